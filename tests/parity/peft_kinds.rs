//! Every kind of prompt that PEFT writes: what a model computes with the prompt that gneiss reads from PEFT's folder,
//! against PEFT's logits. A softmax of the logits is compared, as [`tune::evaluate`] computes it: the log-likelihood of
//! every token of the vocabulary after each sequence, and of each sequence's own tokens.

use crate::fixtures::*;
use candle_core::{DType, Tensor};
use gneiss::batch::{Example, PrefixGroup};
use gneiss::config::PromptKind;
use gneiss::model::Decoder;
use gneiss::prompt::Prefix;
use gneiss::prompt::peft::Adapter;
use gneiss::tune;
use serde_json::Value;
use std::collections::HashMap;
use std::path::PathBuf;

/// Largest difference of a log-likelihood, in nats.
const TOLERANCE: f64 = 1e-4;

/// `peft_kinds.json` and the logits.
pub struct Kinds {
    json: Value,
    logits: HashMap<String, Tensor>,
}

impl Kinds {
    pub fn read() -> Self {
        let text = std::fs::read_to_string(folder("peft_kinds.json")).unwrap();
        let logits =
            candle_core::safetensors::load(folder("peft_kinds.safetensors"), &candle_core::Device::Cpu);
        Self { json: serde_json::from_str(&text).unwrap(), logits: logits.unwrap() }
    }

    /// The cases whose prompt is of this kind.
    pub fn cases(&self, kind: PromptKind) -> Vec<(&Value, Prefix)> {
        let read = |case| (case, Adapter::open(&argument(case)).unwrap().prompt);
        let cases = self.json["cases"].as_array().unwrap().iter().map(read);
        cases.filter(|(_, prompt)| prompt.kind() == kind).collect()
    }

    pub fn sequences(&self) -> Vec<Vec<u32>> {
        self.json["sequences"].as_array().unwrap().iter().map(ids).collect()
    }

    /// Logits under this name, [rows, V] in f64, one sequence below the other.
    pub fn logits(&self, name: &Value) -> Vec<Vec<f64>> {
        let logits = &self.logits[name.as_str().unwrap()];
        logits.to_dtype(DType::F64).unwrap().to_vec2().unwrap()
    }
}

/// The adapter of a case as a command takes it.
fn argument(case: &Value) -> PathBuf {
    let task = case["task"].as_u64().map_or(String::new(), |task| format!(":{task}"));
    folder(&format!("peft_kinds/{}{task}", case["folder"].as_str().unwrap()))
}

/// The negative log-likelihood of each token of the vocabulary by one row of logits.
fn nll_of_row(logits: &[f64]) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log_sum = largest + logits.iter().map(|logit| (logit - largest).exp()).sum::<f64>().ln();
    logits.iter().map(|logit| log_sum - logit).collect()
}

/// The negative log-likelihoods that `model` gives: of every token after all of `sequence`, then of each token of
/// `sequence` after those before it.
fn nll(model: &Decoder, prompt: &Prefix, sequence: &[u32]) -> Vec<f64> {
    let example =
        |input: &[u32], target: &[u32]| Example { input: input.to_vec(), target: target.to_vec(), line: 0 };
    let vocabulary = 0..model.config().vocab_size as u32;
    let mut examples: Vec<Example> = vocabulary.map(|token| example(sequence, &[token])).collect();
    if sequence.len() > 1 {
        examples.push(example(&sequence[..1], &sequence[1..]));
    }
    let group = PrefixGroup::new(0..prompt.num_virtual_tokens() as u32, &examples);
    tune::evaluate(model, prompt, &[group], usize::MAX).unwrap().nll().unwrap()
}

/// [`nll`] by the rows of logits of `sequence`.
fn nll_of_rows(rows: &[Vec<f64>], sequence: &[u32]) -> Vec<f64> {
    let mut all = nll_of_row(rows.last().unwrap());
    let tokens = sequence[1..].iter().zip(rows);
    all.extend(tokens.map(|(token, row)| nll_of_row(row)[*token as usize]));
    all
}

fn compare(what: &str, ours: &[f64], expected: &[f64]) {
    assert_eq!(ours.len(), expected.len(), "{what}");
    let worst = ours.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(worst < TOLERANCE, "{what}: a log-likelihood differs by {worst}");
}

fn agrees_with_peft(kind: PromptKind, count: usize) {
    let kinds = Kinds::read();
    let cases = kinds.cases(kind);
    assert_eq!(cases.len(), count);
    let mut models: HashMap<&str, Decoder> = HashMap::new();
    for (case, prompt) in cases {
        let name = case["checkpoint"].as_str().unwrap();
        let model = models.entry(name).or_insert_with(|| model(name, DType::F32));
        for logits in [&case["logits"], &case["text_logits"]].into_iter().filter(|name| name.is_string()) {
            let mut rows = &kinds.logits(logits)[..];
            for sequence in kinds.sequences() {
                let expected;
                (expected, rows) = rows.split_at(sequence.len());
                compare(
                    &format!("{logits}, {sequence:?}"),
                    &nll(model, &prompt, &sequence),
                    &nll_of_rows(expected, &sequence),
                );
            }
        }
    }
}

#[test]
fn embeddings_of_every_kind_agree_with_peft() {
    agrees_with_peft(PromptKind::Embeddings, 12);
}

/// Those of a text too, which are also compared with transformers' logits after the text itself.
#[test]
fn keys_and_values_of_every_kind_agree_with_peft() {
    agrees_with_peft(PromptKind::Prefix, 13);
}
