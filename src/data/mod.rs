//! From files to packed batches: dataset → template → token ids → [packed batch](pack).

pub mod dataset;
pub mod encode;
pub mod labels;
pub mod pack;
pub mod template;

pub use dataset::{Dataset, Record};
pub use encode::{Encoded, Encoder, Example, LengthStats};
pub use pack::{PackedBatch, Packing, Passes, PrefixGroup};
pub use template::Template;
