//! The models that a server offers: the base model, each tuned prompt under its name, and ensembles of tuned prompts.

use crate::data::Template;
use crate::prompt::peft::{Adapter, PromptTask};
use crate::prompt::{Tuned, check_name};
use crate::{Error, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

/// A model that requests may name.
#[derive(Debug, Clone)]
pub struct Served {
    /// The name.
    pub name: String,
    /// The id of the deployment; `None`: it is computed from the name.
    pub deployment_id: Option<String>,
    /// The adapter's folder; `None` for the base model and an ensemble.
    pub folder: Option<PathBuf>,
    /// Number of virtual tokens; 0 for the base model, and of an ensemble those of its longest prompt.
    pub virtual_tokens: usize,
    /// The task that the prompt was tuned for, if its folder says so.
    pub task: Option<PromptTask>,
    /// The task's verbalizer.
    pub template: Option<Template>,
    /// Time at which it was loaded.
    pub loaded: SystemTime,
    /// The tuned prompts of an ensemble, which requests can't name by themselves; none of another model.
    pub members: Vec<Arc<Served>>,
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
            members: Vec::new(),
        }
    }

    /// Whether this is the base model.
    pub fn is_base(&self) -> bool {
        self.folder.is_none() && self.members.is_empty()
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
            members: Vec::new(),
        })
    }

    /// An ensemble: `tuned` prompts of one classification, which answer together.
    ///
    /// # Errors
    /// Returns an error if [`check_name`] refuses the name, there are fewer than two prompts, they were tuned for different
    /// tasks or for no classification, or a verbalizer is invalid.
    pub fn ensemble(name: &str, tuned: &[Tuned]) -> Result<Self> {
        check_name(name)?;
        let first = match tuned {
            [first, _, ..] => first,
            _ => {
                let found = tuned.len();
                let problem = format!("--ensemble {name}: expected two adapters or more, found {found}");
                return Err(Error::Invalid(problem));
            }
        };
        tuned.iter().try_for_each(|tuned| check_member(name, tuned, first))?;
        let member = |tuned: &Tuned| {
            let served = Self::tuned(name, &tuned.argument(), &tuned.adapter)?;
            // No other model has such a name.
            Ok(Arc::new(Self { name: format!("{name}: {}", tuned.name), ..served }))
        };
        let members: Vec<Arc<Self>> = tuned.iter().map(member).collect::<Result<_>>()?;
        let virtual_tokens = members.iter().map(|member| member.virtual_tokens).max().unwrap_or(0);
        // What stands before a prompt is checked for each member.
        let task = first.adapter.task.clone().map(|task| PromptTask { before: None, ..task });
        Ok(Self { virtual_tokens, task, template: members[0].template.clone(), members, ..Self::base(name) })
    }
}

/// Refuses a prompt that was not tuned for the classification of the `first` one.
fn check_member(name: &str, tuned: &Tuned, first: &Tuned) -> Result<()> {
    let invalid = |problem: String| {
        Err(Error::Invalid(format!("--ensemble {name}: {}: {problem}", tuned.argument().display())))
    };
    match (&tuned.adapter.task, &first.adapter.task) {
        (Some(task), _) if task.labels.is_empty() => invalid(format!(
            "expected a prompt of a classification, whose labels can be voted on, found \"{}\"",
            task.task
        )),
        (Some(task), Some(expected))
            if task.verbalizer == expected.verbalizer && task.labels == expected.labels =>
        {
            Ok(())
        }
        (None, None) => Ok(()),
        (found, expected) => {
            let describe = |task: &Option<PromptTask>| match task {
                Some(task) => {
                    format!("the verbalizer {:?} and the labels {}", task.verbalizer, task.labels.join(", "))
                }
                None => "no task beside the prompt".to_owned(),
            };
            let (expected, found) = (describe(expected), describe(found));
            invalid(format!("expected {expected}, as {} has, found {found}", first.argument().display()))
        }
    }
}
