//! Proposals for the settings of a configuration, from the training file.

use gneiss::config::Task;
use gneiss::data::Record;
use gneiss::data::dataset::DataColumn;
use gneiss::data::labels::distinct;
use std::collections::BTreeSet;
use std::path::Path;

/// Most distinct outputs that are proposed as labels.
const MOST_LABELS: usize = 20;
/// Most labels that the proposed texts list.
const MOST_LISTED: usize = 8;
/// Names of columns that usually hold the output, the likeliest first.
const OUTPUTS: [&str; 14] = [
    "output", "label", "labels", "class", "category", "target", "sentiment", "intent", "topic", "answer",
    "completion", "response", "summary", "rating",
];
/// Names of columns that usually hold the input.
const INPUTS: [&str; 12] = [
    "input", "text", "comment", "review", "message", "sentence", "question", "prompt", "content", "body",
    "document", "description",
];
/// Names that say nothing about the content.
const GENERAL: [&str; 2] = ["input", "output"];
/// The model that `make model` downloads.
const SMALL_MODEL: &str = "models/SmolLM2-135M-Instruct.Q4_1.gguf";
/// The smallest Granite model.
const GRANITE: &str = "ibm-granite/granite-4.0-350m";
/// Optimizer steps that the number of epochs aims at, with 8 examples a step; the tutorial takes 225.
const STEPS: usize = 225;
const BATCH_SIZE: usize = 8;

/// The names of the two columns.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Columns {
    pub input: String,
    pub output: String,
}

/// Limits of the texts in tokens.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TokenLimits {
    pub input: usize,
    pub output: usize,
    /// Whether they were counted by the model's tokenizer.
    pub is_counted: bool,
}

impl TokenLimits {
    /// For the longest input and target, in tokens.
    pub fn counted(input: usize, output: usize) -> Self {
        let output = if output <= MOST_LISTED { output } else { output.next_multiple_of(MOST_LISTED) };
        Self { input: input.next_multiple_of(16), output, is_counted: true }
    }

    /// An estimate from above: a token has at least 2 characters in most texts.
    pub fn estimate(records: &[Record], verbalizer: &str) -> Self {
        let longest =
            |of: fn(&Record) -> &str| records.iter().map(|r| of(r).chars().count()).max().unwrap_or(0);
        let input = (longest(|r| &r.input) + verbalizer.chars().count()).div_ceil(2);
        let output = longest(|r| r.output.trim()).div_ceil(2) + 1;
        Self { is_counted: false, ..Self::counted(input, output) }
    }
}

/// The columns of inputs and outputs: those that have a usual name, otherwise as output the one with the fewest distinct
/// values, and as input the one with the longest texts.
pub(super) fn columns(found: &[DataColumn], input: Option<&str>, output: Option<&str>) -> Columns {
    let named = |names: &[&str], other: Option<&str>| {
        let names = names
            .iter()
            .filter_map(|name| found.iter().find(|column| column.name.trim().eq_ignore_ascii_case(name)));
        names.map(|column| column.name.clone()).find(|name| Some(name.as_str()) != other)
    };
    let others = |other: Option<&str>| {
        let is_other =
            |column: &&DataColumn| Some(column.name.as_str()) != other && !column.name.trim().is_empty();
        found.iter().filter(is_other).collect::<Vec<_>>()
    };
    let distinct = |column: &DataColumn| column.values.iter().collect::<BTreeSet<_>>().len();
    let length = |column: &DataColumn| column.values.iter().map(String::len).sum::<usize>();
    let output = output.map(str::to_owned).or_else(|| named(&OUTPUTS, input)).or_else(|| {
        others(input).into_iter().min_by_key(|column| distinct(column)).map(|column| column.name.clone())
    });
    let output = output.unwrap_or_default();
    let input = input.map(str::to_owned).or_else(|| named(&INPUTS, Some(&output))).or_else(|| {
        others(Some(&output))
            .into_iter()
            // The first of equals.
            .rev()
            .max_by_key(|column| length(column))
            .map(|column| column.name.clone())
    });
    Columns { input: input.unwrap_or_default(), output }
}

/// Classification if few outputs differ and each occurs twice on average.
pub(super) fn task(records: &[Record]) -> Task {
    let labels = distinct(records).len();
    if labels <= MOST_LABELS && 2 * labels <= records.len() { Task::Classification } else { Task::Generation }
}

/// The distinct labels; none for generation.
pub(super) fn labels(records: &[Record], task: Task) -> Vec<String> {
    if task == Task::Classification { distinct(records) } else { Vec::new() }
}

/// A file next to the training file with a name such as `validation.csv`, or the training file's name with another word
/// in place of `train`.
pub(super) fn sibling(train: &Path, names: &[&str]) -> Option<String> {
    let file = train.file_name()?.to_str()?;
    let at = file.to_ascii_lowercase().rfind("train")?;
    let end = if file.to_ascii_lowercase()[at..].starts_with("training") { at + 8 } else { at + 5 };
    let paths =
        names.iter().map(|name| train.with_file_name(format!("{}{name}{}", &file[..at], &file[end..])));
    paths.into_iter().find(|path| path.is_file()).map(|path| path.display().to_string())
}

/// The small model of the tutorial if it is there, otherwise the smallest Granite model.
pub(super) fn model() -> &'static str {
    if Path::new(SMALL_MODEL).is_file() { SMALL_MODEL } else { GRANITE }
}

/// A name for runs: the training file's without its ending and without `train`, or that of its folder.
pub(super) fn name(train: &Path) -> String {
    let stem = |path: &Path| {
        let name = path.file_name()?.to_str()?.split('.').next()?.to_owned();
        let name = name.trim_end_matches("train").trim_end_matches("training");
        let fits = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_') { c } else { '-' };
        let name: String = name.chars().map(fits).collect();
        Some(name.trim_matches(['-', '_']).to_owned()).filter(|name| !name.is_empty())
    };
    stem(train).or_else(|| stem(train.parent()?)).unwrap_or_else(|| "mine".to_owned())
}

/// The column's name with a capital, or `other` if it says nothing.
fn title(column: &str, other: &str) -> String {
    let column = column.trim();
    if GENERAL.iter().any(|name| column.eq_ignore_ascii_case(name)) {
        return other.to_owned();
    }
    let mut chars = column.chars();
    chars.next().map_or(other.to_owned(), |first| first.to_uppercase().chain(chars).collect())
}

/// `{0, 1}`; empty if there are too many labels to list.
fn listed(labels: &[String]) -> Option<String> {
    let short = labels.iter().all(|label| label.chars().count() <= 32 && !label.contains(['{', '}', '\n']));
    ((1..=MOST_LISTED).contains(&labels.len()) && short).then(|| labels.join(", "))
}

/// The text that the model reads.
pub(super) fn verbalizer(columns: &Columns, labels: &[String]) -> String {
    let input = title(&columns.input, "Text");
    let output = title(&columns.output, if labels.is_empty() { "Answer" } else { "Label" });
    let instruction = listed(labels).map(|labels| format!("classify {{{labels}}} ")).unwrap_or_default();
    format!("{instruction}{input}: {{{{input}}}}\n{output}:\n")
}

/// The instruction in words.
pub(super) fn init_text(columns: &Columns, labels: &[String]) -> String {
    let input = title(&columns.input, "text").to_lowercase();
    let output = title(&columns.output, if labels.is_empty() { "answer" } else { "label" }).to_lowercase();
    match (listed(labels), labels.is_empty()) {
        (Some(labels), _) => {
            format!("Find the {output} of the {input}. Answer with one of these only: {labels}.")
        }
        (None, false) => format!("Find the {output} of the {input}. Answer with the {output} only."),
        (None, true) => format!("Read the {input} and write the {output}."),
    }
}

/// Epochs that make about [`STEPS`] steps.
pub(super) fn num_epochs(rows: usize) -> usize {
    (STEPS * BATCH_SIZE).div_ceil(rows.max(1)).clamp(3, 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(name: &str, values: &[&str]) -> DataColumn {
        DataColumn { name: name.to_owned(), values: values.iter().map(|value| (*value).to_owned()).collect() }
    }

    #[test]
    fn columns_are_proposed_by_name_and_by_content() {
        let found = [
            column("id", &["1", "2", "3"]),
            column("Text", &["a b c", "d", "e"]),
            column("label", &["x", "y", "z"]),
        ];
        let proposed = columns(&found, None, None);
        assert_eq!((proposed.input.as_str(), proposed.output.as_str()), ("Text", "label"));
        let found = [
            column("nr", &["1", "2", "3"]),
            column("mail", &["long text", "b", "c"]),
            column("team", &["x", "y", "x"]),
        ];
        let proposed = columns(&found, None, None);
        assert_eq!((proposed.input.as_str(), proposed.output.as_str()), ("mail", "team"));
        assert_eq!(columns(&found, None, Some("mail")).input, "nr");
        assert_eq!(columns(&found, Some("team"), None).output, "nr");
    }

    #[test]
    fn names_are_those_of_the_file_or_its_folder() {
        for (file, expected) in [
            ("dogs.csv", "dogs"),
            ("data/dogs-train.csv", "dogs"),
            ("data/train.csv", "data"),
            ("train.csv", "mine"),
            ("my dogs.csv.gz", "my-dogs"),
        ] {
            assert_eq!(name(Path::new(file)), expected, "{file}");
        }
    }

    #[test]
    fn texts_name_columns_and_labels() {
        let columns = Columns { input: "review".into(), output: "sentiment".into() };
        let labels = ["bad", "good"].map(str::to_owned);
        assert_eq!(verbalizer(&columns, &labels), "classify {bad, good} Review: {{input}}\nSentiment:\n");
        assert_eq!(
            init_text(&columns, &labels),
            "Find the sentiment of the review. Answer with one of these only: bad, good."
        );
        let columns = Columns { input: "input".into(), output: "output".into() };
        assert_eq!(verbalizer(&columns, &[]), "Text: {{input}}\nAnswer:\n");
        assert_eq!(init_text(&columns, &[]), "Read the text and write the answer.");
        let many: Vec<String> = (0..9).map(|i| i.to_string()).collect();
        assert_eq!(verbalizer(&columns, &many), "Text: {{input}}\nLabel:\n");
    }
}
