//! `gneiss tutorial`: the steps of IBM's "Prompt tune a Granite model", on this machine.

#[cfg(feature = "serve")]
mod deployment;
#[cfg(not(feature = "serve"))]
#[path = "tutorial/no_deployment.rs"]
mod deployment;
mod files;

use super::inspect::dataset::DatasetReport;
use super::tune::{self, RunArgs};
use super::{eval, find_lr, learning_curve, progress, stderr, text};
use clap::Args;
use gneiss::config::{Config, Task};
use gneiss::data::{Dataset, Template};
use gneiss::evaluate::{Batching, Evaluation, EvaluationPlace, test_file};
use gneiss::prompt::Tuned;
use gneiss::ranks::Alone;
use gneiss::run::Run;
use gneiss::session;
use gneiss::session::Session;
use std::collections::BTreeMap;
use std::path::Path;

/// Number of sample rows of each label.
const SAMPLES: usize = 2;
/// Number of labels with samples.
const MOST_LABELS: usize = 5;
/// Title and description of each step.
const STEPS: [(&str, &str); 9] = [
    (
        "Environment",
        "the model runs on this machine; it needs no account and no key, and no network after the download",
    ),
    ("Data", "the examples for training, validation and test"),
    ("Experiment", "every setting; --set KEY=VALUE changes one"),
    ("Run", "the model's weights stay as they are; only the virtual tokens' embeddings are tuned"),
    ("Status and summary", "the result of the run"),
    ("Learning curve", "the loss by epoch: mean negative log-likelihood of a target token, nats"),
    ("Tuned against base", "both answer the test file, which the run has not seen"),
    (
        "Deployment",
        "a server on this machine, for OpenAI's and watsonx's clients, until the end of this tutorial",
    ),
    (
        "Tuned against base, over HTTP",
        "both answer the test file again, as for any program that sends requests",
    ),
];

/// Walks through the tutorial: data, experiment, run, status, summary, learning curve, tuned against base, deployment,
/// and the same answers over HTTP. The default configuration is configs/tutorial.toml. If it or its files in data/ are not in
/// this folder, they are written.
#[derive(Args)]
pub struct Tutorial {
    #[command(flatten)]
    run: RunArgs,
}

/// The results as JSON.
#[derive(serde::Serialize)]
struct TutorialOutcome<'a, A> {
    tuning: tune::TuneOutcome<'a>,
    evaluation: Evaluation,
    deployment: Vec<A>,
}

impl Tutorial {
    /// Runs the subcommand.
    pub fn run(self) -> anyhow::Result<()> {
        let takes_default = self.run.takes_default();
        if takes_default {
            files::provide()?;
        }
        let mut order = self.run.order(Path::new(files::CONFIG))?;
        if takes_default {
            files::check_model(&order.config.model.id)?;
        }
        order.check_folder()?;
        // A mistake here would otherwise show only after the run.
        test_file(&order.config)?;
        let show = !self.run.json;
        if show {
            step(1);
        }
        let session = progress::open(&order.config.model)?;
        if show {
            environment(&session);
            step(2);
            data(&order.config)?;
        }
        if self.run.find_lr {
            find_learning_rate(&mut order.config, &session, show)?;
        } else if show {
            step(3);
        }
        if show {
            experiment(&order.config)?;
            step(4);
        }
        let Some((folder, summary)) = tune::tune(&order, &session, &Alone)? else { return Ok(()) };
        tune::go_on("tutorial", &folder, &summary)?;
        if show {
            println!("{} steps in {}", summary.steps, gneiss::text::duration(summary.seconds));
            step(5);
            tune::print(&folder, &summary);
            step(6);
            learning_curve::print(&Run::read(&folder)?);
            step(7);
        }
        let tuned = Tuned::read_all(std::slice::from_ref(&folder))?;
        let place = EvaluationPlace { session: &session, ranks: &Alone, batching: Batching::ByTurns };
        let evaluation = eval::evaluate(&order.config, place, &tuned, &folder)?;
        if show {
            eval::print(&evaluation);
        }
        let deployment = deployment::steps(&order.config, session, &folder, &evaluation, show)?;
        if !show {
            let outcome =
                TutorialOutcome { tuning: tune::TuneOutcome::new(&folder, &summary), evaluation, deployment };
            println!("{}", serde_json::to_string(&outcome)?);
        } else {
            stderr::hint("gneiss init TRAIN.csv, for your own examples");
        }
        Ok(())
    }
}

/// Step 3 with a range test, whose suggestion becomes the learning rate.
fn find_learning_rate(config: &mut Config, session: &Session, show: bool) -> anyhow::Result<()> {
    let (test, folder) = find_lr::run(config, session)?;
    config.train.learning_rate = test.suggestion.unwrap_or(config.train.learning_rate);
    if show {
        heading(3, "Experiment", "first a learning rate, then every setting; --set KEY=VALUE changes one");
        find_lr::print(&test, &folder);
        println!();
    }
    Ok(())
}

/// Prints the heading of a step.
fn step(number: usize) {
    let (title, what) = STEPS[number - 1];
    heading(number, title, what);
}

fn heading(number: usize, title: &str, what: &str) {
    let head = format!("Step {number} of {}: {title}", STEPS.len());
    println!("\n{head}\n{}\n{what}\n", "─".repeat(head.chars().count()));
}

/// Prints two columns.
fn line(key: &str, value: impl std::fmt::Display) {
    println!("{key:<16} {value}");
}

fn environment(session: &Session) {
    let model = &session.model;
    let config = model.config();
    line("version", env!("CARGO_PKG_VERSION"));
    line(
        "device",
        format!("{} ({})", gneiss::device::kind(model.device()), gneiss::device::name(model.device())),
    );
    line("model", format!("{} ({})", session.id, session.format));
    line(
        "",
        format!(
            "{} layers, hidden size {}, vocabulary {}; {} of {:?} weights",
            config.num_hidden_layers,
            config.hidden_size,
            text::grouped(config.vocab_size),
            text::bytes(model.weight_bytes() as u64),
            session.dtype
        ),
    );
}

fn data(config: &Config) -> anyhow::Result<()> {
    let data = &config.data;
    let template = Template::parse(&data.verbalizer)?;
    let files = [("train", &data.train), ("validation", &data.validation), ("test", &data.test)];
    let mut rows =
        vec![["", "file", "rows", "labels", "words, median", "words, most"].map(str::to_owned).to_vec()];
    let mut train = None;
    for (split, file) in files.into_iter().filter(|(_, file)| !file.is_empty()) {
        let dataset = session::dataset(file, data)?;
        let report = DatasetReport::new(&dataset);
        let words = &report.words_per_input;
        let cells = [
            split.to_owned(),
            file.clone(),
            report.rows.to_string(),
            balance(&report, data.task),
            words.median.to_string(),
            words.max.to_string(),
        ];
        rows.push(cells.to_vec());
        train.get_or_insert(dataset);
    }
    println!("{}", text::table(&rows));
    if let Some(train) = train {
        println!("\nsample rows of {}, as the model reads them after the prompt:", data.train);
        samples(&train, data.task, &template);
    }
    Ok(())
}

/// Number of rows of each label.
fn balance(report: &DatasetReport, task: Task) -> String {
    match (&report.labels, task) {
        (Some(labels), Task::Classification) => {
            let of = |(label, n): &(String, usize)| {
                let share = 100.0 * *n as f64 / report.rows as f64;
                format!("{} {n} ({share:.0} %)", text::short(label, 20))
            };
            labels.iter().map(of).collect::<Vec<_>>().join(", ")
        }
        _ => format!("{} distinct outputs", report.distinct_outputs),
    }
}

fn samples(train: &Dataset, task: Task, template: &Template) {
    let mut by_label = BTreeMap::<&str, Vec<&gneiss::data::Record>>::new();
    for record in &train.records {
        let label = if task == Task::Classification { record.output.trim() } else { "" };
        by_label.entry(label).or_default().push(record);
    }
    for records in by_label.values().rev().take(MOST_LABELS) {
        for record in records.iter().take(SAMPLES) {
            println!("  {}", text::short(&template.render(&record.input), 240));
            println!("  → {}", text::short(record.output.trim(), 240));
        }
    }
}

/// Prints every setting, in the order and with the tables of the configuration.
fn experiment(config: &Config) -> anyhow::Result<()> {
    let mut table = String::new();
    for line in config.to_toml()?.lines() {
        if let Some((key, value)) = line.split_once(" = ") {
            println!("{:<26} {value}", format!("{table}{key}"));
        } else if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            table = format!("{name}.");
        } else if !line.is_empty() {
            println!("{:<26} {line}", "");
        }
    }
    Ok(())
}
