//! Evaluation: a model with and without soft prompts answers the test file.

pub mod compare;
mod exam;
mod likelihood;
pub mod metrics;
pub mod result;
mod run;
pub mod text;
mod tuned;
mod write;

pub use compare::{By, Paired};
pub use exam::{Exam, Progress, Stage, labels};
pub use likelihood::nll;
pub use metrics::{ClassScores, Scores};
pub use result::{Answers, Arm, Evaluation, Prediction};
pub use run::{Observer, run, test_file};
pub use text::{RowScores, TextScores};
pub use tuned::Tuned;
