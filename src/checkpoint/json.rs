//! A JSON object read from a file, with typed access by [`TypedKeys`].
//!
//! Python writes numbers that JSON does not have: `{"time_step_limit": [0.0, Infinity]}`. Here they are strings that
//! begin with a NUL, so that they survive reading and writing. transformers 5 writes `{"__float__": "Infinity"}`.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::content;
use super::typed::{TypedKeys, TypedValue};
use crate::{Error, Result};

/// A JSON object and its file. A key whose value is `null` counts as absent.
pub(super) struct JsonObject {
    path: PathBuf,
    prefix: String,
    map: Map<String, Value>,
}

impl JsonObject {
    /// Reads a file that holds one object.
    pub fn read(path: &Path) -> Result<Self> {
        let map = read_map(path)?;
        Ok(Self { path: path.to_path_buf(), prefix: String::new(), map })
    }

    /// Reads a file that may be absent.
    pub fn read_if_exists(path: &Path) -> Result<Option<Self>> {
        if path.exists() { Self::read(path).map(Some) } else { Ok(None) }
    }

    /// Keys with their values.
    pub fn entries(&self) -> impl Iterator<Item = (&String, &Value)> {
        self.map.iter()
    }

    /// An object; its keys are reported as `key.inner`.
    pub fn object(&self, key: &str) -> Result<Option<Self>> {
        let map = self.typed(key, "an object", Value::as_object)?.cloned();
        Ok(map.map(|map| Self { path: self.path.clone(), prefix: format!("{}{key}.", self.prefix), map }))
    }
}

impl<'a> TypedKeys<'a> for &'a JsonObject {
    type Value = Value;

    fn path(self) -> &'a Path {
        &self.path
    }

    fn full_name(self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    fn get(self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }
}

impl TypedValue for Value {
    fn as_text(&self) -> Option<&str> {
        self.as_str()
    }

    /// Includes the numbers that only Python writes.
    fn as_number(&self) -> Option<f64> {
        let named = match self {
            Value::String(text) => text.strip_prefix('\0')?,
            Value::Object(map) => map.get("__float__").filter(|_| map.len() == 1)?.as_str()?,
            number => return number.as_f64(),
        };
        match named {
            "Infinity" => Some(f64::INFINITY),
            "-Infinity" => Some(f64::NEG_INFINITY),
            "NaN" => Some(f64::NAN),
            _ => None,
        }
    }

    fn as_count(&self) -> Option<usize> {
        self.as_u64()?.try_into().ok()
    }

    fn as_boolean(&self) -> Option<bool> {
        self.as_bool()
    }

    fn as_list(&self) -> Option<&[Self]> {
        self.as_array().map(Vec::as_slice)
    }

    fn describe(&self) -> String {
        describe(self)
    }
}

/// The numbers of Python that JSON does not have.
const BARE: [&str; 3] = ["-Infinity", "Infinity", "NaN"];

/// Reads a file that holds one object, as Python's `json` does.
///
/// # Errors
/// Returns an error if the file can't be read or does not contain an object.
pub(crate) fn read_map(path: &Path) -> Result<Map<String, Value>> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    content::expect(path, &bytes, "JSON", b"")?;
    let error = |problem| Error::Checkpoint { path: path.to_path_buf(), problem };
    let text = match std::str::from_utf8(&bytes) {
        Ok(text) => text.trim_start_matches('\u{feff}'),
        Err(problem) => return Err(error(format!("expected JSON in UTF-8: {problem}"))),
    };
    match parse(text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(other) => Err(error(format!("expected a JSON object, found {}", describe(&other)))),
        Err(problem) => Err(error(format!("expected JSON: {problem}"))),
    }
}

/// Parses JSON in which Python may have written non-finite numbers; these become strings that begin with a NUL.
/// [`bare_again`] reverses this.
///
/// # Errors
/// Returns an error if the text is not JSON for Python either.
pub(crate) fn parse(text: &str) -> serde_json::Result<Value> {
    serde_json::from_str(text).or_else(|problem| {
        // The error is reported for the original text.
        quote_bare(text).and_then(|quoted| serde_json::from_str(&quoted).ok()).ok_or(problem)
    })
}

/// The text with Python's non-finite numbers as strings; `None` if it has none.
fn quote_bare(text: &str) -> Option<String> {
    let mut quoted = String::with_capacity(text.len());
    let (mut rest, mut any) = (text, false);
    while let Some(first) = rest.chars().next() {
        let taken = if first == '"' {
            string_length(rest)
        } else if let Some(bare) = BARE.iter().find(|bare| rest.starts_with(**bare)) {
            any = true;
            quoted.push_str(&format!("\"\\u0000{bare}\""));
            rest = &rest[bare.len()..];
            continue;
        } else {
            first.len_utf8()
        };
        quoted.push_str(&rest[..taken]);
        rest = &rest[taken..];
    }
    any.then_some(quoted)
}

/// Length in bytes of the string at the beginning of `text`, quotes included; the whole length if the string has no
/// end.
fn string_length(text: &str) -> usize {
    let mut escaped = false;
    for (at, byte) in text.bytes().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// JSON text with Python's non-finite numbers as they were read.
pub(crate) fn bare_again(mut json: String) -> String {
    for bare in BARE {
        json = json.replace(&format!("\"\\u0000{bare}\""), bare);
    }
    json
}

/// A value in an error message: short, and with its type visible.
pub(super) fn describe(value: &Value) -> String {
    match value {
        Value::String(text) if text.starts_with('\0') => text[1..].to_string(),
        Value::Array(items) => format!("a list of {}", items.len()),
        Value::Object(_) => "an object".to_string(),
        scalar => scalar.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_python_are_read_and_written_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        let text =
            r#"{"a":[0.0,Infinity],"b":-Infinity,"c":"NaN, \" Infinity","d":NaN,"e":{"__float__":"NaN"}}"#;
        std::fs::write(&path, text).unwrap();
        let json = JsonObject::read(&path).unwrap();
        assert_eq!(json.number("b").unwrap(), Some(f64::NEG_INFINITY));
        assert!(json.number("d").unwrap().unwrap().is_nan());
        assert!(json.number("e").unwrap().unwrap().is_nan());
        assert_eq!(json.string("c").unwrap(), Some("NaN, \" Infinity"));
        assert!(json.number("c").is_err());
        assert_eq!(json.size("b").unwrap_err().to_string().split("found ").last(), Some("-Infinity"));
        assert_eq!(bare_again(Value::Object(read_map(&path).unwrap()).to_string()), text);
    }

    #[test]
    fn what_is_no_json_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        for (bytes, says) in [
            (&b"{\"a\": Infinit}"[..], "expected JSON"),
            (b"{\"a\": NaN", "line 1"),
            (b"\xff\xfe{", "UTF-8"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "Git LFS pointer"),
            (b"<!DOCTYPE html>", "web page"),
            (b"", "empty file"),
        ] {
            std::fs::write(&path, bytes).unwrap();
            let message = read_map(&path).unwrap_err().to_string();
            assert!(message.contains(says) && message.contains("config.json"), "{message}");
        }
        std::fs::write(&path, b"\xef\xbb\xbf{}").unwrap();
        assert!(read_map(&path).unwrap().is_empty());
    }
}
