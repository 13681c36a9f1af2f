//! A frozen checkpoint: where it comes from, what its configuration says, its weights, and the
//! forward and backward pass over a packed batch.

pub mod config;
mod json;

pub use config::{ModelConfig, ModelType, Rope};
