//! `gneiss eval`: tuned against base.

pub(super) mod show;

use super::{ConfigArgs, launch, progress, stderr};
use anyhow::Context;
use clap::Args;
use gneiss::config::Config;
use gneiss::data::Dataset;
use gneiss::evaluate;
use gneiss::evaluate::{
    Answers, Batching, EnsembleScores, Evaluation, EvaluationObserver, EvaluationPlace, Progress, Stage,
};
use gneiss::layout::{EVALUATION, METRICS, PREDICTIONS, REPORT};
use gneiss::prompt::Tuned;
use gneiss::ranks::Ranks;
use gneiss::run::Run;
use indicatif::ProgressBar;
pub(super) use show::print;
use std::path::{Path, PathBuf};

/// Answers the test file with the base model after the hard prompt (the init text as plain text, or data.teacher_text if
/// the configuration has one) and with each tuned prompt, and compares the answers row by row.
///
/// Writes evaluation.json and predictions.csv: into the run folder if the only adapter is a run's, otherwise into
/// RUNS/NAME.eval, or into the folder of --out. With several runs each also gets its own part, unless --out is given.
#[derive(Args)]
pub struct Eval {
    #[command(flatten)]
    config: ConfigArgs,
    /// The tuned prompt: a run folder such as runs/tutorial, a folder in PEFT's format, or org/name[@revision]; :TASK
    /// follows if it holds the prompts of several tasks. May be repeated.
    #[arg(long = "adapter", value_name = "DIR[:TASK]", required = true)]
    adapters: Vec<PathBuf>,
    /// Also let the tuned prompts answer together, by votes and by the mean likelihood of each label; all of them are in one
    /// batch.
    #[arg(long)]
    ensemble: bool,
    /// Folder for the results.
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Print the results as JSON, every prediction included.
    #[arg(long)]
    json: bool,
}

impl Eval {
    /// Runs the subcommand, on one or several ranks.
    pub fn run(self) -> anyhow::Result<()> {
        launch::with_ranks(|ranks| self.run_on(ranks))
    }

    fn run_on(self, ranks: &dyn Ranks) -> anyhow::Result<()> {
        let (config, tuned) = launch::all(ranks, self.read())?;
        if ranks.rank() == 0 {
            tuned.iter().for_each(|tuned| super::warn_about(&tuned.adapter));
        }
        let session = launch::open(&config.model, ranks)?;
        let batching = if self.ensemble { Batching::Together } else { Batching::ByTurns };
        let place = EvaluationPlace { session: &session, ranks, batching };
        if ranks.rank() > 0 {
            evaluate::run(&config, place, &tuned, &mut Silent)?;
            return Ok(());
        }
        let folder = match (&self.out, &tuned[..]) {
            (Some(out), _) => out.clone(),
            (None, [Tuned { run: Some(run), .. }]) => run.clone(),
            _ => Path::new(&config.runs).join(format!("{}.eval", config.name)),
        };
        let mut evaluation = evaluate(&config, place, &tuned, &folder)?;
        if self.ensemble {
            evaluation.ensemble = Some(EnsembleScores::new(&evaluation)?);
            evaluation.write(&folder)?;
        }
        if self.out.is_none() && tuned.len() > 1 {
            // Each run gets its own part, so that the runs can be compared.
            for Tuned { name, run, .. } in &tuned {
                let Some(run) = run else { continue };
                evaluation.select(name).write(run)?;
                report(run)?;
            }
        }
        if self.json {
            println!("{}", serde_json::to_string_pretty(&evaluation)?);
        } else {
            print(&evaluation);
            hint(&config, &tuned);
        }
        Ok(())
    }

    /// The configuration and the tuned prompts, checked before the model is loaded.
    fn read(&self) -> anyhow::Result<(Config, Vec<Tuned>)> {
        let config = self.config.load()?;
        evaluate::test_file(&config)?;
        let tuned = Tuned::read_all(&self.adapters)?;
        if self.ensemble {
            EnsembleScores::check(config.data.task, tuned.len())?;
        }
        Ok((config, tuned))
    }
}

/// The observer of the ranks that only compute.
struct Silent;

impl EvaluationObserver for Silent {
    fn progress(&mut self, _name: &str, _progress: Progress) {}

    fn answered(&mut self, _so_far: &Evaluation) -> gneiss::Result<()> {
        Ok(())
    }
}

/// What to do with a single tuned prompt, or with several runs.
fn hint(config: &Config, tuned: &[Tuned]) {
    match tuned {
        [Tuned { name, run: Some(run), .. }] if cfg!(feature = "serve") => stderr::hint(format_args!(
            "gneiss serve --model {} --adapter {name}={}",
            config.model.id,
            run.display()
        )),
        _ => {
            let runs: Vec<String> =
                tuned.iter().filter_map(|tuned| Some(tuned.run.as_ref()?.display().to_string())).collect();
            if !runs.is_empty() {
                stderr::hint(format_args!("gneiss report {}", runs.join(" ")));
            }
        }
    }
}

/// Evaluates with a progress bar, and saves the results in `folder` after each tuned prompt.
pub(super) fn evaluate(
    config: &Config,
    place: EvaluationPlace,
    tuned: &[Tuned],
    folder: &Path,
) -> anyhow::Result<Evaluation> {
    writable(folder)?;
    let mut bars = Bars {
        bar: progress::bar(1, "evaluating", progress::COUNT),
        folder,
        at: None,
        kept: Vec::new(),
        rows: None,
    };
    let result = evaluate::run(config, place, tuned, &mut bars);
    bars.bar.finish_and_clear();
    if !bars.kept.is_empty() {
        let (json, csv) = (folder.join(EVALUATION), folder.join(PREDICTIONS));
        let of = if result.is_ok() { String::new() } else { format!(", of {} alone", bars.kept.join(", ")) };
        status!("results    {} and {}{of}", json.display(), csv.display());
    }
    // A run's report shows its evaluation too.
    if !bars.kept.is_empty() && folder.join(METRICS).is_file() {
        report(folder)?;
    }
    match bars.at {
        Some(name) => result.with_context(|| format!("evaluating {name}")),
        None => Ok(result?),
    }
}

/// Writes the report of a run again.
fn report(run: &Path) -> gneiss::Result<()> {
    gneiss::report::write(&Run::read(run)?)?;
    status!("report     {}", run.join(REPORT).display());
    Ok(())
}

/// Creates the folder and tries to write there, so that an error does not show after minutes of work.
fn writable(folder: &Path) -> gneiss::Result<()> {
    std::fs::create_dir_all(folder).map_err(gneiss::Error::io(folder))?;
    tempfile::tempfile_in(folder).map_err(gneiss::Error::io(folder)).map(drop)
}

/// Shows the progress, and writes the results.
struct Bars<'a> {
    bar: ProgressBar,
    folder: &'a Path,
    /// The current arm.
    at: Option<String>,
    /// Arms whose results are written.
    kept: Vec<String>,
    /// Rows of a pass in the last progress report, and its arm and stage.
    rows: Option<(String, Stage, usize)>,
}

impl EvaluationObserver for Bars<'_> {
    fn progress(&mut self, name: &str, progress: Progress) {
        let stage = match progress.stage {
            Stage::Generating => "answers",
            Stage::Scoring => "likelihoods",
        };
        let less = |(arm, stage, rows): &(String, Stage, usize)| {
            arm == name && *stage == progress.stage && progress.max_rows < *rows
        };
        if self.rows.as_ref().is_some_and(less) {
            progress::fewer_rows(&self.bar, progress.max_rows);
        }
        self.rows = Some((name.to_owned(), progress.stage, progress.max_rows));
        self.at = Some(name.to_owned());
        stderr::progress(&format!("{name}, {stage}"), progress.done, progress.of);
        self.bar.set_prefix(name.to_owned());
        self.bar.set_message(stage);
        self.bar.set_length(progress.of as u64);
        self.bar.set_position(progress.done as u64);
    }

    fn dataset(&mut self, key: &str, dataset: &Dataset) {
        for note in &dataset.notes {
            progress::line(&self.bar, &format!("note       {key}: {note}"));
        }
        for warning in &dataset.warnings {
            progress::warning(&self.bar, &format!("{key}: {warning}"));
        }
    }

    fn answered(&mut self, so_far: &Evaluation) -> gneiss::Result<()> {
        self.at = None;
        if let Some(arm) = so_far.arms.last() {
            let Answers { predictions, seconds, .. } = &arm.answers;
            let line = format!("{:<10} {} rows in {seconds:.1} s", arm.name, predictions.len());
            progress::line(&self.bar, &line);
        }
        // The base alone is no comparison, and would replace an earlier comparison.
        if so_far.arms.len() > 1 {
            so_far.write(self.folder)?;
            self.kept = so_far.arms.iter().map(|arm| arm.name.clone()).collect();
        }
        Ok(())
    }
}
