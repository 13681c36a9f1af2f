//! From files to packed batches: dataset → template → token ids → [packed batch](pack).

pub mod template;

pub use template::Template;
