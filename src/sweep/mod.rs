//! A sweep: trials of one task, each an ordinary run, of which the worse ones are pruned on the way.
//!
//! ```text
//! runs/NAME/config.toml     the configuration, with [sweep]
//! runs/NAME/lock            locked while a program writes the folder; shared by shards
//! runs/NAME/sweep.jsonl     the decisions, one line each, written when they are made
//! runs/NAME/sweep.html      the report page
//! runs/NAME/trials/NNN/     the run folder of a trial
//! runs/NAME/best            link to the best trial's folder
//! ```
//!
//! The trials take turns by epoch. A trial that waits is on disk alone, as its checkpoint; a turn continues it from there. So
//! a trial computes what `gneiss tune` of its configuration computes, and a sweep that is killed continues like a run.

mod advance;
mod folder;
mod halving;
mod observer;
mod record;
mod result;
mod run;
mod shard;
mod trial;
mod validation;

pub use folder::SweepFolder;
pub use halving::{Halving, Standing};
pub use observer::SweepObserver;
pub use record::SweepRecord;
pub use result::{SweepResult, TrialResult};
pub use run::Sweep;
pub use shard::Shard;
pub use trial::Trial;
pub use validation::{Estimate, ValidationRows};
