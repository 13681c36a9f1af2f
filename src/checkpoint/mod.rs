//! A checkpoint: its configuration, tensors, tokenizer and chat template, and the hub.

pub mod chat_template;
pub mod config;
mod content;
mod finite;
pub mod gguf;
pub mod hub;
mod hub_id;
pub(crate) mod json;
pub mod layers;
pub(crate) mod names;
mod on_disk;
mod rope;
mod shards;
pub mod source;
pub mod stored;
pub mod tensors;
pub mod tokenizer;
mod typed;
mod unread;
pub mod weights;

pub use chat_template::{ChatTemplate, find_chat_template};
pub use config::{MixerKind, ModelConfig, ModelType};
pub(crate) use content::LFS_POINTER;
pub use gguf::GgufFile;
pub use hub::{HubOptions, LicenseTag, Upload, UploadFile, license};
pub use hub_id::check_repository;
pub use layers::{ExpertsConfig, MambaConfig};
pub use on_disk::{BareCheckpoint, Checkpoint};
pub use source::{Local, Source, resolve};
pub(crate) use source::{adapter_snapshot, hub_repository};
pub use tokenizer::TextTokenizer;
pub(crate) use tokenizer::{TokenWithoutRow, first_without_row};
pub use weights::Weights;
