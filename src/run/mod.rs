//! The run folder `runs/NAME/`: the files that a run writes, and how they are read later.
//!
//! ```text
//! config.toml              the resolved configuration
//! lock                     locked while a program writes the folder
//! metrics.jsonl            one line for each step and each epoch, written when it ends
//! checkpoint.safetensors   everything that a resumed run needs
//! summary.json             the settings and results of the run
//! adapter/                 the tuned prompt in PEFT's format
//! tokens.json              the vocabulary's nearest tokens of each virtual token, before and after
//! evaluation.json          tuned against base on the test file, every answer included
//! predictions.csv          the same answers as a table
//! report.html              the report page; curve.svg and curve.png are its learning curve
//! events.out.tfevents.*    the records for TensorBoard, if `train.tensorboard` is true
//! ```

mod agreement;
mod data;
pub mod folder;
mod position;
pub mod read;
mod recorder;
mod resumable;
pub mod summary;
pub mod teacher;
pub mod tensorboard;
pub mod tuning;

pub use agreement::Agreement;
pub use data::TuningData;
pub use folder::RunFolder;
pub use read::{Run, RunRecord};
pub use recorder::Recorder;
pub use resumable::{resumable, resumable_as};
pub use summary::{LossKind, ModelSummary, Status, Summary};
pub use teacher::TeacherData;
pub use tuning::Tuning;
