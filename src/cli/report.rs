//! `gneiss report`: a page of one run, or of several runs side by side.

use clap::Args;
use gneiss::files::write_atomically;
use gneiss::layout::METRICS;
use gneiss::report::{self, COMPARE};
use gneiss::run::Run;
use gneiss::sweep::SweepResult;
use std::path::{Path, PathBuf};

/// Writes the report of a run again: report.html, curve.svg and curve.png in its folder; of a sweep sweep.html. Several runs
/// are compared on one page. Prints the paths of the files.
#[derive(Args)]
pub struct ReportArgs {
    /// Run folders, such as runs/tutorial, or the folder of a sweep.
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// Print the steps and epochs as CSV instead, one line a step; with --out into that file.
    #[arg(long)]
    csv: bool,
    /// Write only the page, to this file. By default the page of several runs is compare.html next to the first one's
    /// folder.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

impl ReportArgs {
    /// Runs the subcommand.
    pub fn run(self) -> anyhow::Result<()> {
        if self.csv {
            return self.csv();
        }
        if let ([folder], out) = (&self.runs[..], &self.out)
            && SweepResult::is_in(folder)
        {
            let result = SweepResult::read(folder)?;
            let file = match out {
                Some(out) => page(out.clone(), &report::sweep_page(&result)?)?,
                None => report::write_sweep(&result)?,
            };
            println!("{}", file.display());
            return Ok(());
        }
        let runs = self.runs.iter().map(|path| read(path)).collect::<gneiss::Result<Vec<Run>>>()?;
        let files = match (&runs[..], self.out) {
            ([run], None) => report::write(run)?,
            ([run], Some(out)) => vec![page(out, &report::page(run)?)?],
            (runs, out) => {
                let out = out.unwrap_or_else(|| parent_folder(&self.runs[0]).join(COMPARE));
                vec![page(out, &report::compare(runs)?)?]
            }
        };
        for file in files {
            println!("{}", file.display());
        }
        Ok(())
    }

    /// Prints or writes the metrics of all runs, and of the trials of sweeps.
    fn csv(&self) -> anyhow::Result<()> {
        let mut runs = Vec::new();
        for folder in &self.runs {
            if SweepResult::is_in(folder) {
                let mut trials = SweepResult::read(folder)?.trials;
                trials.sort_by_key(|trial| trial.trial);
                let begun = trials.iter().filter(|trial| trial.status.is_some());
                runs.extend(begun.map(|trial| Run::read(&trial.run)).collect::<gneiss::Result<Vec<_>>>()?);
            } else {
                runs.push(read(folder)?);
            }
        }
        let table = report::metrics_csv(&runs)?;
        match &self.out {
            None => print!("{table}"),
            Some(out) => println!("{}", page(out.clone(), &table)?.display()),
        }
        Ok(())
    }
}

fn page(path: PathBuf, html: &str) -> gneiss::Result<PathBuf> {
    write_atomically(&path, |out| out.write_all(html.as_bytes()))?;
    Ok(path)
}

/// The folder that contains a run's folder.
fn parent_folder(run: &Path) -> PathBuf {
    // The parent of a run named `.` or `..` shows only in its full path.
    let full = run.canonicalize();
    run.file_name().and(run.parent()).or(full.as_deref().ok().and_then(Path::parent)).unwrap_or(run).into()
}

/// Reads a run; the error says whether a folder contains runs.
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
