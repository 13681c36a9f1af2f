//! What a sweep decides: the lines of `sweep.jsonl`.

use serde::{Deserialize, Serialize};

/// A line of `sweep.jsonl`. Trials are named by their numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum SweepRecord {
    /// The sweep began.
    Started {
        /// Number of trials.
        trials: usize,
        /// Most prompts in one pass.
        max_prompts: usize,
    },
    /// A rung was put off by an epoch, because the leading trial has not learned anything yet.
    Postponed {
        /// The epoch of the rung.
        epoch: usize,
        /// The leading trial.
        leader: usize,
        /// Its loss on the validation file, nats per target token.
        #[serde(with = "crate::number")]
        validation_loss: f64,
        /// The loss of guessing each label as often as it occurs.
        #[serde(with = "crate::number")]
        chance: f64,
    },
    /// A rung was decided.
    Rung {
        /// Its epoch.
        epoch: usize,
        /// The trials that stay, the best first.
        kept: Vec<usize>,
        /// The trials that are pruned, the best first.
        pruned: Vec<usize>,
    },
    /// All trials have ended.
    Best {
        /// The best one.
        trial: usize,
        /// The loss of its prompt on the validation file.
        #[serde(default, with = "crate::number::optional")]
        validation_loss: Option<f64>,
        /// The share of validation rows whose expected label is the likeliest after its prompt; null for a generation.
        #[serde(default, with = "crate::number::optional")]
        validation_accuracy: Option<f64>,
    },
}
