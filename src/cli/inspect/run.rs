//! A run folder: its adapter and its losses.

use super::adapter::{self, AdapterReport};
use super::{Report, count, line};
use gneiss::layout::{ADAPTER, METRICS};
use gneiss::run::read::steps_and_epochs;
use gneiss::tune::{EpochRecord, StepRecord};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// A run.
#[derive(Serialize)]
pub struct RunReport {
    run: PathBuf,
    steps: usize,
    epochs: usize,
    seconds: f64,
    /// Lines of metrics.jsonl.
    first_step: Option<StepRecord>,
    last_step: Option<StepRecord>,
    last_epoch: Option<EpochRecord>,
    best_epoch: Option<EpochRecord>,
    /// The tuned prompt; `None` while the run goes on.
    adapter: Option<AdapterReport>,
}

/// Inspects a run; `model` replaces the base model that its adapter names.
pub fn inspect(path: &Path, model: Option<&str>) -> anyhow::Result<RunReport> {
    let (steps, epochs) = steps_and_epochs(&path.join(METRICS))?;
    let folder = path.join(ADAPTER);
    let adapter = if folder.is_dir() {
        Some(adapter::inspect(&folder, None, model)?)
    } else {
        status!("adapter    none yet: {} is not there", folder.display());
        None
    };
    let best = |a: &&EpochRecord, b: &&EpochRecord| loss(a).total_cmp(&loss(b));
    Ok(RunReport {
        run: path.to_path_buf(),
        steps: steps.len(),
        epochs: epochs.len(),
        seconds: steps.iter().map(|step| step.seconds).sum(),
        first_step: steps.first().cloned(),
        last_step: steps.last().cloned(),
        last_epoch: epochs.last().cloned(),
        best_epoch: epochs.iter().min_by(best).cloned(),
        adapter,
    })
}

/// The loss by which an epoch is judged: the validation's, otherwise the training's.
fn loss(epoch: &EpochRecord) -> f64 {
    epoch.validation_loss.or(epoch.train_loss).unwrap_or(f64::INFINITY)
}

impl Report for RunReport {
    fn print(&self) {
        line("run", self.run.display());
        line("length", format!("{}, {}", count(self.steps, "step"), count(self.epochs, "whole epoch")));
        line("time", format!("{:.1} s of steps", self.seconds));
        let number = |loss: Option<f64>| loss.map_or_else(|| "none".to_owned(), |loss| format!("{loss:.4}"));
        for (key, step) in [("first", &self.first_step), ("last", &self.last_step)] {
            let Some(step) = step else { continue };
            line(key, format!("step {}, loss {:.4}", step.step, step.loss));
        }
        for (key, epoch) in [("last epoch", &self.last_epoch), ("best epoch", &self.best_epoch)] {
            let Some(epoch) = epoch else { continue };
            line(
                key,
                format!(
                    "{}, step {}, training loss {}, validation loss {}",
                    epoch.epoch,
                    epoch.step,
                    number(epoch.train_loss),
                    number(epoch.validation_loss)
                ),
            );
        }
        if let Some(adapter) = &self.adapter {
            println!();
            adapter.print();
        }
    }
}
