//! The models that a server offers: the base model, and each tuned prompt under its name.

use crate::Result;
use crate::data::Template;
use crate::prompt::check_name;
use crate::prompt::peft::{Adapter, PromptTask};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// A model that requests may name.
#[derive(Debug, Clone)]
pub struct Served {
    /// The name.
    pub name: String,
    /// The id of the deployment; `None`: it is computed from the name.
    pub deployment_id: Option<String>,
    /// The adapter's folder; `None` for the base model.
    pub folder: Option<PathBuf>,
    /// Number of virtual tokens; 0 for the base model.
    pub virtual_tokens: usize,
    /// The task that the prompt was tuned for, if its folder says so.
    pub task: Option<PromptTask>,
    /// The task's verbalizer.
    pub template: Option<Template>,
    /// Time at which it was loaded.
    pub loaded: SystemTime,
}

impl Served {
    /// The base model.
    pub fn base(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            deployment_id: None,
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
    /// Returns an error if [`check_name`] refuses the name or the verbalizer is invalid.
    pub fn tuned(name: &str, folder: &Path, adapter: &Adapter) -> Result<Self> {
        check_name(name)?;
        let task = adapter.task.clone();
        let template = task.as_ref().map(|task| Template::parse(&task.verbalizer)).transpose()?;
        Ok(Self {
            name: name.to_owned(),
            deployment_id: None,
            folder: Some(folder.to_path_buf()),
            virtual_tokens: adapter.prompt.num_virtual_tokens(),
            task,
            template,
            loaded: SystemTime::now(),
        })
    }
}
