//! Text with a header line and separated fields, quoted by double quotes (RFC 4180): CSV, and the same with tabs or
//! semicolons.

mod dialect;
mod quotes;

use std::ops::Range;

use ::csv::{ByteRecord, Reader, ReaderBuilder, StringRecord};

use self::dialect::{Dialect, find_column, separator_name};
use self::quotes::{QuoteFault, quote_fault};
use super::problems::{FileNotes, Lines};
use super::source::SourceFile;
use super::{DataColumn, FieldNames, Problems, Record, blank, found_names};

/// Number of rows from which a fault that all rows share is reported once.
const MANY: usize = 3;

/// Reads rows; `preferred` is the separator that the file's name gives.
pub(super) fn read(
    source: &SourceFile<'_>,
    preferred: u8,
    names: FieldNames<'_>,
    problems: &mut Problems,
    notes: &mut FileNotes,
) -> Vec<Record> {
    let Dialect { separator, start, compact } = Dialect::detect(source, preferred, names, notes);
    let compact = compact.as_deref().map(SourceFile::new);
    let source = compact.as_ref().unwrap_or(source);
    let mut rows = CsvRows::new(source, start, separator);
    let Some(header) = rows.next() else {
        problems.push(format!("line {}: expected a header, found the file's end", source.line_of(start)));
        return Vec::new();
    };
    let table = match CsvTable::new(source, &header, names, separator) {
        Ok(table) => table,
        Err(faults) => {
            faults.into_iter().for_each(|fault| problems.push(fault));
            return Vec::new();
        }
    };
    let mut read = Read::default();
    for row in rows {
        read.add(&table, &row);
    }
    if read.rows == 0 {
        let line = source.line_of(header.range.start);
        problems.push(format!("line {line}: expected rows after the header, found none"));
    }
    if read.empty.count() > 0 {
        let n = read.empty.count();
        notes.push(format!(
            "{n} row{} without any text {} passed over ({})",
            if n == 1 { "" } else { "s" },
            if n == 1 { "is" } else { "are" },
            read.empty
        ));
    }
    read.finish(&table, problems)
}

/// The columns with all their fields; `preferred` is the separator that the file's name gives.
pub(super) fn columns(source: &SourceFile<'_>, preferred: u8, notes: &mut FileNotes) -> Vec<DataColumn> {
    let names = FieldNames { input: "", output: "" };
    let Dialect { separator, start, compact } = Dialect::detect(source, preferred, names, notes);
    let compact = compact.as_deref().map(SourceFile::new);
    let source = compact.as_ref().unwrap_or(source);
    let mut rows = CsvRows::new(source, start, separator);
    let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
    let header: Vec<String> = rows.next().map_or(Vec::new(), |row| row.fields.iter().map(text).collect());
    let mut columns: Vec<DataColumn> =
        header.into_iter().map(|name| DataColumn { name, values: Vec::new() }).collect();
    for row in rows {
        for (column, field) in columns.iter_mut().zip(row.fields.iter()) {
            column.values.push(text(field));
        }
    }
    columns
}

/// The result of reading the rows.
#[derive(Default)]
struct Read {
    records: Vec<Record>,
    faults: Vec<String>,
    /// Rows with any text.
    rows: usize,
    /// Rows without text.
    empty: Lines,
    /// Rows whose number of fields differs from the header's, and that number.
    widths: Vec<(usize, usize)>,
}

impl Read {
    fn add(&mut self, table: &CsvTable<'_>, row: &CsvRow) {
        let is_empty = match row.fields.len() {
            // A line of spaces; a row of several blank fields does not count as empty.
            1 => row.fields[0].trim_ascii().is_empty(),
            _ => row.fields.iter().all(<[u8]>::is_empty),
        };
        if is_empty {
            return self.empty.push(table.source.line_of(row.range.start));
        }
        self.rows += 1;
        if let Some(found) = table.other_width(row) {
            self.widths.push((table.source.line_of(row.range.start), found));
        }
        match table.record(row) {
            Ok(record) => self.records.push(record),
            Err(fault) => self.faults.push(fault),
        }
    }

    /// The records, and the faults: a single one if every row has it.
    fn finish(self, table: &CsvTable<'_>, problems: &mut Problems) -> Vec<Record> {
        let same = self.widths.first().map(|(_, found)| *found);
        let all = self.widths.len() == self.rows && self.widths.iter().all(|(_, found)| Some(*found) == same);
        match (self.widths.first(), same) {
            (Some((line, _)), Some(found)) if all && self.rows >= MANY => problems.push(format!(
                "line {line} and all {} rows after it: expected {} fields, as the header has, found {found}; hint: give \
                 every column a name in the header, or put a field that holds a {} in double quotes",
                self.rows - 1,
                table.header.len(),
                separator_name(table.separator)
            )),
            _ => self.faults.into_iter().for_each(|fault| problems.push(fault)),
        }
        self.records
    }
}

/// A row: its place in the file, and its fields.
struct CsvRow {
    range: Range<usize>,
    fields: ByteRecord,
}

/// The rows of a file without blank lines.
struct CsvRows<'a> {
    source: &'a SourceFile<'a>,
    start: usize,
    reader: Reader<&'a [u8]>,
}

impl<'a> CsvRows<'a> {
    fn new(source: &'a SourceFile<'a>, start: usize, separator: u8) -> Self {
        // Flexible: rows with a wrong number of fields are reported by this module, with all other faults.
        let mut builder = ReaderBuilder::new();
        let reader = builder
            .has_headers(false)
            .flexible(true)
            .delimiter(separator)
            .from_reader(&source.bytes[start..]);
        Self { source, start, reader }
    }

    fn offset(&self) -> usize {
        // The whole file is in memory, so its offsets fit.
        self.start + self.reader.position().byte() as usize
    }
}

impl Iterator for CsvRows<'_> {
    type Item = CsvRow;

    fn next(&mut self) -> Option<CsvRow> {
        let from = self.offset();
        let mut fields = ByteRecord::new();
        let read = self.reader.read_byte_record(&mut fields);
        if !read.expect("reading bytes from memory, with any number of fields, can't fail") {
            return None;
        }
        // The reader's position is before the blank lines and the LF of a CRLF that it skips.
        let skipped = self.source.bytes[from..].iter().take_while(|b| matches!(b, b'\r' | b'\n')).count();
        Some(CsvRow { range: from + skipped..self.offset(), fields })
    }
}

/// The header, and the columns of the two fields.
struct CsvTable<'a> {
    source: &'a SourceFile<'a>,
    header: StringRecord,
    names: FieldNames<'a>,
    separator: u8,
    input: usize,
    output: usize,
}

impl<'a> CsvTable<'a> {
    fn new(
        source: &'a SourceFile<'a>,
        row: &CsvRow,
        names: FieldNames<'a>,
        separator: u8,
    ) -> Result<Self, Vec<String>> {
        let mut table = Self { source, header: StringRecord::new(), names, separator, input: 0, output: 0 };
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
            find_column(&columns, name).unwrap_or_else(|| {
                let found = found_names(name, "column", &columns);
                let hint = table.header_hint(&columns);
                faults.push(format!("line {line}: no column `{name}`{found}{hint}"));
                0
            })
        };
        let (input, output) = (find(names.input), find(names.output));
        if faults.is_empty() && input == output {
            faults.push(format!("line {line}: expected two columns, found that {} are one", names.both()));
        }
        if faults.is_empty() { Ok(Self { input, output, ..table }) } else { Err(faults) }
    }

    /// A hint for a header that lacks a column.
    fn header_hint(&self, columns: &[&str]) -> String {
        if columns.first().is_some_and(|name| name.starts_with(['{', '['])) {
            return "; hint: if the file is JSON, name it .json or .jsonl".into();
        }
        match self.separator {
            b',' => String::new(),
            other => format!("; fields are separated by {}s", separator_name(other)),
        }
    }

    /// The number of a row's fields, if it differs from the header's by more than empty fields at the end.
    fn other_width(&self, row: &CsvRow) -> Option<usize> {
        let found = row.fields.len();
        if found == self.header.len() {
            return None;
        }
        let used = |is_empty: &[bool]| is_empty.iter().rposition(|empty| !empty).map_or(0, |last| last + 1);
        let of_row = used(&row.fields.iter().map(<[u8]>::is_empty).collect::<Vec<_>>());
        let of_header = used(&self.header.iter().map(str::is_empty).collect::<Vec<_>>());
        let fits = found >= of_header && of_row <= self.header.len();
        (!fits).then_some(found)
    }

    fn record(&self, row: &CsvRow) -> Result<Record, String> {
        self.check(row)?;
        let line = self.source.line_of(row.range.start);
        if let Some(found) = self.other_width(row) {
            return Err(format!(
                "line {line}: expected {} fields, found {found}; hint: put a field that holds a {} or a line break in \
                 double quotes",
                self.header.len(),
                separator_name(self.separator)
            ));
        }
        // Lossless: `check` has verified that the row is UTF-8.
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

    /// Checks a row for UTF-8 and for the rules of quoting, which the CSV reader does not enforce.
    fn check(&self, row: &CsvRow) -> Result<(), String> {
        if let Err(fault) = self.source.text(row.range.clone()) {
            let field = row.fields.iter().position(|field| std::str::from_utf8(field).is_err());
            let field = field.map(|i| format!(", {}", self.field(i))).unwrap_or_default();
            return Err(format!("line {}{field}: {fault}", fault.line));
        }
        let Some(fault) = quote_fault(&self.source.bytes[row.range.clone()], self.separator) else {
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
                "line {line}, {field}: expected a {} or the line's end after the closing double quote, \
                 found more text; hint: double a quote that belongs to the text (\"\")",
                separator_name(self.separator)
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
