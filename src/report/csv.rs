//! The steps and epochs of runs as one table of CSV.

use crate::run::Run;
use crate::{Error, Result};

/// The columns after the run's folder.
const COLUMNS: [&str; 12] = [
    "step", "epoch", "loss", "learning_rate", "grad_norm", "examples", "target_tokens", "rows", "seconds",
    "elapsed", "train_loss", "validation_loss",
];

/// One line for each optimizer step, with the columns of `metrics.jsonl`. The losses of an epoch are in the line of its last
/// step; a value that is not finite or does not exist is an empty field. The first column is the run's folder.
///
/// # Errors
/// Returns [`Error::Invalid`] if a record can't be written as CSV, which a path that is no text can cause.
pub fn metrics_csv(runs: &[Run]) -> Result<String> {
    let mut out = ::csv::Writer::from_writer(Vec::new());
    let failed = |error: ::csv::Error| Error::Invalid(format!("metrics as CSV: {error}"));
    out.write_record(std::iter::once("run").chain(COLUMNS)).map_err(failed)?;
    let number = |value: f64| if value.is_finite() { value.to_string() } else { String::new() };
    for run in runs {
        let folder = run.path.display().to_string();
        for step in &run.steps {
            let epoch = run.epochs.iter().find(|epoch| epoch.step == step.step);
            let loss = |loss: Option<f64>| loss.map(number).unwrap_or_default();
            let fields = [
                folder.clone(),
                step.step.to_string(),
                step.epoch.to_string(),
                number(step.loss),
                number(step.learning_rate),
                number(step.grad_norm),
                step.examples.to_string(),
                step.target_tokens.to_string(),
                step.rows.to_string(),
                number(step.seconds),
                number(step.elapsed),
                loss(epoch.and_then(|epoch| epoch.train_loss)),
                loss(epoch.and_then(|epoch| epoch.validation_loss)),
            ];
            out.write_record(fields).map_err(failed)?;
        }
    }
    let bytes = out.into_inner().map_err(|error| Error::Invalid(format!("metrics as CSV: {error}")))?;
    // Every field is text.
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
