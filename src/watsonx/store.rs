//! A folder with everything that clients have created.
//!
//! ```text
//! STORE/
//!   lock                      held by the server that uses the folder
//!   secret                    32 random bytes: signs tokens and addresses of files
//!   tls/                      the certificate that was made on the first start, and its key
//!   assets/ID/                asset.json, content
//!   trainings/ID/             training.json, the examples, run/ (a run folder)
//!   models/ID/                model.json, adapter/
//!   deployments/ID/           deployment.json
//! ```
//!
//! A record is one file. It is written under another name, synced and renamed, and a new folder is complete before it gets
//! its name. So a process that is killed at any point leaves either the old or the new state, and what a client was told
//! is on the disk. Names that begin with a dot are unfinished and are removed at the next start. Ids in paths are always
//! those of records that the store has made, never text of a client.

use super::records::{Asset, Deployment, Moment, StoredModel, Training};
use crate::files::{FolderLock, read_json, sync_folder, write_json, write_privately};
use crate::{Error, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

/// All records, by id.
#[derive(Default)]
pub struct Catalog {
    assets: BTreeMap<String, Asset>,
    trainings: BTreeMap<String, Training>,
    models: BTreeMap<String, StoredModel>,
    deployments: BTreeMap<String, Deployment>,
}

/// A kind of record.
pub trait StoredRecord: Clone + Serialize + DeserializeOwned {
    /// The folder of all records.
    const FOLDER: &'static str;
    /// The file in a record's folder.
    const FILE: &'static str;
    /// What it is called in messages.
    const WHAT: &'static str;
    /// The record's id.
    fn id(&self) -> &str;
    /// When it was made.
    fn created(&self) -> Moment;
    /// The records of this kind.
    fn table(catalog: &Catalog) -> &BTreeMap<String, Self>;
    /// The records of this kind.
    fn table_mut(catalog: &mut Catalog) -> &mut BTreeMap<String, Self>;
}

macro_rules! record {
    ($kind:ty, $folder:literal, $file:literal, $what:literal, $table:ident) => {
        impl StoredRecord for $kind {
            const FOLDER: &'static str = $folder;
            const FILE: &'static str = $file;
            const WHAT: &'static str = $what;
            fn id(&self) -> &str {
                &self.id
            }
            fn created(&self) -> Moment {
                self.created
            }
            fn table(catalog: &Catalog) -> &BTreeMap<String, Self> {
                &catalog.$table
            }
            fn table_mut(catalog: &mut Catalog) -> &mut BTreeMap<String, Self> {
                &mut catalog.$table
            }
        }
    };
}

record!(Asset, "assets", "asset.json", "data asset", assets);
record!(Training, "trainings", "training.json", "training", trainings);
record!(StoredModel, "models", "model.json", "model", models);
record!(Deployment, "deployments", "deployment.json", "deployment", deployments);

/// The folder, and its records in memory.
pub struct Store {
    root: PathBuf,
    catalog: RwLock<Catalog>,
    /// Held while a record is changed, so that changes follow each other. Readers do not wait for the disk.
    writing: Mutex<()>,
    /// The lock of the folder, as long as the store is open.
    _lock: FolderLock,
}

impl Store {
    /// Opens the folder, or creates it.
    ///
    /// # Errors
    /// Returns an error if another process uses the folder, or a file can't be read or written.
    pub fn open(root: &Path) -> Result<Self> {
        fs::create_dir_all(root).map_err(Error::io(root))?;
        let root = root.canonicalize().map_err(Error::io(root))?;
        let lock = FolderLock::take(&root)?;
        if let Some(warning) = &lock.warning {
            eprintln!("warning: {warning}");
        }
        let mut catalog = Catalog::default();
        load::<Asset>(&root, &mut catalog)?;
        load::<Training>(&root, &mut catalog)?;
        load::<StoredModel>(&root, &mut catalog)?;
        load::<Deployment>(&root, &mut catalog)?;
        Ok(Self { root, catalog: RwLock::new(catalog), writing: Mutex::new(()), _lock: lock })
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Random bytes that are the same after every start.
    ///
    /// # Errors
    /// Returns an error if the file can't be read or written, or has another length.
    pub fn secret(&self) -> Result<[u8; 32]> {
        let path = self.root.join("secret");
        if !path.exists() {
            let secret: [u8; 32] = rand::random();
            write_privately(&path, |out| out.write_all(&secret))?;
        }
        let secret = fs::read(&path).map_err(Error::io(&path))?;
        let found = secret.len();
        secret.try_into().map_err(|_| {
            Error::Invalid(format!("{}: expected 32 bytes, found {found}; hint: remove it", path.display()))
        })
    }

    /// The folder of a record.
    pub fn folder<T: StoredRecord>(&self, id: &str) -> PathBuf {
        self.root.join(T::FOLDER).join(id)
    }

    /// The record of this id.
    pub fn get<T: StoredRecord>(&self, id: &str) -> Option<T> {
        T::table(&self.read()).get(id).cloned()
    }

    /// All records that `wanted` accepts, the newest first.
    pub fn list<T: StoredRecord>(&self, wanted: impl Fn(&T) -> bool) -> Vec<T> {
        let mut records: Vec<T> = T::table(&self.read()).values().filter(|r| wanted(r)).cloned().collect();
        records.sort_by_key(|record| std::cmp::Reverse(record.created()));
        records
    }

    /// The number of all records.
    pub fn count<T: StoredRecord>(&self) -> usize {
        T::table(&self.read()).len()
    }

    /// Whether `wanted` accepts a record.
    pub fn any<T: StoredRecord>(&self, wanted: impl Fn(&T) -> bool) -> bool {
        T::table(&self.read()).values().any(wanted)
    }

    /// The sum of `value` over all records.
    pub fn sum<T: StoredRecord>(&self, value: impl Fn(&T) -> u64) -> u64 {
        T::table(&self.read()).values().map(value).sum()
    }

    /// Adds a record. `fill` writes the other files of its folder.
    ///
    /// # Errors
    /// Returns the errors of `fill`, and an error if a file can't be written. Nothing is added then.
    pub fn create<T: StoredRecord>(&self, record: T, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let parent = self.root.join(T::FOLDER);
        let unfinished = parent.join(format!(".{}", record.id()));
        fs::create_dir(&unfinished).map_err(Error::io(&unfinished))?;
        let written = fill(&unfinished).and_then(|()| write_json(&unfinished.join(T::FILE), &record));
        if let Err(error) = written {
            // What is left is removed at the next start.
            let _ = fs::remove_dir_all(&unfinished);
            return Err(error);
        }
        let _writing = self.lock();
        let folder = self.folder::<T>(record.id());
        fs::rename(&unfinished, &folder).map_err(Error::io(&folder))?;
        sync_folder(&parent).map_err(Error::io(&parent))?;
        T::table_mut(&mut self.write()).insert(record.id().to_owned(), record);
        Ok(())
    }

    /// Changes a record. `None` if there is none of this id.
    ///
    /// # Errors
    /// Returns the errors of `change`, and an error if the file can't be written. Nothing is changed then.
    pub fn update<T: StoredRecord, R, E: From<Error>>(
        &self,
        id: &str,
        change: impl FnOnce(&mut T) -> std::result::Result<R, E>,
    ) -> std::result::Result<Option<R>, E> {
        let _writing = self.lock();
        let Some(mut record) = self.get::<T>(id) else { return Ok(None) };
        let result = change(&mut record)?;
        write_json(&self.folder::<T>(id).join(T::FILE), &record)?;
        T::table_mut(&mut self.write()).insert(id.to_owned(), record);
        Ok(Some(result))
    }

    /// Removes a record and its folder; false if there is none.
    ///
    /// # Errors
    /// Returns an error if the folder can't be renamed.
    pub fn remove<T: StoredRecord>(&self, id: &str) -> Result<bool> {
        let _writing = self.lock();
        if !T::table(&self.read()).contains_key(id) {
            return Ok(false);
        }
        let (parent, folder) = (self.root.join(T::FOLDER), self.folder::<T>(id));
        let removed = parent.join(format!(".{id}.removed"));
        fs::rename(&folder, &removed).map_err(Error::io(&folder))?;
        sync_folder(&parent).map_err(Error::io(&parent))?;
        T::table_mut(&mut self.write()).remove(id);
        // What is left is removed at the next start.
        let _ = fs::remove_dir_all(&removed);
        Ok(true)
    }

    fn read(&self) -> RwLockReadGuard<'_, Catalog> {
        self.catalog.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Catalog> {
        self.catalog.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads all records of a kind, and removes unfinished ones.
fn load<T: StoredRecord>(root: &Path, catalog: &mut Catalog) -> Result<()> {
    let parent = root.join(T::FOLDER);
    fs::create_dir_all(&parent).map_err(Error::io(&parent))?;
    for entry in fs::read_dir(&parent).map_err(Error::io(&parent))? {
        let folder = entry.map_err(Error::io(&parent))?.path();
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with('.') {
            fs::remove_dir_all(&folder).map_err(Error::io(&folder))?;
            continue;
        }
        remove_unfinished(&folder)?;
        let path = folder.join(T::FILE);
        let record: T = read_json(&path)?.ok_or_else(|| Error::Checkpoint {
            path: path.clone(),
            problem: format!("expected the record of a {}, found no such file", T::WHAT),
        })?;
        if record.id() != name {
            let problem = format!("expected the id {name}, found {}", record.id());
            return Err(Error::Checkpoint { path, problem });
        }
        T::table_mut(catalog).insert(name, record);
    }
    Ok(())
}

/// Removes the files of a record's folder that a killed server did not finish.
fn remove_unfinished(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(Error::io(folder))? {
        let path = entry.map_err(Error::io(folder))?.path();
        let is_hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if is_hidden && path.is_file() {
            fs::remove_file(&path).map_err(Error::io(&path))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
