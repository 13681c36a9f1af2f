//! A dataset: rows, labels, lengths, and the number of rows that the limits cut.

use super::{Report, count, lengths_json, line, print_lengths};
use crate::cli::text;
use clap::Args;
use gneiss::batch::Example;
use gneiss::checkpoint::TextTokenizer;
use gneiss::data::labels::{escaped, normalize};
use gneiss::data::{Dataset, Encoded, Encoder, LengthStats, Record, Template};
use gneiss::session;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Most distinct outputs that still count as labels.
const MOST_LABELS: usize = 20;

/// How a dataset is read; a configuration has its own settings.
#[derive(Args)]
pub struct DatasetOptions {
    /// For a dataset: template of the text that the model reads.
    #[arg(long, default_value = "{{input}}")]
    verbalizer: String,
    /// For a dataset: most tokens of an input.
    #[arg(long, default_value_t = 256)]
    max_input_tokens: usize,
    /// For a dataset: most tokens of an output.
    #[arg(long, default_value_t = 128)]
    max_output_tokens: usize,
    /// For a dataset: column or field that holds the input.
    #[arg(long, default_value = "input")]
    input: String,
    /// For a dataset: column or field that holds the output.
    #[arg(long, default_value = "output")]
    output: String,
}

/// A file of examples.
#[derive(Serialize)]
pub struct DatasetReport {
    /// The file.
    file: String,
    /// Rows.
    pub rows: usize,
    /// Number of distinct outputs.
    pub distinct_outputs: usize,
    /// Rows of each output, the most frequent first; `None` if outputs are no labels.
    pub labels: Option<Vec<(String, usize)>>,
    /// Number of words of the inputs.
    #[serde(serialize_with = "lengths_json")]
    pub words_per_input: LengthStats,
    tokens: Option<TokenLengths>,
    /// Notes about how the file was read.
    notes: Vec<String>,
    /// Probable faults of the file.
    warnings: Vec<String>,
}

/// Lengths in tokens before any cut, and the number of rows that the limits cut.
#[derive(Serialize)]
struct TokenLengths {
    #[serde(serialize_with = "lengths_json")]
    inputs: LengthStats,
    #[serde(serialize_with = "lengths_json")]
    targets: LengthStats,
    max_input_tokens: usize,
    max_output_tokens: usize,
    inputs_cut: usize,
    targets_cut: usize,
}

/// Inspects a dataset; with a model also its tokens.
pub fn inspect(path: &Path, model: Option<&str>, options: &DatasetOptions) -> anyhow::Result<DatasetReport> {
    let template = Template::parse(&options.verbalizer)?;
    let dataset = read(path, options)?;
    let mut report = DatasetReport::new(&dataset);
    report.warn("");
    if let Some(model) = model {
        let tokenizer = TextTokenizer::open(&session::locate(model)?)?;
        tokenizer.all_warnings().for_each(crate::cli::warn);
        report.encode(
            &dataset,
            &Encoder {
                tokenizer: &tokenizer.tokenizer,
                template: &template,
                vocab_size: tokenizer.vocab_size,
                eos_token_id: tokenizer.eos_token_id,
                max_input_tokens: options.max_input_tokens,
                max_output_tokens: options.max_output_tokens,
                instruction: None,
            },
        )?;
    }
    Ok(report)
}

/// Reads a dataset; its outputs count as labels if few of them differ, and then are brought into the form of labels.
fn read(path: &Path, options: &DatasetOptions) -> gneiss::Result<Dataset> {
    let mut dataset = Dataset::read(path, &options.input, &options.output)?;
    let mut outputs = BTreeSet::new();
    for record in &dataset.records {
        outputs.insert(normalize(&record.output).into_owned());
        if outputs.len() > MOST_LABELS {
            return Ok(dataset);
        }
    }
    dataset.normalize_labels()?;
    Ok(dataset)
}

impl DatasetReport {
    /// The report of a dataset's text.
    pub fn new(dataset: &Dataset) -> Self {
        let outputs = labels(&dataset.records);
        let words = dataset.records.iter().map(|r| r.input.split_whitespace().count());
        Self {
            file: dataset.path.display().to_string(),
            rows: dataset.records.len(),
            distinct_outputs: outputs.len(),
            labels: (outputs.len() <= MOST_LABELS).then_some(outputs),
            words_per_input: LengthStats::from_lengths(words),
            tokens: None,
            notes: dataset.notes.clone(),
            warnings: dataset.warnings.clone(),
        }
    }

    /// Prints the notes and warnings about the file on stderr, with `key` before them.
    pub fn warn(&self, key: &str) {
        self.notes.iter().for_each(|text| status!("note       {key}{text}"));
        self.warnings.iter().for_each(|text| crate::cli::warn(format_args!("{key}{text}")));
    }

    /// Adds the lengths in tokens; returns the examples as `encoder` cuts them.
    pub fn encode(&mut self, dataset: &Dataset, encoder: &Encoder) -> gneiss::Result<Encoded> {
        let cut = encoder.encode_dataset(dataset)?;
        let uncut = Encoder { max_input_tokens: usize::MAX, max_output_tokens: usize::MAX, ..*encoder };
        let uncut = uncut.encode_dataset(dataset)?;
        let lengths = |of: fn(&Example) -> &[u32]| {
            LengthStats::from_lengths(uncut.examples.iter().map(move |e| of(e).len()))
        };
        self.tokens = Some(TokenLengths {
            inputs: lengths(|e| &e.input),
            targets: lengths(|e| &e.target),
            max_input_tokens: encoder.max_input_tokens,
            max_output_tokens: encoder.max_output_tokens,
            inputs_cut: cut.inputs_cut,
            targets_cut: cut.targets_cut,
        });
        Ok(cut)
    }
}

/// Rows of each distinct output, the most frequent first.
fn labels(records: &[Record]) -> Vec<(String, usize)> {
    let mut rows = BTreeMap::<&str, usize>::new();
    records.iter().for_each(|record| *rows.entry(&record.output).or_default() += 1);
    let mut rows: Vec<_> = rows.into_iter().map(|(label, n)| (label.to_owned(), n)).collect();
    rows.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
    rows
}

impl Report for DatasetReport {
    fn print(&self) {
        line("dataset", &self.file);
        line("rows", self.rows);
        match &self.labels {
            None => line("outputs", format!("{} distinct", self.distinct_outputs)),
            Some(labels) => {
                for (i, (label, n)) in labels.iter().enumerate() {
                    let share = 100.0 * *n as f64 / self.rows as f64;
                    let key = if i == 0 { "outputs" } else { "" };
                    line(key, format!("{n:>6} ({share:>5.1} %)  {}", text::short(&shown(label), 60)));
                }
            }
        }
        match &self.tokens {
            None => print_lengths("words, input", &self.words_per_input),
            Some(tokens) => {
                print_lengths("tokens, input", &tokens.inputs);
                line("", cuts(tokens.inputs_cut, "input", "max_input_tokens", tokens.max_input_tokens));
                print_lengths("tokens, target", &tokens.targets);
                line("", cuts(tokens.targets_cut, "target", "max_output_tokens", tokens.max_output_tokens));
            }
        }
    }
}

/// An output as it is, or with escapes if it contains invisible characters.
fn shown(output: &str) -> String {
    let hides = normalize(output) != output || output.contains(['\u{200c}', '\u{200d}']);
    if hides { escaped(output) } else { output.to_owned() }
}

fn cuts(n: usize, what: &str, key: &str, limit: usize) -> String {
    format!("{} cut by {key} {limit}", count(n, what))
}
