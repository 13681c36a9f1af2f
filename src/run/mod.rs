//! The run folder `runs/NAME/`: what a run writes while it goes on, and what is read of it later.
//!
//! ```text
//! config.toml              the resolved configuration
//! metrics.jsonl            a line a step and a line an epoch, written as they end
//! checkpoint.safetensors   all that it takes to go on
//! summary.json             what was tuned on what, and what came of it
//! adapter/                 the tuned prompt in PEFT's format
//! tokens.json              the vocabulary's nearest tokens of each virtual token, before and after
//! evaluation.json          tuned against base on the test file, every answer included
//! predictions.csv          the same answers as a table
//! report.html              all of it as a page; curve.svg and curve.png are its learning curve
//! events.out.tfevents.*    the records for TensorBoard, where `train.tensorboard` asks for them
//! ```

pub mod folder;
pub mod read;
pub mod summary;
pub mod tensorboard;
pub mod tuning;

pub use folder::RunFolder;
pub use read::{Record, Run};
pub use summary::{ModelSummary, Status, Summary};
pub use tuning::Tuning;

/// File of the resolved configuration.
pub const CONFIG: &str = "config.toml";
/// File of the records.
pub const METRICS: &str = "metrics.jsonl";
/// File of [`crate::tune::State`].
pub const CHECKPOINT: &str = "checkpoint.safetensors";
/// File of [`Summary`].
pub const SUMMARY: &str = "summary.json";
/// Folder of the tuned prompt.
pub const ADAPTER: &str = "adapter";
/// File of [`crate::vocabulary::PromptTokens`].
pub const TOKENS: &str = "tokens.json";
/// File of [`crate::evaluate::Evaluation`].
pub const EVALUATION: &str = "evaluation.json";
/// File of the answers as a table.
pub const PREDICTIONS: &str = "predictions.csv";
/// File of the run as a page.
pub const REPORT: &str = "report.html";
/// File of the learning curve as a drawing.
pub const CURVE_SVG: &str = "curve.svg";
/// File of the learning curve as a picture.
pub const CURVE_PNG: &str = "curve.png";
