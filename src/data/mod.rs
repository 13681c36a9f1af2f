//! From files to packed batches: dataset → template → token ids → [packed batch](pack).

pub mod pack;

pub use pack::{PackedBatch, Passes, PrefixGroup};
