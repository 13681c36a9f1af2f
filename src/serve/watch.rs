//! A folder of adapters: the server offers the tuned prompts that it contains, and follows its changes.

use super::client::Client;
use super::served::Served;
use crate::prompt::Tuned;
use crate::prompt::peft::adapters_in;
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// A folder whose subfolders each hold an adapter, or a run with one. The subfolders' names are the models' names.
pub struct AdapterFolder {
    path: PathBuf,
    /// Names that the command line has given to other models.
    reserved: Vec<String>,
    /// Subfolders at the last update, loaded or not.
    known: BTreeMap<String, KnownAdapter>,
}

/// Lengths and modification times of an adapter's files.
type FileStamps = Vec<(u64, Option<SystemTime>)>;

struct KnownAdapter {
    stamp: FileStamps,
    loaded: bool,
}

/// A change of the folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FolderChange {
    /// A prompt was loaded, or loaded again.
    Loaded(String),
    /// A prompt was unloaded.
    Unloaded(String),
    /// A subfolder cannot be loaded. A prompt that was loaded under its name before stays.
    Failed {
        /// The subfolder's name.
        name: String,
        /// The problem.
        problem: String,
    },
}

impl AdapterFolder {
    /// The folder at `path`. Subfolders with one of the names `reserved` are not loaded.
    ///
    /// # Errors
    /// Returns an error if the folder cannot be read.
    pub fn new(path: &Path, reserved: Vec<String>) -> Result<Self> {
        std::fs::read_dir(path).map_err(Error::io(path))?;
        Ok(Self { path: path.to_path_buf(), reserved, known: BTreeMap::new() })
    }

    /// Loads subfolders that are new or have changed since the last update, and unloads those that are gone.
    ///
    /// # Errors
    /// Returns an error if the folder cannot be read. Nothing is changed then.
    pub fn update(&mut self, client: &Client) -> Result<Vec<FolderChange>> {
        let mut changes = Vec::new();
        let adapters = self.adapters()?;
        let removed: Vec<String> =
            self.known.keys().filter(|name| !adapters.contains_key(*name)).cloned().collect();
        for name in removed {
            if self.known.remove(&name).is_some_and(|known| known.loaded) {
                client.unload(&name);
                changes.push(FolderChange::Unloaded(name));
            }
        }
        for (name, (folder, stamp)) in adapters {
            let known = self.known.get(&name);
            if known.is_some_and(|known| known.stamp == stamp) {
                continue;
            }
            let was_loaded = known.is_some_and(|known| known.loaded);
            let outcome = self.load(&name, &folder, client);
            let loaded = was_loaded || outcome.is_ok();
            self.known.insert(name.clone(), KnownAdapter { stamp, loaded });
            changes.push(match outcome {
                Ok(()) => FolderChange::Loaded(name),
                Err(error) => FolderChange::Failed { name, problem: error.to_string() },
            });
        }
        Ok(changes)
    }

    fn load(&self, name: &str, folder: &Path, client: &Client) -> Result<()> {
        if self.reserved.iter().any(|reserved| reserved == name) {
            return Err(Error::Invalid(format!("{}: another model has the name {name}", folder.display())));
        }
        let tuned = Tuned::read(folder)?;
        client.load(Served::tuned(name, &tuned.folder, &tuned.adapter)?, tuned.adapter)
    }

    /// Subfolders with an adapter, by name. Hidden ones are left out, so that a folder can be written first and then
    /// renamed.
    fn adapters(&self) -> Result<BTreeMap<String, (PathBuf, FileStamps)>> {
        let mut adapters = BTreeMap::new();
        for entry in std::fs::read_dir(&self.path).map_err(Error::io(&self.path))? {
            let folder = entry.map_err(Error::io(&self.path))?.path();
            let Some(name) = folder.file_name().and_then(|name| name.to_str()) else { continue };
            if name.starts_with('.') {
                continue;
            }
            let folders = [folder.clone(), folder.join(crate::layout::ADAPTER)];
            let own = folders
                .into_iter()
                .find(|folder| folder.join(crate::layout::adapter_folder::CONFIG).is_file());
            // Otherwise the adapter that PEFT saved under a name.
            let adapter = own.or_else(|| adapters_in(&folder).into_iter().next());
            // The configuration is written last, so a new folder that has one is complete.
            if let Some(adapter) = adapter {
                adapters.insert(name.to_owned(), (folder, file_stamps(&adapter)));
            }
        }
        Ok(adapters)
    }
}

fn file_stamps(adapter: &Path) -> FileStamps {
    let length_and_time =
        |name: &&str| std::fs::metadata(adapter.join(name)).ok().map(|m| (m.len(), m.modified().ok()));
    crate::layout::adapter_folder::FILES
        .iter()
        .map(|name| length_and_time(name).unwrap_or((0, None)))
        .collect()
}
