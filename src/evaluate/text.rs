//! Metrics of generated texts.

use serde::{Deserialize, Serialize};

/// Generated texts against the expected ones; means over the rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TextScores {
    /// Share of texts that equal what was expected.
    pub exact_match: f64,
    /// Wilson's interval of it, 95 %.
    pub exact_match_interval: [f64; 2],
    /// Texts that equal what was expected.
    pub correct: usize,
    /// All texts.
    pub total: usize,
    /// F1 of the words in common, as SQuAD counts it.
    pub token_f1: f64,
    /// ROUGE-L: F1 of the longest common subsequence of words.
    pub rouge_l: f64,
}
