//! A sweep as read from its folder, running or ended.

use super::trial::value_text;
use super::{Estimate, SweepRecord, Trial, folder};
use crate::Result;
use crate::config::{Config, SweepMetric};
use crate::run::Status;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// A sweep and its trials.
pub struct SweepResult {
    /// The folder.
    pub path: PathBuf,
    /// The configuration.
    pub config: Config,
    /// The keys in which the trials differ.
    pub keys: Vec<String>,
    /// The trials, the best first; pruned trials after those that were not, then failed ones and those that have not begun.
    pub trials: Vec<TrialResult>,
    /// The decisions.
    pub records: Vec<SweepRecord>,
}

/// A trial's result.
#[derive(Debug, Clone, Serialize)]
pub struct TrialResult {
    /// Its number, from 1 on.
    pub trial: usize,
    /// Its run folder.
    pub run: PathBuf,
    /// The values of the keys in which the trials differ.
    pub values: Vec<String>,
    /// The state of its run; null if it has not begun.
    pub status: Option<Status>,
    /// Epochs that it has completed.
    pub epochs: usize,
    /// Rows of its prompt; 0 if it has not begun.
    pub num_virtual_tokens: usize,
    /// The loss of the prompt that it keeps on the validation file, with its standard error once the trial has ended.
    pub validation_loss: Option<Estimate>,
    /// The share of validation rows whose expected label is the likeliest.
    pub validation_accuracy: Option<Estimate>,
    /// Whether it is the best one.
    pub is_best: bool,
    /// Whether it has run to its end and is within one standard error of the best one.
    pub is_near_best: bool,
    /// Wall time of its steps and validations, seconds.
    #[serde(with = "crate::number")]
    pub seconds: f64,
}

impl SweepResult {
    /// Whether `path` is the folder of a sweep.
    pub fn is_in(path: &Path) -> bool {
        folder::is_sweep(path)
    }

    /// Reads the folder of a sweep.
    ///
    /// # Errors
    /// Returns an error if the folder is no sweep's, or if one of its files is missing or malformed.
    pub fn read(path: &Path) -> Result<Self> {
        let config = folder::config(path)?;
        let records = folder::records(path)?;
        let mut trials = Vec::new();
        for (i, trial) in config.trials()?.into_iter().enumerate() {
            let mut trial = Trial::new(i + 1, trial);
            trial.load()?;
            trials.push(TrialResult::new(&trial)?);
        }
        let metric = config.sweep.metric;
        trials.sort_by(|a, b| a.rank().cmp(&b.rank()).then(a.standing(metric).compare(&b.standing(metric))));
        if let Some(SweepRecord::Best { trial: best, .. }) = records.last() {
            mark_best(&mut trials, *best, metric);
        }
        let keys = config.sweep.parameters.keys().cloned().collect();
        Ok(Self { path: path.to_path_buf(), config, keys, trials, records })
    }

    /// The best trial, once all have ended.
    pub fn best(&self) -> Option<&TrialResult> {
        self.trials.iter().find(|trial| trial.is_best)
    }
}

impl TrialResult {
    fn new(trial: &Trial) -> Result<Self> {
        let rows = trial.validation()?;
        let summary = trial.summary.as_ref();
        let loss = summary.and_then(|summary| summary.validation_loss);
        // The loss of a distillation is a divergence; the rows have the outputs' likelihoods.
        let of_loss = rows.as_ref().filter(|_| !trial.config.distils());
        let error = of_loss.map_or(f64::NAN, |rows| rows.loss().standard_error);
        Ok(Self {
            trial: trial.number,
            run: trial.folder(),
            values: trial.values.iter().map(|(_, value)| value_text(value)).collect(),
            status: summary.map(|summary| summary.status.clone()),
            epochs: summary.map_or(0, |summary| summary.epochs),
            num_virtual_tokens: summary.map_or(0, |summary| summary.num_virtual_tokens),
            validation_loss: loss.map(|value| Estimate { value, standard_error: error }),
            validation_accuracy: rows.and_then(|rows| rows.accuracy()),
            is_best: false,
            is_near_best: false,
            seconds: summary.map_or(0.0, |summary| summary.seconds),
        })
    }

    /// Trials that ran on come first.
    fn rank(&self) -> usize {
        match self.status {
            Some(Status::Pruned) => 1,
            Some(Status::Failed { .. }) => 2,
            None => 3,
            Some(_) => 0,
        }
    }

    /// What the sweep compares it by.
    pub fn metric(&self, metric: SweepMetric) -> Option<Estimate> {
        match metric {
            SweepMetric::ValidationLoss => self.validation_loss,
            SweepMetric::ValidationAccuracy => self.validation_accuracy,
        }
    }

    fn standing(&self, metric: SweepMetric) -> super::Standing {
        let value = self.metric(metric).map_or(f64::INFINITY, |estimate| estimate.value);
        let value = if metric == SweepMetric::ValidationAccuracy { -value } else { value };
        super::Standing { trial: self.trial, value, virtual_tokens: self.num_virtual_tokens }
    }
}

/// Marks the best trial and those that its standard error does not tell apart from it.
fn mark_best(trials: &mut [TrialResult], best: usize, metric: SweepMetric) {
    let Some(found) = trials.iter().find(|trial| trial.trial == best) else { return };
    let Some(Estimate { value, standard_error }) = found.metric(metric) else { return };
    for trial in trials {
        let distance = trial.metric(metric).map(|estimate| (estimate.value - value).abs());
        trial.is_best = trial.trial == best;
        trial.is_near_best = !trial.is_best
            && trial.rank() == 0
            && distance.is_some_and(|distance| distance <= standard_error);
    }
}
