//! The columns of a file whose fields are not named yet.

use std::path::Path;

use super::csv;
use super::format::{self, FileFormat, NamedFormat};
use super::problems::FileNotes;
use super::source::SourceFile;
use crate::{Error, Result};

/// A column of a file with separated fields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataColumn {
    /// Its name in the header.
    pub name: String,
    /// Its fields, in the order of the rows; shorter rows have none.
    pub values: Vec<String>,
}

/// The columns of a file with separated fields (`.csv`, `.tsv`), to choose the two that [`super::Dataset::read`] is to
/// read. Malformed rows are not reported here.
///
/// # Errors
/// Returns [`Error::Io`] if the file can't be read, [`Error::Data`] if it is no text with separated fields.
pub fn columns(path: &Path) -> Result<Vec<DataColumn>> {
    let error = |problem: String| Error::Data { path: path.into(), problems: vec![problem], more: 0 };
    let (bytes, format) = format::load(path, path, NamedFormat::parse(path)?)?;
    let FileFormat::Separated(separator) = format else {
        let problem = "expected a .csv or .tsv file, whose columns can be listed, found another format";
        return Err(error(problem.into()));
    };
    let source = SourceFile::new(&bytes);
    match source.not_text() {
        Some(problem) => Err(error(problem)),
        None => Ok(csv::columns(&source, separator, &mut FileNotes::default())),
    }
}
