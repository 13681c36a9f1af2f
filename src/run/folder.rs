//! The run folder during a run.

use super::{Summary, read};
use crate::files::{FolderLock, write_atomically, write_json};
use crate::layout::{ADAPTER, CHECKPOINT, CONFIG, EVALUATION, METRICS, PREDICTIONS, SUMMARY, TOKENS};
use crate::prompt::vocabulary::PromptTokens;
use crate::tune::{Position, State};
use crate::{Error, Result};
use serde::Serialize;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

/// A folder `runs/NAME/` that a run writes.
pub struct RunFolder {
    /// The folder.
    pub path: PathBuf,
    /// The folder to which an earlier run of that name was moved.
    pub moved: Option<PathBuf>,
    /// Held as long as the run writes.
    pub lock: FolderLock,
    metrics: File,
}

impl RunFolder {
    /// Creates the folder. An earlier run of that name is kept, as `NAME~1`, `NAME~2` and so on.
    ///
    /// # Errors
    /// Returns [`Error::InUse`] if another program writes the earlier run, [`Error::Io`] if the folder can't be written.
    pub fn create(runs: &Path, name: &str, config_toml: &str) -> Result<Self> {
        let moved = set_run_aside(runs, name)?;
        Ok(Self { moved, ..Self::begin(&runs.join(name), config_toml)? })
    }

    fn begin(path: &Path, config_toml: &str) -> Result<Self> {
        fs::create_dir_all(path).map_err(Error::io(path))?;
        let lock = FolderLock::take(path)?;
        write_atomically(&path.join(CONFIG), |out| out.write_all(config_toml.as_bytes()))?;
        let metrics = path.join(METRICS);
        let metrics = File::create(&metrics).map_err(Error::io(&metrics))?;
        Ok(Self { path: path.to_path_buf(), moved: None, lock, metrics })
    }

    /// Opens the folder of a run that continues from `state`. A run without one begins again: what it has recorded is removed.
    ///
    /// # Errors
    /// As [`RunFolder::create`] and [`RunFolder::reopen`].
    pub fn go_on(path: &Path, state: Option<&State>, config_toml: &str) -> Result<Self> {
        if let Some(state) = state {
            return Self::reopen(path, &state.position, config_toml);
        }
        if path.exists() {
            let _lock = FolderLock::hold(path)?;
            fs::remove_dir_all(path).map_err(Error::io(path))?;
        }
        Self::begin(path, config_toml)
    }

    /// Opens the folder of a run that continues from `position`. Records of later steps are removed, because those
    /// steps run again.
    ///
    /// # Errors
    /// Returns [`Error::InUse`] if another program writes the folder, [`Error::Checkpoint`] if one has continued the run since
    /// `position` was read, [`Error::Io`] if a file can't be read or written, [`Error::Data`] if `metrics.jsonl` is malformed.
    pub fn reopen(path: &Path, position: &Position, config_toml: &str) -> Result<Self> {
        let lock = FolderLock::take(path)?;
        let checkpoint = path.join(CHECKPOINT);
        let found = State::read(&checkpoint)?.position.step;
        if found != position.step {
            let problem = format!(
                "expected the checkpoint of step {}, as read at the start, found that of step {found}: another program has continued \
                 the run meanwhile; hint: resume it again",
                position.step
            );
            return Err(Error::Checkpoint { path: checkpoint, problem });
        }
        let metrics = path.join(METRICS);
        let earlier: String = read::lines(&metrics)?
            .into_iter()
            .filter(|(record, _)| match record {
                read::RunRecord::Step(step) => step.step <= position.step,
                read::RunRecord::Epoch(epoch) => epoch.epoch <= position.last.epoch,
            })
            .map(|(_, line)| line + "\n")
            .collect();
        write_atomically(&metrics, |out| out.write_all(earlier.as_bytes()))?;
        write_atomically(&path.join(CONFIG), |out| out.write_all(config_toml.as_bytes()))?;
        let metrics = File::options().append(true).open(&metrics).map_err(Error::io(&metrics))?;
        Ok(Self { path: path.to_path_buf(), moved: None, lock, metrics })
    }

    /// The folder of the adapter.
    pub fn adapter(&self) -> PathBuf {
        self.path.join(ADAPTER)
    }

    /// Appends a record to `metrics.jsonl` at once, so that the run can be followed.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the file can't be written.
    pub fn record(&mut self, record: &impl Serialize) -> Result<()> {
        let path = || self.path.join(METRICS);
        let mut line = serde_json::to_vec(record)
            .map_err(|e| Error::io(path())(std::io::Error::other(e.to_string())))?;
        line.push(b'\n');
        self.metrics.write_all(&line).map_err(Error::io(path()))
    }

    /// Writes everything that a resumed run needs. The records before it are synced to the disk first.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the file can't be written, or an error if a device operation fails.
    pub fn checkpoint(&self, state: &State) -> Result<()> {
        self.metrics.sync_data().map_err(Error::io(self.path.join(METRICS)))?;
        state.write(&self.path.join(CHECKPOINT))
    }

    /// Writes `summary.json`.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the file can't be written.
    pub fn summary(&self, summary: &Summary) -> Result<()> {
        write_json(&self.path.join(SUMMARY), summary)
    }

    /// Writes `tokens.json`.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the file can't be written.
    pub fn tokens(&self, tokens: &PromptTokens) -> Result<()> {
        write_json(&self.path.join(TOKENS), tokens)
    }

    /// Renames an evaluation to `evaluation~1.json` and so on: it belongs to a prompt that has changed since.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the file can't be renamed.
    pub fn set_evaluation_aside(&self) -> Result<()> {
        for name in [EVALUATION, PREDICTIONS] {
            if self.path.join(name).exists() {
                move_aside(&self.path, name)?;
            }
        }
        Ok(())
    }
}

/// Moves an earlier run or sweep of that name aside, unless another program writes it; where it is then.
pub(crate) fn set_run_aside(runs: &Path, name: &str) -> Result<Option<PathBuf>> {
    let path = runs.join(name);
    if !path.exists() {
        return Ok(None);
    }
    let _lock = FolderLock::hold(&path)?;
    move_aside(runs, name).map(Some)
}

/// Renames a folder or file to `NAME~1`, or `STEM~1.EXTENSION`, with the first free number.
fn move_aside(inside: &Path, name: &str) -> Result<PathBuf> {
    let from = inside.join(name);
    let (stem, extension) = match name.rsplit_once('.') {
        Some((stem, extension)) if from.is_file() => (stem, format!(".{extension}")),
        _ => (name, String::new()),
    };
    let mut n = 1;
    loop {
        let to = inside.join(format!("{stem}~{n}{extension}"));
        if !to.exists() {
            fs::rename(&from, &to).map_err(Error::io(&from))?;
            return Ok(to);
        }
        n += 1;
    }
}
