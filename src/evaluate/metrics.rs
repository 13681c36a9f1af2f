//! Metrics of predicted labels; `tests/evaluate/main.rs` checks them against scikit-learn's and SciPy's values.

use serde::{Deserialize, Serialize};

/// The quality of predicted labels; a prediction may be no label at all.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Share of predictions that equal the expected label; 0 if there are none.
    pub accuracy: f64,
    /// Its Wilson interval, 95 %.
    pub interval: [f64; 2],
    /// Mean precision of the labels.
    pub macro_precision: f64,
    /// Mean recall of the labels.
    pub macro_recall: f64,
    /// Mean over the labels of the harmonic mean of precision and recall; a label that is neither expected
    /// nor predicted counts as 0, as scikit-learn's `f1_score(average="macro", labels=...)` does.
    pub macro_f1: f64,
    /// The scores of each label, in the labels' order.
    pub classes: Vec<ClassScores>,
    /// Rows by expected label (rows) and predicted label (columns), in the labels' order; the last column counts
    /// predictions that are no label.
    pub confusion: Vec<Vec<usize>>,
    /// Predictions that equal the expected label.
    pub correct: usize,
    /// All predictions.
    pub total: usize,
    /// Predictions that are no label; they are wrong.
    pub no_label: usize,
}

/// Scores of one label; a ratio without a denominator is 0.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClassScores {
    /// The label.
    pub label: String,
    /// Share of its predictions that are right.
    pub precision: f64,
    /// Share of its rows for which it is predicted.
    pub recall: f64,
    /// Harmonic mean of the two.
    pub f1: f64,
    /// Rows whose expected label it is.
    pub support: usize,
}

/// 97.5 % point of the normal distribution: two-sided intervals of 95 %.
const Z: f64 = 1.959_963_984_540_054;

/// Wilson's score interval of a share, 95 % (Wilson, 1927); [0, 1] if `of` is 0.
pub fn wilson(part: usize, of: usize) -> [f64; 2] {
    if of == 0 {
        return [0.0, 1.0];
    }
    let (n, p) = (of as f64, part as f64 / of as f64);
    let middle = p + Z * Z / (2.0 * n);
    let half = Z * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
    let bound = |x: f64| (x / (1.0 + Z * Z / n)).clamp(0.0, 1.0);
    [bound(middle - half), bound(middle + half)]
}

impl Scores {
    /// Scores of (expected, predicted) pairs over `labels`.
    pub fn from_pairs<'a>(labels: &[String], pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let n = labels.len();
        let mut confusion = vec![vec![0usize; n + 1]; n];
        let (mut total, mut correct, mut no_label) = (0, 0, 0);
        let index = |text: &str| labels.iter().position(|label| label == text);
        for (expected, predicted) in pairs {
            let (e, p) = (index(expected), index(predicted));
            total += 1;
            correct += usize::from(e.is_some() && e == p);
            no_label += usize::from(p.is_none());
            if let Some(e) = e {
                confusion[e][p.unwrap_or(n)] += 1;
            }
        }
        let classes: Vec<_> =
            labels.iter().enumerate().map(|(i, l)| ClassScores::from_confusion(l, i, &confusion)).collect();
        let mean = |of: fn(&ClassScores) -> f64| classes.iter().map(of).sum::<f64>() / n.max(1) as f64;
        Self {
            accuracy: ratio(correct, total),
            interval: wilson(correct, total),
            macro_precision: mean(|c| c.precision),
            macro_recall: mean(|c| c.recall),
            macro_f1: mean(|c| c.f1),
            classes,
            confusion,
            correct,
            total,
            no_label,
        }
    }
}

impl ClassScores {
    fn from_confusion(label: &str, i: usize, confusion: &[Vec<usize>]) -> Self {
        let (hit, support) = (confusion[i][i], confusion[i].iter().sum());
        let predicted = confusion.iter().map(|row| row[i]).sum();
        Self {
            label: label.to_owned(),
            precision: ratio(hit, predicted),
            recall: ratio(hit, support),
            f1: ratio(2 * hit, support + predicted),
            support,
        }
    }
}

/// `part / of`; 0 if `of` is 0.
pub(super) fn ratio(part: usize, of: usize) -> f64 {
    part as f64 / of.max(1) as f64
}
