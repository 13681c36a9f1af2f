//! The observer that writes a run's folder.

use super::tensorboard::EventFile;
use super::{RunFolder, Summary};
use crate::Result;
use crate::device::PeakMemory;
use crate::prompt::Prefix;
use crate::tune::health::Health;
use crate::tune::{EpochRecord, Limits, Observer, State, StepRecord};

/// Sums over the steps of all parts of the run.
#[derive(Default)]
pub(super) struct Rates {
    examples: usize,
    seconds: f64,
}

impl Rates {
    pub fn sum(steps: &[StepRecord]) -> Self {
        let mut rates = Self::default();
        steps.iter().for_each(|step| rates.add(step));
        rates
    }

    fn add(&mut self, step: &StepRecord) {
        self.examples += step.examples;
        self.seconds += step.seconds;
    }

    pub fn write(&self, summary: &mut Summary, memory: &dyn PeakMemory) {
        if self.seconds > 0.0 {
            summary.examples_per_second = self.examples as f64 / self.seconds;
        }
        summary.peak_memory_bytes = summary.peak_memory_bytes.max(memory.peak());
    }
}

/// Writes the events of a run, monitors its health, and passes everything on.
pub struct Recorder<'a> {
    pub(super) folder: &'a mut RunFolder,
    pub(super) events: Option<EventFile>,
    pub(super) health: Health,
    pub(super) summary: Summary,
    pub(super) rates: Rates,
    pub(super) memory: &'a mut dyn PeakMemory,
    pub(super) watch: &'a mut dyn Observer,
}

impl Recorder<'_> {
    fn warn(&mut self, text: Option<String>) -> Result<()> {
        let Some(text) = text else { return Ok(()) };
        self.watch.warning(&text)?;
        self.summary.warnings.push(text);
        Ok(())
    }
}

impl Observer for Recorder<'_> {
    fn step(&mut self, record: &StepRecord) -> Result<()> {
        self.folder.record(record)?;
        if let Some(events) = &mut self.events {
            events.step(record)?;
        }
        self.memory.step();
        self.rates.add(record);
        self.watch.step(record)?;
        let found = self.health.step(record);
        self.warn(found)
    }

    fn skipped(&mut self, step: usize, what: &str, value: f64) -> Result<()> {
        self.watch.skipped(step, what, value)?;
        let found = self.health.skipped(step, what, value);
        self.warn(found)
    }

    fn out_of_memory(&mut self, limits: Limits) -> Result<()> {
        self.watch.out_of_memory(limits)
    }

    fn epoch(&mut self, record: &EpochRecord) -> Result<()> {
        self.folder.record(record)?;
        if let Some(events) = &mut self.events {
            events.epoch(record)?;
        }
        self.watch.epoch(record)?;
        let found = self.health.epoch(record);
        self.warn(found)
    }

    fn checkpoint(&mut self, state: &State) -> Result<()> {
        self.folder.checkpoint(state)?;
        let position = &state.position;
        self.summary.reach(position, position.elapsed);
        self.rates.write(&mut self.summary, self.memory);
        if !position.open
            && let Prefix::Embeddings(rows) = state.prompt.prefix()?
        {
            let found = self.health.prompt(&rows)?;
            self.warn(found)?;
        }
        self.folder.summary(&self.summary)?;
        self.watch.checkpoint(state)
    }

    fn latest(&mut self, state: &dyn Fn() -> Result<State>) -> Result<()> {
        self.watch.latest(state)
    }

    fn warning(&mut self, text: &str) -> Result<()> {
        self.warn(Some(text.to_owned()))
    }

    fn pauses(&self) -> bool {
        self.watch.pauses()
    }

    fn interrupted(&self) -> bool {
        self.watch.interrupted()
    }
}
