//! The prompts to export, and their names.

use crate::prompt::peft::Adapter;
use crate::prompt::{Prefix, Tuned, check_name, split_name};
use crate::{Error, Result};
use std::path::{Path, PathBuf};

/// A tuned prompt with a name.
#[derive(Debug, Clone)]
pub struct NamedPrompt {
    /// A name that [`check_name`] allows.
    pub name: String,
    /// The prompt with its configuration.
    pub adapter: Adapter,
}

/// Reads prompts given as `DIR` or `NAME=DIR`; DIR has any of the forms of
/// [`Place::find`](crate::prompt::peft::Place::find). Without a name the prompt has the name of the run, the folder or
/// the repository.
///
/// # Errors
/// Returns an error if a folder has no prompt or is given twice, if a name is given twice or [`check_name`] refuses it, or if
/// a prompt is keys and values.
pub fn read_prompts(arguments: &[String]) -> Result<Vec<NamedPrompt>> {
    let (names, folders): (Vec<Option<&str>>, Vec<PathBuf>) =
        arguments.iter().map(|argument| split_name(argument)).unzip();
    let tuned = Tuned::read_all(&folders)?;
    let mut prompts: Vec<NamedPrompt> = Vec::with_capacity(tuned.len());
    for ((name, folder), tuned) in names.into_iter().zip(&folders).zip(tuned) {
        let name = name.map_or(tuned.name, str::to_owned);
        check_name(&name)
            .map_err(|error| Error::Invalid(format!("{error}; hint: --adapter NAME={}", folder.display())))?;
        if matches!(tuned.adapter.prompt, Prefix::KeysValues(_)) {
            return Err(Error::Invalid(format!(
                "--adapter {}: expected a prompt of embeddings, found keys and values ({}): baked checkpoints and files of \
                 embeddings can't hold them; hint: `gneiss serve` serves such a prompt",
                folder.display(),
                tuned.adapter.config.peft_type
            )));
        }
        if prompts.iter().any(|other| other.name == name) {
            return Err(Error::Invalid(format!("--adapter: expected every name once, found {name:?} twice")));
        }
        prompts.push(NamedPrompt { name, adapter: tuned.adapter });
    }
    Ok(prompts)
}

/// The model on which all prompts were tuned by their configurations, with its revision.
///
/// # Errors
/// Returns an error if a prompt names no model, or if the prompts name different models.
pub fn base_model(prompts: &[NamedPrompt]) -> Result<String> {
    let mut found: Option<(String, &str)> = None;
    for NamedPrompt { name, adapter } in prompts {
        let config = &adapter.config;
        let Some(model) = config.base_model_name_or_path.as_deref().filter(|model| !model.is_empty()) else {
            return Err(Error::Invalid(format!(
                "--model: required, because {name} does not say on which model it was tuned"
            )));
        };
        let model = match &config.revision {
            Some(revision) if !Path::new(model).exists() => format!("{model}@{revision}"),
            _ => model.to_string(),
        };
        match &found {
            Some((first, other)) if *first != model => {
                return Err(Error::Invalid(format!(
                    "--adapter: expected prompts of one model, found {other} of {first} and {name} of {model}; hint: --model \
                     where both are the same"
                )));
            }
            Some(_) => {}
            None => found = Some((model, name)),
        }
    }
    found.map(|(model, _)| model).ok_or_else(|| Error::Invalid("--adapter: expected one, found none".into()))
}
