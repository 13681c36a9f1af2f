//! `gneiss inspect`: what a model, adapter, run, dataset or configuration holds.

mod adapter;
mod config;
pub mod dataset;
mod model;
mod run;

use clap::Args;
use gneiss::Error;
use gneiss::checkpoint::HubOptions;
use gneiss::data::LengthStats;
use gneiss::data::dataset::is_dataset;
use gneiss::layout;
use gneiss::prompt::peft::{Place, adapters_in};
use serde::Serialize;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Says what a path holds: a model (folder, .gguf file, hub id), an adapter (folder, hub id), a run, a dataset (.csv, .tsv,
/// .json, .jsonl, .ndjson, .parquet, or one of them with .gz) or a whole configuration (.toml).
#[derive(Args)]
pub struct Inspect {
    /// A folder, a file or org/name[@revision]; what it is decides what is said.
    path: String,
    /// The model whose tokenizer and embeddings are used; adapters and configurations name their own.
    #[arg(long)]
    model: Option<String>,
    #[command(flatten)]
    dataset: dataset::Options,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// What a path can be.
enum Kind {
    Model,
    /// In this folder.
    Adapter(PathBuf),
    Run,
    Dataset,
    Config,
}

impl Inspect {
    /// Runs the subcommand.
    pub fn run(self) -> anyhow::Result<()> {
        let (path, base) = (Path::new(&self.path), self.model.as_deref());
        match kind(path)? {
            Kind::Model => self.print(&model::inspect(&self.path)?),
            Kind::Adapter(folder) => self.print(&adapter::inspect(&folder, base)?),
            Kind::Run => self.print(&run::inspect(path, base)?),
            Kind::Dataset => self.print(&dataset::inspect(path, base, &self.dataset)?),
            Kind::Config => self.print(&config::inspect(path, base)?),
        }
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

fn kind(path: &Path) -> anyhow::Result<Kind> {
    if path.is_dir() {
        let files = [
            (layout::adapter_folder::CONFIG, Kind::Adapter(path.to_path_buf())),
            (layout::METRICS, Kind::Run),
            (layout::model_folder::CONFIG, Kind::Model),
        ];
        let names = files.each_ref().map(|(name, _)| *name).join(", ");
        if let Some((_, kind)) = files.into_iter().find(|(name, _)| path.join(name).is_file()) {
            return Ok(kind);
        }
        // The folder that PEFT saves an adapter with a name into.
        if !adapters_in(path).is_empty() {
            return Ok(Kind::Adapter(Place::find(path, &HubOptions::from_env())?.folder));
        }
        let problem = format!(
            "expected a model, an adapter or a run, found a folder with none of {names}; for a GGUF file give its own \
             path"
        );
        return Err(Error::Checkpoint { path: path.to_path_buf(), problem }.into());
    }
    let extension = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase());
    Ok(match extension.as_deref() {
        _ if is_dataset(path) => Kind::Dataset,
        Some("toml") => Kind::Config,
        _ if path.exists() => Kind::Model,
        _ => match Place::on_hub(path, &HubOptions::from_env()) {
            Ok(Some(place)) => Kind::Adapter(place.folder),
            // What is no model is said by the model's own errors.
            Ok(None) | Err(Error::Invalid(_) | Error::Checkpoint { .. }) => Kind::Model,
            Err(error) => return Err(error.into()),
        },
    })
}

/// A line of a report.
fn line(key: &str, value: impl std::fmt::Display) {
    println!("{key:<16} {value}");
}

/// A report's histogram: its line of numbers behind the key, its bars below.
fn print_lengths(key: &str, lengths: &LengthStats) {
    let text = lengths.to_string();
    let mut lines = text.lines();
    line(key, lines.next().unwrap_or_default());
    lines.for_each(|bar| line("", bar));
}

/// Lengths for machines.
fn lengths_json<S: serde::Serializer>(lengths: &LengthStats, out: S) -> Result<S::Ok, S::Error> {
    let LengthStats { count, min, median, mean, p95, max, bins } = lengths;
    let bin = |(first, last, n): &(usize, usize, usize)| json!({ "first": first, "last": last, "count": n });
    let bins: Vec<Value> = bins.iter().map(bin).collect();
    json!({ "count": count, "min": min, "median": median, "mean": mean, "p95": p95, "max": max, "bins": bins })
        .serialize(out)
}

/// `n` of a thing whose plural takes an s.
fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}
