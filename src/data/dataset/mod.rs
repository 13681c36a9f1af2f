//! Datasets: CSV, JSON and JSON Lines files of inputs and outputs.
//!
//! A file is read once. Every malformed row is reported, with its line and field; none is skipped.

mod csv;
mod json;
mod source;

use std::path::{Path, PathBuf};

use self::source::Source;
use crate::{Error, Result};

/// Rows that one error lists; the rest is counted.
const LISTED: usize = 20;
/// Similarity from which on a name is offered as what was meant: `otput` is, `label` isn't.
const NEAR: f64 = 0.8;

/// One example as it stands in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The input's text, exactly as in the file; not empty.
    pub input: String,
    /// The output's text, exactly as in the file; not empty.
    pub output: String,
    /// Line of the file that the record starts on, counted from 1.
    pub line: usize,
}

/// The records of a file, in its order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dataset {
    /// The file.
    pub path: PathBuf,
    /// Its records, at least one.
    pub records: Vec<Record>,
}

impl Dataset {
    /// Reads a `.csv` (with a header), `.json` (a list of objects) or `.jsonl` file; `input` and `output`
    /// name the two columns or keys that are used.
    ///
    /// Text is UTF-8, with or without a byte order mark; lines end in LF or CRLF.
    ///
    /// # Errors
    /// [`Error::Io`] if the file can't be read, [`Error::Invalid`] if the two names are the same, and
    /// [`Error::Data`] for anything that is wrong in the file: all of its bad rows together.
    pub fn read(path: &Path, input: &str, output: &str) -> Result<Self> {
        let format = Format::of(path)?;
        if input == output {
            return Err(Error::Invalid(format!(
                "the input and the output field must differ, found `{input}` for both"
            )));
        }
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        let source = Source::new(&bytes);
        let names = Names { input, output };
        let mut problems = Problems::default();
        let records = if let Some(problem) = source.not_text() {
            problems.push(problem);
            Vec::new()
        } else {
            match format {
                Format::Csv => csv::read(&source, names, &mut problems),
                Format::Json => json::read_list(&source, names, &mut problems),
                Format::JsonLines => json::read_lines(&source, names, &mut problems),
            }
        };
        problems.into_data_error(path)?;
        Ok(Self { path: path.to_path_buf(), records })
    }
}

#[derive(Clone, Copy)]
enum Format {
    Csv,
    Json,
    JsonLines,
}

impl Format {
    fn of(path: &Path) -> Result<Self> {
        let extension = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase());
        let found = match extension.as_deref() {
            Some("csv") => return Ok(Self::Csv),
            Some("json") => return Ok(Self::Json),
            Some("jsonl") => return Ok(Self::JsonLines),
            Some(other) => format!("`.{other}`"),
            None => "no extension".to_string(),
        };
        Err(Error::Data {
            path: path.to_path_buf(),
            problems: vec![format!("expected a .csv, .json or .jsonl file, found {found}")],
            more: 0,
        })
    }
}

/// The two fields that are read.
#[derive(Clone, Copy)]
struct Names<'a> {
    input: &'a str,
    output: &'a str,
}

/// What is wrong with a file's rows, one entry a row.
#[derive(Debug, Default)]
pub(super) struct Problems {
    listed: Vec<String>,
    more: usize,
}

impl Problems {
    pub(super) fn push(&mut self, problem: String) {
        if self.listed.len() < LISTED {
            self.listed.push(problem);
        } else {
            self.more += 1;
        }
    }

    fn is_empty(&self) -> bool {
        self.listed.is_empty()
    }

    /// An error that names the file, if there is any problem.
    pub(super) fn into_data_error(self, path: &Path) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        Err(Error::Data { path: path.to_path_buf(), problems: self.listed, more: self.more })
    }

    /// The same for records that come from no file.
    pub(super) fn into_invalid(self) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        let more = if self.more > 0 { format!("\n  and {} more", self.more) } else { String::new() };
        Err(Error::Invalid(format!("{}{more}", self.listed.join("\n  "))))
    }
}

/// Why a text can't be used, if it can't: one that is blank teaches nothing and is a mistake of the file.
fn blank(text: &str) -> Option<&'static str> {
    match text {
        "" => Some("expected text, found an empty string"),
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
