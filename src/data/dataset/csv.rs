//! CSV with a header line: fields separated by commas, quoted by double quotes (RFC 4180).

use std::ops::Range;

use ::csv::{ByteRecord, Reader, ReaderBuilder, StringRecord};

use super::source::Source;
use super::{Names, Problems, Record, blank, found_names};

pub(super) fn read(source: &Source<'_>, names: Names<'_>, problems: &mut Problems) -> Vec<Record> {
    let mut rows = Rows::new(source);
    let header = rows.next().expect("a file that is not blank has a first row");
    let table = match Table::new(source, &header, names) {
        Ok(table) => table,
        Err(faults) => {
            faults.into_iter().for_each(|fault| problems.push(fault));
            return Vec::new();
        }
    };
    let mut count = 0;
    let mut records = Vec::new();
    for row in rows {
        count += 1;
        match table.record(&row) {
            Ok(record) => records.push(record),
            Err(fault) => problems.push(fault),
        }
    }
    if count == 0 {
        let line = source.line_of(header.range.start);
        problems.push(format!("line {line}: expected rows after the header, found none"));
    }
    records
}

/// A row: where it is in the file, and its fields.
struct Row {
    range: Range<usize>,
    fields: ByteRecord,
}

/// The rows of a file, blank lines left out.
struct Rows<'a> {
    source: &'a Source<'a>,
    reader: Reader<&'a [u8]>,
}

impl<'a> Rows<'a> {
    fn new(source: &'a Source<'a>) -> Self {
        // Flexible: wrong numbers of fields are reported here, with all the other faults.
        let reader =
            ReaderBuilder::new().has_headers(false).flexible(true).from_reader(&source.bytes[source.start..]);
        Self { source, reader }
    }

    fn offset(&self) -> usize {
        // The whole file is in memory, so its offsets fit.
        self.source.start + self.reader.position().byte() as usize
    }
}

impl Iterator for Rows<'_> {
    type Item = Row;

    fn next(&mut self) -> Option<Row> {
        let from = self.offset();
        let mut fields = ByteRecord::new();
        let read = self.reader.read_byte_record(&mut fields);
        if !read.expect("reading bytes from memory, with any number of fields, can't fail") {
            return None;
        }
        // The reader's position is before the blank lines and the LF of a CRLF that it skips.
        let skipped = self.source.bytes[from..].iter().take_while(|b| matches!(b, b'\r' | b'\n')).count();
        Some(Row { range: from + skipped..self.offset(), fields })
    }
}

/// The header, and where in it the two fields are.
struct Table<'a> {
    source: &'a Source<'a>,
    header: StringRecord,
    names: Names<'a>,
    input: usize,
    output: usize,
}

impl<'a> Table<'a> {
    fn new(source: &'a Source<'a>, row: &Row, names: Names<'a>) -> Result<Self, Vec<String>> {
        let mut table = Self { source, header: StringRecord::new(), names, input: 0, output: 0 };
        table.check(row).map_err(|fault| vec![fault])?;
        table.header = StringRecord::from_byte_record_lossy(row.fields.clone());
        let line = source.line_of(row.range.start);
        let columns: Vec<&str> = table.header.iter().collect();
        let mut faults = Vec::new();
        for (i, name) in columns.iter().enumerate() {
            // Spreadsheets leave columns without a name at the right; they do no harm.
            let first = columns.iter().position(|other| other == name).unwrap_or(i);
            if first < i && !name.is_empty() {
                faults.push(format!(
                    "line {line}: expected each column once, found `{name}` in columns {} and {}",
                    first + 1,
                    i + 1
                ));
            }
        }
        let mut find = |name: &str| {
            columns.iter().position(|column| *column == name).unwrap_or_else(|| {
                let found = found_names(name, "column", &columns);
                let separator = match columns[..] {
                    [only] if only.contains(';') => "; hint: separate fields by commas, not semicolons",
                    [only] if only.contains('\t') => "; hint: separate fields by commas, not tabs",
                    _ => "",
                };
                faults.push(format!("line {line}: no column `{name}`{found}{separator}"));
                0
            })
        };
        let (input, output) = (find(names.input), find(names.output));
        if faults.is_empty() { Ok(Self { input, output, ..table }) } else { Err(faults) }
    }

    fn record(&self, row: &Row) -> Result<Record, String> {
        self.check(row)?;
        let line = self.source.line_of(row.range.start);
        let (expected, found) = (self.header.len(), row.fields.len());
        if found != expected {
            return Err(format!(
                "line {line}: expected {expected} fields, found {found}; hint: put a field that holds a \
                 comma or a line break in double quotes"
            ));
        }
        // Lossless: `check` has seen that the row is UTF-8.
        let fields = StringRecord::from_byte_record_lossy(row.fields.clone());
        let (input, output) = (&fields[self.input], &fields[self.output]);
        let faults: Vec<String> = [(self.names.input, input), (self.names.output, output)]
            .into_iter()
            .filter_map(|(name, text)| blank(text).map(|why| format!("field `{name}`: {why}")))
            .collect();
        if !faults.is_empty() {
            return Err(format!("line {line}: {}", faults.join("; ")));
        }
        Ok(Record { input: input.to_string(), output: output.to_string(), line })
    }

    /// Holds a row against UTF-8 and the rules of quoting, which the CSV reader is lenient about.
    fn check(&self, row: &Row) -> Result<(), String> {
        if let Err(fault) = self.source.text(row.range.clone()) {
            let field = row.fields.iter().position(|field| std::str::from_utf8(field).is_err());
            let field = field.map(|i| format!(", {}", self.field(i))).unwrap_or_default();
            return Err(format!("line {}{field}: {fault}", fault.line));
        }
        let Some(fault) = quote_fault(&self.source.bytes[row.range.clone()]) else {
            return Ok(());
        };
        let line = self.source.line_of(row.range.start + fault.at);
        let field = self.field(fault.field);
        Err(match fault.kind {
            QuoteFault::Unclosed => format!(
                "line {line}, {field}: the double quote that opens the field is never closed, so the rest \
                 of the file is read as one field; hint: close it after the field"
            ),
            QuoteFault::Stray => format!(
                "line {line}, {field}: expected a comma or the line's end after the closing double quote, \
                 found more text; hint: double a quote that belongs to the text (\"\")"
            ),
        })
    }

    fn field(&self, index: usize) -> String {
        match self.header.get(index) {
            Some(name) => format!("field `{name}`"),
            None => format!("field {}", index + 1),
        }
    }
}

struct FaultAt {
    kind: QuoteFault,
    /// Offset in the row.
    at: usize,
    /// Index of the field.
    field: usize,
}

enum QuoteFault {
    /// A quoted field lasts to the end of the file.
    Unclosed,
    /// Text follows a closing quote.
    Stray,
}

/// The first thing in a row that the CSV reader would let pass and change the text by.
fn quote_fault(row: &[u8]) -> Option<FaultAt> {
    enum At {
        Start,
        Plain,
        Quoted,
        AfterQuote,
    }
    let (mut state, mut field, mut opened) = (At::Start, 0, 0);
    for (i, byte) in row.iter().enumerate() {
        state = match (state, byte) {
            (At::Start, b'"') => {
                opened = i;
                At::Quoted
            }
            (At::Quoted, b'"') => At::AfterQuote,
            (At::Quoted, _) | (At::AfterQuote, b'"') => At::Quoted,
            (_, b',') => {
                field += 1;
                At::Start
            }
            (_, b'\r' | b'\n') => return None,
            (At::AfterQuote, _) => return Some(FaultAt { kind: QuoteFault::Stray, at: i, field }),
            (At::Start | At::Plain, _) => At::Plain,
        };
    }
    matches!(state, At::Quoted).then_some(FaultAt { kind: QuoteFault::Unclosed, at: opened, field })
}
