//! Typed access to the keys of a checkpoint's files, JSON or GGUF metadata. An error names the file, the key, the
//! expected type and the value that was found.

use std::path::Path;

use crate::{Error, Result};

/// A value of a format that has types.
pub(super) trait TypedValue: Sized {
    /// The string.
    fn as_text(&self) -> Option<&str>;
    /// The number.
    fn as_number(&self) -> Option<f64>;
    /// The whole number, if it is not negative.
    fn as_count(&self) -> Option<usize>;
    /// `true` or `false`.
    fn as_boolean(&self) -> Option<bool>;
    /// The values of a list.
    fn as_list(&self) -> Option<&[Self]>;
    /// The value in an error message: short, and with its type visible.
    fn describe(&self) -> String;
}

const SIZE: &str = "a whole number over 0";

/// The keys of a file or of an object inside it, and their values.
///
/// # Errors
/// All readers return [`Error::Checkpoint`] if the key is there and its value has another type.
pub(super) trait TypedKeys<'a>: Copy {
    type Value: TypedValue + 'a;

    /// The file.
    fn path(self) -> &'a Path;

    /// The key as messages name it.
    fn full_name(self, key: &str) -> String;

    /// A value of any type.
    fn get(self, key: &str) -> Option<&'a Self::Value>;

    /// A string.
    fn string(self, key: &str) -> Result<Option<&'a str>> {
        self.typed(key, "a string", TypedValue::as_text)
    }

    /// A number.
    fn number(self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", TypedValue::as_number)
    }

    /// A whole number, not negative.
    fn count(self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a whole number, 0 or more", TypedValue::as_count)
    }

    /// A whole number over 0.
    fn size(self, key: &str) -> Result<Option<usize>> {
        match self.get(key).and_then(TypedValue::as_count) {
            Some(0) => Err(self.error(key, SIZE, "0")),
            _ => self.typed(key, SIZE, TypedValue::as_count),
        }
    }

    /// A whole number over 0 at a key that must be there.
    fn required_size(self, key: &str) -> Result<usize> {
        self.size(key)?.ok_or_else(|| self.missing(key, SIZE))
    }

    /// `true` or `false`.
    fn boolean(self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", TypedValue::as_boolean)
    }

    /// A list of values of any type.
    fn list(self, key: &str) -> Result<Option<&'a [Self::Value]>> {
        self.typed(key, "a list", TypedValue::as_list)
    }

    /// A list of strings.
    fn strings(self, key: &str) -> Result<Option<Vec<&'a str>>> {
        self.typed(key, "a list of strings", |value| {
            value.as_list()?.iter().map(TypedValue::as_text).collect()
        })
    }

    /// A list of whole numbers, not negative.
    fn counts(self, key: &str) -> Result<Option<Vec<usize>>> {
        self.typed(key, "a list of whole numbers, 0 or more", |value| {
            value.as_list()?.iter().map(TypedValue::as_count).collect()
        })
    }

    /// A list of numbers.
    fn numbers(self, key: &str) -> Result<Option<Vec<f64>>> {
        self.typed(key, "a list of numbers", |value| {
            value.as_list()?.iter().map(TypedValue::as_number).collect()
        })
    }

    /// A value of any type, converted; `expected` names the type in the error.
    fn typed<T>(
        self,
        key: &str,
        expected: &str,
        convert: impl Fn(&'a Self::Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| self.error(key, expected, &value.describe()))
    }

    /// An error about a key.
    fn error(self, key: &str, expected: &str, found: &str) -> Error {
        let problem = format!("`{}`: expected {expected}, found {found}", self.full_name(key));
        Error::Checkpoint { path: self.path().to_path_buf(), problem }
    }

    /// An error about a key that must be there.
    fn missing(self, key: &str, expected: &str) -> Error {
        self.error(key, expected, "no such key")
    }
}
