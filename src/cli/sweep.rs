//! `gneiss sweep`: many runs that differ in some keys, of which the worse ones are pruned.

mod follower;
mod progress;

use super::interrupt::{self, Interrupted};
use super::{Overrides, launch, text};
use clap::Args;
use follower::SweepFollower;
use gneiss::config::{Config, SweepMetric};
use gneiss::files::FolderLock;
use gneiss::layout::{BEST, SWEEP_REPORT};
use gneiss::ranks::{Alone, Ranks};
use gneiss::report;
use gneiss::run::Status;
use gneiss::session::Session;
use gneiss::sweep::{Estimate, Shard, Sweep, SweepFolder, SweepResult, TrialResult};
use gneiss::tune::Ended;
use progress::SweepProgress;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// Tunes a soft prompt for each combination of the values in [sweep.parameters], and prunes the worse ones on the way.
///
/// Writes RUNS/NAME: the run folder of each trial in trials/NNN, a link to the best one, and sweep.html. The test file is
/// not read; `gneiss eval CONFIG --adapter RUNS/NAME/best` does that, once.
#[derive(Args)]
#[command(group = clap::ArgGroup::new("sweep_of").required(true).args(["config", "resume", "collect"]))]
pub struct SweepArgs {
    /// The configuration, with a table [sweep.parameters].
    config: Option<PathBuf>,
    /// Continue the sweep in this folder, such as runs/tutorial.
    #[arg(long, value_name = "SWEEP", conflicts_with_all = ["config", "sets", "model", "device", "dtype"])]
    resume: Option<PathBuf>,
    /// Tune only every N-th trial, from number I on, counted from 0: one of N processes that need not know of each other, such as a
    /// Slurm array. Started again, it goes on. The sweep may not prune.
    #[arg(long, value_name = "I/N", conflicts_with_all = ["resume", "collect"])]
    shard: Option<Shard>,
    /// Choose the best trial of the sweep in this folder, whose shards have all ended.
    #[arg(long, value_name = "SWEEP", conflicts_with_all = ["config", "sets", "model", "device", "dtype"])]
    collect: Option<PathBuf>,
    #[command(flatten)]
    overrides: Overrides,
    /// Print a line of JSON for each epoch, decision and trial.
    #[arg(long)]
    json: bool,
}

impl SweepArgs {
    /// Runs the subcommand: on one or several ranks, or as a shard, which knows of no others.
    pub fn run(self) -> anyhow::Result<()> {
        if let Some(shard) = self.shard {
            let config = self.new_config()?;
            return continue_sweep(&config, None, SweepPart::Shard(shard), self.json, &Alone);
        }
        if let Some(folder) = &self.collect {
            launch::refuse("sweep --collect")?;
            let (folder, config) = SweepFolder::open(folder)?;
            return continue_sweep(&config, Some(folder), SweepPart::Choice, self.json, &Alone);
        }
        launch::with_ranks(|ranks| {
            let (folder, config) = launch::all(ranks, self.order(ranks))?;
            run(&config, folder, self.json, ranks)
        })
    }

    fn new_config(&self) -> anyhow::Result<Config> {
        self.overrides.load(self.config.as_deref().unwrap_or(Path::new("")))
    }

    /// The configuration, and on rank 0 the folder of a sweep that continues.
    fn order(&self, ranks: &dyn Ranks) -> anyhow::Result<(Option<SweepFolder>, Config)> {
        match &self.resume {
            None => {
                let config = self.new_config()?;
                if ranks.rank() == 0 {
                    FolderLock::check_free(&config.folder())?;
                }
                Ok((None, config))
            }
            Some(folder) if ranks.rank() == 0 => {
                let (folder, config) = SweepFolder::open(folder)?;
                Ok((Some(folder), config))
            }
            Some(folder) => Ok((None, SweepFolder::config(folder)?)),
        }
    }
}

/// What a process does of a sweep.
#[derive(Clone, Copy)]
enum SweepPart {
    All,
    Shard(Shard),
    /// The choice among trials that have ended.
    Choice,
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

/// Runs a sweep from the beginning, or from where `folder`, which rank 0 has, says that it is.
pub(super) fn run(
    config: &Config,
    folder: Option<SweepFolder>,
    json: bool,
    ranks: &dyn Ranks,
) -> anyhow::Result<()> {
    continue_sweep(config, folder, SweepPart::All, json, ranks)
}

/// Runs a part of a sweep, from where `folder` says that it is.
fn continue_sweep(
    config: &Config,
    folder: Option<SweepFolder>,
    part: SweepPart,
    json: bool,
    ranks: &dyn Ranks,
) -> anyhow::Result<()> {
    // Before the model is loaded.
    ranks.all(config.trials())?;
    let session = launch::open(&config.model, ranks)?;
    let mut sweep = ranks.all(Sweep::prepare(config, &session))?;
    sweep.agree(ranks)?.iter().for_each(super::warn);
    if ranks.rank() > 0 {
        return follow(&mut sweep, config, &session, ranks);
    }
    if let SweepPart::Shard(shard) = part {
        sweep.take_shard(shard)?;
    }
    let (warnings, notes) = sweep.remarks();
    notes.iter().for_each(|text| status!("note       {text}"));
    warnings.iter().for_each(super::warn);
    let is_resumed = folder.is_some() || matches!(part, SweepPart::Shard(_));
    let mut folder = ranks.all(match (folder, part) {
        (Some(folder), _) => Ok(folder),
        (None, SweepPart::Shard(_)) => SweepFolder::of_shards(config),
        (None, _) => SweepFolder::create(config),
    })?;
    ranks.all(Ok(()))?;
    folder.lock.warning.iter().for_each(super::warn);
    if let Some(moved) = &folder.moved {
        status!("sweep      an earlier run or sweep of this name is now {}", moved.display());
    }
    describe(&sweep, &folder, part, is_resumed);
    if ranks.size() > 1 {
        status!("ranks      {}, which share the trials", ranks.size());
    }
    let _guard = interrupt::Guard::new()?;
    let watch = SweepProgress::new(&sweep, session.model.device(), json);
    let outcome = match part {
        SweepPart::Choice => sweep.collect(&mut folder, &watch),
        SweepPart::All => sweep.run(ranks, Some(&mut folder), &watch),
        SweepPart::Shard(_) => sweep.run_shard(&watch),
    };
    watch.finish();
    if let SweepPart::Shard(shard) = part {
        return end_shard(outcome?, shard, &folder);
    }
    finish(outcome, &folder, config, json)
}

/// Tunes this rank's trials; rank 0 decides, prints and writes the sweep's own files.
fn follow(sweep: &mut Sweep, config: &Config, session: &Session, ranks: &dyn Ranks) -> anyhow::Result<()> {
    ranks.all(Ok(()))?;
    // Rank 0 has made the folder.
    ranks.all(SweepFolder::config(&config.folder()))?;
    let _guard = interrupt::Guard::new()?;
    let watch = SweepFollower { rank: ranks.rank(), device: session.model.device().clone() };
    match sweep.run(ranks, None, &watch)? {
        Ended::Interrupted => Err(Interrupted("interrupted".into()).into()),
        Ended::Completed | Ended::StoppedEarly | Ended::Paused => Ok(()),
    }
}

/// Prints what the sweep is about to do.
fn describe(sweep: &Sweep, folder: &SweepFolder, part: SweepPart, is_resumed: bool) {
    let (trials, epochs, path) = (sweep.trials.len(), sweep.epochs(), folder.path.display());
    match part {
        SweepPart::Shard(shard) => {
            let own = sweep.trials.iter().filter(|trial| shard.has(trial)).count();
            status!("shard      {shard}: {own} of {trials} trials of up to {epochs} epochs, in {path}");
        }
        SweepPart::All | SweepPart::Choice => {
            let resumed = if is_resumed { "resumed" } else { "sweep" };
            status!("{resumed:<10} {trials} trials of up to {epochs} epochs, in {path}");
        }
    }
}

/// Says how a shard ended, and what chooses among the trials of all.
fn end_shard(ended: Ended, shard: Shard, folder: &SweepFolder) -> anyhow::Result<()> {
    let path = folder.path.display();
    if ended == Ended::Interrupted {
        return Err(Interrupted(format!("interrupted; the same command goes on with shard {shard}")).into());
    }
    println!("The trials of shard {shard} have ended. When all shards have: gneiss sweep --collect {path}");
    Ok(())
}

/// Writes the report of a sweep, and prints its result.
fn finish(
    outcome: gneiss::Result<Ended>,
    folder: &SweepFolder,
    config: &Config,
    json: bool,
) -> anyhow::Result<()> {
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
