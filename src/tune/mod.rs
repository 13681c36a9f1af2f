//! Tuning: the objective and its gradient, the optimizer step, the run.

pub mod objective;
pub mod plan;
pub mod prompt;
pub mod schedule;
pub mod trainer;

pub use objective::{Objective, evaluate, gradient};
pub use plan::{Budget, Limits, MemoryPlan, RowRange, Work};
pub use trainer::{EpochRecord, Kept, Observer, StepRecord, Task, Trainer, epoch_order};
