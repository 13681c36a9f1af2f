//! `gneiss tutorial`: the steps of IBM's "Prompt tune a Granite model", on this machine.

use super::deployment::{self, HttpAnswers, Server};
use super::inspect::dataset::DatasetReport;
use super::tune::{self, RunArgs};
use super::{eval, find_lr, learning_curve, progress, text};
use clap::Args;
use gneiss::config::{Config, Task};
use gneiss::data::{Dataset, Template};
use gneiss::evaluate::{Evaluation, test_file};
use gneiss::layout;
use gneiss::prompt::Tuned;
use gneiss::run::Run;
use gneiss::session;
use gneiss::session::Session;
use std::collections::BTreeMap;
use std::path::Path;

/// Number of sample rows of each label.
const SAMPLES: usize = 2;
/// Number of labels with samples.
const MOST_LABELS: usize = 5;
/// Number of steps on the screen.
const STEPS: usize = 9;

/// Walks through the tutorial: data, experiment, run, status, summary, learning curve, tuned against base, deployment,
/// and the same answers over HTTP. The default configuration is configs/tutorial.toml.
#[derive(Args)]
pub struct Tutorial {
    #[command(flatten)]
    run: RunArgs,
}

/// The results as JSON.
#[derive(serde::Serialize)]
struct TutorialOutcome<'a> {
    tuning: tune::TuneOutcome<'a>,
    evaluation: Evaluation,
    deployment: Vec<HttpAnswers>,
}

impl Tutorial {
    /// Runs the subcommand.
    pub fn run(self) -> anyhow::Result<()> {
        let mut order = self.run.order(Path::new("configs/tutorial.toml"))?;
        // A mistake here would otherwise show only after the run.
        test_file(&order.config)?;
        let show = !self.run.json;
        if show {
            step(
                1,
                "Environment",
                "the model runs on this machine; it needs no account and no key, and no network after the download",
            );
        }
        let session = progress::open(&order.config.model)?;
        if show {
            environment(&session);
            step(2, "Data", "the examples for training, validation and test");
            data(&order.config)?;
        }
        if self.run.find_lr {
            let (found, folder) = find_lr::run(&order.config, &session)?;
            order.config.train.learning_rate = found.suggestion.unwrap_or(order.config.train.learning_rate);
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
            println!("{} steps in {}", summary.steps, gneiss::text::duration(summary.seconds));
            step(5, "Status and summary", "the result of the run");
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
            step(
                8,
                "Deployment",
                "a server on this machine, for OpenAI's and watsonx's clients, until the end of this tutorial",
            );
        }
        let server = Server::start(&order.config, session, &folder)?;
        if show {
            deployment(&order.config, &folder, &server, &evaluation)?;
            step(
                9,
                "Tuned against base, over HTTP",
                "both answer the test file again, as for any program that sends requests",
            );
        }
        let asked = server.ask(&order.config, &evaluation)?;
        server.end()?;
        if show {
            deployment::print(&asked);
        } else {
            let outcome = TutorialOutcome {
                tuning: tune::TuneOutcome::new(&folder, &summary),
                evaluation,
                deployment: asked,
            };
            println!("{}", serde_json::to_string(&outcome)?);
        }
        Ok(())
    }
}

fn step(number: usize, title: &str, what: &str) {
    let head = format!("Step {number} of {STEPS}: {title}");
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

fn deployment(
    config: &Config,
    folder: &Path,
    server: &Server,
    evaluation: &Evaluation,
) -> anyhow::Result<()> {
    let adapter = folder.join(layout::ADAPTER);
    let bytes = std::fs::metadata(adapter.join(layout::adapter_folder::WEIGHTS))?.len();
    line("adapter", format!("{} ({})", adapter.display(), text::bytes(bytes)));
    line("report", folder.join(layout::REPORT).display());
    line("server", format!("{} serves {} and {}", server.url, config.model.id, server.name));
    let first = evaluation.arms.first().and_then(|arm| arm.answers.predictions.first());
    let (request, answer) = server.example(config, first.map_or("", |row| &row.input))?;
    println!("\nA request, and its answer:\n\n  {request}\n  {answer}");
    let (model, name) = (&config.model.id, &server.name);
    println!("\nTo serve it from now on, with a page to try it in a browser:\n");
    println!("  gneiss serve --model {model} --adapter {name}={}", adapter.display());
    println!("\nFor engines that know nothing of prompts, such as vLLM or llama.cpp:\n");
    println!(
        "  gneiss export --model {model} --adapter {name}={} --bake --out {name}-baked",
        adapter.display()
    );
    println!("\nIn Python:\n");
    println!("  from peft import PeftModel");
    println!("  model = PeftModel.from_pretrained(base_model, {:?})", adapter.display().to_string());
    println!("  model.generate(**inputs, use_cache=False)");
    Ok(())
}
