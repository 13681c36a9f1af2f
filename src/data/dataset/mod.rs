//! Datasets: files of inputs and outputs, as CSV, JSON or Parquet.
//!
//! A file is read once. Every malformed row is reported, with its line and field; none is skipped.

mod chat;
mod columns;
mod csv;
mod format;
mod json;
mod parquet;
mod problems;
mod source;

use std::path::{Path, PathBuf};

use self::format::{FileFormat, NamedFormat};
use self::problems::FileNotes;
use self::source::SourceFile;
use super::labels;
use crate::{Error, Result};

pub use self::columns::{DataColumn, columns};
pub use self::format::is_dataset;
pub(crate) use self::problems::{Lines, Problems};

/// Similarity from which a name is suggested: `otput` is, `label` isn't.
const NEAR: f64 = 0.8;

/// One example as in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The input's text, exactly as in the file; not empty.
    pub input: String,
    /// The output's text, exactly as in the file unless [`Dataset::normalize_labels`] was called; not empty.
    pub output: String,
    /// Line of the file on which the record starts, counted from 1; in a Parquet file, its row.
    pub line: usize,
}

/// The records of a file, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dataset {
    /// The file.
    pub path: PathBuf,
    /// Its records, at least one.
    pub records: Vec<Record>,
    /// FileNotes about values that were read in another way than a reader of the file may expect: another separator,
    /// numbers as text.
    pub notes: Vec<String>,
    /// Probable faults of the file.
    pub warnings: Vec<String>,
}

impl Dataset {
    /// Reads a file of examples; `input` and `output` name the two columns or keys that are used.
    ///
    /// The name says whether it is text with a separator (`.csv`, `.tsv`), JSON (`.json`, `.jsonl`, `.ndjson`) or
    /// `.parquet`, and whether it is compressed by gzip (`.gz` after that). The separator and the shape of JSON are
    /// found in the content: a list of objects, one object per line, a list under a key, columns, or chats of one user
    /// and one assistant message. Text is UTF-8, with or without a byte order mark; lines end in LF or CRLF. JSON's
    /// numbers and booleans become text as they are written.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the file can't be read, [`Error::Invalid`] if the two names are the same, and
    /// [`Error::Data`] with all bad rows of the file.
    pub fn read(path: &Path, input: &str, output: &str) -> Result<Self> {
        Self::read_as(path, path, input, output)
    }

    /// As [`Dataset::read`], for a file whose own name is not that of a dataset: `name` says the format, and stands for the
    /// path in messages.
    ///
    /// # Errors
    /// Returns the errors of [`Dataset::read`].
    pub fn read_as(path: &Path, name: &Path, input: &str, output: &str) -> Result<Self> {
        let named = NamedFormat::parse(name)?;
        if input == output {
            return Err(Error::Invalid(format!(
                "the input and the output field must differ, found `{input}` for both"
            )));
        }
        let (bytes, format) = format::load(path, name, named)?;
        let names = FieldNames { input, output };
        let (mut problems, mut notes) = (Problems::default(), FileNotes::default());
        let records = match format {
            FileFormat::Parquet => parquet::read(bytes, names, &mut problems, &mut notes),
            FileFormat::Separated(separator) => text(&bytes, &mut problems, |source, problems| {
                csv::read(source, separator, names, problems, &mut notes)
            }),
            FileFormat::Json { lines } => text(&bytes, &mut problems, |source, problems| {
                json::read(source, lines, names, problems, &mut notes)
            }),
        };
        problems.into_data_error(name)?;
        Ok(Self { path: name.to_path_buf(), records, notes: notes.into_list(), warnings: Vec::new() })
    }

    /// Brings each output into the one form in which labels are trained and scored ([`labels::normalize`]). Warnings
    /// list the outputs that differed from it, and other probable mistakes in the labels ([`labels::warnings`]).
    ///
    /// # Errors
    /// Returns [`Error::Data`] if nothing is left of a label.
    pub fn normalize_labels(&mut self) -> Result<()> {
        let (problems, warning) = labels::normalize_records(&mut self.records);
        problems.into_data_error(&self.path)?;
        self.warnings.extend(warning);
        self.warnings.extend(labels::warnings(&self.records));
        Ok(())
    }
}

/// Reads the text of a file; if the file is not text, that is a problem of the file.
fn text(
    bytes: &[u8],
    problems: &mut Problems,
    read: impl FnOnce(&SourceFile<'_>, &mut Problems) -> Vec<Record>,
) -> Vec<Record> {
    let source = SourceFile::new(bytes);
    match source.not_text() {
        Some(problem) => {
            problems.push(problem);
            Vec::new()
        }
        None => read(&source, problems),
    }
}

/// The names of the two fields that are read.
#[derive(Clone, Copy)]
struct FieldNames<'a> {
    input: &'a str,
    output: &'a str,
}

impl FieldNames<'_> {
    /// Whether they are the configuration's default names.
    fn are_default(self) -> bool {
        (self.input, self.output) == ("input", "output")
    }

    fn both(self) -> String {
        format!("`{}` and `{}`", self.input, self.output)
    }
}

/// Why a text can't be used, if it can't: a blank text teaches nothing and is a mistake in the file.
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
