//! The models that a server offers: the base, and each tuned prompt under its name.

use crate::adapter::PromptTask;
use crate::data::Template;
use std::path::PathBuf;
use std::time::SystemTime;

/// A model that requests may name.
#[derive(Debug, Clone)]
pub struct Served {
    /// The name.
    pub name: String,
    /// The adapter's folder; `None` of the base model.
    pub folder: Option<PathBuf>,
    /// Virtual tokens of its prompt; 0 of the base model.
    pub virtual_tokens: usize,
    /// What the prompt was tuned for, where its folder says.
    pub task: Option<PromptTask>,
    /// The task's verbalizer.
    pub template: Option<Template>,
    /// When it was loaded.
    pub loaded: SystemTime,
}
