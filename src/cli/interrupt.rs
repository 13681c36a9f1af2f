//! Ctrl-C, and what else asks a program to end: a run ends after its step, anything else at once.

use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

/// The exit code of shells for a program that Ctrl-C ended.
pub const EXIT_CODE: u8 = 130;

static UNDER_WAY: AtomicBool = AtomicBool::new(false);
static ASKED: AtomicBool = AtomicBool::new(false);

/// While it lives, the first Ctrl-C only sets [`asked`]; the second ends the process.
pub struct Guard;

impl Guard {
    /// Begins to listen.
    ///
    /// # Errors
    /// What the system says where it takes no handler.
    pub fn new() -> anyhow::Result<Self> {
        static HANDLER: Once = Once::new();
        let mut outcome = Ok(());
        HANDLER.call_once(|| {
            outcome = ctrlc::set_handler(|| {
                if !UNDER_WAY.load(Ordering::SeqCst) || ASKED.swap(true, Ordering::SeqCst) {
                    std::process::exit(EXIT_CODE.into());
                }
                eprintln!("\nending after this step; once more ends at once, without it");
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

/// Whether Ctrl-C came.
pub fn asked() -> bool {
    ASKED.load(Ordering::SeqCst)
}

/// A command that ended before its time because someone asked it to; the message says how to go on.
#[derive(Debug)]
pub struct Interrupted(pub String);

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Interrupted {}
