//! The separator of a file, found by its name, a `sep=` line and its header.

use ::csv::{ByteRecord, ReaderBuilder};

use super::super::labels::normalize;
use super::super::source::SourceFile;
use super::super::{FieldNames, FileNotes};
use super::quotes;

/// Separators that are tried after the one that the file's name or first line gives.
const SEPARATORS: [u8; 4] = [b',', b';', b'\t', b'|'];

/// How a file is written.
pub(super) struct Dialect {
    pub(super) separator: u8,
    /// Offset of the header, after a `sep=` line.
    pub(super) start: usize,
    /// The file without the spaces at the beginning of its fields, if they are not part of the text.
    pub(super) compact: Option<Vec<u8>>,
}

/// The name of a separator in messages.
pub(super) fn separator_name(separator: u8) -> String {
    match separator {
        b',' => "comma".into(),
        b';' => "semicolon".into(),
        b'\t' => "tab".into(),
        other => format!("`{}`", char::from(other)),
    }
}

/// The index of a column: by its exact name, otherwise by its name without spaces and invisible characters.
pub(super) fn find_column(header: &[&str], name: &str) -> Option<usize> {
    let exact = header.iter().position(|column| *column == name);
    exact.or_else(|| header.iter().position(|column| normalize(column) == name))
}

impl Dialect {
    /// Finds it; `preferred` is the separator that the file's name gives.
    pub(super) fn detect(
        source: &SourceFile<'_>,
        preferred: u8,
        names: FieldNames<'_>,
        notes: &mut FileNotes,
    ) -> Self {
        let (first, start) = match separator_line(&source.bytes[source.start..]) {
            Some((separator, length)) => (separator, source.start + length),
            None => (preferred, source.start),
        };
        let candidates: Vec<u8> =
            std::iter::once(first).chain(SEPARATORS.into_iter().filter(|other| *other != first)).collect();
        let bytes = &source.bytes[start..];
        let headers: Vec<(u8, Vec<String>)> = candidates.into_iter().map(|s| (s, header(bytes, s))).collect();
        let with = |find: fn(&[&str], &str) -> bool| {
            headers.iter().find(|(_, header)| {
                let header: Vec<&str> = header.iter().map(String::as_str).collect();
                find(&header, names.input) && find(&header, names.output)
            })
        };
        let known = with(|header, name| header.contains(&name))
            .or_else(|| with(|header, name| find_column(header, name).is_some()))
            // In a file without these columns, the separator that makes columns at all.
            .or_else(|| headers.iter().find(|(_, header)| header.len() > 1))
            .unwrap_or(&headers[0]);
        let (separator, header) = (known.0, &known.1);
        if separator != preferred {
            notes.push(format!("fields are separated by {}s", separator_name(separator)));
        }
        let compact = Self::compact(source, start, separator, header);
        if compact.is_some() {
            notes.push(format!("spaces after a {} are not part of a field", separator_name(separator)));
        }
        Self { separator, start, compact }
    }

    /// The bytes without the spaces at the beginning of fields, if the header or a quote after spaces shows that a
    /// program wrote them after each separator.
    fn compact(source: &SourceFile<'_>, start: usize, separator: u8, header: &[String]) -> Option<Vec<u8>> {
        let bytes = &source.bytes[start..];
        let in_header = header.iter().skip(1).any(|name| name.starts_with(' ') && !name.trim().is_empty());
        let wanted = in_header || quotes::has_spaces_before_quotes(bytes, separator);
        // Offsets in a message are the file's own, so a file with another fault is left as it is.
        if !wanted || std::str::from_utf8(source.bytes).is_err() {
            return None;
        }
        quotes::without_spaces(source.bytes, start, separator)
    }
}

/// The separator of a first line `sep=;`, which spreadsheets write, and the line's length.
fn separator_line(bytes: &[u8]) -> Option<(u8, usize)> {
    let end = bytes.iter().position(|b| matches!(b, b'\r' | b'\n'))?;
    let line = bytes[..end].trim_ascii_end();
    // A tab at the end is the separator.
    let line = if bytes[..end].ends_with(b"=\t") { &bytes[..end] } else { line };
    let line = line.strip_prefix(b"\"").and_then(|l| l.strip_suffix(b"\"")).unwrap_or(line);
    let separator = match line {
        [name @ .., separator] if name.eq_ignore_ascii_case(b"sep=") => *separator,
        _ => return None,
    };
    let ends = if bytes[end..].starts_with(b"\r\n") { 2 } else { 1 };
    (separator.is_ascii() && !separator.is_ascii_alphanumeric() && separator != b'"')
        .then_some((separator, end + ends))
}

/// The fields of the first row.
fn header(bytes: &[u8], separator: u8) -> Vec<String> {
    let mut reader =
        ReaderBuilder::new().has_headers(false).flexible(true).delimiter(separator).from_reader(bytes);
    let mut row = ByteRecord::new();
    let read = reader.read_byte_record(&mut row);
    read.expect("reading bytes from memory, with any number of fields, can't fail");
    row.iter().map(|field| String::from_utf8_lossy(field).into_owned()).collect()
}
