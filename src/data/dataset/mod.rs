//! Datasets: files of inputs and outputs, as CSV, JSON or Parquet.
//!
//! A file is read once. Every malformed row is reported, with its line and field; none is skipped.

mod chat;
mod csv;
mod format;
mod json;
mod parquet;
mod problems;
mod source;

use std::path::{Path, PathBuf};

use self::format::{Format, Named};
use self::problems::Notes;
use self::source::Source;
use super::labels;
use crate::{Error, Result};

pub use self::format::is_dataset;
pub(crate) use self::problems::{Lines, Problems};

/// Similarity from which on a name is offered as what was meant: `otput` is, `label` isn't.
const NEAR: f64 = 0.8;

/// One example as it stands in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The input's text, exactly as in the file; not empty.
    pub input: String,
    /// The output's text, exactly as in the file unless [`Dataset::normalize_labels`] was called; not empty.
    pub output: String,
    /// Line of the file that the record starts on, counted from 1; of a Parquet file, its row.
    pub line: usize,
}

/// The records of a file, in its order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dataset {
    /// The file.
    pub path: PathBuf,
    /// Its records, at least one.
    pub records: Vec<Record>,
    /// What was read otherwise than a reader of the file may expect: another separator, numbers as text.
    pub notes: Vec<String>,
    /// What is likely to be a fault of the file.
    pub warnings: Vec<String>,
}

impl Dataset {
    /// Reads a file of examples; `input` and `output` name the two columns or keys that are used.
    ///
    /// The name says whether it is text with a separator (`.csv`, `.tsv`), JSON (`.json`, `.jsonl`, `.ndjson`) or
    /// `.parquet`, and whether gzip packed it (`.gz` after that). The separator and the shape of JSON are found in the
    /// content: a list of objects, one object a line, a list under a key, columns, chats of one user and one assistant
    /// message. Text is UTF-8, with or without a byte order mark; lines end in LF or CRLF. JSON's numbers and booleans
    /// become text, as they are written.
    ///
    /// # Errors
    /// [`Error::Io`] if the file can't be read, [`Error::Invalid`] if the two names are the same, and
    /// [`Error::Data`] for anything that is wrong in the file: all of its bad rows together.
    pub fn read(path: &Path, input: &str, output: &str) -> Result<Self> {
        let named = Named::parse(path)?;
        if input == output {
            return Err(Error::Invalid(format!(
                "the input and the output field must differ, found `{input}` for both"
            )));
        }
        let (bytes, format) = format::load(path, named)?;
        let names = Names { input, output };
        let (mut problems, mut notes) = (Problems::default(), Notes::default());
        let records = match format {
            Format::Parquet => parquet::read(bytes, names, &mut problems, &mut notes),
            Format::Separated(separator) => text(&bytes, &mut problems, |source, problems| {
                csv::read(source, separator, names, problems, &mut notes)
            }),
            Format::Json { lines } => text(&bytes, &mut problems, |source, problems| {
                json::read(source, lines, names, problems, &mut notes)
            }),
        };
        problems.into_data_error(path)?;
        Ok(Self { path: path.to_path_buf(), records, notes: notes.into_list(), warnings: Vec::new() })
    }

    /// Puts each output into the one form that labels are trained and scored in ([`labels::normalize`]). Warnings say
    /// which ones differed from it, and what else looks wrong with the labels ([`labels::warnings`]).
    ///
    /// # Errors
    /// [`Error::Data`] for labels of which nothing is left.
    pub fn normalize_labels(&mut self) -> Result<()> {
        let (problems, warning) = labels::normalize_records(&mut self.records);
        problems.into_data_error(&self.path)?;
        self.warnings.extend(warning);
        self.warnings.extend(labels::warnings(&self.records));
        Ok(())
    }
}

/// Reads what is text; anything else is a problem of the file.
fn text(
    bytes: &[u8],
    problems: &mut Problems,
    read: impl FnOnce(&Source<'_>, &mut Problems) -> Vec<Record>,
) -> Vec<Record> {
    let source = Source::new(bytes);
    match source.not_text() {
        Some(problem) => {
            problems.push(problem);
            Vec::new()
        }
        None => read(&source, problems),
    }
}

/// The two fields that are read.
#[derive(Clone, Copy)]
struct Names<'a> {
    input: &'a str,
    output: &'a str,
}

impl Names<'_> {
    /// Whether they are the names that a configuration has by default.
    fn are_default(self) -> bool {
        (self.input, self.output) == ("input", "output")
    }

    fn both(self) -> String {
        format!("`{}` and `{}`", self.input, self.output)
    }
}

/// Why a text can't be used, if it can't: one that is blank teaches nothing and is a mistake of the file.
fn blank(text: &str) -> Option<&'static str> {
    match text {
        "" => Some("expected text, found an empty string"),
        _ if text.contains('\0') => Some("expected text, found a NUL character (U+0000) in it"),
        _ if text.trim().is_empty() => Some("expected text, found white space only"),
        _ => None,
    }
}

/// `: a, b; did you mean X?`, after a message that `wanted` is missing.
fn found_names(wanted: &str, kind: &str, found: &[&str]) -> String {
    if found.is_empty() {
        return format!("; found no {kind}s at all");
    }
    let list: Vec<String> = found.iter().map(|name| format!("`{name}`")).collect();
    let near = found
        .iter()
        .map(|name| (strsim::jaro_winkler(&name.trim().to_lowercase(), &wanted.to_lowercase()), name))
        .filter(|(similarity, _)| *similarity >= NEAR)
        .max_by(|a, b| a.0.total_cmp(&b.0));
    let hint = near.map(|(_, name)| format!("; did you mean `{name}`?")).unwrap_or_default();
    format!("; found the {kind}s {}{hint}", list.join(", "))
}
