//! The result of a case: figures of its steps.

use super::canary::{CanarySeen, Selection};
use super::measure::Case;
use crate::number::quantile;
use serde::Serialize;

/// Median with the 10th and 90th percentile.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// The median.
    pub median: f64,
    /// 10th percentile.
    pub p10: f64,
    /// 90th percentile.
    pub p90: f64,
}

/// The result of a case.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Measured {
    /// The case.
    #[serde(flatten)]
    pub case: Case,
    /// Figures of its steps.
    #[serde(flatten)]
    pub figures: Figures,
    /// [`Figures::flops_per_second`] as a fraction of the device's [`super::MatmulPeak`], which a GPU can sustain.
    pub share_of_peak: f64,
    /// The same as a fraction of the data sheet's rate; `None` if the device's data sheet is not known.
    pub share_of_data_sheet: Option<f64>,
    /// Counted steps during which the machine was disturbed; `None` without a [`super::Canary`], as on a GPU.
    pub disturbed_steps: Option<usize>,
    /// Number of steps from which times and rates are computed: the quiet ones, or all counted steps if too few were
    /// quiet.
    pub used_steps: usize,
    /// The canary's readings; `None` without one.
    pub canary: Option<CanarySeen>,
    /// The most memory in use, bytes.
    pub peak_memory_bytes: Option<u64>,
    /// Most rows of a pass.
    pub max_rows: usize,
    /// Layers that are recomputed in the backward pass.
    pub recompute: usize,
    /// Loss of the first step, nats per target token.
    pub first_loss: f64,
    /// Loss of the last step.
    pub last_loss: f64,
}

/// Times of all counted steps.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct AllSteps {
    /// Wall time of an optimizer step, s.
    pub step_seconds: Spread,
    /// Examples per second.
    pub examples_per_second: Spread,
}

/// Time of one op in a profiled step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct OpShare {
    /// The op's name; `outside of ops` is the remaining time.
    pub op: String,
    /// Time per step, s: the device's time on CUDA, wall time elsewhere.
    pub seconds_per_step: f64,
    /// Calls per step.
    pub calls_per_step: f64,
    /// Fraction of the profiled step.
    pub share: f64,
}

/// Time of every op, of all profiled steps.
#[derive(Debug, Clone, PartialEq)]
pub struct Profile {
    /// The longest first, `outside of ops` last.
    pub ops: Vec<OpShare>,
    /// Profiled steps during which the machine was disturbed, which are not left out; `None` without a canary.
    pub disturbed_steps: Option<usize>,
}

/// The content of a step, independent of its time.
pub(super) struct StepContent {
    pub(super) tokens: usize,
    pub(super) flops: f64,
}

/// A counted step.
pub(super) struct Timed {
    pub(super) seconds: f64,
    pub(super) rows: usize,
    pub(super) loss: f64,
}

/// Figures of the counted steps of a case. Times and rates are those of the quiet steps, rates are medians; tokens are
/// the examples' own, without the prompt's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Figures {
    /// Wall time of an optimizer step, s.
    pub step_seconds: Spread,
    /// Examples per second.
    pub examples_per_second: Spread,
    /// Tokens of inputs and targets per second.
    pub tokens_per_second: f64,
    /// Packed rows per second; prompt and template count once per step.
    pub rows_per_second: f64,
    /// Tokens of inputs and targets per step, mean over all counted steps.
    pub tokens_per_step: f64,
    /// Packed rows per step, mean over all counted steps.
    pub rows_per_step: f64,
    /// Useful floating-point operations per step, mean over all counted steps ([`crate::model::Flops`]).
    pub flops_per_step: f64,
    /// Useful floating-point operations per second.
    pub flops_per_second: f64,
    /// Times of all counted steps, disturbed or not, to compare with a program whose steps are not monitored.
    pub all_steps: AllSteps,
}

impl Spread {
    /// Of at least one value; percentiles between two values are interpolated.
    pub fn from_values(values: impl IntoIterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = values.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let [median, p10, p90] = [0.5, 0.1, 0.9].map(|q| quantile(&sorted, q));
        Self { median, p10, p90 }
    }
}

impl Figures {
    /// Times and rates of the steps of `counted` that are used, means of all of them; a step has `examples` examples.
    pub(super) fn new(counted: &[(&Timed, &StepContent)], selection: &Selection, examples: usize) -> Self {
        let mean = |f: &dyn Fn(&Timed, &StepContent) -> f64| {
            counted.iter().map(|(t, c)| f(t, c)).sum::<f64>() / counted.len() as f64
        };
        let spread = |f: &dyn Fn(&Timed, &StepContent) -> f64| {
            let used = counted.iter().zip(&selection.used).filter(|(_, used)| **used);
            Spread::from_values(used.map(|((timed, content), _)| f(timed, content)))
        };
        let rate = |f: &dyn Fn(&Timed, &StepContent) -> f64| spread(&|t, c| f(t, c) / t.seconds);
        let all = || counted.iter().map(|(timed, _)| timed.seconds);
        let all_steps = AllSteps {
            step_seconds: Spread::from_values(all()),
            examples_per_second: Spread::from_values(all().map(|seconds| examples as f64 / seconds)),
        };
        Self {
            step_seconds: spread(&|timed, _| timed.seconds),
            examples_per_second: rate(&|_, _| examples as f64),
            tokens_per_second: rate(&|_, content| content.tokens as f64).median,
            rows_per_second: rate(&|timed, _| timed.rows as f64).median,
            tokens_per_step: mean(&|_, content| content.tokens as f64),
            rows_per_step: mean(&|timed, _| timed.rows as f64),
            flops_per_step: mean(&|_, content| content.flops),
            flops_per_second: rate(&|_, content| content.flops).median,
            all_steps,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_interpolated() {
        // numpy.percentile([5, 1, 4, 2], [50, 10, 90]).
        let spread = Spread::from_values([5.0, 1.0, 4.0, 2.0]);
        for (found, expected) in [(spread.median, 3.0), (spread.p10, 1.3), (spread.p90, 4.7)] {
            assert!((found - expected).abs() < 1e-12, "{spread:?}");
        }
        assert_eq!(Spread::from_values([7.0]), Spread { median: 7.0, p10: 7.0, p90: 7.0 });
    }

    #[test]
    fn figures_take_times_of_used_steps_and_means_of_all() {
        let seconds = [1.0, 40.0, 2.0, 4.0];
        let steps = seconds.map(|seconds| Timed { seconds, rows: 6, loss: 0.0 });
        let contents = [StepContent { tokens: 20, flops: 80.0 }, StepContent { tokens: 40, flops: 160.0 }];
        let counted: Vec<_> = steps.iter().zip(contents.iter().cycle()).collect();
        let selection = Selection { used: vec![true, false, true, true], disturbed: 1 };
        let figures = Figures::new(&counted, &selection, 8);
        // Percentiles of 1, 2, 4 and of 8/4, 8/2, 8/1.
        let close = |found: Spread, expected: [f64; 3]| {
            let found = [found.p10, found.median, found.p90];
            assert!(
                found.iter().zip(expected).all(|(x, y)| (x - y).abs() < 1e-12),
                "{found:?}, {expected:?}"
            );
        };
        close(figures.step_seconds, [1.2, 2.0, 3.6]);
        close(figures.examples_per_second, [2.4, 4.0, 7.2]);
        // Of 1, 2, 4, 40 and of 8/40, 8/4, 8/2, 8/1.
        close(figures.all_steps.step_seconds, [1.3, 3.0, 29.2]);
        close(figures.all_steps.examples_per_second, [0.74, 3.0, 6.8]);
        // 20 / 1, 20 / 2, 40 / 4; 6 / 1, 6 / 2, 6 / 4; 80 / 1, 80 / 2, 160 / 4.
        let rates = (figures.tokens_per_second, figures.rows_per_second, figures.flops_per_second);
        assert_eq!(rates, (10.0, 3.0, 40.0));
        let means = (figures.tokens_per_step, figures.rows_per_step, figures.flops_per_step);
        assert_eq!(means, (30.0, 6.0, 120.0));
    }
}
