//! The progress of a sweep: a table on a terminal, lines otherwise, and lines of JSON on stdout if they are asked for.

use crate::cli::{interrupt, process, progress, stderr};
use candle_core::Device;
use gneiss::device::{DeviceMemory, PeakMemory};
use gneiss::report;
use gneiss::run::{Run, Status, Summary};
use gneiss::sweep::{Sweep, SweepObserver, SweepRecord, Trial};
use gneiss::tune::{EpochRecord, Limits, StepRecord};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io::IsTerminal;

/// Trials that have a row of their own on a terminal.
const MAX_ROWS: usize = 24;

/// Shows the progress of a sweep.
pub(super) struct SweepProgress {
    device: Device,
    json: bool,
    /// Epochs of all trials.
    bar: ProgressBar,
    /// A row for each trial, unless there are too many.
    rows: Vec<ProgressBar>,
    /// Warnings that were printed: those about the data are the same for all trials.
    said: RefCell<BTreeSet<String>>,
}

/// A line of JSON about a trial.
#[derive(Serialize)]
struct TrialLine<'a, T: Serialize> {
    event: &'static str,
    trial: usize,
    run: String,
    #[serde(flatten)]
    content: &'a T,
}

impl SweepProgress {
    pub fn new(sweep: &Sweep, device: &Device, json: bool) -> Self {
        let is_terminal = std::io::stderr().is_terminal() && stderr::allows_bars();
        let target = if is_terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let table = MultiProgress::with_draw_target(target);
        let epochs: usize = sweep.trials.iter().map(|trial| trial.config.train.num_epochs).sum();
        let bar = table.add(progress::bar(
            epochs,
            "sweep",
            "{prefix:>10} {bar:30} {pos}/{len} epochs {msg}, {eta} left",
        ));
        let shown = if is_terminal && sweep.trials.len() <= MAX_ROWS { sweep.trials.len() } else { 0 };
        let style =
            ProgressStyle::with_template("{wide_msg}").unwrap_or_else(|_| ProgressStyle::default_bar());
        let row = |_| table.add(ProgressBar::new(1).with_style(style.clone()));
        let rows: Vec<ProgressBar> = (0..shown).map(row).collect();
        for (row, trial) in rows.iter().zip(&sweep.trials) {
            row.set_message(format!("{:>10} {}", trial.name(), trial.settings()));
        }
        Self { device: device.clone(), json, bar, rows, said: RefCell::default() }
    }

    /// Takes the table off the terminal.
    pub fn finish(&self) {
        self.rows.iter().for_each(ProgressBar::finish_and_clear);
        self.bar.finish_and_clear();
    }

    /// The epochs of a trial that ended after `epochs` are not to be waited for.
    fn leave_out(&self, trial: &Trial, epochs: usize) {
        let left = trial.config.train.num_epochs.saturating_sub(epochs);
        self.bar.set_length(self.bar.length().unwrap_or(0).saturating_sub(left as u64));
    }

    fn row(&self, trial: &Trial, text: &str) {
        if let Some(row) = self.rows.get(trial.number - 1) {
            row.set_message(format!("{:>10} {}: {text}", trial.name(), trial.settings()));
        }
    }

    fn line(&self, text: &str) {
        progress::line(&self.bar, text);
    }

    fn json<T: Serialize>(&self, line: &T) {
        if self.json
            && let Ok(line) = serde_json::to_string(line)
        {
            println!("{line}");
        }
    }

    fn trial_json<T: Serialize>(&self, event: &'static str, trial: &Trial, content: &T) {
        let run = trial.folder().display().to_string();
        self.json(&TrialLine { event, trial: trial.number, run, content });
    }
}

/// `001, 002`.
fn names(trials: &[usize]) -> String {
    trials.iter().map(|trial| format!("{trial:03}")).collect::<Vec<_>>().join(", ")
}

impl SweepObserver for SweepProgress {
    /// Earlier parts of the sweep, and other ranks, have done some of the epochs.
    fn loaded(&self, trials: &[Trial]) {
        let epochs = |trial: &Trial| trial.summary.as_ref().map_or(0, |summary| summary.epochs);
        let all = |trial: &Trial| if trial.is_live() { trial.config.train.num_epochs } else { epochs(trial) };
        let done = trials.iter().map(epochs).sum::<usize>() as u64;
        self.bar.set_length(trials.iter().map(all).sum::<usize>() as u64);
        if self.bar.position() != done {
            self.bar.set_position(done);
            self.bar.reset_eta();
        }
    }

    fn step(&self, trial: &Trial, record: &StepRecord) {
        stderr::event("step", Some(trial.number), record);
        let StepRecord { epoch, step, loss, .. } = record;
        let epochs = trial.config.train.num_epochs;
        self.row(trial, &format!("epoch {epoch} of {epochs}, step {step}, loss {loss:.4}"));
        self.bar.set_message(format!("trial {}", trial.name()));
    }

    fn skipped(&self, trial: &Trial, step: usize, what: &str, value: f64) {
        self.line(&format!("trial {}: step {step}: skipped, {what} is {value}", trial.name()));
    }

    fn out_of_memory(&self, limits: Limits) {
        progress::out_of_memory(&self.bar, limits);
    }

    fn epoch(&self, trial: &Trial, record: &EpochRecord) {
        self.bar.inc(1);
        stderr::event("epoch", Some(trial.number), record);
        let loss = |loss: Option<f64>| loss.map_or("none".into(), |loss| format!("{loss:.4}"));
        let (train, validation) = (loss(record.train_loss), loss(record.validation_loss));
        let text = format!("epoch {}: training loss {train}, validation loss {validation}", record.epoch);
        if self.rows.is_empty() && !stderr::is_json() {
            self.line(&format!("trial {} {text}, {:.1} s", trial.name(), record.seconds));
        }
        self.row(trial, &text);
        self.trial_json("epoch", trial, record);
    }

    fn warning(&self, trial: &Trial, text: &str) {
        if self.said.borrow_mut().insert(text.to_owned()) {
            progress::warning(&self.bar, &format!("trial {}: {text}", trial.name()));
        }
    }

    fn ended(&self, trial: &Trial, summary: &Summary) -> gneiss::Result<()> {
        self.leave_out(trial, summary.epochs);
        let loss = summary.validation_loss.map_or("none".into(), |loss| format!("{loss:.4}"));
        let text = format!("{} after epoch {}, validation loss {loss}", summary.status, summary.epochs);
        if self.rows.is_empty() || matches!(summary.status, Status::Failed { .. }) {
            self.line(&format!("trial {} {text}", trial.name()));
        }
        self.row(trial, &text);
        report::write(&Run::read(&trial.folder())?)?;
        self.trial_json("ended", trial, summary);
        Ok(())
    }

    fn decided(&self, record: &SweepRecord) {
        match record {
            SweepRecord::Postponed { epoch, leader, validation_loss, chance } => self.line(&format!(
                "epoch {epoch}: no trial is pruned yet: the validation loss of the best one, {leader:03}, is \
                 {validation_loss:.4}, and guessing the labels gives {chance:.4}"
            )),
            SweepRecord::Rung { epoch, kept, pruned } if !pruned.is_empty() => self.line(&format!(
                "epoch {epoch}: {} of {} trials stay: {}",
                kept.len(),
                kept.len() + pruned.len(),
                names(kept)
            )),
            SweepRecord::Rung { .. } | SweepRecord::Started { .. } | SweepRecord::Best { .. } => {}
        }
        self.json(record);
    }

    fn interrupted(&self) -> bool {
        interrupt::asked()
    }

    fn memory(&self) -> Box<dyn PeakMemory> {
        peak_memory(&self.device)
    }
}

/// What measures a trial's memory: that of the process on a CPU, otherwise that of the device.
pub(super) fn peak_memory(device: &Device) -> Box<dyn PeakMemory> {
    match device {
        Device::Cpu => Box::new(process::ProcessMemory),
        device => Box::new(DeviceMemory::new(device)),
    }
}
