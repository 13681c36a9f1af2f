//! Output that is complete or does not exist: it is written in a hidden folder next to its place, then renamed.

use super::{Format, PROMPTS};
use crate::checkpoint::json::bare_again;
use crate::files::write_atomically;
use crate::{Error, Result};
use std::ffi::OsString;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A temporary place for the output until it is complete; removed with its content if that does not happen.
pub(super) struct StagedOutput {
    folder: TempDir,
    out: PathBuf,
    format: Format,
}

impl StagedOutput {
    /// # Errors
    /// Returns an error if `out` exists and is not an empty folder, or if it is a GGUF file without the ending `.gguf`.
    pub fn new(out: &Path, format: Format) -> Result<Self> {
        check_free(out, format)?;
        let name = out.file_name().ok_or_else(|| bad(out, "a path with a name", "none"))?;
        let parent = match out.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        std::fs::create_dir_all(parent).map_err(Error::io(parent))?;
        let prefix: OsString = [".".as_ref(), name, ".".as_ref()].into_iter().collect();
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix).suffix(".tmp");
        // With the permissions of any other folder, which the umask decides.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
        let folder = builder.tempdir_in(parent).map_err(Error::io(parent))?;
        Ok(Self { folder, out: out.to_path_buf(), format })
    }

    /// Temporary path of a file of the output.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Temporary path of a GGUF output.
    pub fn gguf(&self) -> PathBuf {
        self.path("model.gguf")
    }

    /// Writes one file by a function that may fail with its own error.
    pub fn write(&self, path: &Path, body: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
        let mut failed = None;
        let written = write_atomically(path, |out| {
            body(out).map_err(|error| {
                let text = error.to_string();
                failed = Some(error);
                io::Error::other(text)
            })
        });
        failed.map_or(written, Err)
    }

    pub fn write_json(&self, name: &str, json: &impl serde::Serialize) -> Result<()> {
        let path = self.path(name);
        let text =
            serde_json::to_string_pretty(json).map_err(|error| bad(&path, "JSON", &error.to_string()))?;
        let text = bare_again(text);
        write_atomically(&path, |out| writeln!(out, "{text}"))
    }

    /// Adds `prompts.json` and moves the output to its place.
    pub fn finish(self, prompts: &serde_json::Value) -> Result<()> {
        self.write_json(PROMPTS, prompts)?;
        // Another process may have created it meanwhile.
        check_free(&self.out, self.format)?;
        match self.format {
            Format::Gguf => {
                let prompts_path = prompts_path(&self.out);
                std::fs::rename(self.path(PROMPTS), &prompts_path).map_err(Error::io(&prompts_path))?;
                std::fs::rename(self.gguf(), &self.out).map_err(Error::io(&self.out))
            }
            Format::Safetensors => {
                if self.out.is_dir() {
                    std::fs::remove_dir(&self.out).map_err(Error::io(&self.out))?;
                }
                std::fs::rename(self.folder.keep(), &self.out).map_err(Error::io(&self.out))
            }
        }
    }
}

/// The file that lists the prompts of a GGUF file: `model.prompts.json` for `model.gguf`.
fn prompts_path(gguf: &Path) -> PathBuf {
    gguf.with_extension(PROMPTS)
}

fn check_free(out: &Path, format: Format) -> Result<()> {
    if format == Format::Gguf {
        if !out.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
            return Err(bad(out, "a path that ends in .gguf", "another"));
        }
        let there = [out.to_path_buf(), prompts_path(out)].into_iter().find(|path| path.exists());
        return there.map_or(Ok(()), |path| Err(bad(&path, "no such file yet", "one")));
    }
    let mut entries = match std::fs::read_dir(out) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(_) if out.is_file() => return Err(bad(out, "a folder to make", "a file")),
        Err(error) => return Err(Error::io(out)(error)),
    };
    match entries.next() {
        None => Ok(()),
        Some(_) => Err(bad(out, "a folder to make, or an empty one", "one with files in it")),
    }
}

fn bad(path: &Path, expected: &str, found: &str) -> Error {
    Error::Invalid(format!("--out {}: expected {expected}, found {found}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn what_is_not_finished_leaves_nothing() {
        let here = tempfile::tempdir().unwrap();
        let out = here.path().join("a/out");
        let staging = StagedOutput::new(&out, Format::Safetensors).unwrap();
        staging.write_json("config.json", &1).unwrap();
        assert!(!out.exists());
        let fails = staging.write(&staging.path("b"), |out| {
            out.write_all(b"half").unwrap();
            Err(Error::Invalid("enough".into()))
        });
        assert!(matches!(fails.unwrap_err(), Error::Invalid(text) if text == "enough"));
        drop(staging);
        assert!(names(&here.path().join("a")).is_empty());
    }

    #[test]
    fn an_empty_folder_is_taken_and_a_full_one_is_not() {
        let here = tempfile::tempdir().unwrap();
        let out = here.path().join("out");
        std::fs::create_dir(&out).unwrap();
        let staging = StagedOutput::new(&out, Format::Safetensors).unwrap();
        staging.finish(&serde_json::json!({})).unwrap();
        assert_eq!((names(&out), names(here.path())), (vec![PROMPTS.into()], vec!["out".into()]));
        let error = StagedOutput::new(&out, Format::Safetensors).err().unwrap().to_string();
        assert!(error.contains("found one with files in it"), "{error}");
    }

    #[test]
    fn a_gguf_file_has_its_prompts_beside_it() {
        let here = tempfile::tempdir().unwrap();
        let out = here.path().join("dogs.gguf");
        let staging = StagedOutput::new(&out, Format::Gguf).unwrap();
        std::fs::write(staging.gguf(), "").unwrap();
        staging.finish(&serde_json::json!({})).unwrap();
        let mut found = names(here.path());
        found.sort();
        assert_eq!(found, ["dogs.gguf", "dogs.prompts.json"]);
        for taken in ["dogs.gguf", "cats.bin"] {
            assert!(StagedOutput::new(&here.path().join(taken), Format::Gguf).is_err(), "{taken}");
        }
    }
}
