//! A run folder: its adapter, and the course of its loss.

use super::adapter::{self, AdapterReport};
use super::{Report, count, line};
use gneiss::Error;
use serde::Serialize;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// A run.
#[derive(Serialize)]
pub struct RunReport {
    run: PathBuf,
    steps: usize,
    epochs: usize,
    seconds: f64,
    /// Lines of metrics.jsonl.
    first_step: Option<Value>,
    last_step: Option<Value>,
    last_epoch: Option<Value>,
    best_epoch: Option<Value>,
    /// The tuned prompt; none while the run is under way.
    adapter: Option<AdapterReport>,
}

/// Looks at a run; `model` is used in the place of the base model that its adapter names.
pub fn inspect(path: &Path, model: Option<&str>) -> anyhow::Result<RunReport> {
    let (epochs, steps): (Vec<_>, Vec<_>) = metrics(&path.join("metrics.jsonl"))?
        .into_iter()
        .partition(|record| record.get("train_loss").is_some());
    let folder = path.join("adapter");
    let adapter = if folder.is_dir() {
        Some(adapter::inspect(&folder, model)?)
    } else {
        eprintln!("adapter    none yet: {} is not there", folder.display());
        None
    };
    let best = |a: &&Value, b: &&Value| loss(a).total_cmp(&loss(b));
    Ok(RunReport {
        run: path.to_path_buf(),
        steps: steps.len(),
        epochs: epochs.len(),
        seconds: steps.iter().filter_map(|step| step["seconds"].as_f64()).sum(),
        first_step: steps.first().cloned(),
        last_step: steps.last().cloned(),
        last_epoch: epochs.last().cloned(),
        best_epoch: epochs.iter().min_by(best).cloned(),
        adapter,
    })
}

/// What an epoch is judged by: the validation's loss, else the training's.
fn loss(epoch: &Value) -> f64 {
    let loss = epoch["validation_loss"].as_f64().or_else(|| epoch["train_loss"].as_f64());
    loss.unwrap_or(f64::INFINITY)
}

/// The records of metrics.jsonl. A run under way may have written the last one in part.
fn metrics(path: &Path) -> anyhow::Result<Vec<Value>> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let (mut records, mut problems) = (Vec::new(), Vec::new());
    for (i, line) in text.split_inclusive('\n').enumerate() {
        match serde_json::from_str::<Value>(line) {
            Ok(record) if record.get("loss").or(record.get("train_loss")).is_some() => records.push(record),
            Err(_) if !line.ends_with('\n') => eprintln!("metrics    line {} is not whole yet", i + 1),
            Ok(_) => problems.push(format!("line {}: expected `loss` or `train_loss`, found neither", i + 1)),
            Err(error) => problems.push(format!("line {}: expected a JSON object: {error}", i + 1)),
        }
    }
    if problems.is_empty() {
        return Ok(records);
    }
    Err(Error::Data { path: path.to_path_buf(), problems, more: 0 }.into())
}

impl Report for RunReport {
    fn print(&self) {
        line("run", self.run.display());
        line("length", format!("{}, {}", count(self.steps, "step"), count(self.epochs, "whole epoch")));
        line("time", format!("{:.1} s of steps", self.seconds));
        let number = |record: &Value, key: &str| {
            record[key].as_f64().map_or_else(|| "none".to_owned(), |loss| format!("{loss:.4}"))
        };
        for (key, step) in [("first", &self.first_step), ("last", &self.last_step)] {
            let Some(step) = step else { continue };
            line(key, format!("step {}, loss {}", step["step"], number(step, "loss")));
        }
        for (key, epoch) in [("last epoch", &self.last_epoch), ("best epoch", &self.best_epoch)] {
            let Some(epoch) = epoch else { continue };
            line(
                key,
                format!(
                    "{}, step {}, training loss {}, validation loss {}",
                    epoch["epoch"],
                    epoch["step"],
                    number(epoch, "train_loss"),
                    number(epoch, "validation_loss")
                ),
            );
        }
        if let Some(adapter) = &self.adapter {
            println!();
            adapter.print();
        }
    }
}
