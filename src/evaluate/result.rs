//! What an evaluation comes to: `evaluation.json`.

use super::compare::Paired;
use super::metrics::Scores;
use super::text::TextScores;
use crate::config::Task;
use serde::{Deserialize, Serialize};

/// Base and tuned prompts over one file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// The file that was answered.
    pub test: String,
    /// What its outputs are.
    pub task: Task,
    /// The answers that count as labels, sorted; empty for other tasks than classification.
    pub labels: Vec<String>,
    /// The base model behind the hard prompt first, then each tuned prompt.
    pub arms: Vec<Arm>,
    /// Each tuned prompt against the base, in the order of `arms`.
    pub pairs: Vec<Paired>,
}

/// A model that answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Arm {
    /// `base`, or the tuned prompt's name.
    pub name: String,
    /// Folder of the tuned prompt; none for the base.
    pub adapter: Option<String>,
    /// What it answered.
    pub answers: Answers,
}

/// One row's answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// Line of the test file.
    pub line: usize,
    /// The input of the row.
    pub input: String,
    /// The output of the row, without surrounding white space.
    pub expected: String,
    /// What was generated, without surrounding white space.
    pub generated: String,
    /// The label of the highest likelihood; `None` for other tasks.
    pub likeliest: Option<String>,
    /// Probability of each label among the labels, in their order; empty for other tasks.
    pub probabilities: Vec<f64>,
}

/// All answers of one arm, and how good they are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answers {
    /// One a row.
    pub predictions: Vec<Prediction>,
    /// Classification: by what was generated.
    pub generated: Option<Scores>,
    /// Classification: by the likelihood of the labels.
    pub likelihood: Option<Scores>,
    /// Other tasks: the texts against the expected ones.
    pub text: Option<TextScores>,
    /// exp of the mean negative log-likelihood of the expected outputs' tokens, the end-of-text token included.
    pub perplexity: f64,
    /// Wall time of the answers.
    pub seconds: f64,
}
