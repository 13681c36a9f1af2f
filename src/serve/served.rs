//! The models that a server offers: the base model, and each tuned prompt under its name.

use crate::data::Template;
use crate::prompt::peft::{Adapter, PromptTask};
use crate::{Error, Result};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Most characters of a name.
pub const LONGEST_NAME: usize = 128;

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

impl Served {
    /// The base model.
    pub fn base(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            folder: None,
            virtual_tokens: 0,
            task: None,
            template: None,
            loaded: SystemTime::now(),
        }
    }

    /// A tuned prompt that was read from `folder`.
    ///
    /// # Errors
    /// A name that can't stand in an address; a verbalizer that is none.
    pub fn tuned(name: &str, folder: &Path, adapter: &Adapter) -> Result<Self> {
        check_name(name)?;
        let task = adapter.task.clone();
        let template = task.as_ref().map(|task| Template::parse(&task.verbalizer)).transpose()?;
        Ok(Self {
            name: name.to_owned(),
            folder: Some(folder.to_path_buf()),
            virtual_tokens: adapter.prompt.dims()[0],
            task,
            template,
            loaded: SystemTime::now(),
        })
    }
}

/// Refuses a name that can't stand in the address of a deployment.
///
/// # Errors
/// [`Error::Invalid`] with what a name is made of.
pub fn check_name(name: &str) -> Result<()> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let good =
        !name.is_empty() && name.len() <= LONGEST_NAME && name.chars().all(fits) && !name.starts_with('.');
    if good {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "adapter name {name:?}: expected 1 to {LONGEST_NAME} letters, digits, `-`, `_` and `.`, not beginning with `.`"
    )))
}
