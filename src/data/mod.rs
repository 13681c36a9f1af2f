//! From files to token ids: dataset → template → tokenizer.

pub mod dataset;
pub mod encode;
pub mod ensemble;
mod head;
pub mod labels;
pub mod template;

pub use dataset::{Dataset, Record};
pub use encode::{Encoded, Encoder, LengthStats};
pub use head::InputHead;
pub use template::Template;
