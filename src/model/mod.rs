//! A frozen checkpoint: where it comes from, what its configuration says, its weights, and the
//! forward and backward pass over a packed batch.

pub mod checkpoint;
pub mod config;
mod content;
mod finite;
pub mod gguf;
pub mod granite;
pub mod hub;
mod infer;
pub(crate) mod json;
pub mod kv_cache;
pub mod memory;
pub(crate) mod names;
pub mod pass;
mod prepare;
pub mod random;
mod remote;
mod rope;
mod shards;
pub mod source;
pub mod tape;
pub mod tokenizer;
mod transfer;
mod unread;
pub mod weights;

pub use checkpoint::{BareCheckpoint, Checkpoint};
pub use config::{ModelConfig, ModelType};
pub use gguf::GgufFile;
pub use granite::{Dtypes, Granite};
pub use hub::HubOptions;
pub use kv_cache::{KvCache, Next};
pub use memory::{Parameters, TuningMemory};
pub use source::{Local, Source, resolve};
pub(crate) use source::{adapter_snapshot, hub_repository};
pub use tape::Tape;
pub use tokenizer::TextTokenizer;
pub(crate) use tokenizer::{TokenWithoutRow, first_without_row};
pub use weights::Weights;
