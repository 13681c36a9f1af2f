//! A trial: one run of a sweep.

use super::ValidationRows;
use crate::Result;
use crate::config::{Config, TrialConfig};
use crate::files::read_json;
use crate::layout::{CHECKPOINT, SUMMARY, VALIDATION};
use crate::run::{Status, Summary};
use crate::tune::State;
use std::path::PathBuf;
use toml::Value;

/// A run of a sweep.
pub struct Trial {
    /// Its number, from 1 on.
    pub number: usize,
    /// The keys in which it differs from the others, with their values.
    pub values: Vec<(String, Value)>,
    /// Its configuration.
    pub config: Config,
    /// Its summary, if it has begun.
    pub summary: Option<Summary>,
    /// Epochs that it has completed.
    pub(super) epoch: usize,
}

impl Trial {
    pub(super) fn new(number: usize, TrialConfig { values, config }: TrialConfig) -> Self {
        Self { number, values, config, summary: None, epoch: 0 }
    }

    /// Its run folder.
    pub fn folder(&self) -> PathBuf {
        self.config.folder()
    }

    /// Its name: the number with three digits.
    pub fn name(&self) -> &str {
        &self.config.name
    }

    /// Its values as text: `learning_rate 0.01, num_virtual_tokens 25`.
    pub fn settings(&self) -> String {
        let texts = self.values.iter().map(|(key, value)| {
            let name = key.rsplit('.').next().unwrap_or(key);
            format!("{name} {}", value_text(value))
        });
        texts.collect::<Vec<_>>().join(", ")
    }

    /// The state from which it continues; `None` if it has not reached its first checkpoint.
    pub(super) fn state(&self) -> Result<Option<State>> {
        let path = self.folder().join(CHECKPOINT);
        if path.is_file() { State::read(&path).map(Some) } else { Ok(None) }
    }

    /// Reads what the folder says of it.
    pub(super) fn load(&mut self) -> Result<()> {
        self.summary = read_json(&self.folder().join(SUMMARY))?;
        self.epoch = self.state()?.map_or(0, |state| state.position.last.epoch);
        Ok(())
    }

    /// What its kept prompt gives on the rows of the validation file, if that was taken.
    pub(super) fn validation(&self) -> Result<Option<ValidationRows>> {
        let rows: Option<ValidationRows> = read_json(&self.folder().join(VALIDATION))?;
        let step = self.summary.as_ref().map(|summary| summary.kept_step);
        Ok(rows.filter(|rows| Some(rows.step) == step))
    }

    /// Whether it has more epochs to go.
    pub fn is_live(&self) -> bool {
        match self.summary.as_ref().map(|summary| &summary.status) {
            None | Some(Status::Running | Status::Paused | Status::Interrupted) => true,
            Some(Status::Completed | Status::StoppedEarly | Status::Pruned | Status::Failed { .. }) => false,
        }
    }

    /// Whether it takes part in the choice: it has neither failed nor been pruned.
    pub(super) fn is_candidate(&self) -> bool {
        let status = self.summary.as_ref().map(|summary| &summary.status);
        !matches!(status, Some(Status::Pruned | Status::Failed { .. }))
    }
}

/// A value as it stands in a table: a text without quotes.
pub(super) fn value_text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}
