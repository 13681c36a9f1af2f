//! The soft prompt: how it begins, the tokens that it is like, and PEFT's files of it.

pub mod init;
mod layout;
mod named;
pub mod peft;
mod prefix;
mod reparameterization;
mod soft_prompt;
pub mod torch_reader;
pub mod vocabulary;

pub use layout::{PromptLayout, PromptPart};
pub use named::{MAX_NAME_CHARS, Tuned, check_name, split_name};
pub use peft::{Adapter, AdapterConfig, ModelCard, Place, PromptTask, PromptTuningInit};
pub use prefix::Prefix;
pub use soft_prompt::Prompt;
