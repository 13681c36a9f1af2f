//! A JSON object read from a file; typed access whose errors name file, key, expected and found.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::{Error, Result};

/// A JSON object and where it came from. A key whose value is `null` counts as absent.
pub(super) struct JsonObject {
    path: PathBuf,
    prefix: String,
    map: Map<String, Value>,
}

impl JsonObject {
    /// Reads a file that holds one object.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        let problem = match serde_json::from_str(&text) {
            Ok(Value::Object(map)) => {
                return Ok(Self { path: path.to_path_buf(), prefix: String::new(), map });
            }
            Ok(other) => format!("expected a JSON object, found {}", describe(&other)),
            Err(error) => format!("expected JSON: {error}"),
        };
        Err(Error::Checkpoint { path: path.to_path_buf(), problem })
    }

    /// Reads a file that may be absent.
    pub fn read_if_exists(path: &Path) -> Result<Option<Self>> {
        if path.exists() { Self::read(path).map(Some) } else { Ok(None) }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A value of any type.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// Keys with their values.
    pub fn entries(&self) -> impl Iterator<Item = (&String, &Value)> {
        self.map.iter()
    }

    /// A string.
    pub fn string(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", Value::as_str)
    }

    /// A number.
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", Value::as_f64)
    }

    /// A whole number, not negative.
    pub fn count(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a whole number, 0 or more", |value| value.as_u64()?.try_into().ok())
    }

    /// A whole number over zero.
    pub fn size(&self, key: &str) -> Result<Option<usize>> {
        let positive = |value: &Value| value.as_u64()?.try_into().ok().filter(|n| *n > 0);
        self.typed(key, "a whole number over 0", positive)
    }

    /// `true` or `false`.
    pub fn boolean(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    /// A list.
    pub fn list(&self, key: &str) -> Result<Option<&[Value]>> {
        self.typed(key, "a list", |value| value.as_array().map(Vec::as_slice))
    }

    /// An object; its keys are reported as `key.inner`.
    pub fn object(&self, key: &str) -> Result<Option<Self>> {
        let map = self.typed(key, "an object", Value::as_object)?.cloned();
        Ok(map.map(|map| Self { path: self.path.clone(), prefix: format!("{}{key}.", self.prefix), map }))
    }

    /// An error about a key.
    pub fn error(&self, key: &str, expected: &str, found: &str) -> Error {
        let problem = format!("`{}{key}`: expected {expected}, found {found}", self.prefix);
        Error::Checkpoint { path: self.path.clone(), problem }
    }

    /// An error about a key that has to be there.
    pub fn missing(&self, key: &str, expected: &str) -> Error {
        self.error(key, expected, "no such key")
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| self.error(key, expected, &describe(value)))
    }
}

/// A value in an error message: short, and with its type visible.
pub(super) fn describe(value: &Value) -> String {
    match value {
        Value::Array(items) => format!("a list of {}", items.len()),
        Value::Object(_) => "an object".to_string(),
        scalar => scalar.to_string(),
    }
}
