//! How the program ends: the message of an error, and the exit code.

use super::interrupt::{EXIT_CODE, Interrupted};
use super::stderr;

/// Prints an error, and returns its exit code.
pub fn report(error: &anyhow::Error, prefix: &str) -> u8 {
    let code = code(error);
    match error.is::<Interrupted>() {
        true => stderr::interrupted(&format!("{prefix}{error}")),
        false => stderr::error(&format!("{prefix}{}", whole(error)), code),
    }
    code
}

/// 130 for an interrupted command, 2 for bad input, 1 for a failure.
pub fn code(error: &anyhow::Error) -> u8 {
    let is_bad_input = error.downcast_ref::<gneiss::Error>().is_some_and(gneiss::Error::is_bad_input);
    match (error.is::<Interrupted>(), is_bad_input) {
        (true, _) => EXIT_CODE,
        (_, true) => 2,
        _ => 1,
    }
}

/// The error and its causes, without causes that the text before them already ends with.
fn whole(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.ends_with(&cause) {
            text += &format!(": {cause}");
        }
    }
    text
}
