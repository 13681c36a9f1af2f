//! Typed access to GGUF metadata, with errors that name file, key, expected and found.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::Value;

use crate::{Error, Result};

/// The key-value pairs of a GGUF file.
#[derive(Clone, Copy)]
pub(in crate::checkpoint) struct Metadata<'a> {
    path: &'a Path,
    values: &'a HashMap<String, Value>,
}

impl<'a> Metadata<'a> {
    /// Pairs of a parsed file.
    pub fn new(path: &'a Path, values: &'a HashMap<String, Value>) -> Self {
        Self { path, values }
    }

    /// The file.
    pub fn path(&self) -> &'a Path {
        self.path
    }

    /// A value of any type.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.values.get(key)
    }

    /// A string.
    pub fn string(&self, key: &str) -> Result<Option<&'a str>> {
        self.typed(key, "a string", |value| value.to_string().ok().map(String::as_str))
    }

    /// A whole number of any width, not negative.
    pub fn count(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a whole number, 0 or more", as_count)
    }

    /// A whole number over 0 that has to be there.
    pub fn size(&self, key: &str) -> Result<usize> {
        match self.count(key)? {
            Some(0) => Err(self.error(key, "a whole number over 0", "0")),
            Some(size) => Ok(size),
            None => Err(self.missing(key, "a whole number over 0")),
        }
    }

    /// A number.
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", as_number)
    }

    /// `true` or `false`.
    pub fn boolean(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", |value| value.to_bool().ok())
    }

    /// A list of strings.
    pub fn strings(&self, key: &str) -> Result<Option<Vec<&'a str>>> {
        self.typed(key, "a list of strings", |value| {
            let items = value.to_vec().ok()?;
            items.iter().map(|item| item.to_string().ok().map(String::as_str)).collect()
        })
    }

    /// A list of whole numbers, not negative.
    pub fn counts(&self, key: &str) -> Result<Option<Vec<usize>>> {
        self.typed(key, "a list of whole numbers, 0 or more", |value| {
            value.to_vec().ok()?.iter().map(as_count).collect()
        })
    }

    /// A list of numbers.
    pub fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>> {
        self.typed(key, "a list of numbers", |value| value.to_vec().ok()?.iter().map(as_number).collect())
    }

    /// An error about a key.
    pub fn error(&self, key: &str, expected: &str, found: &str) -> Error {
        let problem = format!("`{key}`: expected {expected}, found {found}");
        Error::Checkpoint { path: PathBuf::from(self.path), problem }
    }

    /// An error about a key that has to be there.
    pub fn missing(&self, key: &str, expected: &str) -> Error {
        self.error(key, expected, "no such key")
    }

    fn typed<T>(
        &self,
        key: &str,
        expected: &str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| self.error(key, expected, &describe(value)))
    }
}

fn as_count(value: &Value) -> Option<usize> {
    match value {
        Value::Bool(_) => None,
        Value::I8(n) => usize::try_from(*n).ok(),
        Value::I16(n) => usize::try_from(*n).ok(),
        Value::I32(n) => usize::try_from(*n).ok(),
        Value::I64(n) => usize::try_from(*n).ok(),
        unsigned => unsigned.to_u64().ok()?.try_into().ok(),
    }
}

fn as_number(value: &Value) -> Option<f64> {
    match value {
        // The shortest decimal of the f32 is what config.json had: 0.22, not 0.2199999988079071.
        Value::F32(x) => x.to_string().parse().ok(),
        Value::F64(x) => Some(*x),
        whole => as_count(whole).map(|n| n as f64),
    }
}

fn describe(value: &Value) -> String {
    match value {
        Value::Array(items) => format!("a list of {}", items.len()),
        scalar => format!("{scalar:?}"),
    }
}
