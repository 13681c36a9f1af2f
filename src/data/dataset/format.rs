//! The format of a file, by its name and by its first bytes.

use std::io::Read;
use std::path::Path;

use flate2::bufread::GzDecoder;

use crate::checkpoint::LFS_POINTER;
use crate::{Error, Result};

/// How a file's rows are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FileFormat {
    /// Fields with a separator, which the header shows; this one is tried first.
    Separated(u8),
    /// JSON, whose shape the content shows; `lines` if the file's name says that each line is an object.
    Json { lines: bool },
    /// Parquet.
    Parquet,
}

/// The format that a file's name gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NamedFormat {
    /// `None` if the name says only gzip.
    pub(super) format: Option<FileFormat>,
    pub(super) gzip: bool,
}

/// The endings of names that are accepted.
const EXPECTED: &str =
    "expected a .csv, .tsv, .json, .jsonl, .ndjson or .parquet file, or one of them with .gz after it";

const CSV_HINT: &str = "; hint: save the sheet as CSV, UTF-8";

impl NamedFormat {
    /// The format that the name of `path` gives.
    ///
    /// # Errors
    /// Returns [`Error::Data`] if the name gives none.
    pub(super) fn parse(path: &Path) -> Result<Self> {
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
        let (name, gzip) = match name.strip_suffix(".gz") {
            Some(name) => (name, true),
            None => (name.as_str(), false),
        };
        let extension = Path::new(name).extension().map(|e| e.to_string_lossy().into_owned());
        let format = match extension.as_deref() {
            Some("csv") => Some(FileFormat::Separated(b',')),
            Some("tsv" | "tab") => Some(FileFormat::Separated(b'\t')),
            Some("json") => Some(FileFormat::Json { lines: false }),
            Some("jsonl" | "ndjson") => Some(FileFormat::Json { lines: true }),
            Some("parquet") => Some(FileFormat::Parquet),
            None if gzip => None,
            other => {
                let hint = match other {
                    Some("xlsx" | "xls" | "xlsm" | "ods" | "numbers") => CSV_HINT,
                    _ => "",
                };
                let found = other.map_or("no extension".into(), |other| format!("`.{other}`"));
                return Err(data_error(path, format!("{EXPECTED}, found {found}{hint}")));
            }
        };
        Ok(Self { format, gzip })
    }
}

/// Whether `path` has the name of a dataset.
pub fn is_dataset(path: &Path) -> bool {
    NamedFormat::parse(path).is_ok()
}

fn data_error(path: &Path, problem: String) -> Error {
    Error::Data { path: path.to_path_buf(), problems: vec![problem], more: 0 }
}

/// The bytes of a file, decompressed if it is gzip, and their format. `name` stands for the path in messages; `named` is the
/// format that it gives.
///
/// # Errors
/// Returns [`Error::Io`] if the file can't be read, [`Error::Data`] if its content has another format than its name
/// says.
pub(super) fn load(path: &Path, name: &Path, named: NamedFormat) -> Result<(Vec<u8>, FileFormat)> {
    let mut bytes = std::fs::read(path).map_err(Error::io(path))?;
    if bytes.starts_with(b"\x1F\x8B") {
        if !named.gzip {
            let file = name.file_name().unwrap_or_default().to_string_lossy();
            let problem = format!(
                "the file is compressed by gzip, which its name does not say; hint: rename it {file}.gz, or \
                 unpack it"
            );
            return Err(data_error(name, problem));
        }
        bytes = unpack(&bytes).map_err(|error| {
            data_error(name, format!("gzip: {error}; hint: is the file cut off or damaged?"))
        })?;
    }
    if bytes.starts_with(PARQUET) {
        return Ok((bytes, FileFormat::Parquet));
    }
    if let Some(what) = container(&bytes) {
        return Err(data_error(name, what.into()));
    }
    // The end of a file in DOS, and in programs that come from there.
    if bytes.ends_with(b"\x1A") {
        bytes.pop();
    }
    let format = named.format.unwrap_or_else(|| match bytes.trim_ascii_start().first() {
        Some(b'{' | b'[') => FileFormat::Json { lines: false },
        _ => FileFormat::Separated(b','),
    });
    if format == FileFormat::Parquet {
        let problem = "expected a Parquet file, which begins with PAR1, found other bytes; hint: is it another \
                       format under this name, or a download that failed?";
        return Err(data_error(name, problem.into()));
    }
    Ok((bytes, format))
}

/// The content of all members of a gzip file; zeros after the last one are padding.
fn unpack(bytes: &[u8]) -> std::io::Result<Vec<u8>> {
    let (mut unpacked, mut rest) = (Vec::new(), bytes);
    while rest.iter().any(|byte| *byte != 0) {
        let mut member = GzDecoder::new(rest);
        member.read_to_end(&mut unpacked)?;
        rest = member.into_inner();
    }
    Ok(unpacked)
}

const PARQUET: &[u8] = b"PAR1";

/// The kind of a file that is not text with rows, by its first bytes.
fn container(bytes: &[u8]) -> Option<&'static str> {
    let head = &bytes[..bytes.len().min(4096)];
    let holds = |name: &[u8]| head.windows(name.len()).any(|window| window == name);
    let begins = |text: &str| {
        let head = head.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(head).trim_ascii_start();
        head.len() >= text.len() && head[..text.len()].eq_ignore_ascii_case(text.as_bytes())
    };
    Some(match head {
        [b'P', b'K', 3, 4, ..] if holds(b"[Content_Types].xml") || holds(b"xl/") => {
            "the file is an Excel workbook (xlsx), not text; hint: save the sheet as CSV, UTF-8"
        }
        [b'P', b'K', 3, 4, ..] if holds(b"opendocument.spreadsheet") => {
            "the file is a spreadsheet (ods), not text; hint: save the sheet as CSV, UTF-8"
        }
        [b'P', b'K', 3, 4, ..] => "the file is a zip archive, not text; hint: unpack it",
        [0xD0, 0xCF, 0x11, 0xE0, ..] => {
            "the file is an Excel workbook (xls), not text; hint: save the sheet as CSV, UTF-8"
        }
        [0x28, 0xB5, 0x2F, 0xFD, ..] => {
            "the file is compressed by zstd; hint: unpack it, or pack it with gzip"
        }
        [0xFD, b'7', b'z', b'X', b'Z', ..] => "the file is compressed by xz; hint: unpack it",
        [b'B', b'Z', b'h', b'1'..=b'9', ..] => "the file is compressed by bzip2; hint: unpack it",
        [0x1F, 0x8B, ..] => "the file is compressed by gzip twice; hint: unpack it once",
        [b'P', b'A', b'R', b'E', ..] => "the file is encrypted Parquet; hint: write it without encryption",
        _ if head.starts_with(b"ARROW1") || head.starts_with(b"FEA1") => {
            "the file is Arrow's (Feather), not text; hint: write it as Parquet"
        }
        _ if head.starts_with(b"SQLite format 3\0") => {
            "the file is an SQLite database, not text; hint: export the table as CSV"
        }
        _ if head.starts_with(b"%PDF-") => "the file is a PDF, not text with rows",
        _ if begins(LFS_POINTER) => "the file is a pointer of Git LFS, not the data; hint: git lfs pull",
        _ if begins("<!doctype html") || begins("<html") => {
            "the file is a web page (HTML), not data; hint: the download may have returned a login or an error page"
        }
        _ => return None,
    })
}
