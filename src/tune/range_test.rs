//! A learning-rate range test (Smith, 2017, arXiv:1506.01186): the rate rises from step to step, and the loss shows from
//! where on the prompt learns and from where on it is thrown about.

use super::observer::Observer;
use super::trainer::{Task, Trainer, epoch_order};
use crate::{Error, Result};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// Least and greatest rate that the test tries.
pub const RANGE: [f64; 2] = [1e-5, 1.0];
/// Steps of the test.
pub const STEPS: usize = 100;
/// Weight of the past in the smoothed loss.
const SMOOTHING: f64 = 0.9;
/// The test ends where the smoothed loss is this many times its least.
const DIVERGED: f64 = 4.0;

/// A step of the test.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RangePoint {
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Loss before the step's update, nats a target token.
    pub loss: f64,
    /// Exponential moving average of the losses so far, corrected for its start.
    pub smoothed: f64,
}

/// What the test came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RangeTest {
    /// Its steps in their order.
    pub points: Vec<RangePoint>,
    /// The rate that looks best; `None` where the loss never fell.
    pub suggestion: Option<f64>,
}

/// Tries rates from [`RANGE`] in geometric steps, from `prompt` on, f32 [num_virtual_tokens, C]; ends early where the
/// loss blows up or someone interrupts it.
///
/// # Errors
/// Those of [`Trainer::new`]; the observer's; the device's.
pub fn range_test(task: Task, prompt: &Tensor, observer: &mut dyn Observer) -> Result<RangeTest> {
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
        let record = match trainer.step_at(learning_rate, epoch, &chunk, observer) {
            // The rates before were fine: that is what the test is to find out.
            Err(Error::NotFinite { .. }) | Ok(None) => break,
            other => other?,
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

/// The rate at which the smoothed loss falls fastest, of those before its least; `None` where it never falls.
fn suggest(points: &[RangePoint]) -> Option<f64> {
    let least = points.iter().enumerate().min_by(|a, b| a.1.smoothed.total_cmp(&b.1.smoothed))?.0;
    let slope = |i: usize| {
        let (before, after) = (&points[i - 1], &points[i + 1]);
        (after.smoothed - before.smoothed) / (after.learning_rate / before.learning_rate).ln()
    };
    let steepest =
        (1..least.min(points.len().saturating_sub(1))).min_by(|a, b| slope(*a).total_cmp(&slope(*b)))?;
    (slope(steepest) < 0.0).then(|| points[steepest].learning_rate)
}
