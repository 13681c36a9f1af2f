//! The run folder `runs/NAME/`: the files that a run writes, and how they are read later.
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
pub use read::{Run, RunRecord};
pub use summary::{ModelSummary, Status, Summary};
pub use tuning::Tuning;
