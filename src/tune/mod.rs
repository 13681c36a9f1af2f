//! Tuning: the objective and its gradient, the optimizer step, the run.

pub mod objective;

pub use objective::{Objective, evaluate, gradient};
