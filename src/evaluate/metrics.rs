//! Metrics of predicted labels, held against scikit-learn's values in the tests.

use serde::Serialize;

/// Accuracy and macro F1 of predictions, where a prediction may be no label at all.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Scores {
    /// Share of predictions that equal what was expected.
    pub accuracy: f64,
    /// Mean over the labels of the harmonic mean of precision and recall; a label that is neither expected
    /// nor predicted counts as 0, as scikit-learn's `f1_score(average="macro", labels=...)` does.
    pub macro_f1: f64,
    /// Predictions that equal what was expected.
    pub correct: usize,
    /// All predictions.
    pub total: usize,
    /// Predictions that are none of the labels; they are wrong.
    pub no_label: usize,
}

impl Scores {
    /// Scores of (expected, predicted) pairs over `labels`.
    pub fn of<'a>(labels: &[String], pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let mut counts = vec![[0usize; 3]; labels.len()];
        let (mut correct, mut total, mut no_label) = (0, 0, 0);
        let index = |text: &str| labels.iter().position(|l| l == text);
        for (expected, predicted) in pairs {
            total += 1;
            let (e, p) = (index(expected), index(predicted));
            if let Some(e) = e {
                counts[e][1] += 1;
            }
            match p {
                Some(p) => counts[p][2] += 1,
                None => no_label += 1,
            }
            if let (Some(e), true) = (e, e == p) {
                counts[e][0] += 1;
                correct += 1;
            }
        }
        let f1 = |[hit, expected, predicted]: &[usize; 3]| {
            2.0 * *hit as f64 / (expected + predicted).max(1) as f64
        };
        Self {
            accuracy: correct as f64 / total.max(1) as f64,
            macro_f1: counts.iter().map(f1).sum::<f64>() / labels.len().max(1) as f64,
            correct,
            total,
            no_label,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(pairs: &[(&str, &str)]) -> Scores {
        Scores::of(&["0".into(), "1".into()], pairs.iter().copied())
    }

    /// scikit-learn 1.9: y = 1 1 1 0 0, p = 1 0 x 0 1; accuracy_score 0.4,
    /// f1_score(labels=["0", "1"], average="macro") = 0.45.
    #[test]
    fn an_answer_that_is_no_label_is_wrong() {
        let scores = of(&[("1", "1"), ("1", "0"), ("1", "x"), ("0", "0"), ("0", "1")]);
        assert_eq!((scores.accuracy, scores.correct, scores.total, scores.no_label), (0.4, 2, 5, 1));
        assert!((scores.macro_f1 - 0.45).abs() < 1e-12, "{}", scores.macro_f1);
    }

    #[test]
    fn one_answer_to_everything_has_half_the_f1() {
        let scores = of(&[("1", "1"), ("0", "1")]);
        assert_eq!(scores.accuracy, 0.5);
        assert!((scores.macro_f1 - 1.0 / 3.0).abs() < 1e-12);
    }

    #[test]
    fn nothing_scores_nothing() {
        assert_eq!(of(&[]).accuracy, 0.0);
    }
}
