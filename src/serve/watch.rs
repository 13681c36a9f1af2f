//! A folder whose content says which tuned prompts the server offers.

use super::client::Client;
use super::served::Served;
use crate::prompt::Tuned;
use crate::prompt::peft::adapters_in;
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

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
pub enum FolderChange {
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
    pub fn look(&mut self, client: &Client) -> Result<Vec<FolderChange>> {
        let mut changes = Vec::new();
        let found = self.found()?;
        let gone: Vec<String> =
            self.known.keys().filter(|name| !found.contains_key(*name)).cloned().collect();
        for name in gone {
            if self.known.remove(&name).is_some_and(|known| known.loaded) {
                client.unload(&name);
                changes.push(FolderChange::Unloaded(name));
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
                Ok(()) => FolderChange::Loaded(name),
                Err(error) => FolderChange::Failed { name, problem: error.to_string() },
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
