//! The run folder: the resolved configuration, `metrics.jsonl`, `adapter/`.

use crate::files::write_atomically;
use crate::{Error, Result};
use serde::Serialize;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

/// A folder `runs/NAME/` being written.
pub struct RunFolder {
    /// The folder.
    pub path: PathBuf,
    /// Where an earlier run of that name was moved to.
    pub moved: Option<PathBuf>,
    metrics: File,
}

impl RunFolder {
    /// Makes the folder. An earlier run of that name is kept, under `NAME~1`, `NAME~2` and so on.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(runs: &Path, name: &str, config_toml: &str) -> Result<Self> {
        let path = runs.join(name);
        let moved = if path.exists() { Some(move_aside(runs, name)?) } else { None };
        fs::create_dir_all(&path).map_err(Error::io(&path))?;
        write_atomically(&path.join("config.toml"), |out| out.write_all(config_toml.as_bytes()))?;
        let metrics = path.join("metrics.jsonl");
        let metrics = File::create(&metrics).map_err(Error::io(&metrics))?;
        Ok(Self { path, moved, metrics })
    }

    /// The folder of the adapter.
    pub fn adapter(&self) -> PathBuf {
        self.path.join("adapter")
    }

    /// Appends a record to `metrics.jsonl`, at once, so that the run can be followed.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn record(&mut self, record: &impl Serialize) -> Result<()> {
        let path = || self.path.join("metrics.jsonl");
        let mut line = serde_json::to_vec(record)
            .map_err(|e| Error::io(path())(std::io::Error::other(e.to_string())))?;
        line.push(b'\n');
        self.metrics.write_all(&line).map_err(Error::io(path()))
    }
}

fn move_aside(runs: &Path, name: &str) -> Result<PathBuf> {
    let from = runs.join(name);
    let mut n = 1;
    loop {
        let to = runs.join(format!("{name}~{n}"));
        if !to.exists() {
            fs::rename(&from, &to).map_err(Error::io(&from))?;
            return Ok(to);
        }
        n += 1;
    }
}
