//! The run: epochs of optimizer steps over packed batches.

mod attempt;
mod kept;

use super::observer::{EpochRecord, Observer, StepRecord};
use super::plan::{self, Limits};
use super::state::{self, Clock, Mark, Position, State, epoch_order};
use super::{objective, schedule};
use crate::batch::Sequence;
use crate::batch::{Example, PrefixGroup};
use crate::config::{OnNotFinite, TrainOptions};
use crate::model::Granite;
use crate::ops::adamw::{AdamW, Parameter, Step};
use crate::ops::gpu::{self, products};
use crate::{Error, Result};
use attempt::{Attempt, Prepared};
use candle_core::{DType, Device, Tensor};
pub use kept::Kept;
use kept::LastGood;
use std::time::Instant;

/// What a run tunes with.
pub struct Task<'a> {
    /// The frozen model.
    pub model: &'a Granite,
    /// Examples to learn from.
    pub train: &'a [Example],
    /// Examples whose loss is taken after each epoch; may be empty.
    pub validation: &'a [Example],
    /// Hyperparameters.
    pub options: &'a TrainOptions,
    /// How much goes through the model at a time, at first: less where the device runs out of memory.
    pub limits: Limits,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// All steps are done.
    Completed,
    /// The validation loss did not fall for `train.early_stopping` epochs.
    StoppedEarly,
    /// [`Observer::interrupted`] said so.
    Interrupted,
}

/// The examples of a step, and of the step after it, where that is known; indices of [`Task::train`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Turn<'a> {
    pub(super) chunk: &'a [usize],
    pub(super) next: Option<&'a [usize]>,
}

/// A run under way. After an error it still has the last good prompt.
pub struct Trainer<'a> {
    task: Task<'a>,
    adamw: AdamW,
    parameter: Parameter,
    initial: Tensor,
    best: Option<Tensor>,
    good: LastGood,
    limits: Limits,
    position: Position,
    clock: Clock,
    /// [`state::fingerprint`] of the examples.
    examples: String,
    /// The step after the last, where it was to be expected.
    prepared: Option<Prepared>,
}

impl<'a> Trainer<'a> {
    /// A run from `prompt`, f32 [num_virtual_tokens, C].
    ///
    /// # Errors
    /// No training examples, or examples that with the prompt exceed the model's positions.
    pub fn new(task: Task<'a>, prompt: &Tensor) -> Result<Self> {
        if task.train.is_empty() {
            return Err(Error::Invalid("data.train: expected at least one example, found none".into()));
        }
        let longest = task.train.iter().chain(task.validation).map(|e| e.input.len() + e.target.len()).max();
        let positions = prompt.dims()[0] + longest.unwrap_or(0);
        let limit = task.model.config().max_position_embeddings;
        if positions > limit {
            return Err(Error::Invalid(format!(
                "expected at most {limit} positions, the model's max_position_embeddings, found {positions}: lower \
                 data.max_input_tokens or prompt.num_virtual_tokens"
            )));
        }
        let options = task.options;
        let adamw = AdamW {
            beta1: options.beta1,
            beta2: options.beta2,
            eps: options.eps,
            weight_decay: options.weight_decay,
        };
        products::set_timing(task.model.device(), options.time_products)?;
        let initial = gpu::to_device(&prompt.to_dtype(DType::F32)?, task.model.device())?;
        let parameter = Parameter::new(&initial)?;
        let (limits, position) = (task.limits, Position::default());
        let clock = Clock::new(position.elapsed);
        let examples = state::fingerprint(task.train, task.validation);
        let good = LastGood::default();
        Ok(Self {
            task,
            adamw,
            parameter,
            initial,
            best: None,
            good,
            limits,
            position,
            clock,
            examples,
            prepared: None,
        })
    }

    /// The run that `state` was taken of.
    ///
    /// # Errors
    /// Other examples or a prompt of another width than the run had; those of [`Trainer::new`].
    pub fn resume(task: Task<'a>, state: &State) -> Result<Self> {
        let mut trainer = Self::new(task, &state.initial)?;
        let found = &trainer.examples;
        if *found != state.examples {
            return Err(Error::Invalid(format!(
                "expected the examples that the run began with ({}), found others ({found}): data.train, \
                 data.validation or the tokenizer have changed; start a new run",
                state.examples
            )));
        }
        let (width, expected) = (state.prompt.dims()[1], trainer.task.model.config().hidden_size);
        if width != expected {
            return Err(Error::Invalid(format!(
                "expected a checkpoint of width {expected}, the model's hidden size, found {width}; the run had \
                 another model"
            )));
        }
        let here = |tensor: &Tensor| gpu::to_device(tensor, trainer.task.model.device());
        trainer.parameter = Parameter { value: here(&state.prompt)?, m: here(&state.m)?, v: here(&state.v)? };
        trainer.best = state.best.as_ref().map(here).transpose()?;
        if let Some(choices) = &state.products
            && let Some(warning) = products::import(trainer.task.model.device(), choices)?
        {
            eprintln!("warning: {warning}");
        }
        trainer.limits.max_rows = state.max_rows;
        trainer.position = state.position.clone();
        Ok(trainer)
    }

    /// What it takes to go on from here.
    ///
    /// # Errors
    /// The device's.
    pub fn state(&self) -> Result<State> {
        let Parameter { value, m, v } = self.parameter.clone();
        Ok(State {
            prompt: value,
            m,
            v,
            initial: self.initial.clone(),
            best: self.best.clone(),
            position: Position { elapsed: self.clock.seconds(), ..self.position.clone() },
            max_rows: self.limits.max_rows,
            products: products::export(self.task.model.device())?,
            examples: self.examples.clone(),
        })
    }

    /// Optimizer steps of the whole run.
    pub fn total_steps(&self) -> usize {
        match self.task.options.max_steps {
            0 => self.steps_per_epoch() * self.task.options.num_epochs,
            max_steps => max_steps,
        }
    }

    /// Optimizer steps of an epoch.
    pub fn steps_per_epoch(&self) -> usize {
        self.task.train.len().div_ceil(self.examples_per_step())
    }

    fn examples_per_step(&self) -> usize {
        self.task.options.batch_size * self.task.options.accumulate_steps
    }

    /// Where the run is; its `elapsed` is that of the last checkpoint or epoch.
    pub fn position(&self) -> &Position {
        &self.position
    }

    /// Wall time of the run so far, seconds.
    pub fn elapsed(&self) -> f64 {
        self.clock.seconds()
    }

    /// Steps that were left out because a value was not finite.
    pub fn skipped(&self) -> usize {
        self.position.skipped
    }

    /// The prompt now, f32 [num_virtual_tokens, C] on the model's device.
    pub fn prompt(&self) -> &Tensor {
        &self.parameter.value
    }

    /// The prompt before the first step, f32 [num_virtual_tokens, C] on the CPU.
    ///
    /// # Errors
    /// The device's.
    pub fn initial(&self) -> Result<Tensor> {
        Ok(self.initial.to_device(&Device::Cpu)?)
    }

    /// Runs to the end, or until the observer wants it to end, or until the validation loss has stopped falling.
    ///
    /// # Errors
    /// [`Error::NotFinite`] where a loss or gradient is not finite and the configuration does not say to skip
    /// such steps; the observer's; the device's. [`Trainer::kept`] is good after each of them.
    pub fn run(&mut self, observer: &mut dyn Observer) -> Result<Ended> {
        self.clock = Clock::new(self.position.elapsed);
        let total = self.total_steps();
        while self.position.open || self.position.attempts() < total {
            if !self.position.open && self.is_stale() {
                return Ok(Ended::StoppedEarly);
            }
            self.position.begin_epoch(self.clock.seconds());
            if !self.steps(total, observer)? {
                observer.checkpoint(&self.state()?)?;
                return Ok(Ended::Interrupted);
            }
            let record = self.end_epoch(observer)?;
            observer.epoch(&record)?;
            observer.checkpoint(&self.state()?)?;
        }
        Ok(Ended::Completed)
    }

    /// The epoch's steps from where the run is; whether they were all done.
    fn steps(&mut self, total: usize, observer: &mut dyn Observer) -> Result<bool> {
        let Position { epoch, steps_of_epoch, .. } = self.position;
        let (per_step, options) = (self.examples_per_step(), self.task.options);
        let order_of = |epoch| epoch_order(self.task.train.len(), options, epoch);
        let (order, following) = (order_of(epoch), order_of(epoch + 1));
        let mut chunks = order.chunks(per_step).skip(steps_of_epoch).peekable();
        while let Some(chunk) = chunks.next() {
            let done = self.position.attempts();
            if done == total {
                break;
            }
            let next = chunks.peek().copied().or_else(|| following.chunks(per_step).next());
            let next = next.filter(|_| done + 1 < total);
            if let Some(record) = self.step(epoch, Turn { chunk, next }, total, observer)? {
                self.position.nll += record.loss * record.target_tokens as f64;
                self.position.target_tokens += record.target_tokens;
                self.position.steps_of_epoch += 1;
                observer.step(&record)?;
            } else {
                self.position.steps_of_epoch += 1;
            }
            if observer.interrupted() {
                return Ok(false);
            }
            let every = self.task.options.checkpoint_steps;
            if every > 0 && self.position.attempts().is_multiple_of(every) {
                observer.checkpoint(&self.state()?)?;
            }
        }
        Ok(true)
    }

    /// Whether the validation loss has not fallen for as many epochs as the configuration waits.
    fn is_stale(&self) -> bool {
        let Position { last, best, .. } = &self.position;
        let patience = self.task.options.early_stopping;
        patience > 0 && last.epoch - best.map_or(0, |best| best.epoch) >= patience
    }

    fn step(
        &mut self,
        epoch: usize,
        turn: Turn,
        total: usize,
        observer: &mut dyn Observer,
    ) -> Result<Option<StepRecord>> {
        let options = self.task.options;
        let warmup = schedule::warmup_steps(options.warmup_ratio, total);
        let multiplier = options.schedule.multiplier(self.position.attempts(), warmup, total);
        self.step_at(options.learning_rate * multiplier, epoch, turn, observer)
    }

    /// One optimizer step over the examples of a turn at this learning rate; nothing where it was left out.
    pub(super) fn step_at(
        &mut self,
        learning_rate: f64,
        epoch: usize,
        turn: Turn,
        observer: &mut dyn Observer,
    ) -> Result<Option<StepRecord>> {
        let started = Instant::now();
        let Turn { chunk, next } = turn;
        let (group, max_grad_norm) = (self.group(chunk), self.task.options.max_grad_norm);
        let step = Step { step: self.position.step + 1, learning_rate, max_grad_norm };
        let mut prepared = self.prepared.take().filter(|prepared| prepared.is_of(chunk));
        let (found, limits) = self.within_memory(&group, observer, |limits| {
            let prepared = prepared.take().filter(|prepared| prepared.fits(limits));
            self.attempt(&group, prepared, next, step, limits)
        })?;
        self.limits = limits;
        let Attempt { updated, next, rows, target_tokens, loss, grad_norm, prompt_norm } = found;
        self.prepared = next;
        let values =
            [("the loss", loss), ("the gradient's norm", grad_norm), ("the prompt's norm", prompt_norm)];
        if let Some((what, value)) = values.into_iter().find(|(_, value)| !value.is_finite()) {
            if !loss.is_finite() {
                self.good.found_bad();
            }
            return self.left_out(what, value, observer);
        }
        let before = std::mem::replace(&mut self.parameter, updated.parameter);
        self.good.updated(before.value);
        self.position.step += 1;
        Ok(Some(StepRecord {
            step: self.position.step,
            epoch,
            loss,
            learning_rate,
            grad_norm,
            examples: chunk.len(),
            target_tokens,
            rows,
            seconds: started.elapsed().as_secs_f64(),
            elapsed: self.clock.seconds(),
        }))
    }

    /// Runs `work` over `group`, under less where the device runs out of memory; gives back under which limits.
    fn within_memory<T>(
        &self,
        group: &PrefixGroup,
        observer: &mut dyn Observer,
        work: impl FnMut(Limits) -> Result<T>,
    ) -> Result<(T, Limits)> {
        let rows = group.prefix_rows() + group.sequences.iter().map(Sequence::rows).sum::<usize>();
        let less = |limits: Limits| limits.less(rows, self.task.model.config().num_hidden_layers);
        plan::within_memory(self.task.model.device(), self.limits, less, work, |limits| {
            observer.out_of_memory(limits)
        })
    }

    /// A step whose `what` is not finite: it is skipped, or the error that ends the run.
    fn left_out(
        &mut self,
        what: &'static str,
        value: f64,
        observer: &mut dyn Observer,
    ) -> Result<Option<StepRecord>> {
        let step = self.position.attempts() + 1;
        if self.task.options.on_not_finite == OnNotFinite::Skip {
            self.position.skipped += 1;
            observer.skipped(step, what, value)?;
            return Ok(None);
        }
        // By its loss the prompt itself is bad, not this step's change of it.
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

    fn end_epoch(&mut self, observer: &mut dyn Observer) -> Result<EpochRecord> {
        let Task { model, validation, .. } = self.task;
        let validation_loss = match validation {
            [] => None,
            examples => {
                let group = PrefixGroup::new(0..self.parameter.value.dims()[0] as u32, examples);
                let groups = std::slice::from_ref(&group);
                let prompt = self.parameter.value.to_dtype(model.prompt_dtype())?;
                let loss =
                    |limits: Limits| objective::evaluate(model, &prompt, groups, limits.max_rows)?.loss();
                let (loss, limits) = self.within_memory(&group, observer, loss)?;
                self.limits = limits;
                Some(loss)
            }
        };
        if validation_loss.is_some_and(|loss| !loss.is_finite()) {
            self.good.found_bad();
        }
        let elapsed = self.clock.seconds();
        let Position { epoch, step, nll, target_tokens, epoch_began, .. } = self.position;
        let train_loss = (target_tokens > 0).then(|| nll / target_tokens as f64);
        let mark = Mark { epoch, step, train_loss, validation_loss };
        let best_before = self.position.best.and_then(|b| b.validation_loss);
        let best =
            validation_loss.is_some_and(|loss| loss.is_finite() && best_before.is_none_or(|b| loss < b));
        if best {
            self.position.best = Some(mark);
            self.best = Some(self.parameter.value.clone());
        }
        self.position.end_epoch(mark, elapsed);
        let seconds = elapsed - epoch_began;
        Ok(EpochRecord { epoch, step, train_loss, validation_loss, best, seconds, elapsed })
    }
}

#[cfg(test)]
mod tests;
