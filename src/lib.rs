//! gneiss tunes *soft prompts* for open IBM Granite language models on one's own machine.
//!
//! The model's weights stay frozen; a small matrix of virtual-token embeddings is prepended to every
//! input, and only that matrix is trained. What comes out is a few hundred kilobytes of safetensors
//! that any PEFT user can load.
#![deny(missing_docs)]

pub mod adapter;
pub mod bench;
pub mod check;
pub mod config;
pub mod data;
pub mod device;
pub mod error;
pub mod evaluate;
pub mod export;
pub mod files;
pub mod generate;
pub mod model;
mod number;
pub mod ops;
pub mod report;
pub mod run;
pub mod serve;
pub mod setup;
pub mod text;
pub mod tune;
pub mod vocabulary;

pub use error::{Error, Result};
