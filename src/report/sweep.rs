//! The page of a sweep.

use super::parallel::{self, ParallelAxis, ParallelLine};
use super::plot::{self, Size, SweepCurve};
use super::svg::{self, Ink};
use super::{html, text};
use crate::Result;
use crate::config::SweepMetric;
use crate::files::write_atomically;
use crate::layout::{BEST, METRICS, REPORT, SUMMARY, SWEEP_REPORT, TRIALS};
use crate::run::{Run, Status};
use crate::sweep::{Estimate, SweepRecord, SweepResult, TrialResult};
use serde::Serialize;
use std::path::PathBuf;

/// The page.
#[derive(Serialize)]
struct SweepView<'a> {
    name: &'a str,
    path: String,
    model: &'a str,
    metric: &'static str,
    keys: Vec<&'a str>,
    trials: Vec<TrialView<'a>>,
    best: Option<TrialView<'a>>,
    /// The best trial's steps, wall time and kept epoch.
    summary: Option<BestView>,
    has_accuracy: bool,
    pruned: u64,
    failed: u64,
    epochs: u64,
    all_epochs: u64,
    seconds: f64,
    decisions: Vec<String>,
    parallel: Option<String>,
    curves: Option<String>,
    curves_phone: Option<String>,
    commands: Vec<[String; 2]>,
    config: String,
    version: &'static str,
}

/// A row of the table.
#[derive(Serialize, Clone)]
struct TrialView<'a> {
    name: String,
    /// The page of its run, if there is one.
    page: Option<String>,
    values: &'a [String],
    class: &'static str,
    status: &'static str,
    error: Option<&'a str>,
    epochs: u64,
    loss: Option<EstimateView>,
    accuracy: Option<EstimateView>,
    ink: &'static str,
    is_best: bool,
    is_near_best: bool,
}

/// A mean, and its standard error if it is known.
#[derive(Serialize, Clone, Copy)]
struct EstimateView {
    value: f64,
    error: Option<f64>,
}

#[derive(Serialize)]
struct BestView {
    virtual_tokens: u64,
    trainable: u64,
    kept_epoch: u64,
    kept_step: u64,
    train_loss: Option<f64>,
    seconds: f64,
    memory: Option<String>,
    warnings: Vec<String>,
}

impl EstimateView {
    fn new(estimate: Estimate) -> Self {
        let Estimate { value, standard_error } = estimate;
        Self { value, error: Some(standard_error).filter(|error| error.is_finite()) }
    }
}

/// Writes `sweep.html` into the sweep's folder. Returns the file.
///
/// # Errors
/// Returns an error if a trial's folder can't be read, or the page can't be written.
pub fn write_sweep(result: &SweepResult) -> Result<PathBuf> {
    let path = result.path.join(SWEEP_REPORT);
    let page = sweep_page(result)?;
    write_atomically(&path, |out| out.write_all(page.as_bytes()))?;
    Ok(path)
}

/// The page of a sweep as HTML: its trials by what they are compared by, parallel coordinates, loss curves and the best
/// trial.
///
/// # Errors
/// Returns an error if a trial's folder can't be read, or a plot can't be drawn.
pub fn sweep_page(result: &SweepResult) -> Result<String> {
    let inks = inks(&result.trials);
    let runs = runs(result)?;
    let trials: Vec<TrialView> =
        result.trials.iter().zip(&inks).map(|(trial, ink)| TrialView::new(result, trial, *ink)).collect();
    let best = trials.iter().find(|trial| trial.is_best).cloned();
    let curves = |size: Size| plot::sweep(&curves(&result.trials, &runs, &inks), size);
    let count = |class: &str| trials.iter().filter(|trial| trial.class == class).count() as u64;
    let view = SweepView {
        name: &result.config.name,
        path: result.path.display().to_string(),
        model: &result.config.model.id,
        metric: metric_name(result.config.sweep.metric),
        keys: result.keys.iter().map(String::as_str).collect(),
        best,
        summary: best_view(result, &runs),
        has_accuracy: trials.iter().any(|trial| trial.accuracy.is_some()),
        pruned: count("pruned"),
        failed: count("failed"),
        epochs: result.trials.iter().map(|trial| trial.epochs as u64).sum(),
        all_epochs: all_epochs(result)?,
        seconds: result.trials.iter().map(|trial| trial.seconds).sum(),
        decisions: result.records.iter().filter_map(decision).collect(),
        parallel: parallel(result, &inks).map(|svg| svg::inline(&svg)),
        curves: curves(Size::WIDE)?.map(|svg| svg::inline(&svg)),
        curves_phone: curves(Size::PHONE)?.map(|svg| svg::inline(&svg)),
        commands: commands(result),
        config: result.config.to_toml()?,
        version: env!("CARGO_PKG_VERSION"),
        trials,
    };
    html::render(html::Page::Sweep, &view)
}

/// The trials' colours: those that were not pruned are told apart, the others are grey.
fn inks(trials: &[TrialResult]) -> Vec<Ink> {
    let mut lines = 0;
    let ink = |trial: &TrialResult| match trial.status {
        None | Some(Status::Pruned | Status::Failed { .. }) => Ink::Axis,
        Some(_) => {
            lines += 1;
            Ink::Line(lines - 1)
        }
    };
    trials.iter().map(ink).collect()
}

/// The runs of the trials that have begun.
fn runs(result: &SweepResult) -> Result<Vec<Option<Run>>> {
    let read = |trial: &TrialResult| {
        let has_begun = trial.run.join(METRICS).is_file() && trial.run.join(SUMMARY).is_file();
        has_begun.then(|| Run::read(&trial.run)).transpose()
    };
    result.trials.iter().map(read).collect()
}

fn curves<'a>(trials: &[TrialResult], runs: &'a [Option<Run>], inks: &[Ink]) -> Vec<SweepCurve<'a>> {
    let parts = trials.iter().zip(runs).zip(inks);
    let curve = |((trial, run), ink): ((&TrialResult, &'a Option<Run>), &Ink)| {
        let name = (*ink != Ink::Axis).then(|| format!("{:03}", trial.trial));
        Some(SweepCurve { name, run: run.as_ref()?, ink: *ink, is_best: trial.is_best })
    };
    // The best are drawn last, on top.
    parts.rev().filter_map(curve).collect()
}

fn parallel(result: &SweepResult, inks: &[Ink]) -> Option<String> {
    let metric = result.config.sweep.metric;
    let shown: Vec<(&TrialResult, Ink)> = result.trials.iter().zip(inks.iter().copied()).rev().collect();
    let value = |trial: &TrialResult| trial.metric(metric).map(|estimate| estimate.value);
    if result.keys.is_empty() || shown.iter().all(|(trial, _)| value(trial).is_none()) {
        return None;
    }
    let mut axes: Vec<ParallelAxis> = result
        .keys
        .iter()
        .enumerate()
        .map(|(i, key)| ParallelAxis {
            name: key.rsplit('.').next().unwrap_or(key).to_owned(),
            values: shown.iter().map(|(trial, _)| trial.values[i].clone()).collect(),
        })
        .collect();
    let text = |trial: &TrialResult| value(trial).map_or(String::new(), |value| value.to_string());
    let values = shown.iter().map(|(trial, _)| text(trial)).collect();
    axes.push(ParallelAxis { name: metric_name(metric).to_owned(), values });
    let line = |(trial, ink): &(&TrialResult, Ink)| ParallelLine {
        ink: *ink,
        width: if trial.is_best { 3.6 } else { 1.4 },
    };
    Some(parallel::draw("Settings and results", &axes, &shown.iter().map(line).collect::<Vec<_>>()))
}

const fn metric_name(metric: SweepMetric) -> &'static str {
    match metric {
        SweepMetric::ValidationLoss => "validation loss",
        SweepMetric::ValidationAccuracy => "accuracy",
    }
}

fn all_epochs(result: &SweepResult) -> Result<u64> {
    Ok(result.config.trials()?.iter().map(|trial| trial.config.train.num_epochs as u64).sum())
}

fn best_view(result: &SweepResult, runs: &[Option<Run>]) -> Option<BestView> {
    let best = result.trials.iter().position(|trial| trial.is_best)?;
    let summary = &runs[best].as_ref()?.summary;
    Some(BestView {
        virtual_tokens: summary.num_virtual_tokens as u64,
        trainable: summary.trainable_parameters as u64,
        kept_epoch: summary.kept_epoch as u64,
        kept_step: summary.kept_step as u64,
        train_loss: summary.train_loss,
        seconds: summary.seconds,
        memory: summary.peak_memory_bytes.map(text::bytes),
        warnings: summary.warnings.clone(),
    })
}

/// A decision in a sentence.
fn decision(record: &SweepRecord) -> Option<String> {
    let names = |trials: &[usize]| trials.iter().map(|t| format!("{t:03}")).collect::<Vec<_>>().join(", ");
    match record {
        SweepRecord::Postponed { epoch, leader, validation_loss, chance } => Some(format!(
            "After epoch {epoch}: no trial was pruned; the best one, {leader:03}, had a validation loss of {validation_loss:.4}, \
             and guessing the labels gives {chance:.4}."
        )),
        SweepRecord::Rung { epoch, kept, pruned } if !pruned.is_empty() => Some(format!(
            "After epoch {epoch}: trials {} stayed, {} were pruned.",
            names(kept),
            names(pruned)
        )),
        _ => None,
    }
}

/// Commands for a terminal.
fn commands(result: &SweepResult) -> Vec<[String; 2]> {
    let path = |name: &str| text::shell(&result.path.join(name).display().to_string());
    let folder = text::shell(&result.path.display().to_string());
    let mut commands = Vec::new();
    if result.best().is_some() {
        if !result.config.data.test.is_empty() {
            let config = path(crate::layout::CONFIG);
            commands.push([
                "The best trial on the test file".into(),
                format!("gneiss eval {config} --adapter {}", path(BEST)),
            ]);
        }
    } else {
        commands.push(["Go on".into(), format!("gneiss sweep --resume {folder}")]);
    }
    commands.push(["This page again".into(), format!("gneiss report {folder}")]);
    commands
}

impl<'a> TrialView<'a> {
    fn new(result: &SweepResult, trial: &'a TrialResult, ink: Ink) -> Self {
        let (class, status, error) = match &trial.status {
            None => ("paused", "not begun", None),
            Some(Status::Failed { error }) => ("failed", "failed", Some(error.as_str())),
            Some(Status::Pruned) => ("pruned", "pruned", None),
            Some(Status::Completed) => ("completed", "completed", None),
            Some(Status::StoppedEarly) => ("completed", "stopped early", None),
            Some(Status::Interrupted) => ("interrupted", "interrupted", None),
            Some(Status::Paused) => ("paused", "paused", None),
            Some(Status::Running) => ("running", "running", None),
        };
        let name = format!("{:03}", trial.trial);
        let page = format!("{TRIALS}/{name}/{REPORT}");
        Self {
            page: result.path.join(&page).is_file().then_some(page),
            name,
            values: &trial.values,
            class,
            status,
            error,
            epochs: trial.epochs as u64,
            loss: trial.validation_loss.map(EstimateView::new),
            accuracy: trial.validation_accuracy.map(EstimateView::new),
            ink: ink.name(),
            is_best: trial.is_best,
            is_near_best: trial.is_near_best,
        }
    }
}
