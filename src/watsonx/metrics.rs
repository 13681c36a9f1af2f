//! The metrics of a training, of the records of its run.
//!
//! IBM's SDK takes the mean of an epoch's losses, and the time between the first and the last record of an epoch. It needs
//! whole epochs from 0 without gaps, and two records of an epoch at least.

use super::records::Moment;
use crate::tune::StepRecord;
use serde_json::{Value, json};

/// One entry for each optimizer step of a run that began at `started`. The only step of an epoch has two entries, one for
/// its beginning and one for its end.
pub fn entries(steps: &[StepRecord], started: Moment) -> Vec<Value> {
    let mut entries = Vec::with_capacity(steps.len());
    for (i, step) in steps.iter().enumerate() {
        let is_of_epoch = |other: Option<&StepRecord>| other.is_some_and(|other| other.epoch == step.epoch);
        let is_only =
            !is_of_epoch(i.checked_sub(1).and_then(|i| steps.get(i))) && !is_of_epoch(steps.get(i + 1));
        if is_only {
            entries.push(entry(step, started.after(step.elapsed - step.seconds)));
        }
        entries.push(entry(step, started.after(step.elapsed)));
    }
    entries
}

fn entry(step: &StepRecord, time: Moment) -> Value {
    json!({
        "iteration": step.step - 1,
        "timestamp": time.text(),
        "ml_metrics": {"epoch": step.epoch - 1, "loss": step.loss, "learning_rate": step.learning_rate},
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: usize, epoch: usize, loss: f64, elapsed: f64) -> StepRecord {
        StepRecord {
            step,
            epoch,
            loss,
            learning_rate: 0.5,
            grad_norm: 1.0,
            examples: 8,
            target_tokens: 16,
            rows: 100,
            seconds: 0.25,
            elapsed,
        }
    }

    #[test]
    fn epochs_count_from_zero_and_have_two_entries_at_least() {
        let steps = [step(1, 1, 3.0, 0.25), step(2, 1, 2.0, 0.5), step(3, 2, 1.0, 1.0)];
        let told = entries(&steps, Moment(1_000));
        let summary: Vec<(u64, u64, f64, &str)> = told
            .iter()
            .map(|entry| {
                let metrics = &entry["ml_metrics"];
                let (epoch, loss) = (metrics["epoch"].as_u64().unwrap(), metrics["loss"].as_f64().unwrap());
                (entry["iteration"].as_u64().unwrap(), epoch, loss, entry["timestamp"].as_str().unwrap())
            })
            .collect();
        let expected = [
            (0, 0, 3.0, "1970-01-01T00:00:01.250Z"),
            (1, 0, 2.0, "1970-01-01T00:00:01.500Z"),
            (2, 1, 1.0, "1970-01-01T00:00:01.750Z"),
            (2, 1, 1.0, "1970-01-01T00:00:02.000Z"),
        ];
        assert_eq!(summary, expected);
        assert!(entries(&[], Moment(0)).is_empty());
    }
}
