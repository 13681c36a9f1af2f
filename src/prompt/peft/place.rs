//! Where an adapter is: the forms in which people name one, for every command and key that takes one.
//!
//! ```text
//! DIR/                     adapter_config.json, adapter_model.safetensors
//! runs/NAME/               a run; its adapter is in runs/NAME/adapter/
//! PARENT/                  one folder with an adapter in it, as PEFT saves an adapter that has a name
//! org/name[@revision]      a repository of the hub with an adapter
//! ```
//!
//! Each may end in `:TASK`, the number of a task from 0, if the adapter holds the prompts of several. A path that exists as
//! it is written is that path, whatever colons are in it.

use super::{Adapter, malformed};
use crate::checkpoint::{HubOptions, adapter_snapshot, hub_repository};
use crate::layout::adapter_folder::{CONFIG, PICKLE, WEIGHTS};
use crate::{Error, Result, layout};
use std::path::{Component, Path, PathBuf};

/// Folders that an error names at most.
const NAMED: usize = 5;

/// An adapter that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Its folder, in PEFT's format.
    pub folder: PathBuf,
    /// The run folder that it is in.
    pub run: Option<PathBuf>,
    /// A path whose last part is what it is called: that of its run, of its folder, or of its repository.
    pub title: PathBuf,
    /// The task whose prompt is meant, if the argument names one.
    pub task: Option<usize>,
}

impl Place {
    /// The adapter that `argument` names: its folder, a run's, the parent folder of one, or `org/name[@revision]` on the
    /// hub, from which it is downloaded. What is there as a path is taken as one. `:TASK` may follow.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if there is no such path, or no adapter or several in it; [`Error::Invalid`] for a malformed
    /// hub id; [`Error::Hub`] if the hub does not give the adapter.
    pub fn find(argument: &Path, options: &HubOptions) -> Result<Self> {
        if argument.exists() {
            return Self::of_folder(folder(argument)?);
        }
        if let Some((argument, task)) = split_task(argument)? {
            return Ok(Self { task: Some(task), ..Self::find(&argument, options)? });
        }
        Self::on_hub(argument, options)?.ok_or_else(|| no_adapter(argument, options))
    }

    /// Reads the adapter.
    ///
    /// # Errors
    /// Returns the errors of [`Adapter::read_task`].
    pub fn read(&self) -> Result<Adapter> {
        Adapter::read_task(&self.folder, self.task)
    }

    /// Whether `argument`, which is no path, ends in the number of a task.
    pub fn names_task(argument: &Path) -> bool {
        !argument.exists() && matches!(split_task(argument), Ok(Some(_)))
    }

    /// The title with the task, if there is one, in characters that a prompt's name may have.
    pub(crate) fn titled(&self) -> PathBuf {
        match self.task {
            None => self.title.clone(),
            Some(task) => format!("{}-{task}", self.title.display()).into(),
        }
    }

    /// The adapter in the repository of the hub that `argument` names, downloaded; `None` if that repository holds none, as
    /// one of a model.
    ///
    /// # Errors
    /// As [`Place::find`].
    pub fn on_hub(argument: &Path, options: &HubOptions) -> Result<Option<Self>> {
        let not_there = || malformed(argument, missing(argument));
        let id = argument.to_str().filter(|_| !is_misspelt(argument)).ok_or_else(not_there)?;
        let (repo, revision) = hub_repository("adapter", id)?;
        let folder = adapter_snapshot(&repo, &revision, options)?;
        let title = if id.contains('@') { format!("{repo}@{revision}") } else { repo };
        Ok(folder.map(|folder| Self { folder, run: None, title: title.into(), task: None }))
    }

    fn of_folder(folder: PathBuf) -> Result<Self> {
        let path = folder.canonicalize().map_err(Error::io(&folder))?;
        let run = path.parent().filter(|parent| is_run(parent)).map(Path::to_path_buf);
        let title = run.clone().unwrap_or(path);
        Ok(Self { folder, run: run.map(near), title, task: None })
    }
}

/// An adapter's folder as an argument names it: with the task, if there is one.
pub(crate) fn with_task(folder: &Path, task: Option<usize>) -> PathBuf {
    match task {
        None => folder.to_path_buf(),
        Some(task) => format!("{}:{task}", folder.display()).into(),
    }
}

/// Splits `DIR:TASK`, which is no path; `None` if it has no colon in its last part.
fn split_task(argument: &Path) -> Result<Option<(PathBuf, usize)>> {
    let Some((folder, task)) = argument.to_str().and_then(|argument| argument.rsplit_once(':')) else {
        return Ok(None);
    };
    if folder.is_empty() || task.contains('/') {
        return Ok(None);
    }
    match task.parse() {
        Ok(task) => Ok(Some((folder.into(), task))),
        Err(_) => Err(malformed(
            argument,
            format!(
                "expected the number of a task after the colon, found {task:?}; hint: {folder}:0 is the first task of an \
                 adapter that has several, and a path with a colon in its name has to exist"
            ),
        )),
    }
}

/// Whether an argument that is not there can only be meant as a path: it is one name, or the folder that it would lie in is
/// there.
fn is_misspelt(argument: &Path) -> bool {
    let has_revision = argument.to_string_lossy().contains('@');
    let parent = argument.parent().unwrap_or(argument);
    !has_revision && (parent == Path::new("") || parent.is_dir())
}

fn missing(argument: &Path) -> String {
    let expected = "expected an adapter folder, found nothing";
    let Some(parent) = argument.parent().filter(|parent| *parent != Path::new("")) else {
        return format!("{expected}; a repository of the hub is org/name or org/name@revision");
    };
    let parts: Vec<_> = argument.components().collect();
    let is_id = parts.len() == 2 && parts.iter().all(|part| matches!(part, Component::Normal(_)));
    let hub = if is_id {
        format!("; a repository of the hub is {}@main", argument.display())
    } else {
        String::new()
    };
    format!("{expected}; {} is there: check the spelling{hub}", parent.display())
}

/// The folder with [`CONFIG`] that a folder stands for.
fn folder(path: &Path) -> Result<PathBuf> {
    if path.join(CONFIG).is_file() {
        return Ok(path.to_path_buf());
    }
    if is_run(path) {
        let own = path.join(layout::ADAPTER);
        if !own.is_dir() {
            let problem = format!(
                "expected a run with a tuned prompt in {}/, found none; a run writes it as it ends",
                layout::ADAPTER
            );
            return Err(malformed(path, problem));
        }
        return Ok(own);
    }
    if !path.is_dir() {
        return Err(malformed(path, a_file(path)));
    }
    match &adapters_in(path)[..] {
        [] => Err(malformed(path, nothing_in(path))),
        [one] => Ok(one.clone()),
        several => {
            let more = if several.len() > NAMED { ", ..." } else { "" };
            let names: Vec<String> =
                several.iter().take(NAMED).map(|folder| folder.display().to_string()).collect();
            Err(malformed(
                path,
                format!(
                    "expected one adapter, found a folder that holds {}; hint: give one of them: {}{more}",
                    several.len(),
                    names.join(", ")
                ),
            ))
        }
    }
}

/// The folders in `path` that hold an adapter, sorted; none if it can't be read.
pub fn adapters_in(path: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(path).into_iter().flatten();
    let folders = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let mut found: Vec<PathBuf> = folders.filter(|folder| folder.join(CONFIG).is_file()).collect();
    found.sort();
    found
}

/// Why a file is no adapter.
fn a_file(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    let hint = if [CONFIG, WEIGHTS, PICKLE].iter().any(|file| name == *file) {
        "; hint: give the folder that it lies in"
    } else {
        ""
    };
    format!("expected an adapter folder, found a file{hint}")
}

/// Why a folder is no adapter.
fn nothing_in(path: &Path) -> String {
    let expected = format!("expected an adapter, found a folder without {CONFIG}");
    let has = |name: &str| path.join(name).exists();
    let hint = if has(WEIGHTS) || has(PICKLE) {
        format!("it holds the weights alone: PEFT's save_pretrained writes {CONFIG} beside them")
    } else if has("config.json") {
        "it holds a model: an adapter is tuned on one, and a command takes that as its model".to_owned()
    } else if has("snapshots") {
        "it is a repository in the hub's cache: give the hub id, or the folder in snapshots/".to_owned()
    } else {
        let runs = std::fs::read_dir(path).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
        let mut runs: Vec<PathBuf> = runs.filter(|folder| is_run(folder)).collect();
        runs.sort();
        match runs.first() {
            Some(run) => format!("it holds runs: give one of them, such as {}", run.display()),
            None => return expected,
        }
    };
    format!("{expected}; {hint}")
}

fn no_adapter(argument: &Path, options: &HubOptions) -> Error {
    let (problem, hint) = if options.offline {
        (
            format!("HF_HUB_OFFLINE is set and the cache holds no {CONFIG} of it"),
            "run once without HF_HUB_OFFLINE, or give a local folder",
        )
    } else {
        (
            format!("the repository holds no {CONFIG} at its root"),
            "an adapter has one; if it lies in a folder of the repository, download that and give its path",
        )
    };
    Error::Hub { repo: argument.display().to_string(), problem, hint: hint.into() }
}

fn is_run(folder: &Path) -> bool {
    folder.join(layout::CONFIG).is_file() && folder.join(layout::METRICS).is_file()
}

/// `path` as seen from the current folder, if it is in there.
fn near(path: PathBuf) -> PathBuf {
    let here = std::env::current_dir().and_then(|here| here.canonicalize());
    match here.ok().and_then(|here| path.strip_prefix(here).map(Path::to_path_buf).ok()) {
        Some(inside) if inside != Path::new("") => inside,
        _ => path,
    }
}
