//! What a step or the end of an epoch changes in a run.

use super::{PromptRun, StepPart};
use crate::config::OnNotFinite;
use crate::ops::adamw::Parameter;
use crate::tune::observer::{EpochRecord, Observer, StepRecord};
use crate::tune::state::{Position, RunMark};
use crate::{Error, Result};

/// What one step computed for a run.
pub(in crate::tune) struct RunStep {
    /// The trainable values after the step, with their moments.
    pub(in crate::tune) parameter: Parameter,
    /// Mean over the step's target tokens, nats.
    pub(in crate::tune) loss: f64,
    pub(in crate::tune) grad_norm: f64,
    pub(in crate::tune) prompt_norm: f64,
    pub(in crate::tune) target_tokens: usize,
}

impl PromptRun<'_> {
    /// Takes over a step's result and returns its record; `None` if the step is left out since a value is not finite. `rows`
    /// are the packed rows of the step, with several runs those of all; it took `seconds`.
    ///
    /// # Errors
    /// Returns [`Error::NotFinite`] if a value is not finite and such steps are not skipped; the observer's errors.
    pub(in crate::tune) fn take_step(
        &mut self,
        part: &StepPart,
        result: RunStep,
        (rows, seconds): (usize, f64),
        observer: &mut dyn Observer,
    ) -> Result<Option<StepRecord>> {
        let RunStep { parameter, loss, grad_norm, prompt_norm, target_tokens } = result;
        let values =
            [("the loss", loss), ("the gradient's norm", grad_norm), ("the prompt's norm", prompt_norm)];
        if let Some((what, value)) = values.into_iter().find(|(_, value)| !value.is_finite()) {
            if !loss.is_finite() {
                self.good.found_bad();
            }
            return self.left_out(what, value, observer);
        }
        self.good.updated(self.values().clone());
        self.set_parameter(parameter);
        self.position.step += 1;
        Ok(Some(StepRecord {
            step: self.position.step,
            epoch: self.position.epoch,
            loss,
            learning_rate: part.learning_rate,
            grad_norm,
            examples: part.examples.now.len(),
            target_tokens,
            rows,
            seconds,
            elapsed: self.clock.seconds(),
        }))
    }

    /// Counts a step of the epoch, taken or left out.
    pub(in crate::tune) fn count_step(&mut self, record: Option<&StepRecord>) {
        if let Some(record) = record {
            self.position.nll += record.loss * record.target_tokens as f64;
            self.position.target_tokens += record.target_tokens;
        }
        self.position.steps_of_epoch += 1;
    }

    /// Whether a checkpoint is due after this step.
    pub(in crate::tune) fn checkpoint_is_due(&self) -> bool {
        let every = self.options.checkpoint_steps;
        every > 0 && self.position.attempts().is_multiple_of(every)
    }

    /// A step whose `what` is not finite: it is skipped, or the error that ends the run.
    fn left_out(
        &mut self,
        what: &'static str,
        value: f64,
        observer: &mut dyn Observer,
    ) -> Result<Option<StepRecord>> {
        let step = self.position.attempts() + 1;
        if self.options.on_not_finite == OnNotFinite::Skip {
            self.position.skipped += 1;
            observer.skipped(step, what, value)?;
            return Ok(None);
        }
        // If the loss is not finite, the prompt itself is bad, not this step's change of it.
        let kept = if self.good.instead().is_some() {
            "the last prompt whose loss was finite"
        } else {
            "the prompt before this step"
        };
        let hint = format!(
            "{kept} is kept; a lower train.learning_rate may help, or train.on_not_finite = \"skip\""
        );
        Err(Error::NotFinite { step, what, value, hint })
    }

    /// Ends the epoch with its validation loss, if it was taken.
    pub(in crate::tune) fn end_epoch(&mut self, validation_loss: Option<f64>) -> EpochRecord {
        if validation_loss.is_some_and(|loss| !loss.is_finite()) {
            self.good.found_bad();
        }
        let elapsed = self.clock.seconds();
        let Position { epoch, step, nll, target_tokens, epoch_began, .. } = self.position;
        let train_loss = (target_tokens > 0).then(|| nll / target_tokens as f64);
        let mark = RunMark { epoch, step, train_loss, validation_loss };
        let best_before = self.position.best.and_then(|b| b.validation_loss);
        let best =
            validation_loss.is_some_and(|loss| loss.is_finite() && best_before.is_none_or(|b| loss < b));
        if best {
            self.position.best = Some(mark);
            self.best = Some(self.values().clone());
        }
        self.position.end_epoch(mark, elapsed);
        let seconds = elapsed - epoch_began;
        EpochRecord { epoch, step, train_loss, validation_loss, best, seconds, elapsed }
    }
}
