//! `gneiss man`: manual pages.

use super::Cli;
use anyhow::Context;
use clap::{Args, CommandFactory};
use gneiss::files::write_atomically;
use std::io::Write;
use std::path::PathBuf;

/// Prints the manual page of the program or of a command, or writes all pages into a folder.
#[derive(Args)]
pub struct Man {
    /// The command, such as tune.
    command: Option<String>,
    /// Write the pages of the program and of every command into this folder: gneiss.1, gneiss-tune.1 and so on.
    #[arg(long, value_name = "FOLDER", conflicts_with = "command")]
    out: Option<PathBuf>,
}

impl Man {
    /// Runs the subcommand.
    pub fn run(self) -> anyhow::Result<()> {
        let mut program = Cli::command().disable_help_subcommand(true).long_version(None);
        // Gives every command its full name, and the flags of the program.
        program.build();
        let Some(folder) = &self.out else {
            let command = match &self.command {
                None => &program,
                Some(name) => find(&program, name)?,
            };
            return Ok(std::io::stdout().write_all(&page(command)?)?);
        };
        std::fs::create_dir_all(folder).with_context(|| format!("{}", folder.display()))?;
        for command in std::iter::once(&program).chain(program.get_subcommands()) {
            let path = folder.join(format!("{}.1", file_stem(command)));
            let page = page(command)?;
            write_atomically(&path, |out| out.write_all(&page))?;
            println!("{}", path.display());
        }
        Ok(())
    }
}

fn find<'a>(program: &'a clap::Command, name: &str) -> gneiss::Result<&'a clap::Command> {
    program.find_subcommand(name).ok_or_else(|| {
        let names: Vec<&str> = program.get_subcommands().map(clap::Command::get_name).collect();
        gneiss::Error::Invalid(format!("man: expected one of {}, found {name:?}", names.join(", ")))
    })
}

/// `gneiss` or `gneiss-tune`.
fn file_stem(command: &clap::Command) -> String {
    command.get_bin_name().unwrap_or(command.get_name()).replace(' ', "-")
}

/// The page as roff.
fn page(command: &clap::Command) -> anyhow::Result<Vec<u8>> {
    let mut text = Vec::new();
    clap_mangen::Man::new(command.clone()).title(file_stem(command)).render(&mut text)?;
    Ok(text)
}
