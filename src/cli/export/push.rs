//! `gneiss export --push`: an adapter as a repository on the hub.

use crate::cli::stderr;
use gneiss::checkpoint::{self, HubOptions, LicenseTag, Upload, UploadFile, check_repository};
use gneiss::evaluate::{Answers, Evaluation};
use gneiss::layout::adapter_folder;
use gneiss::prompt::Tuned;
use gneiss::prompt::peft::{CardMetric, CardResults, published_card};
use gneiss::{Error, Result};
use std::path::Path;

/// An adapter for the hub.
pub(super) struct Push<'a> {
    /// The adapter, as on the command line.
    pub adapter: &'a str,
    /// `org/name`.
    pub repo: &'a str,
    /// Whether a new repository is private.
    pub is_private: bool,
    /// The base model's id on the hub; by default the one that the adapter names.
    pub base: Option<&'a str>,
}

impl Push<'_> {
    /// Uploads the adapter; returns the page of the repository.
    pub fn run(&self) -> Result<String> {
        check_repository("--push", self.repo)?;
        let tuned = Tuned::read(Path::new(self.adapter))?;
        let local = tuned.adapter.config.base_model_name_or_path.clone().unwrap_or_default();
        let base = self.base.unwrap_or(&local);
        let is_file = base.ends_with(".gguf") || (self.base.is_none() && Path::new(base).exists());
        if is_file || check_repository("--model", base).is_err() {
            return Err(Error::Invalid(format!(
                "--model: expected the base model's id on the hub, found {base:?}; hint: --model ORG/NAME, of the same weights"
            )));
        }
        let results = match &tuned.run {
            Some(run) => Evaluation::read(run)?.and_then(|evaluation| results(&evaluation, &tuned.name)),
            None => None,
        };
        if results.is_none() {
            stderr::warn(
                "the model card has no evaluation; hint: gneiss eval writes one into the run folder",
            );
        }
        let options = HubOptions::from_env();
        let license = license_of(base, &options);
        let card = |card: &str| published_card(card, self.repo, [&local, base], &license, results.as_ref());
        let files = files(&tuned, base, &card)?;
        for file in &files {
            status!("uploading  {} ({})", file.path, gneiss::text::bytes(file.content.len() as u64));
        }
        let summary = format!("Soft prompt {}", tuned.name);
        let upload = Upload { repo: self.repo.into(), is_private: self.is_private, summary, files };
        upload.run(&options)
    }
}

/// The license in the base model's card on the hub; a warning if none is found.
fn license_of(base: &str, options: &HubOptions) -> Vec<LicenseTag> {
    let found = checkpoint::license(base, options);
    let problem = match found {
        Ok(tags) if !tags.is_empty() => return tags,
        Ok(_) => format!("{base} states none"),
        Err(error) => error.to_string(),
    };
    stderr::warn(format_args!(
        "the model card gets no license of the base model: {problem}; hint: write `license: ID` into the card's header"
    ));
    Vec::new()
}

/// The files of the adapter, with the base model's id on the hub and the published form of the card; no data and no predictions.
fn files(tuned: &Tuned, base: &str, published: &dyn Fn(&str) -> String) -> Result<Vec<UploadFile>> {
    let mut files = Vec::new();
    for name in adapter_folder::FILES.into_iter().chain([adapter_folder::CARD]) {
        let path = tuned.folder.join(name);
        let mut content = match std::fs::read(&path) {
            Ok(content) => content,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                // A folder that PEFT wrote has no task.json; its README.md may be missing.
                if name == adapter_folder::CARD { Vec::new() } else { continue }
            }
            Err(error) => return Err(Error::io(&path)(error)),
        };
        if name == adapter_folder::CARD {
            content = published(&String::from_utf8_lossy(&content)).into_bytes();
        } else if name == adapter_folder::CONFIG {
            content = with_base(&content, base, &path)?;
        }
        files.push(UploadFile { path: name.to_owned(), content });
    }
    Ok(files)
}

/// adapter_config.json with another base model.
fn with_base(content: &[u8], base: &str, path: &Path) -> Result<Vec<u8>> {
    let problem =
        |error: serde_json::Error| Error::Checkpoint { path: path.into(), problem: error.to_string() };
    let mut config: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(content).map_err(problem)?;
    config.insert("base_model_name_or_path".into(), base.into());
    serde_json::to_vec_pretty(&config).map_err(problem)
}

/// The metrics of the prompt `name` beside the base model's.
fn results(evaluation: &Evaluation, name: &str) -> Option<CardResults> {
    let base = &evaluation.arms.first()?.answers;
    let tuned = &evaluation.arms.iter().find(|arm| arm.name == name)?.answers;
    let metric = |kind: &str, name: &str, of: &dyn Fn(&Answers) -> Option<f64>| {
        Some(CardMetric { kind: kind.into(), name: name.into(), base: of(base)?, tuned: of(tuned)? })
    };
    let metrics = [
        metric("accuracy", "accuracy, generated", &|a| Some(a.generated.as_ref()?.accuracy)),
        metric("f1", "macro F1, generated", &|a| Some(a.generated.as_ref()?.macro_f1)),
        metric("accuracy", "accuracy, label likelihood", &|a| Some(a.likelihood.as_ref()?.accuracy)),
        metric("exact_match", "exact match", &|a| {
            let text = a.text.as_ref()?;
            Some(text.correct as f64 / text.total as f64)
        }),
        metric("f1", "token F1", &|a| Some(a.text.as_ref()?.token_f1)),
        metric("rougeL", "ROUGE-L", &|a| Some(a.text.as_ref()?.rouge_l)),
        metric("perplexity", "perplexity of the outputs", &|a| Some(a.perplexity)),
    ];
    let test = Path::new(&evaluation.test).file_name()?.to_string_lossy().into_owned();
    Some(CardResults { test, rows: base.predictions.len(), metrics: metrics.into_iter().flatten().collect() })
}
