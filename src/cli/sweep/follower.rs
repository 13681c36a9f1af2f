//! What a rank says that tunes trials of a sweep for rank 0.

use super::progress::peak_memory;
use crate::cli::interrupt;
use candle_core::Device;
use gneiss::device::PeakMemory;
use gneiss::report;
use gneiss::run::{Run, Summary};
use gneiss::sweep::{SweepObserver, SweepRecord, Trial};
use gneiss::tune::{EpochRecord, Limits, StepRecord};

/// Prints a line for each trial that ends, and warnings, both with the rank.
pub(super) struct SweepFollower {
    pub(super) rank: usize,
    pub(super) device: Device,
}

impl SweepFollower {
    fn warn(&self, text: &str) {
        crate::cli::warn(format_args!("[rank {}] {text}", self.rank));
    }
}

impl SweepObserver for SweepFollower {
    fn loaded(&self, _trials: &[Trial]) {}

    fn step(&self, _trial: &Trial, _record: &StepRecord) {}

    fn skipped(&self, trial: &Trial, step: usize, what: &str, value: f64) {
        self.warn(&format!("trial {}: step {step}: skipped, {what} is {value}", trial.name()));
    }

    fn out_of_memory(&self, limits: Limits) {
        self.warn(&format!("out of memory; the step is tried again with passes of {} rows", limits.max_rows));
    }

    fn epoch(&self, _trial: &Trial, _record: &EpochRecord) {}

    fn warning(&self, trial: &Trial, text: &str) {
        self.warn(&format!("trial {}: {text}", trial.name()));
    }

    fn ended(&self, trial: &Trial, summary: &Summary) -> gneiss::Result<()> {
        let Summary { status, epochs, .. } = summary;
        status!("[rank {}] trial {} {status} after epoch {epochs}", self.rank, trial.name());
        report::write(&Run::read(&trial.folder())?).map(drop)
    }

    fn decided(&self, _record: &SweepRecord) {}

    fn interrupted(&self) -> bool {
        interrupt::asked()
    }

    fn memory(&self) -> Box<dyn PeakMemory> {
        peak_memory(&self.device)
    }
}
