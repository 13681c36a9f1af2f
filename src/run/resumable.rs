//! A run that goes on: its state, and the settings that may change meanwhile.

use super::Run;
use crate::config::Config;
use crate::layout::CHECKPOINT;
use crate::tune::State;
use crate::{Error, Result};
use std::path::Path;

/// The state of the run in `folder`, and its configuration overridden by `sets` (`key=value`).
///
/// # Errors
/// Returns an error if the folder is no run, has no checkpoint, or a setting can't be changed in a started run.
pub fn resumable(folder: &Path, sets: &[String]) -> Result<(Config, State)> {
    let origin = folder.join(crate::layout::CONFIG);
    resumable_as(folder, |run| Config::parse(&run.config_toml, &origin.display().to_string(), sets))
}

/// As [`resumable`], with the configuration that `config` makes.
///
/// # Errors
/// As [`resumable`].
pub fn resumable_as(folder: &Path, config: impl FnOnce(&Run) -> Result<Config>) -> Result<(Config, State)> {
    let run = Run::read(folder)?;
    let path = folder.join(CHECKPOINT);
    if !path.is_file() {
        return Err(Error::Checkpoint {
            path: folder.to_path_buf(),
            problem: format!(
                "expected a run with {CHECKPOINT}, found none: it ended before its first checkpoint (one an epoch, and \
                 one every train.checkpoint_steps); start it again with gneiss tune {}",
                folder.join(crate::layout::CONFIG).display()
            ),
        });
    }
    let state = State::read(&path)?;
    let config = config(&run)?;
    // Settings that may differ between the parts of a run, because the checkpoint does not depend on them.
    let before = &run.config.train;
    let mut same = config.clone();
    same.data.test.clone_from(&run.config.data.test);
    same.model.clone_from(&run.config.model);
    same.train.num_epochs = before.num_epochs;
    same.train.max_steps = before.max_steps;
    same.train.early_stopping = before.early_stopping;
    same.train.checkpoint_steps = before.checkpoint_steps;
    same.train.tensorboard = before.tensorboard;
    same.train.learning_rate = before.learning_rate;
    same.train.schedule = before.schedule;
    same.train.keep = before.keep;
    same.train.on_not_finite = before.on_not_finite;
    same.train.memory_budget.clone_from(&before.memory_budget);
    if same != run.config {
        return Err(Error::Invalid(format!(
            "--resume: expected the settings that the run began with, found others ({}); a run under way can change \
             train.num_epochs, max_steps, learning_rate, schedule, keep, early_stopping, checkpoint_steps, tensorboard, \
             on_not_finite and memory_budget, model.*, and data.test; start a new run for other changes",
            run.config.changed_keys(&same)?.join(", ")
        )));
    }
    Ok((config, state))
}
