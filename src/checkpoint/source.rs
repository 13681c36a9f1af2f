//! The source of a checkpoint: a folder, a GGUF file, or a repository on the hub.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::hub;
use super::hub_id::hub_id;
use super::json::JsonObject;
use crate::checkpoint::HubOptions;
use crate::checkpoint::typed::TypedKeys;
use crate::layout::model_folder::CONFIG;
use crate::layout::{ADAPTER, adapter_folder};
use crate::{Error, Result};

/// The meaning of a model argument.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A folder with `config.json`, the tokenizer and safetensors.
    Folder(PathBuf),
    /// One GGUF file, which contains everything.
    Gguf(PathBuf),
    /// A repository on the hub.
    Hub {
        /// `org/name`.
        repo: String,
        /// Branch, tag or commit; `main` by default.
        revision: String,
    },
}

/// Local files of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Local {
    /// A folder with `config.json`, the tokenizer and safetensors.
    Folder(PathBuf),
    /// One GGUF file, which contains everything.
    Gguf(PathBuf),
}

impl Source {
    /// Parses a model argument: an existing path is local, anything else must be a hub id (`org/name[@revision]`).
    ///
    /// # Errors
    /// Returns [`Error::Checkpoint`] if a path is missing or is no checkpoint, [`Error::Invalid`] if the hub id is
    /// malformed.
    pub fn parse(model: &str) -> Result<Self> {
        let path = Path::new(model);
        if path.is_dir() {
            return folder(path);
        }
        if path.exists() {
            return file(path);
        }
        let (repo, revision) = hub_repository("model", model)?;
        Ok(Self::Hub { repo, revision })
    }
}

/// Repository and revision of an argument that is not an existing path; `kind` names the expected thing in errors.
///
/// # Errors
/// Returns the errors of [`Source::parse`].
pub(crate) fn hub_repository(kind: &str, argument: &str) -> Result<(String, String)> {
    if looks_local(argument) {
        return Err(not_there(Path::new(argument)));
    }
    hub_id(kind, argument)
}

/// The folder of the adapter in a repository on the hub, downloaded if it is not in the cache; `None` if the repository
/// contains none.
///
/// # Errors
/// Returns [`Error::Hub`] if the hub does not deliver it, [`Error::Io`] if the cache can't be written.
pub(crate) fn adapter_snapshot(repo: &str, revision: &str, options: &HubOptions) -> Result<Option<PathBuf>> {
    hub::adapter_snapshot(repo, revision, options)
}

/// Finds the local files of the checkpoint that `model` names, and downloads them if it is a hub id.
///
/// `check_config` is called with the path of `config.json` and refuses a checkpoint that can't be used; it runs before
/// any weight is downloaded. A GGUF file has no `config.json`, so it is not called for one.
///
/// # Errors
/// Returns the errors of [`Source::parse`] and of `check_config`, [`Error::Hub`] if the hub does not deliver the
/// checkpoint, and [`Error::Io`] if the cache can't be written.
pub fn resolve(
    model: &str,
    options: &HubOptions,
    check_config: &dyn Fn(&Path) -> Result<()>,
) -> Result<Local> {
    match Source::parse(model)? {
        Source::Folder(path) => {
            check_config(&path.join(CONFIG))?;
            Ok(Local::Folder(path))
        }
        Source::Gguf(path) => Ok(Local::Gguf(path)),
        Source::Hub { repo, revision } => {
            hub::snapshot(&repo, &revision, options, check_config).map(Local::Folder)
        }
    }
}

/// A folder is a checkpoint if it contains a configuration.
fn folder(path: &Path) -> Result<Source> {
    if path.join(CONFIG).is_file() {
        return Ok(Source::Folder(path.to_path_buf()));
    }
    Err(Error::Checkpoint {
        path: path.to_path_buf(),
        problem: format!("expected a checkpoint folder, found no {} in it; {}", CONFIG, what_instead(path)),
    })
}

/// A hint for a folder without a configuration.
fn what_instead(path: &Path) -> String {
    let entries = std::fs::read_dir(path).into_iter().flatten();
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let names: BTreeSet<String> = names.collect();
    let first = |matches: &dyn Fn(&str) -> bool| names.iter().find(|name| matches(name));
    if names.contains(adapter_folder::CONFIG) {
        let base = adapter_base(path).map_or(String::new(), |base| format!(", {base}"));
        return format!("it is an adapter: give its base model{base}, and this folder as the adapter");
    }
    if path.join(ADAPTER).join(adapter_folder::CONFIG).is_file() {
        return "it is a run of gneiss, whose adapter is in it: give the base model, and this folder as the adapter"
            .to_string();
    }
    if names.contains("snapshots") {
        return cache_hint(path);
    }
    if let Some(repo) = first(&|name| name.starts_with("models--")) {
        let id = repo.trim_start_matches("models--").replacen("--", "/", 1);
        return format!("it is the hub's cache: give the id of a repository in it, such as {id}");
    }
    if let Some(name) = first(&|name| has_extension(Path::new(name), "gguf")) {
        return format!("for the GGUF file in it give its own path, {}", path.join(name).display());
    }
    if names.contains("params.json") && first(&|name| name.starts_with("consolidated.")).is_some() {
        return "it is in the original release's own format: convert it with transformers' \
                convert_llama_weights_to_hf.py, or take the repository whose name ends in -hf"
            .to_string();
    }
    let holds = |name: &&String| path.join(name).join(CONFIG).is_file();
    if let Some(name) = names.iter().rev().find(holds) {
        return format!("{} holds one: give that", path.join(name).display());
    }
    "give the folder that holds config.json, tokenizer.json and *.safetensors".to_string()
}

/// A hint for a repository's folder in the hub's cache.
fn cache_hint(path: &Path) -> String {
    let snapshots = path.join("snapshots");
    let entries = std::fs::read_dir(&snapshots).into_iter().flatten().flatten();
    let commits: BTreeSet<PathBuf> =
        entries.map(|entry| entry.path()).filter(|commit| commit.join(CONFIG).is_file()).collect();
    let id = path
        .file_name()
        .and_then(|name| name.to_str()?.strip_prefix("models--"))
        .map_or(String::new(), |id| format!("the id {}, or ", id.replacen("--", "/", 1)));
    let snapshot = commits.first().unwrap_or(&snapshots).display().to_string();
    format!("it is a repository of the hub's cache: give {id}its snapshot, {snapshot}")
}

/// The base model that an adapter names.
fn adapter_base(path: &Path) -> Option<String> {
    let json = JsonObject::read(&path.join(adapter_folder::CONFIG)).ok()?;
    json.string("base_model_name_or_path").ok()?.map(str::to_string).filter(|base| !base.is_empty())
}

/// A single file is a checkpoint if it is GGUF.
fn file(path: &Path) -> Result<Source> {
    if has_extension(path, "gguf") {
        return Ok(Source::Gguf(path.to_path_buf()));
    }
    let hint = if has_extension(path, "safetensors") || has_extension(path, "json") {
        "give the folder that it lies in"
    } else {
        "convert it to safetensors or GGUF first"
    };
    Err(Error::Checkpoint {
        path: path.to_path_buf(),
        problem: format!("expected a checkpoint folder or a .gguf file, found another kind of file; {hint}"),
    })
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|found| found.eq_ignore_ascii_case(extension))
}

/// Whether an argument that does not exist can only be a path.
fn looks_local(model: &str) -> bool {
    let drive = model.as_bytes().get(1) == Some(&b':');
    let path = Path::new(model);
    let files = ["gguf", "safetensors", "json", "bin"];
    model.starts_with(['.', '/', '~'])
        || model.ends_with('/')
        || model.contains('\\')
        || drive
        || files.iter().any(|extension| has_extension(path, extension))
        // A revision may contain slashes (`refs/pr/1`); a URL gets its own message.
        || (model.split('@').next().unwrap_or(model).matches('/').count() > 1 && !model.contains("://"))
}

/// The error about a path that does not exist, with its first missing part.
fn not_there(path: &Path) -> Error {
    let home = path.starts_with("~");
    let present = path.ancestors().skip(1).find(|parent| parent.is_dir());
    let hint = match present {
        _ if home => "`~` is only understood by a shell: write the home folder out".to_string(),
        Some(parent) => format!("{} is there, what follows is not: check the spelling", parent.display()),
        None => "check the spelling; a hub id is org/name or org/name@revision".to_string(),
    };
    Error::Checkpoint { path: path.to_path_buf(), problem: format!("no such file or folder; {hint}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(model: &str) -> String {
        let error = Source::parse(model).expect_err(model);
        assert!(error.is_bad_input(), "{error}");
        error.to_string()
    }

    #[test]
    fn hub_ids() {
        let hub = |repo: &str, revision: &str| Source::Hub { repo: repo.into(), revision: revision.into() };
        for (model, expected) in [
            ("ibm-granite/granite-4.1-3b", hub("ibm-granite/granite-4.1-3b", "main")),
            ("ibm-granite/granite-4.1-3b@v1.0", hub("ibm-granite/granite-4.1-3b", "v1.0")),
            ("a/b_c@refs/pr/5", hub("a/b_c", "refs/pr/5")),
        ] {
            assert_eq!(Source::parse(model).unwrap(), expected);
        }
    }

    #[test]
    fn malformed_hub_ids_are_refused() {
        for (model, expected) in [
            ("granite", "org/name"),
            ("", "org/name"),
            ("a/", "no such file or folder"),
            ("a/b@", "can't be a revision"),
            ("a/b@../../x", "can't be a revision"),
            ("a/b@x//y", "can't be a revision"),
            ("a/b@.git", "can't be a revision"),
            ("a/b c", "can't be the name"),
            ("a/..", "can't be the name"),
            ("-a/b", "can't be the organisation"),
            ("a--b/c", "can't be the organisation"),
            ("https://example.com/a/b/tree/main", "`a/b`"),
            ("https://example.com", "found a URL"),
        ] {
            let found = problem(model);
            assert!(found.contains(expected), "{model}: {found}");
        }
    }

    #[test]
    fn missing_paths_are_not_taken_for_hub_ids() {
        for model in
            ["./granite", "/no/such/folder", "a/b/c", "a\\b", "C:\\x", "granite.gguf", "a/b.safetensors"]
        {
            let found = problem(model);
            assert!(found.contains("no such file or folder"), "{model}: {found}");
        }
        assert!(problem("~/granite").contains("home folder"));
        let folder = tempfile::tempdir().unwrap();
        let found = problem(folder.path().join("x/y").to_str().unwrap());
        assert!(found.contains(&format!("{} is there", folder.path().display())), "{found}");
    }

    #[test]
    fn local_files() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let parse = |path: &Path| Source::parse(path.to_str().unwrap());

        let found = problem(folder.path().to_str().unwrap());
        assert!(found.contains("no config.json"), "{found}");
        std::fs::write(at("x.GGUF"), "").unwrap();
        let found = problem(folder.path().to_str().unwrap());
        assert!(found.contains("x.GGUF"), "{found}");
        assert_eq!(parse(&at("x.GGUF")).unwrap(), Source::Gguf(at("x.GGUF")));
        std::fs::write(at("config.json"), "{}").unwrap();
        assert_eq!(parse(folder.path()).unwrap(), Source::Folder(folder.path().to_path_buf()));
        let found = problem(at("config.json").to_str().unwrap());
        assert!(found.contains("give the folder"), "{found}");
    }

    #[test]
    fn folders_of_other_kinds_say_what_to_give() {
        let folder = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("a/adapter_config.json", r#"{"base_model_name_or_path": "ibm-granite/granite-4.1-3b"}"#);
        write("b/adapter_config.json", "{");
        write("run/adapter/adapter_config.json", "{}");
        write("hub/models--org--name/snapshots/abc/config.json", "{}");
        write("hub/models--org--name/refs/main", "abc");
        write("meta/params.json", "{}");
        write("meta/consolidated.00.pth", "");
        write("outer/checkpoint-500/config.json", "{}");
        write("outer/checkpoint-1000/README.md", "");
        for (path, says) in [
            (
                "a",
                "it is an adapter: give its base model, ibm-granite/granite-4.1-3b, and this folder as the adapter",
            ),
            ("b", "it is an adapter: give its base model, and this folder"),
            ("run", "it is a run of gneiss"),
            ("hub/models--org--name", "give the id org/name, or its snapshot, "),
            ("hub/models--org--name", "snapshots/abc"),
            ("hub", "it is the hub's cache: give the id of a repository in it, such as org/name"),
            ("meta", "the original release's own format"),
            ("outer", "checkpoint-500 holds one: give that"),
        ] {
            let found = problem(folder.path().join(path).to_str().unwrap());
            assert!(found.contains(says) && found.contains("found no config.json"), "{path}: {found}");
        }
    }

    #[test]
    fn a_local_configuration_is_checked() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), "{}").unwrap();
        let options = HubOptions::from_vars(|_| None);
        let refuse = |path: &Path| Err(Error::Invalid(path.display().to_string()));
        let error = resolve(folder.path().to_str().unwrap(), &options, &refuse).unwrap_err();
        assert_eq!(error.to_string(), folder.path().join("config.json").display().to_string());
    }
}
