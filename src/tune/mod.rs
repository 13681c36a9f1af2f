//! Tuning: what turns a frozen model, a dataset and a configuration into a soft prompt.

pub mod schedule;
