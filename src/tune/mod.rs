//! Tuning: the objective and its gradient, the optimizer step, the run.

pub mod fit;
pub mod health;
pub mod objective;
pub mod observer;
pub mod plan;
pub mod prompt_run;
pub mod range_test;
pub mod schedule;
pub mod state;
pub mod teacher;
pub mod trainer;

pub use fit::{largest_step, max_rows, plan_pack, plan_run, prompts_in_a_pass};
pub use objective::{Loss, Mean, Objective, evaluate, evaluate_of, gradient, gradient_of};
pub use observer::{EpochRecord, Observer, StepRecord};
pub use plan::{BackwardWeights, Budget, LargestStep, Limits, MemoryPlan, RowRange};
pub use prompt_run::{Ended, Kept, PromptRun, RunExamples};
pub use range_test::{RangePoint, RangeTest, range_test};
pub use state::{Position, RunMark, State, epoch_order};
pub use teacher::{Teacher, TeacherExamples};
pub use trainer::{Task, Trainer};
