//! JSON: a list of objects, one object per line, or another shape that programs write; the content shows which.

mod elements;
mod record;
mod shapes;
mod value;

use std::ops::Range;

use serde::de::IgnoredAny;
use serde_json::Deserializer;

use self::elements::Elements;
use self::record::Fault;
use super::problems::FileNotes;
use super::source::SourceFile;
use super::{FieldNames, Problems, Record};

/// Reads rows; `lines` means that the file's name promises one object per line.
pub(super) fn read(
    source: &SourceFile<'_>,
    lines: bool,
    names: FieldNames<'_>,
    problems: &mut Problems,
    notes: &mut FileNotes,
) -> Vec<Record> {
    let mut reader = JsonReader { source, names, problems, notes, records: Vec::new() };
    let first = source.skip_blank(source.start);
    match source.bytes.get(first) {
        Some(b'[') if lines && is_one_line_of_many(source, first) => reader.lines(),
        Some(b'[') => reader.elements(Elements::list(source, first)),
        Some(b'{') => match shape(source, first, lines) {
            JsonShape::Lines => reader.lines(),
            JsonShape::Stream => reader.elements(Elements::stream(source, first)),
            JsonShape::Object(range) => reader.object(range),
        },
        _ if lines => reader.lines(),
        _ => {
            let line = &source.bytes[first..source.line_end(first)];
            let header = String::from_utf8_lossy(line).contains(names.input);
            let hint = if header { "; hint: if the file is CSV, name it .csv" } else { "" };
            reader.problems.push(format!(
                "line {}: expected a list of objects, which starts with `[`{hint}",
                source.line_of(first)
            ));
        }
    }
    reader.records
}

/// Whether the line at `first` is a complete value and other lines follow.
fn is_one_line_of_many(source: &SourceFile<'_>, first: usize) -> bool {
    let end = source.line_end(first);
    let is_value = serde_json::from_slice::<IgnoredAny>(&source.bytes[first..end]).is_ok();
    is_value && source.skip_blank(end) < source.bytes.len()
}

/// The shape of a file that begins with an object.
enum JsonShape {
    /// One object per line.
    Lines,
    /// Objects one after the other, each over any number of lines.
    Stream,
    /// One object, which may hold all rows.
    Object(Range<usize>),
}

fn shape(source: &SourceFile<'_>, first: usize, lines: bool) -> JsonShape {
    let mut values = Deserializer::from_slice(&source.bytes[first..]).into_iter::<IgnoredAny>();
    match values.next() {
        Some(Ok(_)) => {
            let end = first + values.byte_offset();
            if source.skip_blank(end) == source.bytes.len() {
                JsonShape::Object(first..end)
            } else if source.line_of(first) == source.line_of(end - 1) {
                JsonShape::Lines
            } else {
                JsonShape::Stream
            }
        }
        _ if lines => JsonShape::Lines,
        // A syntax error: if each line is an object, the error is reported with its line.
        _ => {
            let line = source.line_end(first);
            match serde_json::from_slice::<IgnoredAny>(&source.bytes[first..line]) {
                Err(e) if e.is_eof() => JsonShape::Stream,
                _ => JsonShape::Lines,
            }
        }
    }
}

/// Reads rows, and collects the faults of the others.
struct JsonReader<'a, 'r> {
    source: &'a SourceFile<'a>,
    names: FieldNames<'a>,
    problems: &'r mut Problems,
    notes: &'r mut FileNotes,
    records: Vec<Record>,
}

impl JsonReader<'_, '_> {
    /// Reads values one by one, so that a malformed one is reported and the next ones are read.
    fn elements(&mut self, mut elements: Elements<'_>) {
        let line = self.source.line_of(elements.start());
        while let Some(element) = elements.next() {
            match element {
                Ok(range) => self.row(range, &format!(", element {}", elements.count())),
                Err(fault) => self.problems.push(fault),
            }
        }
        if self.records.is_empty() && self.problems.is_empty() {
            self.problems.push(format!("line {line}: expected objects, found an empty list"));
        }
    }

    /// Reads one object per line; blank lines are skipped.
    fn lines(&mut self) {
        let source = self.source;
        for line in source.lines() {
            let start = line.end - source.bytes[line.clone()].trim_ascii_start().len();
            let range = start..start + source.bytes[start..line.end].trim_ascii_end().len();
            if range.is_empty() {
                continue;
            }
            match serde_json::from_slice::<IgnoredAny>(&source.bytes[range.clone()]) {
                Ok(_) => self.row(range, ""),
                Err(e) if e.is_eof() => self.problems.push(format!(
                    "line {}: expected a whole object, found the line's end inside it; hint: put each object on \
                     one line",
                    source.line_of(start)
                )),
                Err(e) => self.problems.push(syntax_fault(source, range, "", &e)),
            }
        }
    }

    /// Reads the row of a value that is known to be JSON; `place` follows the line in messages.
    fn row(&mut self, range: Range<usize>, place: &str) {
        match record::read(self.source, range, self.names, self.notes) {
            Ok(record) => self.records.push(record),
            Err(fault) => self.fault(fault, place),
        }
    }

    fn fault(&mut self, fault: Fault, place: &str) {
        let Fault { line, text, common, placed } = fault;
        if common {
            self.problems.push_placed("line", line, if placed { place } else { "" }, text);
        } else {
            self.problems.push(format!("line {line}{place}: {text}"));
        }
    }
}

/// A syntax error in the value of `range`, with its place in the file.
fn syntax_fault(
    source: &SourceFile<'_>,
    range: Range<usize>,
    element: &str,
    e: &serde_json::Error,
) -> String {
    let start = range.start;
    let line = source.line_of(start) + e.line() - 1;
    let before = if e.line() == 1 { source.column_of(start) - 1 } else { 0 };
    let place = format!("line {line}, column {}{element}", before + e.column());
    // The reader stopped at the first word that is not JSON.
    let read = String::from_utf8_lossy(&source.bytes[range]);
    match value::foreign_word(&read) {
        Some((word, hint)) => format!("{place}: expected JSON, found `{word}`; hint: {hint}"),
        None => format!("{place}: {}", bare(e)),
    }
}

/// serde_json's message without its position, which counts from the value's start.
fn bare(e: &serde_json::Error) -> String {
    let message = e.to_string();
    let position = format!(" at line {} column {}", e.line(), e.column());
    message.strip_suffix(&position).unwrap_or(&message).to_string()
}
