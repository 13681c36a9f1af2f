//! What the program writes to stderr: lines of text, or with `--progress json` one JSON object a line.

use clap::ValueEnum;
use serde::Serialize;
use serde_json::json;
use std::fmt::{Arguments, Display};
use std::sync::OnceLock;

/// The form of progress and messages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum ProgressFormat {
    /// Bars on a terminal, lines otherwise.
    #[default]
    Text,
    /// A line of JSON for each event.
    Json,
}

/// How stderr is written.
#[derive(Debug, Clone, Copy, Default)]
pub struct StderrOptions {
    /// The form of progress and messages.
    pub format: ProgressFormat,
    /// Whether only warnings and errors are written.
    pub is_quiet: bool,
}

static OPTIONS: OnceLock<StderrOptions> = OnceLock::new();

/// Sets the options, once, before anything is written.
pub fn configure(options: StderrOptions) {
    // A second call would come from a second command line, of which there is none.
    let _first = OPTIONS.set(options);
}

fn options() -> StderrOptions {
    OPTIONS.get().copied().unwrap_or_default()
}

/// Whether bars may be drawn.
pub fn allows_bars() -> bool {
    !options().is_quiet && !is_json()
}

/// Whether stderr is a stream of JSON.
pub fn is_json() -> bool {
    options().format == ProgressFormat::Json
}

/// Writes a line about the work; `--quiet` leaves it out.
macro_rules! status {
    ($($argument:tt)*) => { $crate::cli::stderr::status(format_args!($($argument)*)) };
}

/// As the macro of this name.
pub fn status(text: Arguments) {
    if is_json() {
        write(&json!({ "event": "message", "text": text.to_string().trim() }));
    } else if !options().is_quiet {
        eprintln!("{text}");
    }
}

/// Says what to do next, as a command; `--quiet` and `--progress json` leave it out.
pub fn hint(text: impl Display) {
    if !is_json() {
        status(format_args!("next       {text}"));
    }
}

/// Writes a warning.
pub fn warn(text: impl Display) {
    if is_json() {
        write(&json!({ "event": "warning", "text": text.to_string() }));
    } else {
        eprintln!("warning    {text}");
    }
}

/// Writes the error that ends the program.
pub fn error(text: &str, exit_code: u8) {
    if is_json() {
        write(&json!({ "event": "error", "text": text, "exit_code": exit_code }));
    } else {
        eprintln!("error: {text}");
    }
}

/// Writes the message of an interrupted command.
pub fn interrupted(text: &str) {
    if is_json() {
        write(&json!({ "event": "interrupted", "text": text }));
    } else {
        eprintln!("{text}");
    }
}

/// An event with its content.
#[derive(Serialize)]
struct EventLine<'a, T: Serialize> {
    event: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    trial: Option<usize>,
    #[serde(flatten)]
    content: &'a T,
}

/// Writes an event, of a trial if it belongs to one; only with `--progress json`.
pub fn event<T: Serialize>(event: &str, trial: Option<usize>, content: &T) {
    if is_json() {
        write(&EventLine { event, trial, content });
    }
}

/// Writes how much of a stage is done; only with `--progress json`.
pub fn progress(stage: &str, done: usize, total: usize) {
    event("progress", None, &json!({ "stage": stage, "done": done, "total": total }));
}

fn write(line: &impl Serialize) {
    // Numbers, text and maps with text as keys can always be written.
    if let Ok(line) = serde_json::to_string(line) {
        eprintln!("{line}");
    }
}
