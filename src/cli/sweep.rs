//! `gneiss sweep`: many runs that differ in some keys, of which the worse ones are pruned.

mod progress;

use super::interrupt::{self, Interrupted};
use super::{Overrides, text};
use clap::Args;
use gneiss::config::{Config, SweepMetric};
use gneiss::layout::{BEST, SWEEP_REPORT};
use gneiss::report;
use gneiss::run::Status;
use gneiss::sweep::{Estimate, Sweep, SweepFolder, SweepResult, TrialResult};
use gneiss::tune::Ended;
use progress::SweepProgress;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// Tunes a soft prompt for each combination of the values in [sweep.parameters], and prunes the worse ones on the way.
///
/// Writes RUNS/NAME: the run folder of each trial in trials/NNN, a link to the best one, and sweep.html. The test file is
/// not read; `gneiss eval CONFIG --adapter RUNS/NAME/best` does that, once.
#[derive(Args)]
#[command(group = clap::ArgGroup::new("sweep_of").required(true).args(["config", "resume"]))]
pub struct SweepArgs {
    /// The configuration, with a table [sweep.parameters].
    config: Option<PathBuf>,
    /// Continue the sweep in this folder, such as runs/tutorial.
    #[arg(long, value_name = "SWEEP", conflicts_with_all = ["config", "sets", "model", "device", "dtype"])]
    resume: Option<PathBuf>,
    #[command(flatten)]
    overrides: Overrides,
    /// Print a line of JSON for each epoch, decision and trial.
    #[arg(long)]
    json: bool,
}

impl SweepArgs {
    /// Runs the subcommand.
    pub fn run(self) -> anyhow::Result<()> {
        match (&self.resume, &self.config) {
            (Some(folder), _) => {
                let (folder, config) = SweepFolder::open(folder)?;
                run(&config, Some(folder), self.json)
            }
            (None, config) => {
                let config = self.overrides.load(config.as_deref().unwrap_or(Path::new("")))?;
                run(&config, None, self.json)
            }
        }
    }
}

/// The result of a sweep as JSON.
#[derive(Serialize)]
struct SweepOutcome<'a> {
    event: &'static str,
    sweep: String,
    best: String,
    report: String,
    trials: &'a [TrialResult],
}

/// Runs a sweep from the beginning, or from where `folder` says that it is.
pub(super) fn run(config: &Config, folder: Option<SweepFolder>, json: bool) -> anyhow::Result<()> {
    // Before the model is loaded.
    config.trials()?;
    let session = super::progress::open(&config.model)?;
    let mut sweep = Sweep::prepare(config, &session)?;
    let (warnings, notes) = sweep.remarks();
    notes.iter().for_each(|text| status!("note       {text}"));
    warnings.iter().for_each(super::warn);
    let is_resumed = folder.is_some();
    let mut folder = match folder {
        Some(folder) => folder,
        None => SweepFolder::create(config)?,
    };
    if let Some(moved) = &folder.moved {
        status!("sweep      an earlier run or sweep of this name is now {}", moved.display());
    }
    let (trials, epochs) = (sweep.trials.len(), sweep.epochs());
    let resumed = if is_resumed { "resumed" } else { "sweep" };
    status!("{resumed:<10} {trials} trials of up to {epochs} epochs, in {}", folder.path.display());
    let _guard = interrupt::Guard::new()?;
    let watch = SweepProgress::new(&sweep, session.model.device(), json);
    if is_resumed {
        watch.skip(&sweep, &SweepResult::read(&folder.path)?);
    }
    let outcome = sweep.run(&mut folder, &watch);
    watch.finish();
    // Also after an error: the page shows the sweep up to there.
    let result = SweepResult::read(&folder.path).and_then(|result| {
        report::write_sweep(&result)?;
        Ok(result)
    });
    let ended = outcome?;
    let result = result?;
    if ended == Ended::Interrupted {
        let text = format!("interrupted; go on with: gneiss sweep --resume {}", folder.path.display());
        return Err(Interrupted(text).into());
    }
    let path = |name: &str| folder.path.join(name).display().to_string();
    if json {
        let outcome = SweepOutcome {
            event: "finished",
            sweep: folder.path.display().to_string(),
            best: path(BEST),
            report: path(SWEEP_REPORT),
            trials: &result.trials,
        };
        println!("{}", serde_json::to_string(&outcome)?);
    } else {
        print(&result);
        println!("\nbest       {}\nreport     {}", path(BEST), path(SWEEP_REPORT));
        super::tune::hint(&folder.path.join(BEST), config);
    }
    Ok(())
}

/// The trials as a table, the best first.
fn print(result: &SweepResult) {
    let has_accuracy = result.trials.iter().any(|trial| trial.validation_accuracy.is_some());
    let mut header = vec!["trial".to_owned()];
    header.extend(result.keys.iter().map(|key| key.rsplit('.').next().unwrap_or(key).to_owned()));
    header.extend(["epochs", "status", "validation loss"].map(str::to_owned));
    header.extend(has_accuracy.then(|| "accuracy".to_owned()));
    header.push(String::new());
    let mut rows = vec![header];
    for trial in &result.trials {
        let mut row = vec![format!("{:03}", trial.trial)];
        row.extend(trial.values.iter().map(|value| text::short(value, 24)));
        row.push(trial.epochs.to_string());
        row.push(trial.status.as_ref().map_or("not begun".into(), status));
        row.push(trial.validation_loss.map_or("none".into(), |loss| estimate(loss, 1.0, 4)));
        if has_accuracy {
            row.push(
                trial.validation_accuracy.map_or("none".into(), |share| estimate(share, 100.0, 1) + " %"),
            );
        }
        row.push(mark(trial).to_owned());
        rows.push(row);
    }
    println!("{}", text::table(&rows));
    let near = result.trials.iter().filter(|trial| trial.is_near_best).count();
    if let (1.., Some(best)) = (near, result.best()) {
        let metric = match result.config.sweep.metric {
            SweepMetric::ValidationLoss => "loss",
            SweepMetric::ValidationAccuracy => "accuracy",
        };
        println!(
            "\nNot told apart: within one standard error of the {metric} of trial {:03} on the validation rows.",
            best.trial
        );
    }
}

/// A short name of a trial's status; the reason of a failure is in its summary.
fn status(status: &Status) -> String {
    match status {
        Status::Failed { .. } => "failed".into(),
        Status::StoppedEarly => "stopped early".into(),
        other => other.to_string(),
    }
}

fn mark(trial: &TrialResult) -> &'static str {
    match (trial.is_best, trial.is_near_best) {
        (true, _) => "best",
        (_, true) => "not told apart",
        _ => "",
    }
}

/// `0.1234 ± 0.0056`.
fn estimate(estimate: Estimate, scale: f64, decimals: usize) -> String {
    let Estimate { value, standard_error } = estimate;
    let value = format!("{:.decimals$}", scale * value);
    match standard_error.is_finite() {
        true => format!("{value} ± {:.decimals$}", scale * standard_error),
        false => value,
    }
}
