//! The real model of the tests.

use std::path::{Path, PathBuf};

/// SmolLM2, which `make model` fetches into models/ (or GNEISS_MODELS names its folder).
pub fn path() -> PathBuf {
    let folder = std::env::var_os("GNEISS_MODELS").map(PathBuf::from);
    let folder = folder.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("models"));
    let path = folder.join("SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.is_file(), "{} is not there: `make model` gets it", path.display());
    path
}
