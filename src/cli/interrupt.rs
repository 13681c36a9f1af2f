//! Signals that ask a program to end: a run ends after its step, other commands end at once.
//!
//! ```text
//! SIGINT, SIGTERM, SIGHUP   the last finished step's state is written at once, as the process may be killed before the next step
//!                           ends; the run ends after this step; a second signal ends it at once
//! SIGUSR1                   the run ends after this step
//! ```

use super::process;
use gneiss::tune::State;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, Once, PoisonError};

/// The shell's exit code for a program that Ctrl-C ended.
pub const EXIT_CODE: u8 = 130;

static UNDER_WAY: AtomicBool = AtomicBool::new(false);
static ASKED: AtomicBool = AtomicBool::new(false);
/// The file and the state of the last finished step. It is locked while the state is written, so that the run writes later ones
/// after it.
static LATEST: Mutex<Option<(PathBuf, State)>> = Mutex::new(None);

/// While this value lives, the first Ctrl-C only sets [`asked`]; the second ends the process.
pub struct Guard;

impl Guard {
    /// Installs the handlers.
    ///
    /// # Errors
    /// Returns an error if the system refuses a handler.
    pub fn new() -> anyhow::Result<Self> {
        static HANDLER: Once = Once::new();
        let mut outcome = Ok(());
        HANDLER.call_once(|| {
            process::at_user_signal(|| ASKED.store(true, Ordering::SeqCst));
            outcome = ctrlc::set_handler(|| {
                let under_way = UNDER_WAY.load(Ordering::SeqCst);
                // Before anything is printed: the reader of the output may have ended.
                let written = write_latest();
                if !under_way || ASKED.swap(true, Ordering::SeqCst) {
                    std::process::exit(EXIT_CODE.into());
                }
                if let Err(error) = written {
                    super::warn(format_args!("the last step's state could not be written: {error}"));
                }
                status!("\nending after this step; once more ends at once, without it");
            });
        });
        outcome?;
        ASKED.store(false, Ordering::SeqCst);
        UNDER_WAY.store(true, Ordering::SeqCst);
        Ok(Self)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        UNDER_WAY.store(false, Ordering::SeqCst);
        *LATEST.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// Keeps the state of the last finished step, which a signal writes to `path`.
pub fn keep_latest(path: &Path, state: State) {
    *LATEST.lock().unwrap_or_else(PoisonError::into_inner) = Some((path.to_owned(), state));
}

fn write_latest() -> gneiss::Result<()> {
    match &*LATEST.lock().unwrap_or_else(PoisonError::into_inner) {
        Some((path, state)) => state.write(path),
        None => Ok(()),
    }
}

/// Whether a signal asked the run to end.
pub fn asked() -> bool {
    ASKED.load(Ordering::SeqCst)
}

/// A command was interrupted by the user; the message says how to continue.
#[derive(Debug)]
pub struct Interrupted(pub String);

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Interrupted {}
