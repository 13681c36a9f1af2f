//! The run: epochs of optimizer steps over packed batches.

use super::objective;
use super::plan::{self, Limits};
use crate::config::{Keep, OnNotFinite, TrainOptions};
use crate::data::pack::Sequence;
use crate::data::{Example, PrefixGroup};
use crate::model::Granite;
use crate::ops::adamw::{AdamW, Parameter, Step, Updated};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
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

/// One optimizer step, a line of `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Counted from 1.
    pub step: usize,
    /// Counted from 1.
    pub epoch: usize,
    /// Mean negative log-likelihood of the step's target tokens, nats.
    pub loss: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Norm of the prompt's gradient before clipping.
    pub grad_norm: f64,
    /// Examples of the step.
    pub examples: usize,
    /// Target tokens of the step.
    pub target_tokens: usize,
    /// Packed rows of the step.
    pub rows: usize,
    /// Wall time of the step.
    pub seconds: f64,
    /// Wall time of the run up to its end, all parts of a resumed run together.
    pub elapsed: f64,
}

/// The end of an epoch, a line of `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EpochRecord {
    /// Counted from 1.
    pub epoch: usize,
    /// Optimizer steps so far.
    pub step: usize,
    /// Mean training loss of the epoch, weighted by target tokens; `None` where every step was skipped.
    pub train_loss: Option<f64>,
    /// Loss of the validation file; `None` without one.
    pub validation_loss: Option<f64>,
    /// Whether this epoch's prompt is the best so far.
    pub best: bool,
    /// Wall time of the epoch's steps and validation.
    pub seconds: f64,
    /// Wall time of the run up to its end, all parts of a resumed run together.
    pub elapsed: f64,
}

/// Is told of each step and epoch as they end.
pub trait Observer {
    /// A step has ended.
    ///
    /// # Errors
    /// Ends the run.
    fn step(&mut self, record: &StepRecord) -> Result<()>;
    /// A step was left out because its `what` was `value`.
    ///
    /// # Errors
    /// Ends the run.
    fn skipped(&mut self, step: usize, what: &str, value: f64) -> Result<()>;
    /// The device ran out of memory in a step or a validation: it is tried again, and the run goes on, under `limits`.
    ///
    /// # Errors
    /// Ends the run.
    fn out_of_memory(&mut self, limits: Limits) -> Result<()>;
    /// An epoch has ended.
    ///
    /// # Errors
    /// Ends the run.
    fn epoch(&mut self, record: &EpochRecord) -> Result<()>;
}

/// Indices of `examples` training examples in the order of an epoch, which is counted from 1; it depends on the
/// seed and the epoch alone.
pub fn epoch_order(examples: usize, options: &TrainOptions, epoch: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..examples).collect();
    if options.shuffle {
        let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
        rng.set_stream(epoch as u64);
        order.shuffle(&mut rng);
    }
    order
}

/// A prompt, and where in the run it was.
#[derive(Debug, Clone)]
pub struct Kept {
    /// f32 [num_virtual_tokens, C], on the CPU.
    pub prompt: Tensor,
    /// Epochs behind it.
    pub epoch: usize,
    /// Optimizer steps behind it.
    pub step: usize,
    /// Mean training loss of its last epoch; `None` where that has not ended.
    pub train_loss: Option<f64>,
    /// Its validation loss; `None` where it was not taken.
    pub validation_loss: Option<f64>,
}

/// A run under way. After an error it still has the last good prompt.
pub struct Trainer<'a> {
    task: Task<'a>,
    adamw: AdamW,
    parameter: Parameter,
    limits: Limits,
    step: usize,
    last: Kept,
    best: Option<Kept>,
    skipped: usize,
}

/// What a step computed; nothing is changed yet.
struct Attempt {
    updated: Updated,
    rows: usize,
    target_tokens: usize,
    loss: f64,
    grad_norm: f64,
    prompt_norm: f64,
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
        let prompt = prompt.to_dtype(DType::F32)?.to_device(task.model.device())?;
        let parameter = Parameter::new(&prompt)?;
        let last = Kept { prompt, epoch: 0, step: 0, train_loss: None, validation_loss: None };
        let limits = task.limits;
        Ok(Self { task, adamw, parameter, limits, step: 0, last, best: None, skipped: 0 })
    }

    /// Optimizer steps of the whole run.
    pub fn total_steps(&self) -> usize {
        match self.task.options.max_steps {
            0 => self.steps_per_epoch() * self.task.options.num_epochs,
            max_steps => max_steps,
        }
    }

    fn steps_per_epoch(&self) -> usize {
        self.task.train.len().div_ceil(self.examples_per_step())
    }

    fn examples_per_step(&self) -> usize {
        self.task.options.batch_size * self.task.options.accumulate_steps
    }

    /// Steps that were left out because a value was not finite.
    pub fn skipped(&self) -> usize {
        self.skipped
    }

    /// The prompt that the configuration asks to keep; before the first epoch's end, the last good one.
    ///
    /// # Errors
    /// The device's.
    pub fn kept(&self) -> Result<Kept> {
        let kept = match (&self.best, self.task.options.keep) {
            (Some(best), Keep::Best) => best.clone(),
            _ if self.step == self.last.step => self.last.clone(),
            // In the middle of an epoch: the losses of the last one are those of another prompt.
            _ => Kept {
                prompt: self.parameter.value.clone(),
                epoch: self.last.epoch,
                step: self.step,
                train_loss: None,
                validation_loss: None,
            },
        };
        Ok(Kept { prompt: kept.prompt.to_device(&Device::Cpu)?, ..kept })
    }

    /// Runs to the end.
    ///
    /// # Errors
    /// [`Error::NotFinite`] where a loss or gradient is not finite and the configuration does not say to skip
    /// such steps; the observer's; the device's. [`Trainer::kept`] is good after each of them.
    pub fn run(&mut self, observer: &mut dyn Observer) -> Result<()> {
        let total = self.total_steps();
        let mut epoch = 0;
        while self.step + self.skipped < total {
            epoch += 1;
            let started = Instant::now();
            let (mut nll, mut target_tokens) = (0.0, 0);
            for chunk in
                epoch_order(self.task.train.len(), self.task.options, epoch).chunks(self.examples_per_step())
            {
                if self.step + self.skipped == total {
                    break;
                }
                if let Some(record) = self.step(epoch, chunk, total, observer)? {
                    nll += record.loss * record.target_tokens as f64;
                    target_tokens += record.target_tokens;
                    observer.step(&record)?;
                }
            }
            let train_loss = (target_tokens > 0).then(|| nll / target_tokens as f64);
            let record = self.end_epoch(epoch, train_loss, started, observer)?;
            observer.epoch(&record)?;
        }
        Ok(())
    }

    fn step(
        &mut self,
        epoch: usize,
        chunk: &[usize],
        total: usize,
        observer: &mut dyn Observer,
    ) -> Result<Option<StepRecord>> {
        let started = Instant::now();
        let Task { train, options, .. } = self.task;
        let n = self.parameter.value.dims()[0] as u32;
        let group = PrefixGroup::new(0..n, chunk.iter().map(|i| &train[*i]));
        let attempt = self.step + self.skipped;
        let warmup = super::schedule::warmup_steps(options.warmup_ratio, total);
        let learning_rate = options.learning_rate * options.schedule.multiplier(attempt, warmup, total);
        let step = Step { step: self.step + 1, learning_rate, max_grad_norm: options.max_grad_norm };
        let (found, limits) =
            self.within_memory(&group, observer, |limits| self.attempt(&group, step, limits))?;
        self.limits = limits;
        let Attempt { updated, rows, target_tokens, loss, grad_norm, prompt_norm } = found;
        let values =
            [("the loss", loss), ("the gradient's norm", grad_norm), ("the prompt's norm", prompt_norm)];
        if let Some((what, value)) = values.into_iter().find(|(_, value)| !value.is_finite()) {
            return self.left_out(what, value, observer);
        }
        self.parameter = updated.parameter;
        self.step += 1;
        Ok(Some(StepRecord {
            step: self.step,
            epoch,
            loss,
            learning_rate,
            grad_norm,
            examples: chunk.len(),
            target_tokens,
            rows,
            seconds: started.elapsed().as_secs_f64(),
            elapsed: 0.0,
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
        plan::within_memory(self.limits, less, work, |limits| observer.out_of_memory(limits))
    }

    /// Loss, gradient and update of one step under `limits`.
    fn attempt(&self, group: &PrefixGroup, step: Step, limits: Limits) -> Result<Attempt> {
        let model = self.task.model;
        let prompt = self.parameter.value.to_dtype(model.prompt_dtype())?;
        let objective = objective::gradient(model, &prompt, std::slice::from_ref(group), limits)?;
        let Some(gradient) = objective.gradient.as_ref() else {
            return Err(Error::Invalid("the prompt has no gradient".into()));
        };
        let updated = self.adamw.forward(&self.parameter, &gradient.to_dtype(DType::F32)?, step)?;
        // Only here does the host wait for a GPU. The prompt's norm: a huge learning rate overflows it by a
        // gradient that is finite.
        let (loss, target_tokens) = (objective.loss()?, objective.target_tokens());
        let (grad_norm, prompt_norm) = (updated.grad_norm.value()?, updated.value_norm.value()?);
        Ok(Attempt { updated, rows: objective.rows, target_tokens, loss, grad_norm, prompt_norm })
    }

    /// A step whose `what` is not finite: it is skipped, or the error that ends the run.
    fn left_out(
        &mut self,
        what: &'static str,
        value: f64,
        observer: &mut dyn Observer,
    ) -> Result<Option<StepRecord>> {
        let step = self.step + self.skipped + 1;
        if self.task.options.on_not_finite == OnNotFinite::Skip {
            self.skipped += 1;
            observer.skipped(step, what, value)?;
            return Ok(None);
        }
        let hint = "the prompt before this step is kept; a lower train.learning_rate may help, or \
                    train.on_not_finite = \"skip\""
            .into();
        Err(Error::NotFinite { step, what, value, hint })
    }

    fn end_epoch(
        &mut self,
        epoch: usize,
        train_loss: Option<f64>,
        started: Instant,
        observer: &mut dyn Observer,
    ) -> Result<EpochRecord> {
        let Task { model, validation, .. } = self.task;
        let prompt = self.parameter.value.clone();
        let validation_loss = match validation {
            [] => None,
            examples => {
                let group = PrefixGroup::new(0..prompt.dims()[0] as u32, examples);
                let groups = std::slice::from_ref(&group);
                let prompt = prompt.to_dtype(model.prompt_dtype())?;
                let loss =
                    |limits: Limits| objective::evaluate(model, &prompt, groups, limits.max_rows)?.loss();
                let (loss, limits) = self.within_memory(&group, observer, loss)?;
                self.limits = limits;
                Some(loss)
            }
        };
        self.last = Kept { prompt: prompt.clone(), epoch, step: self.step, train_loss, validation_loss };
        let best_before = self.best.as_ref().and_then(|b| b.validation_loss);
        let best =
            validation_loss.is_some_and(|loss| loss.is_finite() && best_before.is_none_or(|b| loss < b));
        if best {
            self.best = Some(self.last.clone());
        }
        let seconds = started.elapsed().as_secs_f64();
        Ok(EpochRecord { epoch, step: self.step, train_loss, validation_loss, best, seconds, elapsed: 0.0 })
    }
}
