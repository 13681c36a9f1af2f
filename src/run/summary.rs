//! The result of a run: `summary.json`.

use crate::Result;
use crate::config::{Config, InitMethod};
use crate::prompt::PromptLayout;
use crate::tune::{Ended, Position};
use serde::{Deserialize, Serialize};
use std::fmt;

/// The state of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum Status {
    /// Running, or killed before the status could be written.
    Running,
    /// All steps are done.
    Completed,
    /// The validation loss did not fall for `train.early_stopping` epochs.
    StoppedEarly,
    /// It was interrupted between two steps; `gneiss tune --resume` continues it.
    Interrupted,
    /// It waits for its next epoch, as a trial of a sweep.
    Paused,
    /// A sweep gave it up, as others were better.
    Pruned,
    /// An error ended it.
    Failed {
        /// The error's message.
        error: String,
    },
}

impl Status {
    /// Of a run that ended in this way.
    pub fn new(outcome: &Result<Ended>) -> Self {
        match outcome {
            Ok(Ended::Completed) => Self::Completed,
            Ok(Ended::StoppedEarly) => Self::StoppedEarly,
            Ok(Ended::Interrupted) => Self::Interrupted,
            Ok(Ended::Paused) => Self::Paused,
            Err(error) => Self::Failed { error: error.to_string() },
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Running => f.write_str("running"),
            Self::Completed => f.write_str("completed"),
            Self::StoppedEarly => f.write_str("completed (stopped early)"),
            Self::Interrupted => f.write_str("interrupted"),
            Self::Paused => f.write_str("paused"),
            Self::Pruned => f.write_str("pruned"),
            Self::Failed { error } => write!(f, "failed: {error}"),
        }
    }
}

/// What a run's losses are; all in nats, as means over target tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossKind {
    /// Cross-entropy: the negative log-likelihood of the target tokens.
    #[default]
    CrossEntropy,
    /// With `data.teacher_text`, the KL divergence of the model's distribution from the teacher's.
    KlDivergence,
}

impl LossKind {
    /// The kind of a run's losses.
    pub fn new(config: &Config) -> Self {
        if config.distils() { Self::KlDivergence } else { Self::CrossEntropy }
    }

    /// The unit of its values, for axes and tables.
    pub fn unit(self) -> &'static str {
        match self {
            Self::CrossEntropy => "nats per target token",
            Self::KlDivergence => "KL divergence from the teacher, nats per target token",
        }
    }
}

/// The frozen model of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelSummary {
    /// Folder, file or hub id as given by the user.
    pub id: String,
    /// How the weights are stored, such as `gguf Q4_1`.
    pub format: String,
    /// dtype of the weights on the device, such as `f32`.
    pub dtype: String,
    /// cpu, cuda or metal.
    pub device: String,
    /// Number of values of all weights.
    pub parameters: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Hidden size C.
    pub hidden_size: usize,
    /// Vocabulary size V.
    pub vocab_size: usize,
}

/// The settings and results of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// The state of the run.
    pub status: Status,
    /// gneiss's version.
    pub version: String,
    /// Start of the run, seconds since 1970-01-01 UTC.
    pub started: u64,
    /// The frozen model.
    pub model: ModelSummary,
    /// How the first rows of the prompt were made.
    pub init_method: InitMethod,
    /// Rows of the prompt.
    pub num_virtual_tokens: usize,
    /// Number of trainable values of the prompt.
    pub trainable_parameters: usize,
    /// What the trainable values are; `None` if they are the rows of a prompt of embeddings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layout: Option<PromptLayout>,
    /// Examples of the training file.
    pub train_examples: usize,
    /// Examples of the validation file; 0 without one.
    pub validation_examples: usize,
    /// Optimizer steps done.
    pub steps: usize,
    /// Optimizer steps of the whole run.
    pub total_steps: usize,
    /// Steps that were skipped because a value was not finite.
    pub skipped_steps: usize,
    /// Completed epochs.
    pub epochs: usize,
    /// Optimizer steps after which the kept prompt was saved.
    pub kept_step: usize,
    /// Epochs after which the kept prompt was saved.
    pub kept_epoch: usize,
    /// What the losses are. Files of earlier versions do not have it: they are cross-entropies.
    #[serde(default)]
    pub loss: LossKind,
    /// Mean training loss of the kept prompt's last epoch, nats per target token; `None` in the middle of an epoch.
    #[serde(default, with = "crate::number::optional")]
    pub train_loss: Option<f64>,
    /// The kept prompt's loss on the validation file, nats per target token.
    #[serde(default, with = "crate::number::optional")]
    pub validation_loss: Option<f64>,
    /// Wall time of steps and validation, seconds, over all parts of a resumed run.
    #[serde(with = "crate::number")]
    pub seconds: f64,
    /// Examples of all steps divided by the steps' wall time.
    #[serde(with = "crate::number")]
    pub examples_per_second: f64,
    /// The most memory that the process used, bytes; `None` if the system does not report it.
    pub peak_memory_bytes: Option<u64>,
    /// Number of times that the run was resumed.
    pub resumed: usize,
    /// Warnings with hints.
    pub warnings: Vec<String>,
}

impl Summary {
    /// The prompt's settings that are not the defaults, each after a comma.
    pub fn prompt_settings(&self) -> String {
        self.layout.map_or(String::new(), |layout| layout.to_string())
    }

    /// Sets the numbers for `position`, after `elapsed` seconds.
    pub(super) fn reach(&mut self, position: &Position, elapsed: f64) {
        (self.steps, self.skipped_steps) = (position.step, position.skipped);
        (self.epochs, self.seconds) = (position.last.epoch, elapsed);
    }
}
