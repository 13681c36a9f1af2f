//! A frozen checkpoint: where it comes from, what its configuration says, its weights, and the
//! forward and backward pass over a packed batch.

pub mod checkpoint;
pub mod config;
pub mod gguf;
mod json;
pub mod tokenizer;
pub mod weights;

pub use checkpoint::{BareCheckpoint, Checkpoint};
pub use config::{ModelConfig, ModelType, Rope};
pub use gguf::GgufFile;
pub use tokenizer::TextTokenizer;
pub use weights::Weights;
