//! The prompts to export, and their names.

use crate::prompt::Tuned;
use crate::prompt::peft::Adapter;
use crate::{Error, Result};
use std::path::{Path, PathBuf};

/// A tuned prompt with a name.
#[derive(Debug, Clone)]
pub struct NamedPrompt {
    /// Letters, digits, `.`, `_` and `-`.
    pub name: String,
    /// The prompt with its configuration.
    pub adapter: Adapter,
}

/// Reads prompts given as `DIR` or `NAME=DIR`; DIR has any of the forms of
/// [`Place::find`](crate::prompt::peft::Place::find). Without a name the prompt has the name of the run, the folder or
/// the repository.
///
/// # Errors
/// Returns an error if a folder is no adapter or is given twice, or if a name is given twice or contains other
/// characters than letters, digits, `.`, `_` and `-`.
pub fn read_prompts(arguments: &[String]) -> Result<Vec<NamedPrompt>> {
    let (names, folders): (Vec<Option<&str>>, Vec<PathBuf>) =
        arguments.iter().map(|argument| split(argument)).unzip();
    let tuned = Tuned::read_all(&folders)?;
    let mut prompts: Vec<NamedPrompt> = Vec::with_capacity(tuned.len());
    for ((name, folder), tuned) in names.into_iter().zip(&folders).zip(tuned) {
        let name = name.map_or(tuned.name, str::to_owned);
        check_name(&name, folder)?;
        if prompts.iter().any(|other| other.name == name) {
            return Err(Error::Invalid(format!("--adapter: expected every name once, found {name:?} twice")));
        }
        prompts.push(NamedPrompt { name, adapter: tuned.adapter });
    }
    Ok(prompts)
}

/// A path may contain a `=` too: an argument that exists as a path has no name.
fn split(argument: &str) -> (Option<&str>, PathBuf) {
    match argument.split_once('=') {
        Some((name, folder)) if !Path::new(argument).exists() => (Some(name), folder.into()),
        _ => (None, argument.into()),
    }
}

fn check_name(name: &str, folder: &Path) -> Result<()> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if !name.is_empty() && name.chars().all(fits) {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "--adapter: expected a name of letters, digits, `.`, `_` and `-`because it becomes part of tokens, found {name:?}; hint: \
         --adapter NAME={}",
        folder.display()
    )))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stands_before_the_first_equals_sign() {
        assert_eq!(split("dogs=runs/a=b"), (Some("dogs"), "runs/a=b".into()));
        assert_eq!(split("runs/dogs"), (None, "runs/dogs".into()));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a=b");
        std::fs::create_dir(&path).unwrap();
        assert_eq!(split(path.to_str().unwrap()), (None, path.clone()));
    }

    #[test]
    fn names_are_parts_of_tokens() {
        let folder = Path::new("runs/dogs");
        for good in ["dogs", "dogs-2.1_b", "7"] {
            check_name(good, folder).unwrap();
        }
        for bad in ["", "a/b", "a b", "a|b", "a:0", "hündchen", "a>"] {
            let error = check_name(bad, folder).unwrap_err().to_string();
            assert!(error.contains("--adapter NAME=runs/dogs"), "{error}");
        }
    }
}
