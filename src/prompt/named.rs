//! Tuned prompts with names that tell them apart.

use crate::checkpoint::HubOptions;
use crate::prompt::peft::{Adapter, Place, with_task};
use crate::{Error, Result};
use std::path::{Component, Path, PathBuf};

/// Most characters of a prompt's name.
pub const MAX_NAME_CHARS: usize = 128;

/// Checks the name that a prompt is served or exported under. It may become part of an address or of a token.
///
/// # Errors
/// Returns [`Error::Invalid`], with the characters that a name may have, if `name` has others, is empty or too long, or begins
/// with `.`.
pub fn check_name(name: &str) -> Result<()> {
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let is_valid = !name.is_empty()
        && name.len() <= MAX_NAME_CHARS
        && name.chars().all(is_allowed)
        && !name.starts_with('.');
    if is_valid {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "adapter name {name:?}: expected 1 to {MAX_NAME_CHARS} letters, digits, `-`, `_` and `.`, not beginning with `.`"
    )))
}

/// Splits `NAME=DIR` at the first `=`. `DIR` alone has no name, and neither has a path that exists as it is written, since
/// a path may contain `=`.
pub fn split_name(argument: &str) -> (Option<&str>, PathBuf) {
    match argument.split_once('=') {
        Some((name, folder)) if !is_path(argument) => (Some(name), folder.into()),
        _ => (None, argument.into()),
    }
}

/// Whether `argument`, or what is before the colon of a task in it, is there.
fn is_path(argument: &str) -> bool {
    let exists = |path: &str| Path::new(path).exists();
    let has_task = |task: &str| !task.is_empty() && task.bytes().all(|byte| byte.is_ascii_digit());
    exists(argument)
        || argument.rsplit_once(':').is_some_and(|(folder, task)| has_task(task) && exists(folder))
}

/// A tuned prompt with its name.
#[derive(Debug, Clone)]
pub struct Tuned {
    /// Name of its run, or of its folder if it is in no run, then `-TASK` if it is that of a task; with as much of the
    /// path before it as tells it from the others and from `base`.
    pub name: String,
    /// The adapter's folder.
    pub folder: PathBuf,
    /// The run folder that it is in.
    pub run: Option<PathBuf>,
    /// The task whose prompt it is, if the adapter holds several and one was named.
    pub task: Option<usize>,
    /// The prompt itself.
    pub adapter: Adapter,
}

impl Tuned {
    /// Reads the adapter that `argument` names in any of the forms of [`Place::find`].
    ///
    /// # Errors
    /// As [`Tuned::read_all`].
    pub fn read(argument: &Path) -> Result<Self> {
        Ok(Self::read_all(&[argument.to_path_buf()])?.remove(0))
    }

    /// Reads adapters: each of `arguments` names one in any of the forms of [`Place::find`].
    ///
    /// # Errors
    /// Returns an error if there is no argument, an adapter is named twice, or two would have the same name, and the
    /// errors of [`Place::find`] and [`Place::read`].
    pub fn read_all(arguments: &[PathBuf]) -> Result<Vec<Self>> {
        if arguments.is_empty() {
            return Err(Error::Invalid("expected the folder of an adapter, found none".into()));
        }
        let options = HubOptions::from_env();
        let mut found: Vec<(Place, Adapter)> = Vec::new();
        for argument in arguments {
            let place = Place::find(argument, &options)?;
            let is_same = |other: &&(Place, Adapter)| {
                let other = &other.0;
                (other.title == place.title || other.folder == place.folder) && other.task == place.task
            };
            if let Some((other, _)) = found.iter().find(is_same) {
                return Err(Error::Invalid(format!(
                    "{}: expected every adapter once, found that {} is the same one",
                    argument.display(),
                    other.folder.display()
                )));
            }
            let adapter = place.read()?;
            found.push((place, adapter));
        }
        let titles: Vec<PathBuf> = found.iter().map(|(place, _)| place.titled()).collect();
        let names = names(&titles);
        for (i, name) in names.iter().enumerate() {
            // A folder may have the name that a task of another one gets.
            if let Some(j) = names[..i].iter().position(|other| other == name) {
                return Err(Error::Invalid(format!(
                    "{}: expected adapters whose names differ, found that {} is called {name} too; hint: rename a folder",
                    arguments[i].display(),
                    arguments[j].display()
                )));
            }
        }
        let tuned = |((place, adapter), name): ((Place, Adapter), String)| Self {
            name,
            folder: place.folder,
            run: place.run,
            task: place.task,
            adapter,
        };
        Ok(found.into_iter().zip(names).map(tuned).collect())
    }

    /// The adapter as an argument names it: its folder, then `:TASK` if it is the prompt of a task.
    pub fn argument(&self) -> PathBuf {
        with_task(&self.folder, self.task)
    }
}

/// Last parts of `paths`, as many of each as make it unlike the others and `base`.
fn names(paths: &[PathBuf]) -> Vec<String> {
    let parts: Vec<Vec<String>> = paths
        .iter()
        .map(|path| {
            let normal = path.components().filter_map(|part| match part {
                Component::Normal(name) => Some(name.to_string_lossy().into_owned()),
                _ => None,
            });
            normal.collect()
        })
        .collect();
    let mut depths = vec![1; parts.len()];
    loop {
        let names: Vec<String> = parts
            .iter()
            .zip(&depths)
            .map(|(parts, depth)| parts[parts.len().saturating_sub(*depth)..].join("/"))
            .collect();
        let alike = |i: usize| {
            names[i] == "base" || names.iter().enumerate().any(|(j, other)| j != i && *other == names[i])
        };
        let short: Vec<usize> =
            (0..names.len()).filter(|i| alike(*i) && depths[*i] < parts[*i].len()).collect();
        if short.is_empty() {
            return names;
        }
        short.into_iter().for_each(|i| depths[i] += 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_name_allows_parts_of_addresses_and_tokens() {
        let longest = "x".repeat(MAX_NAME_CHARS);
        for good in ["dogs", "dogs-2.1_b", "7", &longest] {
            check_name(good).unwrap();
        }
        let too_long = "x".repeat(MAX_NAME_CHARS + 1);
        for bad in ["", ".a", "a/b", "a b", "a|b", "a:0", "h\u{fc}ndchen", "a>", &too_long] {
            assert!(check_name(bad).unwrap_err().is_bad_input(), "{bad}");
        }
    }

    #[test]
    fn split_name_splits_at_the_first_equals_sign() {
        assert_eq!(split_name("dogs=runs/a=b"), (Some("dogs"), "runs/a=b".into()));
        assert_eq!(split_name("runs/dogs"), (None, "runs/dogs".into()));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a=b");
        std::fs::create_dir(&path).unwrap();
        assert_eq!(split_name(path.to_str().unwrap()), (None, path.clone()));
        let task = format!("{}:3", path.display());
        assert_eq!(split_name(&task), (None, PathBuf::from(&task)));
        assert_eq!(split_name("dogs=runs/a:3"), (Some("dogs"), "runs/a:3".into()));
    }

    #[test]
    fn names_are_as_long_as_it_takes() {
        let of = |paths: &[&str]| names(&paths.iter().map(PathBuf::from).collect::<Vec<_>>());
        assert_eq!(of(&["/home/runs/dogs"]), ["dogs"]);
        assert_eq!(of(&["/home/runs/dogs", "/home/runs/cats"]), ["dogs", "cats"]);
        assert_eq!(
            of(&["/a/runs/dogs", "/b/runs/dogs", "/b/runs/cats"]),
            ["a/runs/dogs", "b/runs/dogs", "cats"]
        );
        assert_eq!(of(&["/runs/base", "/runs/dogs"]), ["runs/base", "dogs"]);
        assert_eq!(of(&["/dogs", "/runs/dogs"]), ["dogs", "runs/dogs"]);
    }
}
