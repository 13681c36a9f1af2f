//! Two sets of answers to the same rows.

use serde::{Deserialize, Serialize};

/// A tuned prompt against the base, row by row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Paired {
    /// Name of the tuned prompt.
    pub name: String,
    /// Rows that only the tuned prompt answered right.
    pub fixed: usize,
    /// Rows that only the base answered right.
    pub broken: usize,
    /// Accuracy (or the share of exact matches) of the tuned prompt minus that of the base.
    pub difference: f64,
    /// Its bootstrap interval, 95 %.
    pub interval: [f64; 2],
    /// Two-sided exact p-value of McNemar's test: how likely it is that rows are fixed and broken so unevenly where
    /// neither is better.
    pub p_value: f64,
}
