//! One prompt that is being tuned: all that belongs to it and to no other.

mod kept;
mod progress;

use super::schedule;
use super::state::{self, Clock, Position, State, epoch_order};
use super::teacher::{Teacher, TeacherExamples};
use crate::batch::{Example, PrefixGroup};
use crate::config::{PromptKind, TrainOptions};
use crate::model::{Decoder, keys_values_width};
use crate::ops::adamw::{AdamW, AdamWStep, Parameter, Updated};
use crate::ops::gpu;
use crate::ops::gpu::products::ProductChoices;
use crate::prompt::{Prefix, Prompt};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
pub use kept::Kept;
use kept::LastGood;
pub(super) use progress::RunStep;
use std::ops::Range;

/// The examples of a run.
#[derive(Debug, Clone, Copy)]
pub struct RunExamples<'a> {
    /// Examples to learn from.
    pub train: &'a [Example],
    /// Examples whose loss is taken after each epoch; may be empty.
    pub validation: &'a [Example],
    /// The same as a teacher reads them, if the run distils one.
    pub teacher: Option<TeacherExamples<'a>>,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// All steps are done.
    Completed,
    /// The validation loss did not fall for `train.early_stopping` epochs.
    StoppedEarly,
    /// [`super::Observer::interrupted`] said so.
    Interrupted,
    /// It has more epochs to go, and [`super::Observer::pauses`] said so.
    Paused,
}

/// The examples of a step and, if it is known, of the step after it; indices of [`RunExamples::train`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct StepExamples {
    pub(super) now: Vec<usize>,
    pub(super) next: Option<Vec<usize>>,
}

/// A run's part in a step of the trainer.
pub(super) struct StepPart {
    /// Index of the run.
    pub(super) run: usize,
    pub(super) examples: StepExamples,
    pub(super) learning_rate: f64,
}

/// What a run has to do next.
pub(super) enum NextAction {
    /// A step over these examples.
    Step(StepExamples),
    /// The end of the epoch.
    EndOfEpoch,
    /// Nothing.
    Ended(Ended),
}

/// A prompt that is being tuned: its trainable values, optimizer, schedule, order of examples, position and best values. After an
/// error it still has the last good prompt.
pub struct PromptRun<'a> {
    examples: RunExamples<'a>,
    /// Hyperparameters.
    options: &'a TrainOptions,
    prompt: Prompt,
    adamw: AdamW,
    /// AdamW's first moment.
    m: Tensor,
    /// AdamW's second moment.
    v: Tensor,
    /// The prefix before the first step.
    initial: Prefix,
    /// Trainable values of the lowest validation loss.
    best: Option<Tensor>,
    good: LastGood,
    position: Position,
    clock: Clock,
    /// [`state::fingerprint`] of the examples.
    fingerprint: String,
    /// Of a distillation.
    teacher: Option<Teacher<'a>>,
    /// The order of the current epoch and of the one after it.
    orders: Orders,
}

/// Orders of two epochs' examples.
#[derive(Default)]
struct Orders {
    /// The epoch of the first; 0 if there are none yet.
    epoch: usize,
    current: Vec<usize>,
    following: Vec<usize>,
}

impl<'a> PromptRun<'a> {
    /// A run from `initial`.
    ///
    /// # Errors
    /// Returns an error if there are no training examples, or if the examples with the prompt exceed the model's positions.
    pub fn new(
        decoder: &Decoder,
        examples: RunExamples<'a>,
        options: &'a TrainOptions,
        initial: &Prompt,
    ) -> Result<Self> {
        if examples.train.is_empty() {
            return Err(Error::Invalid("data.train: expected at least one example, found none".into()));
        }
        for examples in [examples.train, examples.validation] {
            PrefixGroup::check_before(initial.before(), examples)?;
        }
        let prompt = initial.to_device(decoder.device())?;
        let Parameter { value, m, v } = Parameter::new(prompt.values())?;
        let initial = prompt.prefix()?;
        let prompt = prompt.with_values(value);
        let longest =
            examples.train.iter().chain(examples.validation).map(|e| e.input.len() + e.target.len()).max();
        let positions = prompt.num_virtual_tokens() + longest.unwrap_or(0);
        let limit = decoder.config().max_position_embeddings;
        if positions > limit {
            return Err(Error::Invalid(format!(
                "expected at most {limit} positions, the model's max_position_embeddings, found {positions}: lower \
                 data.max_input_tokens or prompt.num_virtual_tokens"
            )));
        }
        let teacher =
            examples.teacher.map(|of_teacher| Teacher::new(decoder, of_teacher, examples)).transpose()?;
        let adamw = AdamW {
            beta1: options.beta1,
            beta2: options.beta2,
            eps: options.eps,
            weight_decay: options.weight_decay,
        };
        let position = Position::default();
        Ok(Self {
            examples,
            options,
            prompt,
            adamw,
            m,
            v,
            initial,
            best: None,
            good: LastGood::default(),
            clock: Clock::new(position.elapsed),
            position,
            fingerprint: state::fingerprint(examples),
            teacher,
            orders: Orders::default(),
        })
    }

    /// The run whose state `state` is.
    ///
    /// # Errors
    /// Returns an error if the examples or the prompt's width are not those of the run, and in the cases of
    /// [`PromptRun::new`].
    pub fn resume(
        decoder: &Decoder,
        examples: RunExamples<'a>,
        options: &'a TrainOptions,
        state: &State,
    ) -> Result<Self> {
        let mut run = Self::new(decoder, examples, options, &state.prompt)?;
        let found = &run.fingerprint;
        if *found != state.examples {
            return Err(Error::Invalid(format!(
                "expected the examples that the run began with ({}), found others ({found}): data.train, \
                 data.validation, data.teacher_text or the tokenizer have changed; start a new run",
                state.examples
            )));
        }
        let (what, expected) = match state.prompt.kind() {
            PromptKind::Embeddings => ("the model's hidden size", decoder.config().hidden_size),
            PromptKind::Prefix => {
                ("that of the model's keys and values", keys_values_width(decoder.config()))
            }
        };
        let width = state.prompt.layout().width;
        if width != expected {
            return Err(Error::Invalid(format!(
                "expected a checkpoint of width {expected}, {what}, found {width}; the run had another model"
            )));
        }
        let to_device = |tensor: &Tensor| gpu::to_device(tensor, decoder.device());
        run.set_parameter(Parameter {
            value: to_device(state.prompt.values())?,
            m: to_device(&state.m)?,
            v: to_device(&state.v)?,
        });
        run.initial = state.initial.with_values(to_device(state.initial.values())?);
        run.best = state.best.as_ref().map(to_device).transpose()?;
        run.position = state.position.clone();
        run.start_clock();
        Ok(run)
    }

    /// All that is needed to go on from here.
    pub(super) fn state(&self, max_rows: usize, products: Option<ProductChoices>) -> State {
        State {
            prompt: self.prompt.clone(),
            m: self.m.clone(),
            v: self.v.clone(),
            initial: self.initial.clone(),
            best: self.best.clone(),
            position: Position { elapsed: self.clock.seconds(), ..self.position.clone() },
            max_rows,
            products,
            examples: self.fingerprint.clone(),
            ranks: 1,
        }
    }

    /// What it learns from, and what its loss is taken on.
    pub fn examples(&self) -> RunExamples<'a> {
        self.examples
    }

    /// The teacher of a distillation.
    pub fn teacher(&self) -> Option<&Teacher<'a>> {
        self.teacher.as_ref()
    }

    /// Hyperparameters.
    pub fn options(&self) -> &'a TrainOptions {
        self.options
    }

    /// Optimizer steps of the whole run.
    pub fn total_steps(&self) -> usize {
        match self.options.max_steps {
            0 => self.steps_per_epoch() * self.options.num_epochs,
            max_steps => max_steps,
        }
    }

    /// Optimizer steps of an epoch.
    pub fn steps_per_epoch(&self) -> usize {
        self.examples.train.len().div_ceil(self.examples_per_step())
    }

    fn examples_per_step(&self) -> usize {
        self.options.batch_size * self.options.accumulate_steps
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

    /// The prompt with its current values.
    pub fn prompt(&self) -> &Prompt {
        &self.prompt
    }

    /// The prompt's trainable values, f32 on the model's device.
    pub fn values(&self) -> &Tensor {
        self.prompt.values()
    }

    /// The prefix before the first step, f32 on the CPU.
    pub fn initial(&self) -> Result<Prefix> {
        Ok(self.initial.with_values(self.initial.values().to_device(&Device::Cpu)?))
    }

    /// The prompt's trainable values with their moments.
    pub(super) fn parameter(&self) -> Parameter {
        Parameter { value: self.values().clone(), m: self.m.clone(), v: self.v.clone() }
    }

    fn set_parameter(&mut self, Parameter { value, m, v }: Parameter) {
        self.prompt = self.prompt.with_values(value);
        (self.m, self.v) = (m, v);
    }

    /// Starts the clock again after a pause.
    pub(super) fn start_clock(&mut self) {
        self.clock = Clock::new(self.position.elapsed);
    }

    /// What is to be done next; an epoch begins if none is open.
    pub(super) fn next(&mut self) -> NextAction {
        let total = self.total_steps();
        if !self.position.open {
            if self.position.attempts() >= total {
                return NextAction::Ended(Ended::Completed);
            }
            if self.is_stale() {
                return NextAction::Ended(Ended::StoppedEarly);
            }
            self.position.begin_epoch(self.clock.seconds());
        }
        let Position { epoch, steps_of_epoch, .. } = self.position;
        let (done, per_step) = (self.position.attempts(), self.examples_per_step());
        self.orders.prepare(self.examples.train.len(), self.options, epoch);
        let mut chunks = self.orders.current.chunks(per_step).skip(steps_of_epoch);
        let now = chunks.next().filter(|_| done < total);
        let Some(now) = now else { return NextAction::EndOfEpoch };
        let next = chunks.next().or_else(|| self.orders.following.chunks(per_step).next());
        let next = next.filter(|_| done + 1 < total).map(<[usize]>::to_vec);
        NextAction::Step(StepExamples { now: now.to_vec(), next })
    }

    /// Whether the validation loss has not fallen for as many epochs as the configuration waits.
    fn is_stale(&self) -> bool {
        let Position { last, best, .. } = &self.position;
        let patience = self.options.early_stopping;
        patience > 0 && last.epoch - best.map_or(0, |best| best.epoch) >= patience
    }

    /// The learning rate of the next step.
    pub(super) fn learning_rate(&self) -> f64 {
        let (options, total) = (self.options, self.total_steps());
        let warmup = schedule::warmup_steps(options.warmup_ratio, total);
        options.learning_rate * options.schedule.multiplier(self.position.attempts(), warmup, total)
    }

    /// The examples of a step after the prompt, whose rows in the matrix of all prompts are `rows`.
    ///
    /// # Errors
    /// Returns [`Error::Invalid`] if an input does not begin with the tokens before the prompt.
    pub(super) fn group(&self, chunk: &[usize], rows: Range<u32>) -> Result<PrefixGroup> {
        PrefixGroup::after(self.prompt.before(), rows, chunk.iter().map(|i| &self.examples.train[*i]))
    }

    /// The optimizer step for the gradient of the prompt's prefix; nothing is changed yet.
    pub(super) fn update(&self, gradient: &Prefix, learning_rate: f64) -> Result<Updated> {
        let gradient = self.prompt.backward(gradient)?;
        let max_grad_norm = self.options.max_grad_norm;
        let step = AdamWStep { step: self.position.step + 1, learning_rate, max_grad_norm };
        self.adamw.forward(&self.parameter(), &gradient, step)
    }
}

impl Orders {
    /// Makes the orders of `epoch` and of the next one, unless they are there.
    fn prepare(&mut self, examples: usize, options: &TrainOptions, epoch: usize) {
        if self.epoch == epoch {
            return;
        }
        let order = |epoch| epoch_order(examples, options, epoch);
        self.current = match self.epoch + 1 == epoch && self.epoch > 0 {
            true => std::mem::take(&mut self.following),
            false => order(epoch),
        };
        self.following = order(epoch + 1);
        self.epoch = epoch;
    }
}
