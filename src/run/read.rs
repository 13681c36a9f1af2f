//! Reading a run folder.

use super::Summary;
use crate::config::Config;
use crate::files::read_json;
use crate::layout::{ADAPTER, CONFIG, METRICS, SUMMARY, TOKENS};
use crate::prompt::vocabulary::PromptTokens;
use crate::tune::{EpochRecord, StepRecord};
use crate::{Error, Result};
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// A line of `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum RunRecord {
    /// An optimizer step.
    Step(StepRecord),
    /// The end of an epoch.
    Epoch(EpochRecord),
}

/// A run as read from its folder, running or ended.
#[derive(Debug, Clone)]
pub struct Run {
    /// The folder.
    pub path: PathBuf,
    /// The resolved configuration.
    pub config: Config,
    /// The configuration's text.
    pub config_toml: String,
    /// Optimizer steps in order.
    pub steps: Vec<StepRecord>,
    /// Completed epochs in order.
    pub epochs: Vec<EpochRecord>,
    /// The settings and results of the run.
    pub summary: Summary,
    /// The nearest tokens of the virtual tokens, before and after; `None` while the run goes on.
    pub tokens: Option<PromptTokens>,
}

impl Run {
    /// Reads a run folder.
    ///
    /// # Errors
    /// Returns an error if the folder is no run, or if one of its files is missing or malformed.
    pub fn read(path: &Path) -> Result<Self> {
        if !path.join(CONFIG).is_file() || !path.join(METRICS).is_file() {
            let problem = format!(
                "expected a run folder with {CONFIG} and {METRICS}, as gneiss tune writes, found none"
            );
            return Err(Error::Checkpoint { path: path.to_path_buf(), problem });
        }
        let config_path = path.join(CONFIG);
        let config_toml = std::fs::read_to_string(&config_path).map_err(Error::io(&config_path))?;
        let config = Config::parse(&config_toml, &config_path.display().to_string(), &[])?;
        let (steps, epochs) = steps_and_epochs(&path.join(METRICS))?;
        let summary = read_json(&path.join(SUMMARY))?.ok_or_else(|| Error::Checkpoint {
            path: path.join(SUMMARY),
            problem: "expected the run's summary, found no such file".into(),
        })?;
        Ok(Self {
            path: path.to_path_buf(),
            config,
            config_toml,
            steps,
            epochs,
            summary,
            tokens: read_json(&path.join(TOKENS))?,
        })
    }

    /// Name of the run.
    pub fn name(&self) -> &str {
        &self.config.name
    }

    /// Folder of the tuned prompt, if there is one already.
    pub fn adapter(&self) -> Option<PathBuf> {
        Some(self.path.join(ADAPTER)).filter(|path| path.is_dir())
    }

    /// The epoch with the lowest validation loss.
    pub fn best_epoch(&self) -> Option<&EpochRecord> {
        self.epochs.iter().rfind(|epoch| epoch.best)
    }
}

/// The steps and epochs of `metrics.jsonl`. The last line of a running run may be incomplete, and is left out then.
///
/// # Errors
/// Returns [`Error::Io`] if the file can't be read, [`Error::Data`] with every line that is no record.
pub fn steps_and_epochs(path: &Path) -> Result<(Vec<StepRecord>, Vec<EpochRecord>)> {
    let (mut steps, mut epochs) = (Vec::new(), Vec::new());
    for (record, _) in lines(path)? {
        match record {
            RunRecord::Step(step) => steps.push(step),
            RunRecord::Epoch(epoch) => epochs.push(epoch),
        }
    }
    Ok((steps, epochs))
}

/// As [`records`], each with its line.
pub(super) fn lines(path: &Path) -> Result<Vec<(RunRecord, String)>> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let (mut records, mut problems) = (Vec::new(), Vec::new());
    for (i, line) in text.split_inclusive('\n').enumerate() {
        match serde_json::from_str(line) {
            // A line without its end may be a record whose last number is cut.
            _ if !line.ends_with('\n') => {}
            Ok(record) => records.push((record, line.trim_end().to_owned())),
            Err(error) => problems.push(format!("line {}: expected a step or an epoch: {error}", i + 1)),
        }
    }
    if problems.is_empty() { Ok(records) } else { Err(Error::Data { path: path.into(), problems, more: 0 }) }
}
