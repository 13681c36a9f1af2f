//! Tuned prompts with names that tell them apart.

use crate::checkpoint::HubOptions;
use crate::prompt::peft::{Adapter, Place};
use crate::{Error, Result};
use std::path::{Component, Path, PathBuf};

/// A tuned prompt to evaluate.
#[derive(Debug, Clone)]
pub struct Tuned {
    /// Name of its run, or of its folder if it is in no run; with as much of the path before it as tells it from the
    /// others and from `base`.
    pub name: String,
    /// The adapter's folder.
    pub folder: PathBuf,
    /// The run folder that it is in.
    pub run: Option<PathBuf>,
    /// The prompt itself.
    pub adapter: Adapter,
}

impl Tuned {
    /// Reads adapters: each of `arguments` names one in any of the forms of [`Place::find`].
    ///
    /// # Errors
    /// Returns an error if there is no argument or an adapter is named twice, and the errors of [`Place::find`] and
    /// [`Adapter::read`].
    pub fn read_all(arguments: &[PathBuf]) -> Result<Vec<Self>> {
        if arguments.is_empty() {
            return Err(Error::Invalid("expected the folder of an adapter, found none".into()));
        }
        let options = HubOptions::from_env();
        let mut found: Vec<(Place, Adapter)> = Vec::new();
        for argument in arguments {
            let place = Place::find(argument, &options)?;
            let is_same =
                |other: &&(Place, Adapter)| other.0.title == place.title || other.0.folder == place.folder;
            if let Some((other, _)) = found.iter().find(is_same) {
                return Err(Error::Invalid(format!(
                    "{}: expected every adapter once, found that {} is the same one",
                    argument.display(),
                    other.folder.display()
                )));
            }
            let adapter = Adapter::read(&place.folder)?;
            found.push((place, adapter));
        }
        let titles: Vec<&Path> = found.iter().map(|(place, _)| place.title.as_path()).collect();
        let names = names(&titles);
        let tuned = |((place, adapter), name): ((Place, Adapter), String)| Self {
            name,
            folder: place.folder,
            run: place.run,
            adapter,
        };
        Ok(found.into_iter().zip(names).map(tuned).collect())
    }
}

/// Last parts of `paths`, as many of each as make it unlike the others and `base`.
fn names(paths: &[&Path]) -> Vec<String> {
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
    fn names_are_as_long_as_it_takes() {
        let of = |paths: &[&str]| names(&paths.iter().map(Path::new).collect::<Vec<_>>());
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
