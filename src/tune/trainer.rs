//! Takes the steps of one or many prompt runs: each step runs the examples of all of them through the model together.
//!
//! ```text
//! step n    run a: 8 examples ┐                                  ┌ gradient of a ─ clip, AdamW, schedule of a
//!           run b: 8 examples ┼─ one packed batch ─ gradient of ─┼ gradient of b ─ clip, AdamW, schedule of b
//!           run c: 8 examples ┘      each run's mean loss        └ gradient of c ─ clip, AdamW, schedule of c
//! ```

mod attempt;
mod shared;

use super::observer::{Observer, StepRecord};
use super::plan::Limits;
use super::prompt_run::{Ended, NextAction, PromptRun, RunExamples, StepExamples, StepPart};
use super::state::State;
use super::teacher::TeacherExamples;
use super::{Kept, objective};
use crate::batch::{Example, PrefixGroup};
use crate::config::TrainOptions;
use crate::model::Decoder;
use crate::ops::gpu::products;
use crate::prompt::Prompt;
use crate::ranks::{Alone, Ranks};
use crate::{Error, Result};
use attempt::Prepared;
use std::ops::ControlFlow;
use std::time::Instant;

/// What one run tunes with.
#[derive(Clone, Copy)]
pub struct Task<'a> {
    /// The frozen model.
    pub model: &'a Decoder,
    /// Examples to learn from.
    pub train: &'a [Example],
    /// Examples whose loss is taken after each epoch; may be empty.
    pub validation: &'a [Example],
    /// The examples as a teacher reads them: the loss is then the divergence from the teacher's distribution.
    pub teacher: Option<TeacherExamples<'a>>,
    /// Hyperparameters.
    pub options: &'a TrainOptions,
    /// How much goes through the model at a time at first: less if the device runs out of memory.
    pub limits: Limits,
}

/// Runs that are being trained.
pub struct Trainer<'a> {
    decoder: &'a Decoder,
    runs: Vec<PromptRun<'a>>,
    /// How much goes through the model at a time: less after the device ran out of memory.
    limits: Limits,
    /// The step after the last, if it could be foreseen.
    prepared: Option<Prepared>,
    /// Which of several ranks this is: each computes a share of every step.
    ranks: &'a dyn Ranks,
}

impl<'a> Task<'a> {
    fn examples(&self) -> RunExamples<'a> {
        RunExamples { train: self.train, validation: self.validation, teacher: self.teacher }
    }
}

impl<'a> Trainer<'a> {
    /// For one run from `prompt`.
    ///
    /// # Errors
    /// As [`PromptRun::new`].
    pub fn new(task: Task<'a>, prompt: &Prompt) -> Result<Self> {
        let run = PromptRun::new(task.model, task.examples(), task.options, prompt)?;
        Self::with_runs(task.model, task.limits, vec![run])
    }

    /// For the one run whose state `state` is.
    ///
    /// # Errors
    /// As [`PromptRun::resume`].
    pub fn resume(task: Task<'a>, state: &State) -> Result<Self> {
        let run = PromptRun::resume(task.model, task.examples(), task.options, state)?;
        let limits = Limits { max_rows: state.max_rows, ..task.limits };
        let trainer = Self::with_runs(task.model, limits, vec![run])?;
        trainer.use_products(state)?;
        Ok(trainer)
    }

    /// Takes the algorithms of the matrix products that `state` was computed with, so that the sums repeat.
    ///
    /// # Errors
    /// Returns an error if the device's library fails.
    pub fn use_products(&self, state: &State) -> Result<()> {
        if let Some(choices) = &state.products
            && let Some(warning) = products::import(self.decoder.device(), choices)?
        {
            eprintln!("warning: {warning}");
        }
        Ok(())
    }

    /// For `runs`, at least one, which are trained together.
    ///
    /// # Errors
    /// Returns an error if there are no runs, if they differ in the kind of their prompts or in `train.time_products`, which
    /// is a setting of the device, or if one of several has a teacher.
    pub fn with_runs(decoder: &'a Decoder, limits: Limits, runs: Vec<PromptRun<'a>>) -> Result<Self> {
        let Some(first) = runs.first() else {
            return Err(Error::Invalid("tune: expected at least one prompt, found none".into()));
        };
        let (time_products, kind) = (first.options().time_products, first.prompt().kind());
        if let Some(other) = runs.iter().find(|run| run.prompt().kind() != kind) {
            return Err(Error::Invalid(format!(
                "prompt.kind: expected one value for all runs of a trainer, found \"{kind}\" and \"{}\"",
                other.prompt().kind()
            )));
        }
        if runs.iter().any(|run| run.options().time_products != time_products) {
            return Err(Error::Invalid(
                "train.time_products: expected one value for all runs of a trainer, found two".into(),
            ));
        }
        if runs.len() > 1 && runs.iter().any(|run| run.teacher().is_some()) {
            return Err(Error::Invalid(format!(
                "data.teacher_text: expected one run for a trainer, found {}: runs with a teacher are trained alone",
                runs.len()
            )));
        }
        products::set_timing(decoder.device(), time_products)?;
        Ok(Self { decoder, runs, limits, prepared: None, ranks: &Alone })
    }

    /// The runs.
    pub fn runs(&self) -> &[PromptRun<'a>] {
        &self.runs
    }

    /// The run of a trainer for one run; of several the first.
    pub fn first(&self) -> &PromptRun<'a> {
        &self.runs[0]
    }

    /// The prompt that the first run keeps.
    pub fn kept(&self) -> Result<Kept> {
        self.first().kept()
    }

    /// All that is needed to go on with the run of an index.
    pub fn state(&self, run: usize) -> Result<State> {
        let products = products::export(self.decoder.device())?;
        let state = self.runs[run].state(self.limits.max_rows, products);
        Ok(State { ranks: self.ranks.size(), ..state })
    }

    /// Runs the first run to its end, or until the observer interrupts it, or until its validation loss stops falling.
    ///
    /// # Errors
    /// Returns [`Error::NotFinite`] if a loss or gradient is not finite and the configuration does not say to skip
    /// such steps, the observer's errors, and those of device operations. [`Trainer::kept`] is good after each of them.
    pub fn run(&mut self, observer: &mut dyn Observer) -> Result<Ended> {
        let mut outcomes = self.run_all(&mut [observer])?;
        match outcomes.pop() {
            Some(outcome) => outcome,
            None => Err(Error::Invalid("tune: expected one run, found none".into())),
        }
    }

    /// Runs all runs to their ends; `observers` has one for each. The outcome of each run is returned: an error of one run
    /// does not end the others.
    ///
    /// # Errors
    /// Returns an error if there are fewer or more observers than runs, or if a step of all runs failed, as a device's memory
    /// or the device itself did; each run still has its last good prompt.
    pub fn run_all(&mut self, observers: &mut [&mut dyn Observer]) -> Result<Vec<Result<Ended>>> {
        if observers.len() != self.runs.len() {
            let (expected, found) = (self.runs.len(), observers.len());
            return Err(Error::Invalid(format!("observers: expected {expected}, one a run, found {found}")));
        }
        self.runs.iter_mut().for_each(PromptRun::start_clock);
        let mut outcomes: Vec<Option<Result<Ended>>> = self.runs.iter().map(|_| None).collect();
        while outcomes.iter().any(Option::is_none) {
            let mut parts = Vec::new();
            for run in (0..self.runs.len()).filter(|i| outcomes[*i].is_none()).collect::<Vec<_>>() {
                match self.next(run, observers[run]) {
                    Ok(ControlFlow::Continue(examples)) => {
                        parts.push(StepPart { run, examples, learning_rate: self.runs[run].learning_rate() });
                    }
                    Ok(ControlFlow::Break(ended)) => outcomes[run] = Some(Ok(ended)),
                    Err(error) => outcomes[run] = Some(Err(error)),
                }
            }
            if parts.is_empty() {
                continue;
            }
            let records = self.step(&parts, observers)?;
            for (StepPart { run, .. }, record) in parts.iter().zip(records) {
                let ended = record.and_then(|record| self.finish_step(*run, record, observers[*run]));
                outcomes[*run] = ended.transpose();
            }
        }
        Ok(outcomes.into_iter().flatten().collect())
    }

    /// The next step of a run, or its end; ends of epochs on the way are taken.
    fn next(&mut self, run: usize, observer: &mut dyn Observer) -> Result<ControlFlow<Ended, StepExamples>> {
        let mut pauses = false;
        loop {
            match self.runs[run].next() {
                NextAction::EndOfEpoch => {
                    let loss = self.validation_loss(run, observer)?;
                    let record = self.runs[run].end_epoch(loss);
                    observer.epoch(&record)?;
                    observer.checkpoint(&self.state(run)?)?;
                    pauses = observer.pauses();
                }
                NextAction::Step(_) if pauses => return Ok(ControlFlow::Break(Ended::Paused)),
                NextAction::Step(examples) => return Ok(ControlFlow::Continue(examples)),
                NextAction::Ended(ended) => return Ok(ControlFlow::Break(ended)),
            }
        }
    }

    /// Reports a step that was taken or left out; the run's end, if it is interrupted.
    fn finish_step(
        &mut self,
        run: usize,
        record: Option<StepRecord>,
        observer: &mut dyn Observer,
    ) -> Result<Option<Ended>> {
        self.runs[run].count_step(record.as_ref());
        if let Some(record) = &record {
            observer.step(record)?;
        }
        observer.latest(&|| self.state(run))?;
        if self.ranks.any(observer.interrupted())? {
            observer.checkpoint(&self.state(run)?)?;
            return Ok(Some(Ended::Interrupted));
        }
        if self.runs[run].checkpoint_is_due() {
            observer.checkpoint(&self.state(run)?)?;
        }
        Ok(None)
    }

    /// One step of the runs of `parts`: each one's record, `None` for a step that was left out, or its error.
    ///
    /// # Errors
    /// Returns an error if the step of all runs failed.
    pub(super) fn step(
        &mut self,
        parts: &[StepPart],
        observers: &mut [&mut dyn Observer],
    ) -> Result<Vec<Result<Option<StepRecord>>>> {
        let started = Instant::now();
        let groups = self.groups(parts.iter().map(|part| (part.run, &part.examples.now[..])))?;
        let mut prepared = self.prepared.take().filter(|prepared| prepared.is_for(parts));
        let rows = match parts {
            [part] => self.rows(&groups, self.runs[part.run].examples().train, &part.examples.now),
            _ => self.rows(&groups, &[], &[]),
        };
        let (attempt, limits) = self.within_memory(rows, observers, |limits| {
            let prepared = prepared.take().filter(|prepared| prepared.fits(limits));
            match (self.ranks.size(), parts) {
                (2.., [part]) => self.attempt_share(&groups, prepared, part, limits),
                _ => self.attempt(&groups, prepared, parts, limits),
            }
        })?;
        self.limits = limits;
        self.prepared = attempt.next;
        let cost = (attempt.rows, started.elapsed().as_secs_f64());
        let mut records = Vec::with_capacity(parts.len());
        for (part, result) in parts.iter().zip(attempt.results) {
            records.push(self.runs[part.run].take_step(part, result, cost, observers[part.run]));
        }
        Ok(records)
    }

    /// A prefix group for the examples `chunk` of each (run, chunk), or for this rank's share of them if it has one. The runs'
    /// prompts stand one below the other in the matrix of prompts.
    fn groups<'c>(&self, chunks: impl Iterator<Item = (usize, &'c [usize])>) -> Result<Vec<PrefixGroup>> {
        let mut end = 0;
        let group = |(index, chunk): (usize, &[usize])| {
            let run = &self.runs[index];
            let start = end;
            end += run.prompt().num_virtual_tokens() as u32;
            let share = self.share(index, chunk);
            (!share.is_empty()).then(|| run.group(&share, start..end))
        };
        chunks.filter_map(group).collect()
    }

    /// The loss of a run's validation examples; `None` if it has none.
    fn validation_loss(&mut self, run: usize, observer: &mut dyn Observer) -> Result<Option<f64>> {
        let (decoder, of_run) = (self.decoder, &self.runs[run]);
        let RunExamples { validation, .. } = of_run.examples();
        if validation.is_empty() {
            return Ok(None);
        }
        let prompt = of_run.prompt().prefix()?.to_dtype(decoder.prompt_dtype())?;
        let all: Vec<usize> = (0..validation.len()).collect();
        let share = self.share_of(validation, &all);
        let groups = match share.is_empty() {
            true => Vec::new(),
            false => vec![prompt.group(share.iter().map(|i| &validation[*i]))?],
        };
        let teacher = of_run.teacher();
        let evaluate = |limits: Limits| {
            let mut passes = objective::packed(decoder, &groups, prompt.kind(), limits.max_rows)?;
            passes.teacher_passes =
                teacher.map_or(Vec::new(), |teacher| teacher.validation_passes(&passes, &share));
            objective::evaluate_with(decoder, &prompt, &passes, teacher)
        };
        let loss = |limits: Limits| match (self.ranks.size(), groups.len()) {
            (1, _) => evaluate(limits)?.loss(),
            (_, 0) => self.mean_of_shares(Ok(Vec::new())),
            _ => self.mean_of_shares(evaluate(limits).and_then(|found| found.nll())),
        };
        let rows = self.rows(&groups, validation, &all);
        let (loss, limits) = self.within_memory(rows, &mut [observer], loss)?;
        self.limits = limits;
        Ok(Some(loss))
    }
}

#[cfg(test)]
mod tests;
