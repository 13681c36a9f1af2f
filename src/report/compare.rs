//! Several runs on one page.

use super::plot::{self, Overlay, Size};
use super::svg::{self, Ink};
use super::view::{ArmScores, StatusView, scores};
use super::{html, text};
use crate::evaluate::Evaluation;
use crate::run::{LossKind, Run};
use crate::{Error, Result};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// The page.
#[derive(Serialize)]
struct CompareView<'a> {
    rows: Vec<RunRow<'a>>,
    /// Whether any run has the quantity.
    has: Has,
    settings: Vec<Setting>,
    plots: Vec<String>,
    version: &'static str,
}

#[derive(Serialize)]
struct Has {
    evaluation: bool,
    /// Name of the share of right answers.
    right: &'static str,
    validation: bool,
    memory: bool,
    /// Whether the losses of any run are divergences.
    teacher: bool,
}

/// One run's results.
#[derive(Serialize)]
struct RunRow<'a> {
    name: &'a str,
    /// Class of its lines in the page's style.
    ink: &'static str,
    path: String,
    status: StatusView<'a>,
    test: Option<&'a str>,
    base: Option<Share>,
    tuned: Option<Share>,
    train_loss: Option<f64>,
    validation_loss: Option<f64>,
    steps: u64,
    seconds: f64,
    examples_per_second: f64,
    memory: Option<String>,
    /// Quantities in which it is best.
    best: BTreeSet<&'static str>,
}

/// A share of right answers with its interval.
#[derive(Serialize, Clone, Copy)]
struct Share {
    share: f64,
    interval: [f64; 2],
    correct: u64,
    total: u64,
}

/// A setting with different values.
#[derive(Serialize)]
struct Setting {
    key: String,
    values: Vec<String>,
}

/// A page of HTML with several runs: the settings that differ, the results side by side, the curves in one plot. The
/// runs have the names of their folders.
///
/// # Errors
/// Returns [`Error::Invalid`] without runs, or an error if the plotting crate fails.
pub fn compare(runs: &[Run]) -> Result<String> {
    if runs.is_empty() {
        return Err(Error::Invalid("report: expected at least one run, found none".into()));
    }
    let names = names(runs);
    let evaluations = runs.iter().map(|run| Evaluation::read(&run.path)).collect::<Result<Vec<_>>>()?;
    let named: Vec<(&str, &Run)> = names.iter().map(String::as_str).zip(runs).collect();
    let mut rows: Vec<RunRow> = named
        .iter()
        .zip(&evaluations)
        .enumerate()
        .map(|(i, ((n, run), e))| RunRow::new(i, n, run, e.as_ref()))
        .collect();
    mark_best(&mut rows);
    let mut plots = Vec::new();
    for (what, by_time) in [
        (Overlay::Validation, false),
        (Overlay::Validation, true),
        (Overlay::Training, false),
        (Overlay::Training, true),
    ] {
        plots.extend(plot::overlay(&named, what, by_time, Size::HALF)?.map(|svg| svg::inline(&svg)));
    }
    let tasks: BTreeSet<&str> = evaluations.iter().flatten().map(|e| e.task.name()).collect();
    let right = match tasks.into_iter().collect::<Vec<_>>()[..] {
        ["classification"] => "Accuracy",
        ["generation"] => "Exact match",
        _ => "Share right",
    };
    let has = Has {
        evaluation: rows.iter().any(|r| r.tuned.is_some()),
        right,
        validation: rows.iter().any(|r| r.validation_loss.is_some()),
        memory: rows.iter().any(|r| r.memory.is_some()),
        teacher: runs.iter().any(|run| run.summary.loss == LossKind::KlDivergence),
    };
    let settings = settings(runs)?;
    let view = CompareView { rows, has, settings, plots, version: env!("CARGO_PKG_VERSION") };
    html::render(html::Page::Compare, &view)
}

/// The folders' names, or their paths if two have the same name.
fn names(runs: &[Run]) -> Vec<String> {
    let name = |run: &Run| run.path.file_name().map(|name| name.to_string_lossy().into_owned());
    let names: Vec<String> = runs.iter().map(|run| name(run).unwrap_or_else(|| run.name().into())).collect();
    let distinct: BTreeSet<&String> = names.iter().collect();
    if distinct.len() == names.len() {
        return names;
    }
    runs.iter().map(|run| run.path.display().to_string()).collect()
}

impl<'a> RunRow<'a> {
    fn new(index: usize, name: &'a str, run: &'a Run, evaluation: Option<&'a Evaluation>) -> Self {
        let summary = &run.summary;
        let shares = evaluation.map(shares).unwrap_or_default();
        Self {
            name,
            ink: Ink::Line(index).name(),
            path: run.path.display().to_string(),
            status: StatusView::new(summary),
            test: evaluation.map(|e| e.test.as_str()),
            base: shares.first().copied(),
            tuned: shares.get(1).copied(),
            train_loss: summary.train_loss,
            validation_loss: summary.validation_loss,
            steps: summary.steps as u64,
            seconds: summary.seconds,
            examples_per_second: summary.examples_per_second,
            memory: summary.peak_memory_bytes.map(text::bytes),
            best: BTreeSet::new(),
        }
    }
}

/// Share of right generated answers of each arm.
fn shares(evaluation: &Evaluation) -> Vec<Share> {
    let of_scores = |arm: ArmScores| Share {
        share: arm.scores.accuracy,
        interval: arm.scores.interval,
        correct: arm.scores.correct as u64,
        total: arm.scores.total as u64,
    };
    if let Some(scores) = scores(&evaluation.arms, |answers| answers.generated.as_ref()) {
        return scores.into_iter().map(of_scores).collect();
    }
    let of_text = |arm: &crate::evaluate::Arm| {
        arm.answers.text.as_ref().map(|s| Share {
            share: s.exact_match,
            interval: s.exact_match_interval,
            correct: s.correct as u64,
            total: s.total as u64,
        })
    };
    evaluation.arms.iter().filter_map(of_text).collect()
}

/// Marks the rows that are best in a quantity; if all are equal, none is marked. Answers to different files are not
/// compared.
fn mark_best(rows: &mut [RunRow]) {
    type Value = fn(&RunRow) -> Option<f64>;
    let mut qualities: Vec<(&'static str, Value)> = vec![
        ("validation_loss", |r| r.validation_loss.map(|loss| -loss)),
        ("seconds", |r| (r.status.class == "completed").then_some(-r.seconds)),
        ("rate", |r| Some(r.examples_per_second)),
    ];
    let tests: BTreeSet<&str> = rows.iter().filter_map(|r| r.test).collect();
    if tests.len() == 1 {
        qualities.push(("tuned", |r| r.tuned.map(|t| t.share)));
    }
    for (name, value) in qualities {
        let values: Vec<f64> = rows.iter().filter_map(value).collect();
        let best = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if values.iter().all(|v| *v == best) {
            continue;
        }
        for row in rows.iter_mut().filter(|r| value(r) == Some(best)) {
            row.best.insert(name);
        }
    }
}

/// The configuration's keys that do not have the same value in all runs, except the names.
fn settings(runs: &[Run]) -> Result<Vec<Setting>> {
    let flat = |run: &Run| -> Result<BTreeMap<String, String>> {
        let value = toml::Value::try_from(&run.config)
            .map_err(|e| Error::Invalid(format!("{}: {e}", run.path.display())))?;
        let mut keys = BTreeMap::new();
        flatten("", &value, &mut keys);
        Ok(keys)
    };
    let all: Vec<BTreeMap<String, String>> = runs.iter().map(flat).collect::<Result<_>>()?;
    let keys: BTreeSet<&String> = all.iter().flat_map(BTreeMap::keys).collect();
    let row = |key: &String| Setting {
        key: key.clone(),
        values: all.iter().map(|run| run.get(key).cloned().unwrap_or_default()).collect(),
    };
    let differs = |setting: &Setting| setting.values.iter().any(|value| *value != setting.values[0]);
    let named = |key: &&String| !["name", "runs"].contains(&key.as_str());
    Ok(keys.into_iter().filter(named).map(row).filter(differs).collect())
}

fn flatten(prefix: &str, value: &toml::Value, keys: &mut BTreeMap<String, String>) {
    match value {
        toml::Value::Table(table) => {
            for (key, value) in table {
                let key = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                flatten(&key, value, keys);
            }
        }
        toml::Value::String(text) => {
            keys.insert(prefix.into(), text.clone());
        }
        other => {
            keys.insert(prefix.into(), other.to_string());
        }
    }
}
