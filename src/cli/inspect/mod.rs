//! `gneiss inspect`: describes a model, adapter, run, dataset or configuration.

mod adapter;
mod batches;
mod config;
pub mod dataset;
mod keys_values;
mod model;
mod run;

use clap::Args;
use gneiss::checkpoint::HubOptions;
use gneiss::data::LengthStats;
use gneiss::data::dataset::is_dataset;
use gneiss::prompt::peft::{Place, adapters_in};
use gneiss::{Error, layout};
use serde::Serialize;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Describes the content of a path: a model (folder, .gguf file, hub id), an adapter (folder, hub id), a run, a dataset
/// (.csv, .tsv, .json, .jsonl, .ndjson, .parquet, or one of them with .gz) or a complete configuration (.toml).
#[derive(Args)]
pub struct Inspect {
    /// A folder, a file or org/name[@revision]; its kind decides the output. :TASK after an adapter with several tasks.
    path: String,
    /// The model whose tokenizer and embeddings are used; adapters and configurations name their own.
    #[arg(long)]
    model: Option<String>,
    #[command(flatten)]
    dataset: dataset::DatasetOptions,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// The kinds of a path.
enum PathKind {
    Model,
    /// An adapter: its folder, and the task whose prompt is meant.
    Adapter(PathBuf, Option<usize>),
    Run,
    Dataset,
    Config,
}

impl PathKind {
    /// The command to go on with.
    fn hint(&self, path: &str) -> String {
        match self {
            Self::Model => format!("gneiss init TRAIN.csv --model {path}"),
            Self::Adapter(..) => format!("gneiss generate --model MODEL --adapter {path} TEXT"),
            Self::Run => format!("gneiss report {path}"),
            Self::Dataset => format!("gneiss init {path}"),
            Self::Config => format!("gneiss tune {path}"),
        }
    }
}

impl Inspect {
    /// Runs the subcommand.
    pub fn run(self) -> anyhow::Result<()> {
        let (path, base) = (Path::new(&self.path), self.model.as_deref());
        let kind = kind(path)?;
        let hint = kind.hint(&self.path);
        match kind {
            PathKind::Model => self.print(&model::inspect(&self.path)?),
            PathKind::Adapter(folder, task) => self.print(&adapter::inspect(&folder, task, base)?),
            PathKind::Run => self.print(&run::inspect(path, base)?),
            PathKind::Dataset => self.print(&dataset::inspect(path, base, &self.dataset)?),
            PathKind::Config => self.print(&config::inspect(path, base)?),
        }?;
        if !self.json {
            crate::cli::stderr::hint(hint);
        }
        Ok(())
    }

    fn print(&self, report: &impl Report) -> anyhow::Result<()> {
        if self.json {
            println!("{}", serde_json::to_string_pretty(report)?);
        } else {
            report.print();
        }
        Ok(())
    }
}

/// A result, for machines and for people.
trait Report: Serialize {
    /// Prints it for people.
    fn print(&self);
}

fn kind(path: &Path) -> anyhow::Result<PathKind> {
    if path.is_dir() {
        let files = [
            (layout::adapter_folder::CONFIG, PathKind::Adapter(path.to_path_buf(), None)),
            (layout::METRICS, PathKind::Run),
            (layout::model_folder::CONFIG, PathKind::Model),
        ];
        let names = files.each_ref().map(|(name, _)| *name).join(", ");
        if let Some((_, kind)) = files.into_iter().find(|(name, _)| path.join(name).is_file()) {
            return Ok(kind);
        }
        // The folder into which PEFT saves a named adapter.
        if !adapters_in(path).is_empty() {
            return Ok(PathKind::Adapter(Place::find(path, &HubOptions::from_env())?.folder, None));
        }
        let problem = format!(
            "expected a model, an adapter or a run, found a folder with none of {names}; for a GGUF file give its own \
             path"
        );
        return Err(Error::Checkpoint { path: path.to_path_buf(), problem }.into());
    }
    let extension = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase());
    Ok(match extension.as_deref() {
        _ if is_dataset(path) => PathKind::Dataset,
        Some("toml") => PathKind::Config,
        _ if path.exists() => PathKind::Model,
        _ if Place::names_task(path) => {
            let place = Place::find(path, &HubOptions::from_env())?;
            PathKind::Adapter(place.folder, place.task)
        }
        _ => match Place::on_hub(path, &HubOptions::from_env()) {
            Ok(Some(place)) => PathKind::Adapter(place.folder, None),
            // For anything else the model's own errors say what is wrong.
            Ok(None) | Err(Error::Invalid(_) | Error::Checkpoint { .. }) => PathKind::Model,
            Err(error) => return Err(error.into()),
        },
    })
}

/// A line of a report.
fn line(key: &str, value: impl std::fmt::Display) {
    println!("{key:<16} {value}");
}

/// A histogram of a report: its line of numbers after the key, its bars below.
fn print_lengths(key: &str, lengths: &LengthStats) {
    let text = lengths.to_string();
    let mut lines = text.lines();
    line(key, lines.next().unwrap_or_default());
    lines.for_each(|bar| line("", bar));
}

/// Lengths as JSON.
fn lengths_json<S: serde::Serializer>(lengths: &LengthStats, out: S) -> Result<S::Ok, S::Error> {
    let LengthStats { count, min, median, mean, p95, max, bins } = lengths;
    let bin = |(first, last, n): &(usize, usize, usize)| json!({ "first": first, "last": last, "count": n });
    let bins: Vec<Value> = bins.iter().map(bin).collect();
    json!({ "count": count, "min": min, "median": median, "mean": mean, "p95": p95, "max": max, "bins": bins })
        .serialize(out)
}

/// `n` of a thing whose plural has an s.
fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}
