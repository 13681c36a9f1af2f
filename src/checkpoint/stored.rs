//! A tensor as it is stored in its file.

use crate::{Error, Result};
use candle_core::quantized::GgmlDType;
use safetensors::Dtype;
use std::path::Path;

/// A tensor as it is stored in its file.
#[derive(Debug)]
pub struct StoredTensor<'a> {
    /// Its shape.
    pub shape: Vec<usize>,
    /// Type of its values on disk.
    pub dtype: StoredDtype,
    /// Its values; safetensors have Hugging Face's order of rows, GGUF has llama.cpp's.
    pub bytes: &'a [u8],
}

/// Type of a tensor's values on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredDtype {
    /// Type in a safetensors file.
    Safetensors(Dtype),
    /// Type in a GGUF file.
    Gguf(GgmlDType),
}

/// Returns an error if a tensor does not have the shape that the configuration implies.
pub(super) fn check_shape(path: &Path, name: &str, expected: &[usize], found: &[usize]) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    let problem = format!("tensor `{name}`: expected shape {expected:?}, found {found:?}");
    Err(Error::Checkpoint { path: path.to_path_buf(), problem })
}
