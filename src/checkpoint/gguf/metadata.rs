//! The key-value pairs of a GGUF file, read by [`TypedKeys`].

use std::collections::HashMap;
use std::path::Path;

use candle_core::quantized::gguf_file::Value;

use crate::checkpoint::typed::{TypedKeys, TypedValue};

/// The key-value pairs of a GGUF file.
#[derive(Clone, Copy)]
pub(in crate::checkpoint) struct GgufMetadata<'a> {
    path: &'a Path,
    values: &'a HashMap<String, Value>,
}

impl<'a> GgufMetadata<'a> {
    /// Pairs of a parsed file.
    pub fn new(path: &'a Path, values: &'a HashMap<String, Value>) -> Self {
        Self { path, values }
    }
}

impl<'a> TypedKeys<'a> for GgufMetadata<'a> {
    type Value = Value;

    fn path(self) -> &'a Path {
        self.path
    }

    fn full_name(self, key: &str) -> String {
        key.to_string()
    }

    fn get(self, key: &str) -> Option<&'a Value> {
        self.values.get(key)
    }
}

impl TypedValue for Value {
    fn as_text(&self) -> Option<&str> {
        self.to_string().ok().map(String::as_str)
    }

    fn as_number(&self) -> Option<f64> {
        match self {
            // The shortest decimal of the f32 is the number in config.json: 0.22, not 0.2199999988079071.
            Value::F32(x) => x.to_string().parse().ok(),
            Value::F64(x) => Some(*x),
            integer => integer.as_count().map(|n| n as f64),
        }
    }

    fn as_count(&self) -> Option<usize> {
        match self {
            Value::Bool(_) => None,
            Value::I8(n) => usize::try_from(*n).ok(),
            Value::I16(n) => usize::try_from(*n).ok(),
            Value::I32(n) => usize::try_from(*n).ok(),
            Value::I64(n) => usize::try_from(*n).ok(),
            unsigned => unsigned.to_u64().ok()?.try_into().ok(),
        }
    }

    fn as_boolean(&self) -> Option<bool> {
        self.to_bool().ok()
    }

    fn as_list(&self) -> Option<&[Self]> {
        self.to_vec().ok().map(Vec::as_slice)
    }

    fn describe(&self) -> String {
        match self {
            Value::Array(items) => format!("a list of {}", items.len()),
            scalar => format!("{scalar:?}"),
        }
    }
}
