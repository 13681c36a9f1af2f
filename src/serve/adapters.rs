//! The models that a server offers: the base, and each tuned prompt under its name; and a folder whose content says
//! which prompts there are.

use super::client::Client;
use crate::data::Template;
use crate::prompt::Tuned;
use crate::prompt::peft::{Adapter, PromptTask, adapters_in};
use crate::{Error, Result};
use std::collections::BTreeMap;
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

/// A folder with an adapter, or a run with one, in each of its folders: their names are the models' names.
pub struct AdapterFolder {
    path: PathBuf,
    /// Names that the command line gave away.
    taken: Vec<String>,
    /// What was found last, loaded or not.
    known: BTreeMap<String, Known>,
}

/// Length and time of change of the files that make up an adapter.
type Stamp = Vec<(u64, Option<SystemTime>)>;

struct Known {
    stamp: Stamp,
    loaded: bool,
}

/// What became of a look at the folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A prompt is offered, or offered anew.
    Loaded(String),
    /// A prompt is offered no longer.
    Unloaded(String),
    /// A folder can't be offered; what was offered under its name before still is.
    Failed {
        /// The folder's name.
        name: String,
        /// What is wrong.
        problem: String,
    },
}

impl AdapterFolder {
    /// The folder at `path`; the names `taken` are not to be had by its content.
    ///
    /// # Errors
    /// No such folder.
    pub fn new(path: &Path, taken: Vec<String>) -> Result<Self> {
        std::fs::read_dir(path).map_err(Error::io(path))?;
        Ok(Self { path: path.to_path_buf(), taken, known: BTreeMap::new() })
    }

    /// Loads what is new or changed since the last look, and unloads what is gone.
    ///
    /// # Errors
    /// A folder that can't be read; everything then stays as it is.
    pub fn look(&mut self, client: &Client) -> Result<Vec<Change>> {
        let mut changes = Vec::new();
        let found = self.found()?;
        let gone: Vec<String> =
            self.known.keys().filter(|name| !found.contains_key(*name)).cloned().collect();
        for name in gone {
            if self.known.remove(&name).is_some_and(|known| known.loaded) {
                client.unload(&name);
                changes.push(Change::Unloaded(name));
            }
        }
        for (name, (folder, stamp)) in found {
            let known = self.known.get(&name);
            if known.is_some_and(|known| known.stamp == stamp) {
                continue;
            }
            let was_loaded = known.is_some_and(|known| known.loaded);
            let outcome = self.load(&name, &folder, client);
            let loaded = was_loaded || outcome.is_ok();
            self.known.insert(name.clone(), Known { stamp, loaded });
            changes.push(match outcome {
                Ok(()) => Change::Loaded(name),
                Err(error) => Change::Failed { name, problem: error.to_string() },
            });
        }
        Ok(changes)
    }

    fn load(&self, name: &str, folder: &Path, client: &Client) -> Result<()> {
        if self.taken.iter().any(|taken| taken == name) {
            return Err(Error::Invalid(format!("{}: another model has the name {name}", folder.display())));
        }
        let tuned = Tuned::read_all(&[folder.to_path_buf()])?.remove(0);
        client.load(Served::tuned(name, &tuned.folder, &tuned.adapter)?, tuned.adapter)
    }

    /// Folders with an adapter by name, hidden ones left out: a folder that is being written can be renamed into place.
    fn found(&self) -> Result<BTreeMap<String, (PathBuf, Stamp)>> {
        let mut found = BTreeMap::new();
        for entry in std::fs::read_dir(&self.path).map_err(Error::io(&self.path))? {
            let folder = entry.map_err(Error::io(&self.path))?.path();
            let Some(name) = folder.file_name().and_then(|name| name.to_str()) else { continue };
            if name.starts_with('.') {
                continue;
            }
            let own = [folder.clone(), folder.join(crate::layout::ADAPTER)];
            let own =
                own.into_iter().find(|folder| folder.join(crate::layout::adapter_folder::CONFIG).is_file());
            // Else the one that PEFT saved under a name.
            let adapter = own.or_else(|| adapters_in(&folder).into_iter().next());
            // The configuration is written last, so a new folder that has one is whole.
            if let Some(adapter) = adapter {
                found.insert(name.to_owned(), (folder, stamp(&adapter)));
            }
        }
        Ok(found)
    }
}

fn stamp(adapter: &Path) -> Stamp {
    let of = |name: &&str| std::fs::metadata(adapter.join(name)).ok().map(|m| (m.len(), m.modified().ok()));
    crate::layout::adapter_folder::FILES.iter().map(|name| of(name).unwrap_or((0, None))).collect()
}
