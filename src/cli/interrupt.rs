//! Ctrl-C and other signals that ask a program to end: a run ends after its step, other commands end at once.

use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

/// The shell's exit code for a program that Ctrl-C ended.
pub const EXIT_CODE: u8 = 130;

static UNDER_WAY: AtomicBool = AtomicBool::new(false);
static ASKED: AtomicBool = AtomicBool::new(false);

/// While this value lives, the first Ctrl-C only sets [`asked`]; the second ends the process.
pub struct Guard;

impl Guard {
    /// Installs the handler.
    ///
    /// # Errors
    /// Returns an error if the system refuses the handler.
    pub fn new() -> anyhow::Result<Self> {
        static HANDLER: Once = Once::new();
        let mut outcome = Ok(());
        HANDLER.call_once(|| {
            outcome = ctrlc::set_handler(|| {
                if !UNDER_WAY.load(Ordering::SeqCst) || ASKED.swap(true, Ordering::SeqCst) {
                    std::process::exit(EXIT_CODE.into());
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
    }
}

/// Whether Ctrl-C was pressed.
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
