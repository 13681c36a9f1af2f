//! `gneiss tutorial`: the steps of IBM's "Prompt tune a Granite model", on this machine.

#[cfg(feature = "serve")]
mod deployment;
#[cfg(not(feature = "serve"))]
#[path = "tutorial/no_deployment.rs"]
mod deployment;

use super::inspect::dataset::DatasetReport;
use super::tune::{self, RunArgs};
use super::{eval, find_lr, learning_curve, progress, text};
use clap::Args;
use gneiss::config::{Config, Task};
use gneiss::data::{Dataset, Template};
use gneiss::evaluate::{Evaluation, test_file};
use gneiss::prompt::Tuned;
use gneiss::run::Run;
use gneiss::session;
use gneiss::session::Session;
use std::collections::BTreeMap;
use std::path::Path;

/// Sample rows of each label.
const SAMPLES: usize = 2;
/// Labels that samples are shown of.
const MOST_LABELS: usize = 5;
/// Steps, as they are counted on the screen.
const STEPS: usize = 9;

/// Walks through the tutorial: data, experiment, run, status, summary, learning curve, tuned against base, deployment,
/// and base and tuned asked over HTTP. The
/// configuration is configs/tutorial.toml where none is named.
#[derive(Args)]
pub struct Tutorial {
    #[command(flatten)]
    run: RunArgs,
}

/// All that came of it, for machines.
#[derive(serde::Serialize)]
struct Outcome<'a> {
    tuning: tune::Outcome<'a>,
    evaluation: Evaluation,
    deployment: Vec<deployment::ServedAnswers>,
}

impl Tutorial {
    /// Runs the subcommand.
    pub fn run(self) -> anyhow::Result<()> {
        let mut order = self.run.order(Path::new("configs/tutorial.toml"))?;
        // A mistake here would show after the run.
        test_file(&order.config)?;
        let show = !self.run.json;
        if show {
            step(
                1,
                "Environment",
                "the model runs on this machine: no account, no key, no network once it is here",
            );
        }
        let session = progress::open(&order.config.model)?;
        if show {
            environment(&session);
            step(2, "Data", "what the prompt learns from, is chosen by, and is judged on");
            data(&order.config)?;
        }
        self.learning_rate(&mut order.config, &session)?;
        if show {
            experiment(&order.config)?;
            step(
                4,
                "Run",
                "the model's weights stay as they are; only the virtual tokens' embeddings are tuned",
            );
        }
        let (folder, summary) = tune::tune(&order, &session)?;
        tune::go_on("tutorial", &folder, &summary)?;
        if show {
            println!("{} steps in {}", summary.steps, text::duration(summary.seconds));
            step(5, "Status and summary", "what the run came to");
            tune::print(&folder, &summary);
            step(
                6,
                "Learning curve",
                "the loss by epoch: mean negative log-likelihood of a target token, nats",
            );
            learning_curve::print(&Run::read(&folder)?);
            step(7, "Tuned against base", "both answer the test file, which the run has not seen");
        }
        let tuned = Tuned::read_all(std::slice::from_ref(&folder))?;
        let evaluation = eval::evaluate(&order.config, &session, &tuned, &folder)?;
        if show {
            eval::print(&evaluation);
        }
        let deployment = deployment::steps(&order.config, session, &folder, &evaluation, show)?;
        if !show {
            let outcome = Outcome { tuning: tune::Outcome::of(&folder, &summary), evaluation, deployment };
            println!("{}", serde_json::to_string(&outcome)?);
        }
        Ok(())
    }

    /// Sets the learning rate that the range test suggests, if it is asked for, and prints step 3's title.
    fn learning_rate(&self, config: &mut Config, session: &Session) -> anyhow::Result<()> {
        let show = !self.run.json;
        if self.run.find_lr {
            let (found, folder) = find_lr::run(config, session)?;
            config.train.learning_rate = found.suggestion.unwrap_or(config.train.learning_rate);
            if show {
                step(
                    3,
                    "Experiment",
                    "first a learning rate, then every setting; --set KEY=VALUE changes one",
                );
                find_lr::print(&found, &folder);
                println!();
            }
        } else if show {
            step(3, "Experiment", "every setting; --set KEY=VALUE changes one");
        }
        Ok(())
    }
}

fn step(number: usize, title: &str, what: &str) {
    let head = format!("Step {number} of {STEPS}: {title}");
    println!("\n{head}\n{}\n{what}\n", "─".repeat(head.chars().count()));
}

/// What is printed in two columns.
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
            "{} blocks, hidden size {}, vocabulary {}; {} of {:?} weights",
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

/// How many rows each label has.
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

/// Every setting, in the order and with the tables that the configuration has.
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
