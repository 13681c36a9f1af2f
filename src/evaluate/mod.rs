//! Evaluation: a model answers the test file with and without soft prompts.

pub mod compare;
mod ensemble;
mod exam;
mod likelihood;
pub mod metrics;
pub mod result;
mod run;
mod share;
pub mod text;
mod write;

pub use compare::{By, Paired};
pub use ensemble::EnsembleScores;
pub use exam::{Exam, Progress, Stage};
pub use likelihood::nll;
pub use metrics::{ClassScores, Scores};
pub use result::{Answers, Arm, Evaluation, Prediction};
pub use run::{Batching, EvaluationObserver, EvaluationPlace, run, test_file};
pub use text::{RowScores, TextScores};
