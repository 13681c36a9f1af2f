//! The result of an evaluation: `evaluation.json`.

use super::compare::{By, Paired};
use super::ensemble::EnsembleScores;
use super::metrics::Scores;
use super::text::{RowScores, TextScores};
use crate::config::Task;
use serde::{Deserialize, Serialize};

/// Base and tuned prompts on one file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// The file with the questions.
    pub test: String,
    /// The kind of its outputs.
    pub task: Task,
    /// The answers that count as labels, sorted; empty for other tasks than classification.
    pub labels: Vec<String>,
    /// The text before each row for the base model, in the place of a tuned prompt's virtual tokens; empty for none.
    pub hard_prompt: String,
    /// Whether that text is `data.teacher_text`, whose effect the tuned prompt has learned. Files of earlier versions do not
    /// have it: false.
    #[serde(default)]
    pub teacher: bool,
    /// The base model with the hard prompt first, then each tuned prompt.
    pub arms: Vec<Arm>,
    /// Each tuned prompt against the base: by the generated texts, in the order of `arms`; then the same by likelihood,
    /// or for other tasks than classification by token F1 and by ROUGE-L.
    pub pairs: Vec<Paired>,
    /// The tuned prompts together, with `--ensemble`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ensemble: Option<EnsembleScores>,
}

/// A model that answered, with its prompt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Arm {
    /// `base`, or the tuned prompt's name.
    pub name: String,
    /// Folder of the tuned prompt; none for the base.
    pub adapter: Option<String>,
    /// Its answers.
    pub answers: Answers,
}

/// One row's answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// Line of the test file.
    pub line: usize,
    /// The input of the row.
    pub input: String,
    /// The output of the row, without surrounding white space; in a classification in the form of labels.
    pub expected: String,
    /// The generated text, without surrounding white space; in a classification in the form of labels.
    pub generated: String,
    /// The label of the highest likelihood; `None` for other tasks.
    pub likeliest: Option<String>,
    /// Probability of each label among the labels, in their order; empty for other tasks.
    pub probabilities: Vec<f64>,
}

/// All answers of one arm, and their quality.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answers {
    /// One for each row.
    pub predictions: Vec<Prediction>,
    /// Classification: by the generated texts.
    pub generated: Option<Scores>,
    /// Classification: by the likelihood of the labels.
    pub likelihood: Option<Scores>,
    /// Other tasks: the texts against the expected ones.
    pub text: Option<TextScores>,
    /// Mean negative log-likelihood of the expected outputs' tokens, nats. The end-of-text token is one of them, except
    /// for outputs that were cut to `data.max_output_tokens`.
    #[serde(with = "crate::number")]
    pub loss: f64,
    /// exp of `loss`; at most the largest f64.
    #[serde(with = "crate::number")]
    pub perplexity: f64,
    /// Wall time of the answers: generation and the labels' likelihoods, without the time for `loss`. Of a prompt of an ensemble
    /// it is the time of all its prompts, which answer in one batch.
    #[serde(with = "crate::number")]
    pub seconds: f64,
}

impl Evaluation {
    /// The arms' names in a table: `base`, then `tuned` if there is one tuned prompt, otherwise the name of each.
    pub fn columns(&self) -> Vec<String> {
        let short = self.arms.len() <= 2;
        let name = |(i, arm): (usize, &Arm)| if short && i > 0 { "tuned".into() } else { arm.name.clone() };
        self.arms.iter().enumerate().map(name).collect()
    }

    /// The evaluation with only the base and the tuned prompt `name`.
    pub fn select(&self, name: &str) -> Self {
        let arms = self.arms.iter().enumerate().filter(|(i, arm)| *i == 0 || arm.name == name);
        let pairs = self.pairs.iter().filter(|pair| pair.name == name);
        Self {
            arms: arms.map(|(_, arm)| arm.clone()).collect(),
            pairs: pairs.cloned().collect(),
            ensemble: None,
            ..self.clone()
        }
    }

    /// Adds an arm, and compares it with the base if the base is there.
    pub(super) fn push(&mut self, arm: Arm) {
        if let Some(base) = self.arms.first() {
            let ways: &[By] = match self.task {
                Task::Classification => &[By::Generated, By::Likelihood],
                Task::Generation => &[By::Generated, By::TokenF1, By::RougeL],
            };
            let paired = |by: &By| {
                Paired::from_scores(&arm.name, *by, &base.answers.judged(*by), &arm.answers.judged(*by))
            };
            self.pairs.extend(ways.iter().map(paired));
            // The sort is stable: for each way of judging, the arms keep their order.
            self.pairs.sort_by_key(|pair| pair.by as u8);
        }
        self.arms.push(arm);
    }
}

impl Answers {
    /// The score of each row, in [0, 1].
    fn judged(&self, by: By) -> Vec<f64> {
        let rows = self.predictions.iter();
        let texts = || RowScores::all(rows.clone().map(|p| (p.expected.as_str(), p.generated.as_str())));
        match by {
            By::Generated => rows.map(|p| f64::from(p.generated == p.expected)).collect(),
            By::Likelihood => rows.map(|p| f64::from(p.likeliest.as_deref() == Some(&p.expected))).collect(),
            By::TokenF1 => texts().iter().map(|row| row.token_f1).collect(),
            By::RougeL => texts().iter().map(|row| row.rouge_l).collect(),
        }
    }
}
