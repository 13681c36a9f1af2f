//! An ensemble of tuned prompts (Lester and others, 2021, section 6): several prompts of one task answer together.

use super::metrics::Scores;
use super::result::{Arm, Evaluation, Prediction};
use crate::config::Task;
use crate::data::ensemble::LabelEnsemble;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// What tuned prompts answer together, beside what each of them answers by itself; all by the likelihood of the labels.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EnsembleScores {
    /// The prompts.
    pub names: Vec<String>,
    /// The label that most prompts find the likeliest. Of labels with the same number of votes the one of the higher mean
    /// probability counts.
    pub vote: Scores,
    /// The label of the highest mean probability.
    pub mean_likelihood: Scores,
    /// Mean accuracy of the prompts by themselves.
    pub mean_accuracy: f64,
    /// The prompt of the highest accuracy on these rows, which is known only after them.
    pub best: String,
    /// Its accuracy.
    pub best_accuracy: f64,
}

impl EnsembleScores {
    /// Whether so many prompts of a task can answer together.
    ///
    /// # Errors
    /// Returns [`Error::Invalid`] if there are fewer than two, or if the task is no classification.
    pub fn check(task: Task, prompts: usize) -> Result<()> {
        if task != Task::Classification {
            return Err(Error::Invalid(
                "--ensemble: expected data.task = \"classification\", whose labels can be voted on, found \"generation\"".into(),
            ));
        }
        if prompts < 2 {
            return Err(Error::Invalid(format!(
                "--ensemble: expected two adapters or more, found {prompts}"
            )));
        }
        Ok(())
    }

    /// Of the tuned prompts of an evaluation.
    ///
    /// # Errors
    /// As [`EnsembleScores::check`].
    pub fn new(evaluation: &Evaluation) -> Result<Self> {
        let tuned = evaluation.arms.get(1..).unwrap_or_default();
        Self::check(evaluation.task, tuned.len())?;
        let labels = &evaluation.labels;
        let rows: Vec<Vec<&Prediction>> = (0..tuned[0].answers.predictions.len())
            .map(|row| tuned.iter().map(|arm| &arm.answers.predictions[row]).collect())
            .collect();
        let scores = |answer: fn(&LabelEnsemble) -> usize| {
            let answers =
                rows.iter().map(|row| (row[0].expected.as_str(), labels[answer(&together(row))].as_str()));
            Scores::from_pairs(labels, answers)
        };
        let accuracies: Vec<(f64, &str)> =
            tuned.iter().map(|arm| (accuracy(arm), arm.name.as_str())).collect();
        let best = accuracies.iter().copied().reduce(|a, b| if b.0 > a.0 { b } else { a });
        let (best_accuracy, best) = best.unwrap_or_default();
        Ok(Self {
            names: tuned.iter().map(|arm| arm.name.clone()).collect(),
            vote: scores(LabelEnsemble::vote),
            mean_likelihood: scores(LabelEnsemble::mean_likelihood),
            mean_accuracy: accuracies.iter().map(|(accuracy, _)| accuracy).sum::<f64>() / tuned.len() as f64,
            best: best.to_owned(),
            best_accuracy,
        })
    }
}

/// The labels of a row by all prompts.
fn together(row: &[&Prediction]) -> LabelEnsemble {
    let probabilities: Vec<&[f64]> = row.iter().map(|prediction| &prediction.probabilities[..]).collect();
    LabelEnsemble::new(&probabilities)
}

fn accuracy(arm: &Arm) -> f64 {
    arm.answers.likelihood.as_ref().map_or(0.0, |scores| scores.accuracy)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::ensemble::largest;
    use crate::evaluate::{Answers, Scores};

    fn arm(name: &str, probabilities: &[[f64; 3]], expected: &[&str], labels: &[String]) -> Arm {
        let predictions: Vec<Prediction> = probabilities
            .iter()
            .zip(expected)
            .map(|(p, expected)| Prediction {
                line: 2,
                input: String::new(),
                expected: (*expected).to_owned(),
                generated: String::new(),
                likeliest: Some(labels[largest(p)].clone()),
                probabilities: p.to_vec(),
            })
            .collect();
        let pairs: Vec<(&str, &str)> = predictions
            .iter()
            .map(|p| (p.expected.as_str(), p.likeliest.as_deref().unwrap_or_default()))
            .collect();
        let likelihood = Some(Scores::from_pairs(labels, pairs));
        let answers = Answers {
            predictions: predictions.clone(),
            generated: None,
            likelihood,
            text: None,
            loss: 1.0,
            perplexity: 1.0,
            seconds: 1.0,
        };
        Arm { name: name.to_owned(), adapter: None, answers }
    }

    fn evaluation(arms: Vec<Arm>, labels: &[String]) -> Evaluation {
        Evaluation {
            test: String::new(),
            task: Task::Classification,
            labels: labels.to_vec(),
            hard_prompt: String::new(),
            teacher: false,
            arms,
            pairs: Vec::new(),
            ensemble: None,
        }
    }

    /// Row 1: two weak votes for a against a sure one for b. Row 2: a vote each, so the mean decides. Row 3: all agree.
    #[test]
    fn votes_and_mean_probabilities_are_different_answers() {
        let labels = ["a", "b", "c"].map(str::to_owned);
        let expected = ["a", "c", "b"];
        let arms = vec![
            arm("base", &[[1.0, 0.0, 0.0]; 3], &expected, &labels),
            arm("x", &[[0.5, 0.4, 0.1], [0.4, 0.3, 0.3], [0.1, 0.8, 0.1]], &expected, &labels),
            arm("y", &[[0.5, 0.4, 0.1], [0.3, 0.4, 0.3], [0.1, 0.8, 0.1]], &expected, &labels),
            arm("z", &[[0.0, 1.0, 0.0], [0.1, 0.1, 0.8], [0.1, 0.8, 0.1]], &expected, &labels),
        ];
        let found = EnsembleScores::new(&evaluation(arms.clone(), &labels)).unwrap();
        assert_eq!((found.vote.correct, found.mean_likelihood.correct), (3, 2));
        assert_eq!((found.best.as_str(), found.best_accuracy), ("x", 2.0 / 3.0), "the first of equal ones");
        assert!((found.mean_accuracy - 2.0 / 3.0).abs() < 1e-12);
        assert_eq!(found.names, ["x", "y", "z"]);
        let few = EnsembleScores::new(&evaluation(arms[..2].to_vec(), &labels)).unwrap_err();
        assert!(few.to_string().contains("two adapters or more, found 1"), "{few}");
        let task = Task::Generation;
        let other = EnsembleScores::new(&Evaluation { task, ..evaluation(arms, &labels) }).unwrap_err();
        assert!(other.to_string().contains("classification"), "{other}");
    }
}
