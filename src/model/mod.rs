//! A frozen checkpoint: where it comes from, what its configuration says, its weights, and the
//! forward and backward pass over a packed batch.

pub mod config;
pub mod hub;
mod remote;
pub mod source;
mod transfer;

pub use config::{ModelConfig, ModelType, Rope};
pub use hub::HubOptions;
pub use source::{Local, Source, resolve};
