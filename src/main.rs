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
        Err(error) => match error.downcast_ref() {
            Some(cli::launch::Reported(code)) => ExitCode::from(*code),
            None => ExitCode::from(cli::exit::report(&error, "")),
        },
    }
}
