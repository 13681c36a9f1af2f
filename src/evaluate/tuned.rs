//! The tuned prompts that an evaluation is asked for: where they are, and what they are called.

use crate::adapter::Adapter;
use crate::run::{ADAPTER, CONFIG, METRICS};
use crate::{Error, Result};
use std::path::{Component, Path, PathBuf};

/// A tuned prompt to evaluate.
#[derive(Debug, Clone)]
pub struct Tuned {
    /// Name of its run, or of its folder where it is in no run; with as much of the path before it as tells it from the
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
    /// Reads adapters: each of `folders` is one in PEFT's format, or a run folder that has one.
    ///
    /// # Errors
    /// No folder; a folder that is neither, or given twice; what [`Adapter::read`] says.
    pub fn read_all(folders: &[PathBuf]) -> Result<Vec<Self>> {
        if folders.is_empty() {
            return Err(Error::Invalid("expected the folder of an adapter, found none".into()));
        }
        let mut found: Vec<(PathBuf, Self)> = Vec::new();
        for folder in folders {
            let (identity, tuned) = read(folder)?;
            if let Some((_, other)) = found.iter().find(|(known, _)| *known == identity) {
                return Err(Error::Invalid(format!(
                    "{}: expected every adapter once, found that {} is the same one",
                    folder.display(),
                    other.folder.display()
                )));
            }
            found.push((identity, tuned));
        }
        let identities: Vec<&Path> = found.iter().map(|(identity, _)| identity.as_path()).collect();
        let names = names(&identities);
        Ok(found.into_iter().zip(names).map(|((_, tuned), name)| Self { name, ..tuned }).collect())
    }
}

/// An adapter, and the one true path of its run, or of itself where it is in none.
fn read(folder: &Path) -> Result<(PathBuf, Tuned)> {
    let own = folder.join(ADAPTER);
    let given = if is_run(folder) && !folder.join("adapter_config.json").exists() {
        if !own.is_dir() {
            let problem = format!(
                "expected a run with a tuned prompt in {ADAPTER}/, found none; a run writes it as it ends"
            );
            return Err(Error::Checkpoint { path: folder.to_path_buf(), problem });
        }
        own
    } else {
        folder.to_path_buf()
    };
    let adapter = Adapter::read(&given)?;
    let path = given.canonicalize().map_err(Error::io(&given))?;
    let run = path.parent().filter(|parent| is_run(parent)).map(Path::to_path_buf);
    let identity = run.clone().unwrap_or(path);
    Ok((identity, Tuned { name: String::new(), folder: given, run: run.map(near), adapter }))
}

fn is_run(folder: &Path) -> bool {
    folder.join(CONFIG).is_file() && folder.join(METRICS).is_file()
}

/// `path` as seen from the current folder, if it is in there.
fn near(path: PathBuf) -> PathBuf {
    let here = std::env::current_dir().and_then(|here| here.canonicalize());
    match here.ok().and_then(|here| path.strip_prefix(here).map(Path::to_path_buf).ok()) {
        Some(inside) if inside != Path::new("") => inside,
        _ => path,
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
