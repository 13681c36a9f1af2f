//! A turn: some trials go on for an epoch, in one pass.

use super::observer::TrialObserver;
use super::{Sweep, SweepObserver, Trial, ValidationRows};
use crate::Result;
use crate::config::SweepMetric;
use crate::device::PeakMemory;
use crate::run::{Recorder, RunFolder, Status, Summary, Tuning};
use crate::tune::{Observer, Trainer, plan_pack};
use std::rc::Rc;

impl Sweep<'_> {
    /// Continues the trials of `pack`, which are indices, until each has ended its epoch or has ended. If the device's memory
    /// does not suffice for all of them together, each continues alone.
    pub(super) fn advance(&mut self, pack: &[usize], watch: &dyn SweepObserver) -> Result<()> {
        let Some(summaries) = self.turn(pack, watch)? else {
            return pack.iter().try_for_each(|trial| self.advance(&[*trial], watch));
        };
        for (trial, summary) in pack.iter().zip(summaries) {
            self.trials[*trial].epoch = summary.epochs;
            self.trials[*trial].summary = Some(summary);
            if !self.trials[*trial].is_live() {
                self.end(*trial, watch)?;
            }
        }
        Ok(())
    }

    /// The summaries of the trials of `pack` after their turn; `None` if a pass of several could not be computed.
    fn turn(&self, pack: &[usize], watch: &dyn SweepObserver) -> Result<Option<Vec<Summary>>> {
        let trials: Vec<&Trial> = pack.iter().map(|trial| &self.trials[*trial]).collect();
        let tunings = trials.iter().map(|trial| self.tuning(trial)).collect::<Result<Vec<_>>>()?;
        let mut trainer = self.trainer(&tunings)?;
        let mut folders = trials
            .iter()
            .zip(&tunings)
            .map(|(trial, tuning)| run_folder(trial, tuning))
            .collect::<Result<Vec<_>>>()?;
        let mut observers: Vec<_> = trials.iter().map(|trial| TrialObserver { trial, watch }).collect();
        let mut memories: Vec<Box<dyn PeakMemory>> = trials.iter().map(|_| watch.memory()).collect();
        let mut recorders: Vec<Recorder> = Vec::with_capacity(pack.len());
        let parts = folders.iter_mut().zip(&mut memories).zip(&mut observers);
        for (i, ((folder, memory), observer)) in parts.enumerate() {
            recorders.push(tunings[i].recorder(&trainer.runs()[i], folder, memory.as_mut(), observer)?);
        }
        let mut watched: Vec<&mut dyn Observer> = Vec::with_capacity(pack.len());
        watched.extend(recorders.iter_mut().map(|recorder| recorder as &mut dyn Observer));
        let statuses: Vec<Status> = match trainer.run_all(&mut watched) {
            Ok(outcomes) => outcomes.iter().map(Status::new).collect(),
            Err(_) if pack.len() > 1 => return Ok(None),
            Err(error) => vec![Status::new(&Err(error))],
        };
        let parts = tunings.iter().zip(trainer.runs()).zip(recorders).zip(statuses);
        let finish = |(((tuning, run), recorder), status): (((&Tuning, _), _), _)| {
            tuning.finish(run, recorder, status)
        };
        parts.map(finish).collect::<Result<Vec<_>>>().map(Some)
    }

    /// The run of a trial, as it continues.
    fn tuning<'t>(&'t self, trial: &'t Trial) -> Result<Tuning<'t>> {
        Tuning::with_data(&trial.config, self.session, Rc::clone(self.data(trial)?), trial.state()?)
    }

    /// The trainer of one run is that of `gneiss tune`; that of several plans the memory for all of them.
    fn trainer<'t>(&self, tunings: &'t [Tuning]) -> Result<Trainer<'t>>
    where
        Self: 't,
    {
        if let [tuning] = tunings {
            return tuning.trainer();
        }
        let runs = tunings.iter().map(Tuning::prompt_run).collect::<Result<Vec<_>>>()?;
        let model = tunings[0].model();
        let limits = plan_pack(model, &runs)?.limits;
        let trainer = Trainer::with_runs(model, limits, runs)?;
        if let Some(state) = &tunings[0].state {
            trainer.use_products(state)?;
        }
        Ok(trainer)
    }

    /// Prunes a trial at the end of its epoch.
    pub(super) fn prune(&mut self, trial: usize, watch: &dyn SweepObserver) -> Result<()> {
        let pruned = &self.trials[trial];
        let tuning = self.tuning(pruned)?;
        let trainer = tuning.trainer()?;
        let mut folder = run_folder(pruned, &tuning)?;
        let (mut memory, mut observer) = (watch.memory(), TrialObserver { trial: pruned, watch });
        let recorder = tuning.recorder(trainer.first(), &mut folder, memory.as_mut(), &mut observer)?;
        let summary = tuning.finish(trainer.first(), recorder, Status::Pruned)?;
        self.trials[trial].summary = Some(summary);
        self.end(trial, watch)
    }

    /// Takes the losses of the validation rows of a trial that has ended, and tells the observer.
    fn end(&self, trial: usize, watch: &dyn SweepObserver) -> Result<()> {
        let trial = &self.trials[trial];
        let Some(summary) = &trial.summary else { return Ok(()) };
        if !matches!(summary.status, Status::Failed { .. }) {
            self.validation(trial)?;
        }
        watch.ended(trial, summary)
    }

    /// What the prompt that a trial keeps gives on the validation rows; taken unless the folder has it. `None` if the prompt
    /// gives no finite loss.
    pub(super) fn validation(&self, trial: &Trial) -> Result<Option<ValidationRows>> {
        if let Some(rows) = trial.validation()? {
            return Ok(Some(rows));
        }
        let summary = trial.summary.as_ref();
        if !summary.and_then(|summary| summary.validation_loss).is_some_and(f64::is_finite) {
            return Ok(None);
        }
        let accuracy = self.config.sweep.metric == SweepMetric::ValidationAccuracy;
        ValidationRows::take(self.session, trial, self.data(trial)?, accuracy)
    }
}

/// The folder of a trial. What a trial has recorded before its first checkpoint is removed, because it begins again.
fn run_folder(trial: &Trial, tuning: &Tuning) -> Result<RunFolder> {
    RunFolder::go_on(&trial.folder(), tuning.state.as_ref(), &trial.config.to_toml()?)
}
