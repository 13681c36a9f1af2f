//! `gneiss completions`: completions of a shell.

use super::Cli;
use clap::{Args, CommandFactory};
use clap_complete::Shell;
use std::io::Write;

/// Prints the completions of a shell: commands, flags and their values.
#[derive(Args)]
pub struct Completions {
    /// The shell.
    shell: Shell,
}

impl Completions {
    /// Runs the subcommand.
    pub fn run(self) -> anyhow::Result<()> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "gneiss", &mut script);
        Ok(std::io::stdout().write_all(&script)?)
    }
}
