//! `gneiss report`: a run as a page, or several runs side by side.

use clap::Args;
use gneiss::files::write_atomically;
use gneiss::layout::METRICS;
use gneiss::report::{self, COMPARE};
use gneiss::run::Run;
use std::path::{Path, PathBuf};

/// Makes the report of a run again: report.html, curve.svg and curve.png in its folder. Several runs are compared in
/// one page. Prints the paths of the files.
#[derive(Args)]
pub struct Report {
    /// Run folders, such as runs/tutorial.
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// Write the page, and nothing else, to this file. Several runs go to compare.html beside the first one's folder
    /// unless this says otherwise.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

impl Report {
    /// Runs the subcommand.
    pub fn run(self) -> anyhow::Result<()> {
        let runs = self.runs.iter().map(|path| read(path)).collect::<gneiss::Result<Vec<Run>>>()?;
        let files = match (&runs[..], self.out) {
            ([run], None) => report::write(run)?,
            ([run], Some(out)) => vec![page(out, &report::page(run)?)?],
            (runs, out) => {
                let out = out.unwrap_or_else(|| beside(&self.runs[0]).join(COMPARE));
                vec![page(out, &report::compare(runs)?)?]
            }
        };
        for file in files {
            println!("{}", file.display());
        }
        Ok(())
    }
}

fn page(path: PathBuf, html: &str) -> gneiss::Result<PathBuf> {
    write_atomically(&path, |out| out.write_all(html.as_bytes()))?;
    Ok(path)
}

/// The folder that holds a run's.
fn beside(run: &Path) -> PathBuf {
    // A run named `.` or `..` has its parent in its full path alone.
    let full = run.canonicalize();
    run.file_name().and(run.parent()).or(full.as_deref().ok().and_then(Path::parent)).unwrap_or(run).into()
}

/// Reads a run; a folder that holds runs is told from one that is no run.
fn read(path: &Path) -> gneiss::Result<Run> {
    if path.join(METRICS).is_file() {
        return Run::read(path);
    }
    let entries = std::fs::read_dir(path).map_err(gneiss::Error::io(path))?;
    let mut runs: Vec<String> = entries
        .filter_map(|entry| Some(entry.ok()?.path()).filter(|path| path.join(METRICS).is_file()))
        .map(|path| path.display().to_string())
        .collect();
    if runs.is_empty() {
        return Run::read(path);
    }
    runs.sort();
    runs.truncate(3);
    let problem = format!("expected a run's own folder, found one that holds runs; hint: {}", runs.join(" "));
    Err(gneiss::Error::Checkpoint { path: path.to_path_buf(), problem })
}
