//! What a run tells while it goes on.

use super::plan::Limits;
use super::state::State;
use crate::Result;
use serde::{Deserialize, Serialize};

/// One optimizer step, a line of `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Counted from 1.
    pub step: usize,
    /// Counted from 1.
    pub epoch: usize,
    /// Mean negative log-likelihood of the step's target tokens or, with `data.teacher_text`, mean KL divergence from the
    /// teacher's distribution; nats.
    #[serde(with = "crate::number")]
    pub loss: f64,
    /// Learning rate of the step.
    #[serde(with = "crate::number")]
    pub learning_rate: f64,
    /// Norm of the prompt's gradient before clipping.
    #[serde(with = "crate::number")]
    pub grad_norm: f64,
    /// Examples of the step.
    pub examples: usize,
    /// Target tokens of the step.
    pub target_tokens: usize,
    /// Packed rows of the step.
    pub rows: usize,
    /// Wall time of the step.
    #[serde(with = "crate::number")]
    pub seconds: f64,
    /// Wall time of the run up to its end, all parts of a resumed run together.
    #[serde(with = "crate::number")]
    pub elapsed: f64,
}

/// The end of an epoch, a line of `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EpochRecord {
    /// Counted from 1.
    pub epoch: usize,
    /// Optimizer steps so far.
    pub step: usize,
    /// Mean training loss of the epoch, weighted by target tokens; `None` if every step was skipped.
    #[serde(default, with = "crate::number::optional")]
    pub train_loss: Option<f64>,
    /// Loss of the validation file; `None` without one.
    #[serde(default, with = "crate::number::optional")]
    pub validation_loss: Option<f64>,
    /// Whether this epoch's prompt is the best so far.
    pub best: bool,
    /// Wall time of the epoch's steps and validation.
    #[serde(with = "crate::number")]
    pub seconds: f64,
    /// Wall time of the run up to its end, all parts of a resumed run together.
    #[serde(with = "crate::number")]
    pub elapsed: f64,
}

/// Is called as each step and epoch ends. An error of a method ends the run.
pub trait Observer {
    /// A step has ended.
    fn step(&mut self, record: &StepRecord) -> Result<()>;
    /// A step was left out because its `what` was `value`.
    fn skipped(&mut self, step: usize, what: &str, value: f64) -> Result<()>;
    /// The device ran out of memory in a step or a validation: it is tried again, and the run goes on, under `limits`.
    fn out_of_memory(&mut self, limits: Limits) -> Result<()>;
    /// An epoch has ended.
    fn epoch(&mut self, _record: &EpochRecord) -> Result<()> {
        Ok(())
    }
    /// The run could go on from here: after an epoch, after every `train.checkpoint_steps`, and when it is
    /// interrupted. Comes after the step or epoch that it includes.
    fn checkpoint(&mut self, _state: &State) -> Result<()> {
        Ok(())
    }
    /// A step has ended, and `state` makes what the run could go on with from there, should the process be killed during the next
    /// step. Comes after the step, and before a checkpoint of it.
    fn latest(&mut self, _state: &dyn Fn() -> Result<State>) -> Result<()> {
        Ok(())
    }
    /// Something looks wrong with the run; `text` says what, and what to try.
    fn warning(&mut self, _text: &str) -> Result<()> {
        Ok(())
    }
    /// Whether the run is to pause after the epoch that has just ended; asked after its checkpoint.
    fn pauses(&self) -> bool {
        false
    }
    /// Whether someone wants the run to end; asked after each step.
    fn interrupted(&self) -> bool {
        false
    }
}
