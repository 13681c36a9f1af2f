//! `gneiss eval`: tuned against base.

use super::{ConfigArgs, progress, text};
use clap::Args;
use gneiss::adapter::Adapter;
use gneiss::config::{Config, Task};
use gneiss::data::{Dataset, Template};
use gneiss::evaluate::{self, Answers, Exam, Scores};
use gneiss::setup::{self, Session};
use std::path::{Path, PathBuf};

/// Runs the test file through the base model with the hard prompt (the init text in plain words) and through
/// the tuned prompt.
#[derive(Args)]
pub struct Eval {
    #[command(flatten)]
    config: ConfigArgs,
    /// The tuned prompt: a folder in PEFT's format, such as runs/tutorial/adapter.
    #[arg(long)]
    adapter: PathBuf,
    /// Print the results, every prediction included, as JSON.
    #[arg(long)]
    json: bool,
}

impl Eval {
    /// Runs the subcommand.
    pub fn run(self) -> anyhow::Result<()> {
        let config = self.config.load()?;
        let adapter = Adapter::read(&self.adapter)?;
        let session = progress::open(&config.model)?;
        super::check_width(&adapter, &self.adapter, &session)?;
        let arms = both(&config, &session, &adapter)?;
        if self.json {
            println!("{}", serde_json::to_string_pretty(&arms)?);
        } else {
            print(&arms);
        }
        Ok(())
    }
}

/// Both arms over one file.
#[derive(serde::Serialize)]
struct Arms {
    test: String,
    labels: Vec<String>,
    base: Answers,
    tuned: Answers,
}

fn both(config: &Config, session: &Session, adapter: &Adapter) -> anyhow::Result<Arms> {
    let (data, file) = (&config.data, &config.data.test);
    if file.is_empty() {
        anyhow::bail!(gneiss::Error::Invalid("data.test: expected a file to evaluate on, found none".into()));
    }
    let test = Dataset::read(Path::new(file), &data.input, &data.output)?;
    let train = Dataset::read(Path::new(&data.train), &data.input, &data.output)?;
    let labels = match data.task {
        Task::Classification => evaluate::labels(test.records.iter().chain(&train.records)),
        Task::Generation => Vec::new(),
    };
    let template = Template::parse(&data.verbalizer)?;
    let tuned = setup::encoder(data, &session.tokenizer, &template);
    let instruction = Some(config.prompt.init_text.as_str()).filter(|text| !text.is_empty());
    let base = gneiss::data::Encoder { instruction, ..tuned };
    let exam = Exam {
        model: &session.model,
        tokenizer: &session.tokenizer,
        dataset: &test,
        task: data.task,
        labels: &labels,
        max_rows: setup::max_rows(config.train.max_rows, session.model.device()),
    };
    let arm = |what, prompt, encoder| -> anyhow::Result<Answers> {
        let bar = progress::bar(test.records.len(), what, progress::COUNT);
        let answers = exam.answer(prompt, encoder, &mut |done| bar.set_position(done as u64))?;
        bar.finish_and_clear();
        eprintln!("{what:<10} {} rows in {:.1} s", test.records.len(), answers.seconds);
        Ok(answers)
    };
    let base = arm("base", None, &base)?;
    let tuned = arm("tuned", Some(&adapter.prompt), &tuned)?;
    Ok(Arms { test: file.clone(), labels, base, tuned })
}

fn print(arms: &Arms) {
    let Arms { test, labels, base, tuned } = arms;
    println!("{test}: {} rows", base.predictions.len());
    let cells = |what: &str, of: &dyn Fn(&Answers) -> String| vec![what.to_owned(), of(base), of(tuned)];
    let mut rows = vec![vec![String::new(), "base, hard prompt".into(), "tuned, soft prompt".into()]];
    if labels.is_empty() {
        rows.push(cells("exact match", &|a| {
            let hits = a.predictions.iter().filter(|p| p.generated == p.expected).count();
            share(hits, a.predictions.len())
        }));
    } else {
        rows.push(cells("accuracy, generated", &|a| a.generated.as_ref().map_or(String::new(), accuracy)));
        rows.push(cells("macro F1, generated", &|a| {
            format!("{:.3}", a.generated.as_ref().map_or(0.0, |s| s.macro_f1))
        }));
        rows.push(cells("answers that are no label", &|a| {
            a.generated.as_ref().map_or(0, |s| s.no_label).to_string()
        }));
        let likelihood =
            |f: fn(&Scores) -> String| move |a: &Answers| a.likelihood.as_ref().map_or(String::new(), f);
        rows.push(cells("accuracy, label likelihood", &likelihood(accuracy)));
        rows.push(cells("macro F1, label likelihood", &likelihood(|s| format!("{:.3}", s.macro_f1))));
    }
    rows.push(cells("seconds", &|a| format!("{:.1}", a.seconds)));
    println!("{}", text::table(&rows));
    for (what, answers) in [("base", base), ("tuned", tuned)] {
        let strange: Vec<_> = answers.predictions.iter().filter(|p| !labels.contains(&p.generated)).collect();
        if labels.is_empty() || strange.is_empty() {
            continue;
        }
        println!("\n{what}: {} answers are no label and count as wrong", strange.len());
        for p in strange.iter().take(10) {
            println!(
                "  line {}: {:?}, expected {:?}: {}",
                p.line,
                p.generated,
                p.expected,
                text::short(&p.input, 60)
            );
        }
        if strange.len() > 10 {
            println!("  and {} more (--json has them all)", strange.len() - 10);
        }
    }
}

fn accuracy(scores: &Scores) -> String {
    share(scores.correct, scores.total)
}

/// A share in per cent, with its counts.
fn share(part: usize, of: usize) -> String {
    format!("{:.2} % ({part}/{of})", 100.0 * part as f64 / of as f64)
}
