//! gneiss tunes *soft prompts* for open IBM Granite language models on one's own machine.
//!
//! The model's weights stay frozen; a small matrix of virtual-token embeddings is prepended to every input, and only
//! that matrix is trained. The result is a few hundred kilobytes of safetensors that any PEFT user can load.
#![deny(missing_docs)]

pub mod batch;
pub mod bench;
pub mod calendar;
pub mod check;
pub mod checkpoint;
pub mod config;
pub mod data;
pub mod device;
pub mod error;
pub mod evaluate;
pub mod export;
pub mod files;
pub mod generate;
pub mod layout;
pub mod model;
mod number;
pub mod ops;
pub mod prompt;
pub mod ranks;
pub mod report;
pub mod run;
#[cfg(feature = "serve")]
pub mod serve;
pub mod session;
pub mod sweep;
pub mod text;
pub mod tune;
#[cfg(feature = "serve")]
pub mod watsonx;

pub use error::{Error, Result};
