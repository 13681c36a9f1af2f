//! A learning-rate range test (Smith, 2017, arXiv:1506.01186): the rate rises from step to step, and the loss shows from
//! which rate on the prompt learns and from which rate on its updates are too large.

use super::observer::{Observer, StepRecord};
use super::prompt_run::{StepExamples, StepPart};
use super::state::epoch_order;
use super::trainer::{Task, Trainer};
use crate::prompt::Prompt;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// Least and greatest rate that the test tries.
pub const RANGE: [f64; 2] = [1e-5, 1.0];
/// Steps of the test.
pub const STEPS: usize = 100;
/// Weight of the past in the smoothed loss.
const SMOOTHING: f64 = 0.9;
/// Share of the smoothed loss's fall that has been made at the suggested rate.
const FALLEN: f64 = 0.9;
/// The test ends when the smoothed loss is this many times its least.
const DIVERGED: f64 = 4.0;

/// A step of the test.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RangePoint {
    /// Learning rate of the step.
    #[serde(with = "crate::number")]
    pub learning_rate: f64,
    /// Loss before the step's update, nats a target token.
    #[serde(with = "crate::number")]
    pub loss: f64,
    /// Exponential moving average of the losses so far, corrected for its start.
    #[serde(with = "crate::number")]
    pub smoothed: f64,
}

/// What the test came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RangeTest {
    /// Its steps in their order.
    pub points: Vec<RangePoint>,
    /// The rate that looks best; `None` if the loss never fell.
    #[serde(default, with = "crate::number::optional")]
    pub suggestion: Option<f64>,
}

/// Tries rates from [`RANGE`] in geometric steps, from `prompt` on; ends early if the
/// loss diverges or the observer interrupts it.
///
/// # Errors
/// Returns the errors of [`Trainer::new`] and of the observer, and an error if a device operation fails.
pub fn range_test(task: Task, prompt: &Prompt, observer: &mut dyn Observer) -> Result<RangeTest> {
    let (examples, options) = (task.train.len(), task.options);
    let per_step = options.batch_size * options.accumulate_steps;
    let mut trainer = Trainer::new(task, prompt)?;
    let (mut points, mut average, mut least) = (Vec::with_capacity(STEPS), 0.0, f64::INFINITY);
    let batches = (1..).flat_map(|epoch| {
        let order = epoch_order(examples, options, epoch);
        order.chunks(per_step).map(|chunk| (epoch, chunk.to_vec())).collect::<Vec<_>>()
    });
    for (i, (epoch, chunk)) in batches.take(STEPS).enumerate() {
        let learning_rate = RANGE[0] * (RANGE[1] / RANGE[0]).powf(i as f64 / (STEPS - 1) as f64);
        let part = StepPart { run: 0, examples: StepExamples { now: chunk, next: None }, learning_rate };
        let record = match trainer.step(&[part], &mut [observer])?.pop() {
            // The rates before were fine: that is what the test is to find out.
            Some(Err(Error::NotFinite { .. }) | Ok(None)) | None => break,
            Some(record) => record?.map(|record| StepRecord { epoch, ..record }),
        };
        let Some(record) = record else { break };
        average = SMOOTHING * average + (1.0 - SMOOTHING) * record.loss;
        let smoothed = average / (1.0 - SMOOTHING.powi(i as i32 + 1));
        points.push(RangePoint { learning_rate, loss: record.loss, smoothed });
        observer.step(&record)?;
        least = least.min(smoothed);
        if smoothed > DIVERGED * least || observer.interrupted() {
            break;
        }
    }
    let suggestion = suggest(&points);
    Ok(RangeTest { points, suggestion })
}

/// The rate at which the smoothed loss has made nine tenths of its fall; `None` if it never falls.
///
/// Below it a higher rate still learns faster; above it there is little to win. The rate of the steepest fall, which is
/// used when whole models are trained, is too low for a prompt: on the tutorial it says 0.0015 (LOG.md, 2026-11-25).
fn suggest(points: &[RangePoint]) -> Option<f64> {
    let first = points.first()?.smoothed;
    let least = points.iter().map(|point| point.smoothed).fold(f64::INFINITY, f64::min);
    let there = first - FALLEN * (first - least);
    let found = points.iter().find(|point| point.smoothed <= there)?;
    (least < first).then_some(found.learning_rate)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(smoothed: impl Fn(f64) -> f64) -> Vec<RangePoint> {
        let rate = |i: usize| RANGE[0] * (RANGE[1] / RANGE[0]).powf(i as f64 / (STEPS - 1) as f64);
        let point = |learning_rate| {
            let loss = smoothed(learning_rate);
            RangePoint { learning_rate, loss, smoothed: loss }
        };
        (0..STEPS).map(|i| point(rate(i))).collect()
    }

    #[test]
    fn nine_tenths_of_the_fall_are_suggested() {
        // Falls by one each decade from 1e-4 to 1e-2, then stands: nine tenths are at 10^-2.2.
        let falls = |rate: f64| 5.0 - (rate.log10() + 4.0).clamp(0.0, 2.0);
        let found = suggest(&points(falls)).unwrap();
        assert!((10f64.powf(-2.2)..10f64.powf(-2.14)).contains(&found), "{found}");
        // What comes after the least does not count.
        let rises = |rate: f64| if rate > 0.1 { 50.0 } else { falls(rate) };
        assert_eq!(suggest(&points(rises)), Some(found));
    }

    #[test]
    fn a_loss_that_never_falls_suggests_nothing() {
        assert_eq!(suggest(&points(|_| 2.0)), None);
        assert_eq!(suggest(&points(|rate| 2.0 + rate)), None);
        assert_eq!(suggest(&[]), None);
    }
}
