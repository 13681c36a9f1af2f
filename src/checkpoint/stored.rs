//! A tensor as its file holds it.

use crate::{Error, Result};
use candle_core::quantized::GgmlDType;
use safetensors::Dtype;
use std::path::Path;

/// A tensor as its file holds it.
#[derive(Debug)]
pub struct Stored<'a> {
    /// Its shape.
    pub shape: Vec<usize>,
    /// Type of its values on disk.
    pub dtype: StoredDtype,
    /// Its values: those of safetensors in Hugging Face's order of rows, those of GGUF in llama.cpp's.
    pub bytes: &'a [u8],
}

/// Type of a tensor's values on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredDtype {
    /// Of a safetensors file.
    Safetensors(Dtype),
    /// Of a GGUF file.
    Gguf(GgmlDType),
}

/// An error where a tensor has not the shape that the configuration implies.
pub(super) fn check_shape(path: &Path, name: &str, expected: &[usize], found: &[usize]) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    let problem = format!("tensor `{name}`: expected shape {expected:?}, found {found:?}");
    Err(Error::Checkpoint { path: path.to_path_buf(), problem })
}
