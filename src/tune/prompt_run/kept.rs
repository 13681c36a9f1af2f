//! The prompt that a run keeps.

use super::PromptRun;
use crate::Result;
use crate::config::Keep;
use crate::prompt::Prefix;
use crate::tune::state::{Position, RunMark};
use candle_core::{Device, Tensor};

/// A prompt, and its place in the run.
#[derive(Debug, Clone)]
pub struct Kept {
    /// The prefix that its values make, f32 on the CPU.
    pub prompt: Prefix,
    /// Epochs of training that it has had.
    pub epoch: usize,
    /// Optimizer steps that it has had.
    pub step: usize,
    /// Mean training loss of its last epoch; `None` if that has not ended.
    pub train_loss: Option<f64>,
    /// Its validation loss; `None` if it was not taken.
    pub validation_loss: Option<f64>,
}

/// Trainable values of the last prompt that is known to have a finite loss, for when the one after it turns out to have none: an update by a
/// huge learning rate leaves values that are finite themselves, and only the next pass overflows.
#[derive(Default)]
pub(super) struct LastGood {
    /// The prompt of the last step whose loss was finite, before its update.
    before: Option<Tensor>,
    /// Whether the loss of the prompt after that update is not finite.
    after_is_bad: bool,
}

impl LastGood {
    /// A step began at `value` with a finite loss, and has updated it.
    pub fn updated(&mut self, value: Tensor) {
        *self = Self { before: Some(value), after_is_bad: false };
    }

    /// The loss of the prompt that the last update left is not finite.
    pub fn found_bad(&mut self) {
        self.after_is_bad = self.before.is_some();
    }

    /// The prompt to go back to.
    pub fn instead(&self) -> Option<&Tensor> {
        self.before.as_ref().filter(|_| self.after_is_bad)
    }
}

impl PromptRun<'_> {
    /// The prompt that the configuration asks to keep; before the first epoch's end, the last good one.
    pub fn kept(&self) -> Result<Kept> {
        let Position { step, last, best, .. } = &self.position;
        let (prompt, mark) = match (&self.best, best, self.options.keep) {
            (Some(prompt), Some(mark), Keep::Best) => (prompt, *mark),
            _ => self.last_good(*step, *last),
        };
        let RunMark { epoch, step, train_loss, validation_loss } = mark;
        let prefix = self.prompt.with_values(prompt.clone()).prefix()?;
        let prompt = prefix.with_values(prefix.values().to_device(&Device::Cpu)?);
        Ok(Kept { prompt, epoch, step, train_loss, validation_loss })
    }

    /// The prompt now, unless its loss is not finite and an earlier one's is.
    fn last_good(&self, step: usize, last: RunMark) -> (&Tensor, RunMark) {
        if let Some(before) = self.good.instead() {
            // One step back, which may lie in the epoch before.
            let epoch = if step == last.step { last.epoch.saturating_sub(1) } else { last.epoch };
            return (before, RunMark { epoch, step: step.saturating_sub(1), ..RunMark::default() });
        }
        let value = self.values();
        match step == last.step {
            true => (value, last),
            // In the middle of an epoch: the losses of the last one are those of another prompt.
            false => (value, RunMark { epoch: last.epoch, step, ..RunMark::default() }),
        }
    }
}
