//! `gneiss eval`: tuned against base.

use super::{ConfigArgs, progress, stderr, text};
use anyhow::Context;
use clap::Args;
use gneiss::config::Config;
use gneiss::data::Dataset;
use gneiss::evaluate;
use gneiss::evaluate::{
    Answers, Batching, By, EnsembleScores, Evaluation, EvaluationObserver, Paired, Progress, Scores, Stage,
};
use gneiss::layout::{EVALUATION, METRICS, PREDICTIONS, REPORT};
use gneiss::prompt::Tuned;
use gneiss::run::Run;
use gneiss::session::Session;
use indicatif::ProgressBar;
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
    /// Runs the subcommand.
    pub fn run(self) -> anyhow::Result<()> {
        let config = self.config.load()?;
        evaluate::test_file(&config)?;
        let tuned = Tuned::read_all(&self.adapters)?;
        if self.ensemble {
            EnsembleScores::check(config.data.task, tuned.len())?;
        }
        tuned.iter().for_each(|tuned| super::warn_about(&tuned.adapter));
        let session = progress::open(&config.model)?;
        let folder = match (&self.out, &tuned[..]) {
            (Some(out), _) => out.clone(),
            (None, [Tuned { run: Some(run), .. }]) => run.clone(),
            _ => Path::new(&config.runs).join(format!("{}.eval", config.name)),
        };
        let batching = if self.ensemble { Batching::Together } else { Batching::ByTurns };
        let mut evaluation = evaluate(&config, &session, &tuned, batching, &folder)?;
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
    session: &Session,
    tuned: &[Tuned],
    batching: Batching,
    folder: &Path,
) -> anyhow::Result<Evaluation> {
    for tuned in tuned {
        tuned.adapter.check_fits(&tuned.argument(), &session.id, session.model.config())?;
    }
    writable(folder)?;
    let mut bars = Bars {
        bar: progress::bar(1, "evaluating", progress::COUNT),
        folder,
        at: None,
        kept: Vec::new(),
        rows: None,
    };
    let result = evaluate::run(config, session, tuned, batching, &mut bars);
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

/// Shows the results: a table of all arms, each tuned prompt against the base, then the details.
pub(super) fn print(evaluation: &Evaluation) {
    let names = evaluation.columns();
    let rows = evaluation.arms.first().map_or(0, |base| base.answers.predictions.len());
    println!("{}: {rows} rows", evaluation.test);
    println!("{}", text::table(&summary(evaluation)));
    if !evaluation.pairs.is_empty() {
        println!();
    }
    for pair in &evaluation.pairs {
        println!("{}", paired(pair, evaluation));
    }
    if let Some(ensemble) = &evaluation.ensemble {
        println!("\n{}", text::table(&together(ensemble)));
    }
    for (name, arm) in names.iter().zip(&evaluation.arms) {
        let ways = [("generated", &arm.answers.generated), ("label likelihood", &arm.answers.likelihood)];
        for (way, scores) in ways {
            if let Some(scores) = scores {
                println!("\n{}", text::table(&classes(&format!("{name}, {way}"), scores)));
            }
        }
    }
    if evaluation.labels.len() > WIDE {
        println!("\nThe confusion matrix is in {EVALUATION}: `confusion`");
    }
    for (name, arm) in names.iter().zip(&evaluation.arms) {
        strange(name, &arm.answers, &evaluation.labels);
    }
}

/// The arms side by side.
fn summary(evaluation: &Evaluation) -> Vec<Vec<String>> {
    type EvalCell<'a> = &'a dyn Fn(&Answers) -> Option<String>;
    let mut header = evaluation.columns();
    if let [base, tuned @ ..] = &mut header[..] {
        base.push_str(match (evaluation.hard_prompt.is_empty(), evaluation.teacher) {
            (true, _) => ", no prompt",
            (false, false) => ", hard prompt",
            (false, true) => ", teacher's text",
        });
        if let [tuned] = tuned {
            tuned.push_str(", soft prompt");
        }
    }
    let mut rows = vec![[vec![String::new()], header].concat()];
    let mut row = |what: &str, of: EvalCell| {
        let cells = evaluation.arms.iter().map(|arm| of(&arm.answers));
        // A row without values for the task is left out.
        if let Some(cells) = cells.collect::<Option<Vec<_>>>() {
            rows.push([vec![what.to_owned()], cells].concat());
        }
    };
    let generated = |f: fn(&Scores) -> String| move |a: &Answers| a.generated.as_ref().map(f);
    let likelihood = |f: fn(&Scores) -> String| move |a: &Answers| a.likelihood.as_ref().map(f);
    row("accuracy, generated", &generated(accuracy));
    row("  95 % interval", &generated(|s| interval(s.interval)));
    row("macro precision, generated", &generated(|s| three(s.macro_precision)));
    row("macro recall, generated", &generated(|s| three(s.macro_recall)));
    row("macro F1, generated", &generated(|s| three(s.macro_f1)));
    row("answers that are no label", &generated(|s| s.no_label.to_string()));
    row("accuracy, label likelihood", &likelihood(accuracy));
    row("  95 % interval", &likelihood(|s| interval(s.interval)));
    row("macro F1, label likelihood", &likelihood(|s| three(s.macro_f1)));
    row("exact match", &|a| a.text.as_ref().map(|t| share(t.correct, t.total)));
    row("  95 % interval", &|a| a.text.as_ref().map(|t| interval(t.exact_match_interval)));
    row("token F1", &|a| a.text.as_ref().map(|t| three(t.token_f1)));
    row("ROUGE-L", &|a| a.text.as_ref().map(|t| three(t.rouge_l)));
    row("perplexity of the outputs", &|a| {
        Some(if a.perplexity < 1e5 { three(a.perplexity) } else { format!("{:.2e}", a.perplexity) })
    });
    row("seconds", &|a| Some(format!("{:.1}", a.seconds)));
    rows
}

/// The prompts of an ensemble together and by themselves.
fn together(ensemble: &EnsembleScores) -> Vec<Vec<String>> {
    let EnsembleScores { names, vote, mean_likelihood, mean_accuracy, best, best_accuracy } = ensemble;
    let title = format!("{} prompts, label likelihood", names.len());
    let row = |what: String, share: String, interval: String| vec![what, share, interval];
    let percent = |share: f64| format!("{:.2} %", 100.0 * share);
    vec![
        row(title, "accuracy".into(), "95 % interval".into()),
        row("  most votes".into(), accuracy(vote), interval(vote.interval)),
        row("  mean likelihood".into(), accuracy(mean_likelihood), interval(mean_likelihood.interval)),
        row("  mean of single prompts".into(), percent(*mean_accuracy), String::new()),
        row(format!("  best single prompt here, {best}"), percent(*best_accuracy), String::new()),
    ]
}

/// A tuned prompt against the base in one line.
fn paired(pair: &Paired, evaluation: &Evaluation) -> String {
    let name = if evaluation.arms.len() > 2 { &pair.name } else { "tuned" };
    let p = match pair.p_value {
        p if p < 1e-300 => "p < 1e-300".to_owned(),
        p if p < 1e-3 => format!("p = {p:.1e}"),
        p => format!("p = {p:.3}"),
    };
    let [low, high] = pair.interval;
    let points = format!("{:+.1} points [{:.1}, {:.1}]", 100.0 * pair.difference, 100.0 * low, 100.0 * high);
    let score = format!("{:+.3} [{low:.3}, {high:.3}]", pair.difference);
    let (way, difference, test, up, down) = match pair.by {
        By::Generated if evaluation.labels.is_empty() => {
            ("exact match", points, "McNemar", "fixed", "broken")
        }
        By::Generated => ("generated", points, "McNemar", "fixed", "broken"),
        By::Likelihood => ("label likelihood", points, "McNemar", "fixed", "broken"),
        By::TokenF1 => ("token F1", score, "sign test", "better", "worse"),
        By::RougeL => ("ROUGE-L", score, "sign test", "better", "worse"),
    };
    let (fixed, broken) = (pair.fixed, pair.broken);
    format!("{name} minus base, {way}: {difference}, {test} {p}; {fixed} rows {up}, {broken} {down}")
}

/// With more labels than this, a line of the confusion matrix is too wide to read.
const WIDE: usize = 8;

/// Each label's scores, and the answers of the rows where it was expected.
fn classes(title: &str, scores: &Scores) -> Vec<Vec<String>> {
    let short = |label: &str| text::short(label, 20);
    let fits = scores.classes.len() <= WIDE;
    let mut header = [title, "precision", "recall", "F1", "rows"].map(str::to_owned).to_vec();
    if fits {
        header.extend(scores.classes.iter().map(|class| format!("said {}", short(&class.label))));
        // A column of zeros says nothing; by likelihood every answer is a label.
        header.extend((scores.no_label > 0).then(|| "no label".into()));
    }
    let columns = header.len();
    let row = |(class, confusion): (&evaluate::ClassScores, &Vec<usize>)| {
        let mut row = vec![format!("  {}", short(&class.label))];
        row.extend([class.precision, class.recall, class.f1].map(three));
        row.push(class.support.to_string());
        row.extend(confusion.iter().map(usize::to_string));
        row.truncate(columns);
        row
    };
    std::iter::once(header).chain(scores.classes.iter().zip(&scores.confusion).map(row)).collect()
}

/// Lists the answers that are no label.
fn strange(name: &str, answers: &Answers, labels: &[String]) {
    let strange: Vec<_> = answers.predictions.iter().filter(|p| !labels.contains(&p.generated)).collect();
    if labels.is_empty() || strange.is_empty() {
        return;
    }
    println!("\n{name}: {} answers are no label and count as wrong", strange.len());
    for p in strange.iter().take(10) {
        let input = text::short(&p.input, 60);
        println!("  line {}: {:?}, expected {:?}: {input}", p.line, p.generated, p.expected);
    }
    if strange.len() > 10 {
        println!("  and {} more ({PREDICTIONS} has them all)", strange.len() - 10);
    }
}

fn accuracy(scores: &Scores) -> String {
    share(scores.correct, scores.total)
}

/// A share in per cent, with its counts.
pub(super) fn share(part: usize, of: usize) -> String {
    format!("{:.2} % ({part}/{of})", 100.0 * part as f64 / of as f64)
}

/// The bounds of a share in per cent.
fn interval([low, high]: [f64; 2]) -> String {
    format!("[{:.1}, {:.1}]", 100.0 * low, 100.0 * high)
}

fn three(value: f64) -> String {
    format!("{value:.3}")
}
