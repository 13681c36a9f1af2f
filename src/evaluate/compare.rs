//! Comparison of two sets of answers to the same rows; `tests/evaluate/main.rs` checks the numbers against SciPy's and
//! statsmodels'.
//!
//! Two accuracies alone say little about a difference: both arms answer the same rows, so the rows that change count.

use crate::number::quantile;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Resamples of the bootstrap.
const RESAMPLES: u64 = 10_000;
/// Its seed.
const SEED: u64 = 42;

/// How the answer to a row is judged.
///
/// In a classification neither way alone is fair. By the generated text, a base model that knows the answer and words
/// it differently (`1.` for `1`) is wrong. Its user does get that answer, but the form is the easy part of tuning. By
/// likelihood, the base model is given the form, and the difference shows what tuning taught of the task itself. A
/// claim that holds both ways is safe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum By {
    /// Whether the generated text is the expected one.
    Generated,
    /// Classification: whether the expected label is the likeliest.
    Likelihood,
    /// Other tasks: F1 of the words in common.
    TokenF1,
    /// Other tasks: ROUGE-L.
    RougeL,
}

/// A tuned prompt against the base, row by row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Paired {
    /// Name of the tuned prompt.
    pub name: String,
    /// How rows are judged.
    pub by: By,
    /// Rows that only the tuned prompt answered right; with a score, rows that it answered better.
    pub fixed: usize,
    /// Rows that only the base answered right; with a score, rows that it answered better.
    pub broken: usize,
    /// Accuracy (or the share of exact matches, or the mean score) of the tuned prompt minus that of the base.
    pub difference: f64,
    /// Its bootstrap interval, 95 %: percentiles of 10,000 resamples of the rows. If all rows changed alike, it is a
    /// point; then the p-value says more.
    pub interval: [f64; 2],
    /// Two-sided exact p-value of McNemar's test (with a score: of the sign test, which is the same for right and
    /// wrong): the probability of so uneven a split of fixed and broken rows if neither prompt is better.
    pub p_value: f64,
}

impl Paired {
    /// Right and wrong answers of both to the same rows, in the same order.
    pub fn from_answers(name: &str, by: By, base: &[bool], tuned: &[bool]) -> Self {
        let scores = |of: &[bool]| of.iter().map(|right| f64::from(*right)).collect::<Vec<_>>();
        Self::from_scores(name, by, &scores(base), &scores(tuned))
    }

    /// Scores of both on the same rows, in the same order; rows beyond the shorter list are left out.
    pub fn from_scores(name: &str, by: By, base: &[f64], tuned: &[f64]) -> Self {
        let differences: Vec<f64> = base.iter().zip(tuned).map(|(b, t)| t - b).collect();
        let fixed = differences.iter().filter(|d| **d > 0.0).count();
        let broken = differences.iter().filter(|d| **d < 0.0).count();
        let difference = differences.iter().sum::<f64>() / differences.len().max(1) as f64;
        let interval = bootstrap(&differences);
        Self {
            name: name.to_owned(),
            by,
            fixed,
            broken,
            difference,
            interval,
            p_value: mcnemar(fixed, broken),
        }
    }
}

/// Two-sided exact p-value of McNemar's test: twice the probability that fair coins, one for each row that changed,
/// fall so seldom on the rarer side; 1 if no row changed.
pub fn mcnemar(fixed: usize, broken: usize) -> f64 {
    let (rarer, n) = (fixed.min(broken), fixed + broken);
    if fixed == broken {
        return 1.0;
    }
    // The largest term is computed from its logarithm, which doesn't overflow; each smaller term from the one before.
    let log_term = (1..=rarer).map(|i| ((n - rarer + i) as f64 / i as f64).ln()).sum::<f64>()
        - n as f64 * std::f64::consts::LN_2;
    let (mut term, mut sum) = (1.0, 0.0);
    for k in (0..=rarer).rev() {
        sum += term;
        term *= k as f64 / (n - k + 1) as f64;
        if term < f64::EPSILON * sum {
            break;
        }
    }
    (2.0 * sum * log_term.exp()).min(1.0)
}

/// Percentile interval, 95 %, of the mean of `differences` over resamples of them (Efron, 1979). The same differences
/// give the same interval on any number of threads.
fn bootstrap(differences: &[f64]) -> [f64; 2] {
    let n = differences.len();
    if n == 0 {
        return [-1.0, 1.0];
    }
    let resample = |stream: u64| {
        let mut rng = ChaCha8Rng::seed_from_u64(SEED);
        rng.set_stream(stream);
        (0..n).map(|_| differences[rng.random_range(0..n)]).sum::<f64>() / n as f64
    };
    let mut means: Vec<f64> = (0..RESAMPLES).into_par_iter().map(resample).collect();
    means.sort_unstable_by(f64::total_cmp);
    [0.025, 0.975].map(|q| quantile(&means, q))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comparison_is_the_same_on_any_number_of_threads() {
        let base: Vec<f64> = (0..50).map(|i| f64::from(i * 7 % 11) / 11.0).collect();
        let tuned: Vec<f64> = (0..50).map(|i| f64::from(i * 5 % 13) / 13.0).collect();
        let with = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| Paired::from_scores("dogs", By::TokenF1, &base, &tuned))
        };
        assert_eq!(with(1), with(3));
        let [low, high] = with(1).interval;
        assert!(low < with(1).difference && with(1).difference < high);
    }

    #[test]
    fn no_rows_say_nothing() {
        let paired = Paired::from_answers("dogs", By::Generated, &[], &[]);
        assert_eq!((paired.fixed, paired.broken, paired.difference, paired.p_value), (0, 0, 0.0, 1.0));
        assert_eq!(paired.interval, [-1.0, 1.0]);
    }
}
