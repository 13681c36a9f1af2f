//! What a sweep tells while it goes on.

use super::{SweepRecord, Trial};
use crate::Result;
use crate::device::PeakMemory;
use crate::run::Summary;
use crate::tune::{EpochRecord, Limits, Observer, StepRecord};

/// Receives the events of a sweep. Several trials can be under way at once.
pub trait SweepObserver {
    /// The trials' summaries were read from their folders: at the beginning, and before and after each decision.
    fn loaded(&self, trials: &[Trial]);
    /// A trial has taken a step.
    fn step(&self, trial: &Trial, record: &StepRecord);
    /// A trial has left out a step because its `what` was `value`.
    fn skipped(&self, trial: &Trial, step: usize, what: &str, value: f64);
    /// The device ran out of memory; the step is tried again under `limits`.
    fn out_of_memory(&self, limits: Limits);
    /// A trial has ended an epoch.
    fn epoch(&self, trial: &Trial, record: &EpochRecord);
    /// Something looks wrong with a trial.
    fn warning(&self, trial: &Trial, text: &str);
    /// A trial has completed, failed or was pruned; its folder is written but for the report.
    ///
    /// # Errors
    /// May return any error; it ends the sweep.
    fn ended(&self, trial: &Trial, summary: &Summary) -> Result<()>;
    /// The sweep has decided something.
    fn decided(&self, record: &SweepRecord);
    /// Whether someone wants the sweep to end; asked after each step.
    fn interrupted(&self) -> bool;
    /// What measures a trial's memory.
    fn memory(&self) -> Box<dyn PeakMemory>;
}

/// Passes the events of one trial on, and ends its turn after an epoch.
pub(super) struct TrialObserver<'a> {
    pub trial: &'a Trial,
    pub watch: &'a dyn SweepObserver,
}

impl Observer for TrialObserver<'_> {
    fn step(&mut self, record: &StepRecord) -> Result<()> {
        self.watch.step(self.trial, record);
        Ok(())
    }

    fn skipped(&mut self, step: usize, what: &str, value: f64) -> Result<()> {
        self.watch.skipped(self.trial, step, what, value);
        Ok(())
    }

    fn out_of_memory(&mut self, limits: Limits) -> Result<()> {
        self.watch.out_of_memory(limits);
        Ok(())
    }

    fn epoch(&mut self, record: &EpochRecord) -> Result<()> {
        self.watch.epoch(self.trial, record);
        Ok(())
    }

    fn warning(&mut self, text: &str) -> Result<()> {
        self.watch.warning(self.trial, text);
        Ok(())
    }

    fn pauses(&self) -> bool {
        true
    }

    fn interrupted(&self) -> bool {
        self.watch.interrupted()
    }
}
