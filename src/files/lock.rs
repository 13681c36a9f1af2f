//! A folder that one program writes at a time.

use crate::layout::LOCK;
use crate::{Error, Result};
use std::fs::{File, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::Path;

/// The right to write a folder, until this value is dropped or the program ends, however it ends.
///
/// It is a lock on the file `lock` of the folder, which has the number of the process and stays there.
#[derive(Debug)]
pub struct FolderLock {
    /// What to tell the user if the folder is on a file system without locks, on which nothing is refused.
    pub warning: Option<String>,
    _file: File,
}

impl FolderLock {
    /// Locks a folder, which must exist.
    ///
    /// # Errors
    /// Returns [`Error::InUse`] if another holds the lock or shares it, and [`Error::Io`] if the file can't be written.
    pub fn take(folder: &Path) -> Result<Self> {
        let lock = Self::hold(folder)?;
        let write = || (&lock._file).write_all(format!("{}\n", std::process::id()).as_bytes());
        lock._file.set_len(0).and_then(|()| write()).map_err(Error::io(folder.join(LOCK)))?;
        Ok(lock)
    }

    /// As [`FolderLock::take`], but leaves the number of the process that wrote the folder before.
    pub(crate) fn hold(folder: &Path) -> Result<Self> {
        Self::of(folder, File::try_lock)
    }

    /// Shares a folder with others that share it; nobody can then [`take`](Self::take) it.
    ///
    /// # Errors
    /// As [`FolderLock::take`], if another has taken the folder.
    pub fn share(folder: &Path) -> Result<Self> {
        let lock = Self::of(folder, File::try_lock_shared)?;
        // Not the number of one that had it alone before.
        lock._file.set_len(0).map_err(Error::io(folder.join(LOCK)))?;
        Ok(lock)
    }

    /// Refuses a folder that another writes, before long work for it is begun. A folder that does not exist is free.
    ///
    /// # Errors
    /// As [`FolderLock::take`].
    pub fn check_free(folder: &Path) -> Result<()> {
        if folder.join(LOCK).is_file() { Self::hold(folder).map(drop) } else { Ok(()) }
    }

    fn of(folder: &Path, lock: impl Fn(&File) -> std::result::Result<(), TryLockError>) -> Result<Self> {
        let path = folder.join(LOCK);
        let file =
            File::options().write(true).create(true).truncate(false).open(&path).map_err(Error::io(&path))?;
        let warning = match lock(&file) {
            Ok(()) => None,
            Err(TryLockError::WouldBlock) => {
                let process = std::fs::read_to_string(&path).ok().and_then(|text| text.trim().parse().ok());
                return Err(Error::InUse { path: folder.to_path_buf(), process });
            }
            Err(TryLockError::Error(error)) if has_no_locks(&error) => Some(format!(
                "{}: the file system has no locks ({error}), so a second program that writes this folder would not be refused",
                folder.display()
            )),
            Err(TryLockError::Error(error)) => return Err(Error::io(&path)(error)),
        };
        Ok(Self { warning, _file: file })
    }
}

/// Whether the error says that the file system has no locks, or that its server for them does not run.
fn has_no_locks(error: &std::io::Error) -> bool {
    #[cfg(unix)]
    let is_server_missing = error.raw_os_error() == Some(libc::ENOLCK);
    #[cfg(not(unix))]
    let is_server_missing = false;
    error.kind() == ErrorKind::Unsupported || is_server_missing
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_takes_a_folder_until_it_lets_go() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        FolderLock::check_free(folder).unwrap();
        assert!(!folder.join(LOCK).exists(), "check_free creates no file");
        let held = FolderLock::take(folder).unwrap();
        assert_eq!(held.warning, None);
        for refused in [FolderLock::take(folder).map(drop), FolderLock::check_free(folder)] {
            let text = refused.unwrap_err().to_string();
            let process = format!("process {}", std::process::id());
            assert!(text.contains(&folder.display().to_string()) && text.contains(&process), "{text}");
        }
        assert!(FolderLock::share(folder).is_err());
        drop(held);
        FolderLock::check_free(folder).unwrap();
        FolderLock::check_free(&folder.join("missing")).unwrap();
        assert!(FolderLock::take(&folder.join("missing")).unwrap_err().to_string().contains("missing"));
    }

    #[test]
    fn several_share_a_folder_that_none_takes() {
        let folder = tempfile::tempdir().unwrap();
        drop(FolderLock::take(folder.path()).unwrap());
        let shared = [(); 2].map(|()| FolderLock::share(folder.path()).unwrap());
        let refused = FolderLock::take(folder.path()).unwrap_err();
        assert!(matches!(refused, Error::InUse { process: None, .. }), "{refused}");
        drop(shared);
        FolderLock::take(folder.path()).unwrap();
    }
}
