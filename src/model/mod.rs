//! A frozen checkpoint: where it comes from, what its configuration says, its weights, and the
//! forward and backward pass over a packed batch.

pub mod checkpoint;
pub mod config;
pub mod gguf;
pub mod granite;
pub mod hub;
mod json;
pub mod kv_cache;
pub mod memory;
pub mod pass;
pub mod random;
mod remote;
pub mod source;
pub mod tape;
pub mod tokenizer;
mod transfer;
pub mod weights;

pub use checkpoint::{BareCheckpoint, Checkpoint};
pub use config::{ModelConfig, ModelType, Rope};
pub use gguf::GgufFile;
pub use granite::{Dtypes, Granite};
pub use hub::HubOptions;
pub use kv_cache::{KvCache, Next};
pub use memory::{Parameters, TuningMemory};
pub use source::{Local, Source, resolve};
pub use tape::Tape;
pub use tokenizer::TextTokenizer;
pub(crate) use tokenizer::{Rowless, first_without_row};
pub use weights::Weights;
