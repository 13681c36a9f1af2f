//! `gneiss`: parse, dispatch, exit code.

mod cli;

use clap::Parser;
use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: cli::allocator::WholeLines = cli::allocator::WholeLines;

fn main() -> ExitCode {
    cli::process::end_at_a_closed_pipe();
    cli::process::keep_freed_memory();
    match cli::Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<cli::interrupt::Interrupted>() => {
            cli::stderr::interrupted(&error.to_string());
            ExitCode::from(cli::interrupt::EXIT_CODE)
        }
        Err(error) => {
            let bad_input = error.downcast_ref::<gneiss::Error>().is_some_and(gneiss::Error::is_bad_input);
            let exit_code = if bad_input { 2 } else { 1 };
            cli::stderr::error(&with_causes(&error), exit_code);
            ExitCode::from(exit_code)
        }
    }
}

/// The error and its causes, without causes that the text before them already ends with.
fn with_causes(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.ends_with(&cause) {
            text += &format!(": {cause}");
        }
    }
    text
}
