//! What a trial's prompt gives on each row of the validation file, from which the standard errors come.

use super::Trial;
use crate::Result;
use crate::config::Task;
use crate::data::labels::distinct;
use crate::evaluate::{Exam, nll};
use crate::files::write_json;
use crate::layout::VALIDATION;
use crate::prompt::Adapter;
use crate::ranks::Alone;
use crate::run::TuningData;
use crate::session::Session;
use serde::{Deserialize, Serialize};

/// With more labels than this the accuracy is taken only if the trials are compared by it: each label of each row is scored.
const FEW_LABELS: usize = 8;

/// A mean over rows with its standard error.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The mean.
    #[serde(with = "crate::number")]
    pub value: f64,
    /// Its standard error over the rows; 0 for a single row.
    #[serde(with = "crate::number")]
    pub standard_error: f64,
}

/// `validation.json`: a trial's kept prompt on the rows of the validation file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ValidationRows {
    /// Optimizer steps that the prompt has had.
    pub step: usize,
    /// Negative log-likelihood of each row's target, nats.
    pub nll: Vec<f64>,
    /// Target tokens of each row.
    pub target_tokens: Vec<usize>,
    /// Whether the expected label of each row is the likeliest; empty for a generation, and with many labels.
    pub correct: Vec<bool>,
}

impl ValidationRows {
    /// Of the prompt that `trial` keeps; written into its folder.
    ///
    /// # Errors
    /// Returns an error if the trial's adapter can't be read, a likelihood is not finite, or a device operation fails.
    pub(super) fn take(
        session: &Session,
        trial: &Trial,
        data: &TuningData,
        accuracy: bool,
    ) -> Result<Option<Self>> {
        let (Some((dataset, encoded)), Some(summary)) = (&data.validation, &trial.summary) else {
            return Ok(None);
        };
        let prompt = Adapter::read(&trial.folder().join(crate::layout::ADAPTER))?.prompt;
        let max_rows = crate::tune::max_rows(trial.config.train.max_rows, session.model.device());
        let found = nll(&session.model, Some(&prompt), &encoded.examples, max_rows, &mut |_| {})?;
        let target_tokens: Vec<usize> = encoded.examples.iter().map(|example| example.target.len()).collect();
        let mut rest = &found[..];
        let mut sum = |tokens: usize| {
            let (row, later) = rest.split_at(tokens);
            rest = later;
            row.iter().sum()
        };
        let nll = target_tokens.iter().map(|tokens| sum(*tokens)).collect();
        let task = trial.config.data.task;
        let labels = match task {
            Task::Classification => distinct(dataset.records.iter().chain(&data.train.0.records)),
            Task::Generation => Vec::new(),
        };
        let correct = if !labels.is_empty() && (accuracy || labels.len() <= FEW_LABELS) {
            let (model, tokenizer) = (&session.model, &session.tokenizer);
            let exam = Exam { model, tokenizer, dataset, task, labels: &labels, max_rows, ranks: &Alone };
            exam.judge_labels(Some(&prompt), &encoded.examples)?
        } else {
            Vec::new()
        };
        let rows = Self { step: summary.kept_step, nll, target_tokens, correct };
        write_json(&trial.folder().join(VALIDATION), &rows)?;
        Ok(Some(rows))
    }

    /// The loss per target token: a ratio of two sums over the rows, whose standard error is that of its linearization.
    pub fn loss(&self) -> Estimate {
        let weights: Vec<f64> = self.target_tokens.iter().map(|tokens| *tokens as f64).collect();
        ratio(&self.nll, &weights)
    }

    /// The share of rows whose expected label is the likeliest.
    pub fn accuracy(&self) -> Option<Estimate> {
        let correct: Vec<f64> = self.correct.iter().map(|correct| f64::from(*correct)).collect();
        (!correct.is_empty()).then(|| ratio(&correct, &vec![1.0; correct.len()]))
    }
}

/// sum(values) / sum(weights) over rows that are a sample.
fn ratio(values: &[f64], weights: &[f64]) -> Estimate {
    let (n, total) = (values.len() as f64, weights.iter().sum::<f64>());
    let value = values.iter().sum::<f64>() / total;
    let squares: f64 = values.iter().zip(weights).map(|(v, w)| (v - value * w).powi(2)).sum();
    let standard_error = if n > 1.0 { (squares * n / (n - 1.0)).sqrt() / total } else { 0.0 };
    Estimate { value, standard_error }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With equal weights: numpy's std(ddof=1) / sqrt(n) of [1, 2, 4, 5].
    #[test]
    fn the_standard_error_of_equal_rows_is_that_of_a_mean() {
        let rows = ValidationRows {
            step: 1,
            nll: vec![2.0, 4.0, 8.0, 10.0],
            target_tokens: vec![2; 4],
            correct: vec![true, true, true, false],
        };
        let loss = rows.loss();
        assert_eq!(loss.value, 3.0);
        assert!((loss.standard_error - 0.912_870_929_2).abs() < 1e-9, "{loss:?}");
        // sqrt(p (1 - p) / (n - 1)).
        let accuracy = rows.accuracy().expect("labels");
        assert_eq!(accuracy.value, 0.75);
        assert!((accuracy.standard_error - 0.25).abs() < 1e-12, "{accuracy:?}");
    }

    /// Rows whose losses are the same per token are all at the mean, whatever their lengths.
    #[test]
    fn rows_of_other_lengths_count_by_their_tokens() {
        let rows =
            ValidationRows { step: 1, nll: vec![2.0, 6.0], target_tokens: vec![1, 3], correct: Vec::new() };
        assert_eq!(rows.loss(), Estimate { value: 2.0, standard_error: 0.0 });
        assert_eq!(rows.accuracy(), None);
    }
}
