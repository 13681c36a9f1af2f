//! The course of a sweep: turns, rungs, the choice.

use super::{Halving, Standing, SweepFolder, SweepObserver, SweepRecord, Trial};
use crate::config::{Config, SweepMetric, Task};
use crate::ranks::{Ranks, deal};
use crate::run::{Agreement, Status, Tuning, TuningData};
use crate::session::Session;
use crate::tune::health::{self, is_at_chance};
use crate::tune::{Ended, largest_step, prompts_in_a_pass};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// How a sweep goes on.
#[derive(Serialize, Deserialize)]
enum NextRung {
    /// Up to the rung after this epoch; `None`: to the ends of the trials.
    At(Option<usize>),
    /// The best trial has been chosen.
    Over,
}

fn no_folder() -> Error {
    Error::Invalid("sweep: expected its folder on rank 0, found none".into())
}

/// A sweep that is ready to start or to continue.
pub struct Sweep<'a> {
    pub(super) config: &'a Config,
    pub(super) session: &'a Session,
    /// The trials, in the order of their numbers.
    pub trials: Vec<Trial>,
    /// The files, encoded with each verbalizer that trials have.
    data: BTreeMap<String, Rc<TuningData>>,
    halving: Halving,
    max_prompts: usize,
    /// The trials that this process continues, as indices; `None`: all.
    pub(super) own: Option<BTreeSet<usize>>,
}

impl<'a> Sweep<'a> {
    /// Reads the files and checks each trial as far as that is possible before its first step; nothing is written.
    ///
    /// # Errors
    /// Returns the errors of [`Config::trials`], and the error of the first trial that can't begin.
    pub fn prepare(config: &'a Config, session: &'a Session) -> Result<Self> {
        let trials = config.trials()?.into_iter().enumerate();
        let trials: Vec<Trial> = trials.map(|(i, trial)| Trial::new(i + 1, trial)).collect();
        let mut data = BTreeMap::new();
        for trial in &trials {
            let verbalizer = &trial.config.data.verbalizer;
            if !data.contains_key(verbalizer) {
                data.insert(verbalizer.clone(), Rc::new(TuningData::read(&trial.config, session)?));
            }
        }
        let halving = Halving::new(&config.sweep, 0);
        let mut sweep = Self { config, session, trials, data, halving, max_prompts: 1, own: None };
        let (epochs, max_prompts) = sweep.check_trials()?;
        sweep.halving = Halving::new(&config.sweep, epochs);
        sweep.max_prompts = max_prompts;
        Ok(sweep)
    }

    /// Makes the run of each trial, one at a time. Returns the epochs of the longest, and how many prompts are in a pass at most.
    fn check_trials(&self) -> Result<(usize, usize)> {
        let (mut epochs, mut works) = (0, Vec::new());
        for trial in &self.trials {
            let name = |error: Error| {
                Error::Invalid(format!("trial {} ({}): {error}", trial.name(), trial.settings()))
            };
            let data = Rc::clone(self.data(trial)?);
            let tuning = Tuning::with_data(&trial.config, self.session, data, None).map_err(name)?;
            let run = tuning.prompt_run().map_err(name)?;
            epochs = epochs.max(run.total_steps().div_ceil(run.steps_per_epoch()));
            works.push(largest_step(&run));
        }
        let model = &self.session.model;
        let max_prompts = match self.config.sweep.max_prompts {
            // A prompt with a teacher is tuned alone.
            0 if model.device().is_cpu() || self.config.distils() => 1,
            0 => prompts_in_a_pass(model, &self.config.train, works)?,
            prompts => prompts,
        };
        Ok((epochs, max_prompts))
    }

    /// Compares what the ranks are about to tune, by the first trial. Returns, on rank 0, the warnings that only other ranks have.
    ///
    /// # Errors
    /// As [`Agreement::check`].
    pub fn agree(&self, ranks: &dyn Ranks) -> Result<Vec<String>> {
        if ranks.size() == 1 {
            return Ok(Vec::new());
        }
        let own = || {
            let trial = &self.trials[0];
            let tuning = Tuning::with_data(&trial.config, self.session, Rc::clone(self.data(trial)?), None)?;
            Agreement::new(&tuning, &tuning.trainer()?, self.session, &self.config.to_toml()?)
        };
        Agreement::check(own(), ranks)
    }

    /// The files of a trial.
    pub(super) fn data(&self, trial: &Trial) -> Result<&Rc<TuningData>> {
        let data = self.data.get(&trial.config.data.verbalizer);
        data.ok_or_else(|| Error::Invalid(format!("trial {}: expected its files, found none", trial.name())))
    }

    /// Warnings and notes about the files.
    pub fn remarks(&self) -> (Vec<&str>, Vec<&str>) {
        let first = self.data.values().next();
        let texts = |of: fn(&TuningData) -> &Vec<String>| {
            first.iter().flat_map(|data| of(data)).map(String::as_str).collect()
        };
        (texts(|data| &data.warnings), texts(|data| &data.notes))
    }

    /// Epochs of the longest trial.
    pub fn epochs(&self) -> usize {
        self.halving.epochs()
    }

    /// Runs the trials from where `folder`, which rank 0 alone has, says that they are to their ends, or until an observer
    /// interrupts them. The ranks share the trials up to each rung, where rank 0 decides which of them stay; they have the trials'
    /// folders in common.
    ///
    /// # Errors
    /// Returns [`Error::Invalid`] if all trials have failed, and an error if a file of the sweep can't be written.
    pub fn run(
        &mut self,
        ranks: &dyn Ranks,
        mut folder: Option<&mut SweepFolder>,
        watch: &dyn SweepObserver,
    ) -> Result<Ended> {
        let mut next = ranks.from_first(|| {
            self.load(watch)?;
            let folder = folder.as_deref_mut().ok_or_else(no_folder)?;
            self.replay(folder, watch).map(NextRung::At)
        })?;
        loop {
            let NextRung::At(rung) = next else { return Ok(Ended::Completed) };
            ranks.all(self.load(watch))?;
            self.deal(rung, ranks);
            let ended = ranks.all(self.advance_to(rung, watch))?;
            if ranks.any(ended == Ended::Interrupted)? {
                return Ok(Ended::Interrupted);
            }
            next = ranks.from_first(|| {
                self.own = None;
                self.load(watch)?;
                let folder = folder.as_deref_mut().ok_or_else(no_folder)?;
                match rung {
                    Some(epoch) if self.live().next().is_some() => {
                        self.decide(epoch, folder, watch).map(NextRung::At)
                    }
                    _ => self.choose(folder, watch).map(|()| NextRung::Over),
                }
            })?;
        }
    }

    /// Reads what the folders of the trials say of them.
    pub(super) fn load(&mut self, watch: &dyn SweepObserver) -> Result<()> {
        self.trials.iter_mut().try_for_each(Trial::load)?;
        watch.loaded(&self.trials);
        Ok(())
    }

    /// Takes this rank's part of the trials that have not reached `rung`.
    fn deal(&mut self, rung: Option<usize>, ranks: &dyn Ranks) {
        self.own = None;
        let limit = rung.unwrap_or(usize::MAX);
        let (waiting, epochs): (Vec<usize>, Vec<usize>) = self
            .live()
            .filter(|(_, trial)| trial.epoch < limit)
            .map(|(i, trial)| (i, limit.min(trial.config.train.num_epochs).saturating_sub(trial.epoch)))
            .unzip();
        let own = &deal(&epochs, ranks.size())[ranks.rank()];
        self.own = Some(own.iter().map(|i| waiting[*i]).collect());
    }

    /// Continues this process's trials, in turns of an epoch, until each has ended or reached `rung`.
    pub(super) fn advance_to(&mut self, rung: Option<usize>, watch: &dyn SweepObserver) -> Result<Ended> {
        while let Some(done) = self.live().map(|(_, trial)| trial.epoch).min() {
            if rung.is_some_and(|epoch| done >= epoch) {
                break;
            }
            for pack in self.packs(done + 1) {
                self.advance(&pack, watch)?;
                let was_interrupted = |trial: &usize| {
                    let summary = self.trials[*trial].summary.as_ref();
                    summary.is_some_and(|summary| summary.status == Status::Interrupted)
                };
                if pack.iter().any(was_interrupted) {
                    return Ok(Ended::Interrupted);
                }
            }
        }
        Ok(Ended::Completed)
    }

    /// Takes over the decisions of an earlier part of the sweep. Returns the epoch of the next rung.
    pub(super) fn replay(
        &mut self,
        folder: &mut SweepFolder,
        watch: &dyn SweepObserver,
    ) -> Result<Option<usize>> {
        if folder.records.is_empty() {
            let started = SweepRecord::Started { trials: self.trials.len(), max_prompts: self.max_prompts };
            folder.record(&started)?;
            watch.decided(&started);
        }
        let mut rung = self.halving.rung_after(0);
        for record in folder.records.clone() {
            match record {
                SweepRecord::Started { max_prompts, .. } => self.max_prompts = max_prompts,
                SweepRecord::Postponed { epoch, .. } => rung = Some(epoch + 1),
                SweepRecord::Rung { epoch, pruned, .. } => {
                    rung = self.halving.rung_after(epoch);
                    // The sweep may have been killed before it pruned all of them.
                    for trial in pruned.into_iter().map(|number| number - 1) {
                        if self.trials.get(trial).is_some_and(Trial::is_live) {
                            self.prune(trial, watch)?;
                        }
                    }
                }
                SweepRecord::Best { .. } => {}
            }
        }
        Ok(rung)
    }

    /// Trials of this process that have more epochs to go, with their indices.
    pub(super) fn live(&self) -> impl Iterator<Item = (usize, &Trial)> {
        let is_own = |trial| self.own.as_ref().is_none_or(|own| own.contains(&trial));
        self.trials.iter().enumerate().filter(move |(i, trial)| is_own(*i) && trial.is_live())
    }

    /// The live trials that have not ended `epoch`, in the passes in which they run: prompts of one kind each.
    fn packs(&self, epoch: usize) -> Vec<Vec<usize>> {
        let mut kinds: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for (i, trial) in self.live().filter(|(_, trial)| trial.epoch < epoch) {
            kinds.entry(trial.config.prompt.kind.name()).or_default().push(i);
        }
        kinds.values().flat_map(|trials| trials.chunks(self.max_prompts)).map(<[usize]>::to_vec).collect()
    }

    /// Decides which trials stay after `epoch`. Returns the epoch of the next rung.
    fn decide(
        &mut self,
        epoch: usize,
        folder: &mut SweepFolder,
        watch: &dyn SweepObserver,
    ) -> Result<Option<usize>> {
        let standings = self.standings()?;
        if let Some(record) = self.postponed(epoch, standings.first()) {
            folder.record(&record)?;
            watch.decided(&record);
            return Ok(Some(epoch + 1));
        }
        let numbers: Vec<usize> = standings.iter().map(|standing| standing.trial).collect();
        let (kept, others) = numbers.split_at(self.halving.stay(numbers.len()));
        let is_live = |number: &&usize| self.trials[**number - 1].is_live();
        let pruned: Vec<usize> = others.iter().filter(is_live).copied().collect();
        let record = SweepRecord::Rung { epoch, kept: kept.to_vec(), pruned: pruned.clone() };
        folder.record(&record)?;
        watch.decided(&record);
        for number in pruned {
            self.prune(number - 1, watch)?;
        }
        Ok(self.halving.rung_after(epoch))
    }

    /// The decision to put a rung off, if the leading trial is still where guessing the labels is: there the order of the
    /// trials says nothing.
    fn postponed(&self, epoch: usize, leader: Option<&Standing>) -> Option<SweepRecord> {
        let trial = &self.trials[leader?.trial - 1];
        if trial.config.data.task != Task::Classification
            || trial.config.distils()
            || !self.halving.can_postpone(epoch)
        {
            return None;
        }
        let (dataset, encoded) = &self.data(trial).ok()?.train;
        let chance = health::chance(&encoded.examples, &dataset.records)?;
        let validation_loss = trial.summary.as_ref()?.validation_loss?;
        let record = SweepRecord::Postponed { epoch, leader: trial.number, validation_loss, chance };
        is_at_chance(validation_loss, chance).then_some(record)
    }

    /// The trials that take part in the choice, the best first.
    fn standings(&self) -> Result<Vec<Standing>> {
        let mut standings = Vec::new();
        for trial in self.trials.iter().filter(|trial| trial.is_candidate()) {
            let Some(summary) = &trial.summary else { continue };
            let value = match self.config.sweep.metric {
                SweepMetric::ValidationLoss => summary.validation_loss,
                SweepMetric::ValidationAccuracy => {
                    let rows = self.validation(trial)?;
                    rows.and_then(|rows| rows.accuracy()).map(|accuracy| -accuracy.value)
                }
            };
            let value = value.unwrap_or(f64::INFINITY);
            standings.push(Standing {
                trial: trial.number,
                value,
                virtual_tokens: summary.num_virtual_tokens,
            });
        }
        standings.sort_by(Standing::compare);
        Ok(standings)
    }

    /// Chooses the best trial, and makes the link to it.
    pub(super) fn choose(&self, folder: &mut SweepFolder, watch: &dyn SweepObserver) -> Result<()> {
        let Some(best) = self.standings()?.first().copied().filter(|best| best.value.is_finite()) else {
            return Err(Error::Invalid(format!(
                "{}: expected at least one trial with a finite validation loss, found none of {}; hint: summary.json in each \
                 trial's folder says why it ended",
                folder.path.display(),
                self.trials.len()
            )));
        };
        let trial = &self.trials[best.trial - 1];
        let rows = self.validation(trial)?;
        let record = SweepRecord::Best {
            trial: trial.number,
            validation_loss: trial.summary.as_ref().and_then(|summary| summary.validation_loss),
            validation_accuracy: rows.and_then(|rows| rows.accuracy()).map(|accuracy| accuracy.value),
        };
        if let Err(error) = folder.link_best(trial.name()) {
            watch.warning(
                trial,
                &format!(
                    "{error}: there is no link to the best trial; its folder is {}",
                    trial.folder().display()
                ),
            );
        }
        if folder.records.last() != Some(&record) {
            folder.record(&record)?;
        }
        watch.decided(&record);
        Ok(())
    }
}
