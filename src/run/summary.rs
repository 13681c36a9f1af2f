//! What a run came to: `summary.json`.

use crate::config::InitMethod;
use crate::tune::Position;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Where a run stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum Status {
    /// Under way, or ended without a word.
    Running,
    /// All steps are done.
    Completed,
    /// The validation loss did not fall for `train.early_stopping` epochs.
    StoppedEarly,
    /// Someone ended it between two steps; `gneiss tune --resume` goes on.
    Interrupted,
    /// An error ended it.
    Failed {
        /// The error's message.
        error: String,
    },
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Running => f.write_str("running"),
            Self::Completed => f.write_str("completed"),
            Self::StoppedEarly => f.write_str("completed (stopped early)"),
            Self::Interrupted => f.write_str("interrupted"),
            Self::Failed { error } => write!(f, "failed: {error}"),
        }
    }
}

/// The frozen model of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelSummary {
    /// Folder, file or hub id as it was asked for.
    pub id: String,
    /// How the weights are stored, such as `gguf Q4_1`.
    pub format: String,
    /// dtype of the weights on the device, such as `f32`.
    pub dtype: String,
    /// cpu, cuda or metal.
    pub device: String,
    /// Values of all weights.
    pub parameters: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Width C.
    pub hidden_size: usize,
    /// Tokens V.
    pub vocab_size: usize,
}

/// What was tuned on what, and what came of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Where the run stands.
    pub status: Status,
    /// gneiss's version.
    pub version: String,
    /// When the run began, seconds since 1970-01-01 UTC.
    pub started: u64,
    /// The frozen model.
    pub model: ModelSummary,
    /// How the prompt began.
    pub init_method: InitMethod,
    /// Rows of the prompt.
    pub num_virtual_tokens: usize,
    /// Values of the prompt.
    pub trainable_parameters: usize,
    /// Examples of the training file.
    pub train_examples: usize,
    /// Examples of the validation file; 0 without one.
    pub validation_examples: usize,
    /// Optimizer steps done.
    pub steps: usize,
    /// Optimizer steps of the whole run.
    pub total_steps: usize,
    /// Steps left out because a value was not finite.
    pub skipped_steps: usize,
    /// Whole epochs done.
    pub epochs: usize,
    /// Optimizer steps behind the prompt that was kept.
    pub kept_step: usize,
    /// Epochs behind the prompt that was kept.
    pub kept_epoch: usize,
    /// Mean training loss of the kept prompt's last epoch, nats a target token; none in the middle of one.
    #[serde(default, with = "crate::number::optional")]
    pub train_loss: Option<f64>,
    /// The kept prompt's loss on the validation file, nats a target token.
    #[serde(default, with = "crate::number::optional")]
    pub validation_loss: Option<f64>,
    /// Wall time of steps and validation, seconds, over all parts of a resumed run.
    #[serde(with = "crate::number")]
    pub seconds: f64,
    /// Examples of all steps over the steps' wall time.
    #[serde(with = "crate::number")]
    pub examples_per_second: f64,
    /// The most memory that the process held, bytes, where the system tells.
    pub peak_memory_bytes: Option<u64>,
    /// Times that the run was resumed.
    pub resumed: usize,
    /// What looked wrong, and what to try.
    pub warnings: Vec<String>,
}

impl Summary {
    /// The run is at `position`, after `elapsed` seconds.
    pub(super) fn reach(&mut self, position: &Position, elapsed: f64) {
        (self.steps, self.skipped_steps) = (position.step, position.skipped);
        (self.epochs, self.seconds) = (position.last.epoch, elapsed);
    }
}
