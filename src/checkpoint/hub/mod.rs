//! The hub: the files of a checkpoint, and the cache in which they are stored.
//!
//! The cache has the layout that the hub's own programs share (types from `hf-hub`), so that a file that one of them
//! has downloaded is not downloaded again:
//!
//! ```text
//! models--org--name/
//!   refs/main                      commit that the revision stood for, written when all files are there
//!   blobs/<etag>                   a whole file; <etag>.gneiss-part while it is being downloaded
//!   snapshots/<commit>/model.safetensors -> ../../blobs/<etag>
//!   .no_exist/<commit>/<file>      the hub has said that this commit has no such file
//! ```

mod license;
mod options;
mod remote;
mod transfer;
mod upload;

pub use license::{LicenseTag, license};
pub use options::HubOptions;
pub use upload::{Upload, UploadFile};

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use serde::Deserialize;

use self::remote::{FileLookup, Remote};
use self::transfer::Download;
use crate::layout::adapter_folder;
use crate::layout::model_folder::{
    CHAT_TEMPLATE, CONFIG, GENERATION_CONFIG, SPECIAL_TOKENS, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS,
    WEIGHTS_INDEX,
};
use crate::{Error, Result};

/// Files that a checkpoint may lack.
const OPTIONAL: [&str; 4] = [GENERATION_CONFIG, TOKENIZER_CONFIG, SPECIAL_TOKENS, CHAT_TEMPLATE];

/// Downloads a checkpoint's files into the cache and returns the folder of its snapshot.
///
/// `config.json` comes first and is passed to `check_config`; the weights come last.
pub(super) fn snapshot(
    repo: &str,
    revision: &str,
    options: &HubOptions,
    check_config: &dyn Fn(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let checkpoint = Snapshot::open(repo, revision, CONFIG, options)?
        .ok_or_else(|| no_config(&format!("{repo}@{revision}")))?;
    check_config(&checkpoint.need(CONFIG)?)?;
    checkpoint.need(TOKENIZER)?;
    for file in OPTIONAL {
        checkpoint.find(file)?;
    }
    checkpoint.weights()?;
    checkpoint.done(revision)
}

/// Downloads an adapter's files into the cache and returns the folder of its snapshot; `None` if the repository (or the
/// cache, when offline) contains no adapter.
pub(super) fn adapter_snapshot(repo: &str, revision: &str, options: &HubOptions) -> Result<Option<PathBuf>> {
    let [config, weights, task] = adapter_folder::FILES;
    let found = match Snapshot::open(repo, revision, config, options) {
        // When offline, only the files in the cache exist.
        Err(Error::Hub { .. }) if options.offline => None,
        other => other?,
    };
    let Some(checkpoint) = found else { return Ok(None) };
    if checkpoint.find(config)?.is_none() {
        return Ok(None);
    }
    if checkpoint.find(weights)?.is_none() {
        return Err(checkpoint.no_adapter_weights()?);
    }
    checkpoint.find(task)?;
    checkpoint.done(revision).map(Some)
}

/// One commit of a repository.
struct Snapshot {
    /// `org/name@revision`, for messages.
    name: String,
    repo: String,
    commit: String,
    /// Folder of the repository in the cache.
    folder: PathBuf,
    cache: CacheRepo,
    /// `None` if only the cache is used.
    remote: Option<Remote>,
}

impl Snapshot {
    /// Finds the commit of a revision, so that all files are of the same commit; `None` if the repository does not
    /// contain the file `first`.
    fn open(repo: &str, revision: &str, first: &str, options: &HubOptions) -> Result<Option<Self>> {
        let name = format!("{repo}@{revision}");
        let Some(root) = &options.cache else {
            return Err(Error::Hub {
                repo: name,
                problem: "no folder for downloads: the home folder is not known".to_string(),
                hint: "set HF_HOME to a folder that can be written".to_string(),
            });
        };
        let id = Repo::with_revision(repo.to_string(), RepoType::Model, revision.to_string());
        let folder = root.join(id.folder_name());
        let encoded = id.url_revision();
        let cache = Cache::new(root.clone()).repo(id);
        let remote = (!options.offline).then(|| Remote::new(&name, repo, options));
        let commit = match &remote {
            _ if is_commit(revision) => revision.to_string(),
            None => cached_commit(&cache, first).ok_or_else(|| not_cached(&name, first, &folder))?,
            Some(remote) => match remote.look_up(&encoded, first)? {
                FileLookup::File(file) => file.commit,
                FileLookup::Absent { .. } => return Ok(None),
            },
        };
        Ok(Some(Self { name, repo: repo.to_string(), commit, folder, cache, remote }))
    }

    /// The folder of the complete snapshot. From now on `revision` stands for its commit.
    fn done(&self, revision: &str) -> Result<PathBuf> {
        if self.remote.is_some() && revision != self.commit {
            self.cache.create_ref(&self.commit).map_err(Error::io(self.folder.join("refs")))?;
        }
        Ok(self.snapshot())
    }

    /// The error about an adapter's repository without safetensors, with the files that it contains instead.
    fn no_adapter_weights(&self) -> Result<Error> {
        let (weights, pickle) = (adapter_folder::WEIGHTS, adapter_folder::PICKLE);
        let Some(remote) = &self.remote else { return Ok(not_cached(&self.name, weights, &self.folder)) };
        let has_pickle = matches!(remote.look_up(&self.commit, pickle)?, FileLookup::File(_));
        let (found, hint) = if has_pickle {
            let hint =
                "load it with PEFT, save it with save_pretrained, and give the folder that this writes";
            (format!("{pickle}, a Python pickle, and no {weights}"), hint)
        } else {
            (format!("no {weights}"), "it may not be finished: see its list of files on the hub")
        };
        Ok(Error::Hub {
            repo: self.name.clone(),
            problem: format!("the repository holds {found}"),
            hint: hint.to_string(),
        })
    }

    fn snapshot(&self) -> PathBuf {
        self.cache.pointer_path(&self.commit)
    }

    /// Path of a file, from the cache or downloaded; an error if there is none.
    fn need(&self, file: &str) -> Result<PathBuf> {
        if let Some(path) = self.find(file)? {
            return Ok(path);
        }
        Err(match file {
            _ if self.remote.is_none() => not_cached(&self.name, file, &self.folder),
            CONFIG => no_config(&self.name),
            _ => Error::Hub {
                repo: self.name.clone(),
                problem: format!("the repository holds no {file}"),
                hint: "it may not be finished: see its list of files on the hub".to_string(),
            },
        })
    }

    /// Path of a file, from the cache or downloaded; `None` if there is none.
    fn find(&self, file: &str) -> Result<Option<PathBuf>> {
        let pointer = self.snapshot().join(file);
        let absent = self.folder.join(".no_exist").join(&self.commit).join(file);
        if pointer.exists() {
            return Ok(Some(pointer));
        }
        let Some(remote) = self.remote.as_ref().filter(|_| !absent.exists()) else {
            return Ok(None);
        };
        let head = match remote.look_up(&self.commit, file)? {
            FileLookup::File(head) => head,
            FileLookup::Absent { certain } => {
                if certain {
                    make_parent(&absent)?;
                    fs::write(&absent, "").map_err(Error::io(&absent))?;
                }
                return Ok(None);
            }
        };
        let blob = self.cache.blob_path(&head.etag);
        let length = fs::metadata(&blob).ok().map(|blob| blob.len());
        // A blob of another length was truncated by another program.
        if length.is_none() || head.size.is_some_and(|size| length != Some(size)) {
            make_parent(&blob)?;
            let part = self.cache.blob_path(&format!("{}.gneiss-part", head.etag));
            Download { remote, commit: &self.commit, file, size: head.size, part: &part }.run()?;
            match fs::rename(&part, &blob) {
                // Another process has downloaded and renamed the same file.
                Err(error) if error.kind() == ErrorKind::NotFound && blob.exists() => {}
                renamed => renamed.map_err(Error::io(&part))?,
            }
        }
        make_parent(&pointer)?;
        link(&blob, &pointer).map_err(Error::io(&pointer))?;
        Ok(Some(pointer))
    }

    /// The weights: one safetensors file, or an index and the shards that it lists.
    fn weights(&self) -> Result<()> {
        // There may be an index of an earlier commit next to a single file; then the single file is read.
        let sharded = self.snapshot().join(WEIGHTS_INDEX).exists() && !self.snapshot().join(WEIGHTS).exists();
        if !sharded && self.find(WEIGHTS)?.is_some() {
            return Ok(());
        }
        let Some(index) = self.find(WEIGHTS_INDEX)? else {
            if self.remote.is_none() {
                return Err(not_cached(&self.name, WEIGHTS, &self.folder));
            }
            return Err(Error::Hub {
                repo: self.name.clone(),
                problem: format!("the repository has no safetensors: neither {WEIGHTS} nor {WEIGHTS_INDEX}"),
                hint: format!(
                    "choose a repository with safetensors, or download a .gguf file of {} and give its \
                     path",
                    self.repo
                ),
            });
        };
        for shard in shards(&index)? {
            self.need(&shard)?;
        }
        Ok(())
    }
}

/// Whether the revision is a full commit hash.
fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// The commit that the cache holds for a revision.
fn cached_commit(cache: &CacheRepo, file: &str) -> Option<String> {
    let file = cache.get(file)?;
    Some(file.parent()?.file_name()?.to_str()?.to_string())
}

fn not_cached(name: &str, file: &str, folder: &Path) -> Error {
    Error::Hub {
        repo: name.to_string(),
        problem: format!("HF_HUB_OFFLINE is set and {} holds no {file} of it", folder.display()),
        hint: "run once without HF_HUB_OFFLINE, or give a local folder".to_string(),
    }
}

fn no_config(name: &str) -> Error {
    Error::Hub {
        repo: name.to_string(),
        problem: format!("the repository holds no {CONFIG}"),
        hint: "if it holds GGUF files, download one and give its path; if it holds an adapter, give its base as the model and this \
               id as the adapter"
            .to_string(),
    }
}

fn make_parent(path: &Path) -> Result<()> {
    let parent = path.parent().unwrap_or(path);
    fs::create_dir_all(parent).map_err(Error::io(parent))
}

/// Makes a file of a snapshot out of a blob.
fn link(blob: &Path, pointer: &Path) -> std::io::Result<()> {
    // A link whose blob was deleted is in the way.
    if pointer.symlink_metadata().is_ok() && !pointer.exists() {
        fs::remove_file(pointer)?;
    }
    #[cfg(unix)]
    let linked = {
        let target = Path::new("../../blobs").join(blob.file_name().unwrap_or_default());
        std::os::unix::fs::symlink(target, pointer)
    };
    #[cfg(not(unix))]
    let linked = fs::hard_link(blob, pointer);
    match linked {
        Err(error) if error.kind() == ErrorKind::AlreadyExists && pointer.exists() => Ok(()),
        linked => linked,
    }
}

/// `model.safetensors.index.json`, without its metadata.
#[derive(Deserialize)]
struct Index {
    /// Tensor name to the shard that holds it.
    weight_map: BTreeMap<String, String>,
}

/// The shards that an index lists, each once.
fn shards(path: &Path) -> Result<BTreeSet<String>> {
    let checkpoint = |problem: String| Error::Checkpoint { path: path.to_path_buf(), problem };
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    let index: Index = serde_json::from_str(&text)
        .map_err(|error| checkpoint(format!("expected a `weight_map` of tensor to file name: {error}")))?;
    let shards: BTreeSet<String> = index.weight_map.into_values().collect();
    if shards.is_empty() {
        return Err(checkpoint("`weight_map` is empty, expected at least one tensor".to_string()));
    }
    // A name is joined to the snapshot's folder and must stay in it.
    let is_file_name = |name: &str| {
        name.ends_with(".safetensors")
            && !name.starts_with('.')
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
    };
    match shards.iter().find(|name| !is_file_name(name)) {
        Some(name) => Err(checkpoint(format!(
            "`weight_map` names the file `{name}`, expected a .safetensors file in the same folder"
        ))),
        None => Ok(shards),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shard_names_stay_in_their_folder() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(WEIGHTS_INDEX);
        let read = |text: &str| {
            fs::write(&path, text).unwrap();
            shards(&path)
        };
        let two = read(r#"{"metadata": {}, "weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}"#);
        assert_eq!(two.unwrap().into_iter().collect::<Vec<_>>(), ["x.safetensors", "y.safetensors"]);
        for name in ["../x.safetensors", "/x.safetensors", "a\\\\x.safetensors", "x.bin", ".safetensors", ""]
        {
            let error = read(&format!(r#"{{"weight_map": {{"a": "{name}"}}}}"#)).unwrap_err().to_string();
            assert!(error.contains("weight_map") && error.contains(WEIGHTS_INDEX), "{name}: {error}");
        }
        assert!(read(r#"{"weight_map": {}}"#).unwrap_err().to_string().contains("empty"));
        assert!(read("{").unwrap_err().to_string().contains("weight_map"));
    }
}
