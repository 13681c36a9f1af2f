//! The folder of a sweep.

use super::SweepRecord;
use crate::config::Config;
use crate::files::{FolderLock, write_atomically};
use crate::layout::{BEST, CONFIG, SWEEP, TRIALS};
use crate::run::folder::set_run_aside;
use crate::{Error, Result};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

/// A folder `runs/NAME/` that a sweep writes.
pub struct SweepFolder {
    /// The folder.
    pub path: PathBuf,
    /// The folder to which an earlier run or sweep of that name was moved.
    pub moved: Option<PathBuf>,
    /// Held as long as the sweep writes.
    pub lock: FolderLock,
    /// The decisions so far.
    pub(super) records: Vec<SweepRecord>,
    file: File,
}

/// Whether a folder is that of a sweep.
pub(super) fn is_sweep(path: &Path) -> bool {
    path.join(SWEEP).is_file() && path.join(CONFIG).is_file()
}

/// The configuration of the sweep in `path`.
///
/// # Errors
/// Returns [`Error::Checkpoint`] if the folder is no sweep's, and the errors of [`Config::load`].
pub(super) fn config(path: &Path) -> Result<Config> {
    if !is_sweep(path) {
        let problem = format!(
            "expected the folder of a sweep with {CONFIG} and {SWEEP}, as gneiss sweep writes, found none"
        );
        return Err(Error::Checkpoint { path: path.to_path_buf(), problem });
    }
    let mut config = Config::load(&path.join(CONFIG), &[])?;
    // The trials are in the folder, wherever it is now. The name of `.` shows only in its full path.
    let full =
        if path.file_name().is_none() { path.canonicalize().map_err(Error::io(path))? } else { path.into() };
    let parent = full.parent().filter(|parent| *parent != Path::new(""));
    config.runs = parent.unwrap_or(Path::new(".")).display().to_string();
    if let Some(name) = full.file_name() {
        config.name = name.to_string_lossy().into_owned();
    }
    Ok(config)
}

/// The decisions in a sweep's folder. A last line without its end, which a killed sweep may leave, is left out.
///
/// # Errors
/// Returns [`Error::Io`] if the file can't be read, [`Error::Data`] with every line that is no decision.
pub(super) fn records(path: &Path) -> Result<Vec<SweepRecord>> {
    let path = path.join(SWEEP);
    let text = fs::read_to_string(&path).map_err(Error::io(&path))?;
    let (mut records, mut problems) = (Vec::new(), Vec::new());
    for (i, line) in text.split_inclusive('\n').enumerate().filter(|(_, line)| line.ends_with('\n')) {
        match serde_json::from_str(line) {
            Ok(record) => records.push(record),
            Err(error) => problems.push(format!("line {}: expected a decision of a sweep: {error}", i + 1)),
        }
    }
    if problems.is_empty() { Ok(records) } else { Err(Error::Data { path, problems, more: 0 }) }
}

impl SweepFolder {
    /// Creates the folder. An earlier run or sweep of that name is kept, as `NAME~1`, `NAME~2` and so on.
    ///
    /// # Errors
    /// Returns [`Error::InUse`] if another program writes the earlier one, [`Error::Io`] if the folder can't be written.
    pub fn create(config: &Config) -> Result<Self> {
        let (runs, name) = (Path::new(&config.runs), config.name.as_str());
        let path = runs.join(name);
        let moved = set_run_aside(runs, name)?;
        let trials = path.join(TRIALS);
        fs::create_dir_all(&trials).map_err(Error::io(&trials))?;
        let lock = FolderLock::take(&path)?;
        let toml = config.to_toml()?;
        write_atomically(&path.join(CONFIG), |out| out.write_all(toml.as_bytes()))?;
        let file = path.join(SWEEP);
        let file = File::create(&file).map_err(Error::io(&file))?;
        Ok(Self { path, moved, lock, records: Vec::new(), file })
    }

    /// The folder of a sweep whose shards several processes tune: made by the first, and continued by those that start again.
    ///
    /// # Errors
    /// Returns [`Error::Invalid`] if the folder has another configuration, [`Error::InUse`] if a program writes it that is no
    /// shard, and [`Error::Io`] if it can't be written.
    pub fn of_shards(config: &Config) -> Result<Self> {
        let path = config.folder();
        let trials = path.join(TRIALS);
        fs::create_dir_all(&trials).map_err(Error::io(&trials))?;
        let lock = FolderLock::share(&path)?;
        let (file, toml) = (path.join(CONFIG), config.to_toml()?);
        if !file.exists() {
            write_atomically(&file, |out| out.write_all(toml.as_bytes()))?;
        }
        if fs::read_to_string(&file).map_err(Error::io(&file))? != toml {
            return Err(Error::Invalid(format!(
                "{}: expected the configuration of this sweep, found another; hint: the same command for all shards, and a new \
                 name for a new sweep",
                file.display()
            )));
        }
        let file = path.join(SWEEP);
        let file = File::options().append(true).create(true).open(&file).map_err(Error::io(&file))?;
        Ok(Self { records: records(&path)?, path, moved: None, lock, file })
    }

    /// The configuration of the sweep in `path`, which another process may be writing.
    ///
    /// # Errors
    /// As [`SweepFolder::open`].
    pub fn config(path: &Path) -> Result<Config> {
        config(path)
    }

    /// The folder of a sweep that continues, and its configuration.
    ///
    /// # Errors
    /// Returns [`Error::Checkpoint`] if the folder is no sweep's, [`Error::InUse`] if another program writes it, and an error if a
    /// file can't be read or is malformed.
    pub fn open(path: &Path) -> Result<(Self, Config)> {
        let config = config(path)?;
        let lock = FolderLock::take(path)?;
        let records = records(path)?;
        let mut lines = Vec::new();
        for record in &records {
            lines.extend(line(record)?);
        }
        let file = path.join(SWEEP);
        write_atomically(&file, |out| out.write_all(&lines))?;
        let file = File::options().append(true).open(&file).map_err(Error::io(&file))?;
        Ok((Self { path: path.to_path_buf(), moved: None, lock, records, file }, config))
    }

    /// Appends a decision to `sweep.jsonl`, synced to the disk.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the file can't be written.
    pub(super) fn record(&mut self, record: &SweepRecord) -> Result<()> {
        let path = self.path.join(SWEEP);
        self.file.write_all(&line(record)?).map_err(Error::io(&path))?;
        self.file.sync_data().map_err(Error::io(&path))?;
        self.records.push(record.clone());
        Ok(())
    }

    /// Makes `best` a link to the folder of trial `name`. An earlier link is replaced in one step.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the file system has no links.
    pub(super) fn link_best(&self, name: &str) -> Result<()> {
        let (link, temporary) = (self.path.join(BEST), self.path.join(format!(".{BEST}.tmp")));
        crate::files::remove_if_there(&temporary)?;
        symlink(&Path::new(TRIALS).join(name), &temporary).map_err(Error::io(&link))?;
        fs::rename(&temporary, &link).map_err(Error::io(&link))
    }
}

#[cfg(unix)]
fn symlink(to: &Path, link: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(to, link)
}

#[cfg(not(unix))]
fn symlink(_to: &Path, _link: &Path) -> std::io::Result<()> {
    Err(std::io::Error::other("expected a system with symbolic links"))
}

fn line(record: &SweepRecord) -> Result<Vec<u8>> {
    let mut line = serde_json::to_vec(record).map_err(|error| Error::Invalid(format!("{SWEEP}: {error}")))?;
    line.push(b'\n');
    Ok(line)
}
