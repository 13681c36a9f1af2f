//! One object that holds all rows: a list under a key, columns, or rows by number.

use std::collections::HashMap;
use std::ops::Range;

use super::super::{Record, chat};
use super::JsonReader;
use super::record::Fault;
use super::value::{self, Entries};

/// Keys under which lists of rows are commonly found.
const LISTS: [&str; 9] =
    ["data", "rows", "records", "examples", "items", "samples", "instances", "train", "results"];
/// Nesting depth to which rows are looked for.
const DEPTH: usize = 3;
/// Most keys that a message lists.
const KEYS: usize = 8;

impl JsonReader<'_, '_> {
    /// Reads the rows that one object holds, or the row that it is.
    pub(super) fn object(&mut self, range: Range<usize>) {
        let line = self.source.line_of(range.start);
        match self.source.text(range.clone()) {
            Ok(text) => self.inside(text, DEPTH),
            // Read as a row, it is refused with its line.
            Err(_) => self.row(range, ""),
        }
        if self.records.is_empty() && self.problems.is_empty() {
            self.problems.push(format!("line {line}: expected rows, found an empty list"));
        }
    }

    fn inside(&mut self, text: &str, depth: usize) {
        let start = self.source.offset_of(text);
        let range = start..start + text.len();
        let Ok(entries) = Entries::parse(text, "an object") else { return self.row(range, "") };
        let keys = entries.keys();
        let nested = |raw: &str| raw.starts_with(['[', '{']);
        match (entries.get(self.names.input), entries.get(self.names.output)) {
            (Some(inputs), Some(outputs)) if nested(inputs) && nested(outputs) => {
                return self.columns(inputs, outputs);
            }
            (None, None) => {}
            _ => return self.row(range, ""),
        }
        let is_chat = keys.iter().any(|key| chat::KEYS.contains(key));
        if is_chat || !entries.0.iter().any(|(_, raw)| nested(raw)) {
            return self.row(range, "");
        }
        if let (Some(columns), Some(rows)) = (entries.get("columns"), entries.get("data"))
            && let Some(columns) = strings(columns)
        {
            return self.split(&columns, rows);
        }
        if self.are_rows(&entries) {
            self.notes.push("the rows are the values of one object");
            return entries.0.iter().for_each(|(key, raw)| self.part(raw, &format!(", key `{key}`")));
        }
        match list(&entries) {
            Ok(Some(key)) => {
                self.notes.push(format!("the rows are the list under the key `{key}`"));
                let rows = entries.get(key).and_then(value::elements).unwrap_or_default();
                rows.into_iter().enumerate().for_each(|(i, raw)| self.part(raw, &format!(", element {}", i + 1)));
            }
            Ok(None) => match LISTS.iter().find_map(|key| entries.get(key)) {
                // Nothing is read here; the error is reported at the end.
                Some(raw) if value::elements(raw).is_some_and(|rows| rows.is_empty()) => {}
                Some(raw) if raw.starts_with('{') && depth > 1 => self.inside(raw, depth - 1),
                _ => self.unknown(start, &keys),
            },
            Err(lists) => self.problems.push(format!(
                "line {}: expected one list of rows, found the lists {}; hint: put each into a file of its own, and name \
                 the files in data.train, data.validation and data.test",
                self.source.line_of(start),
                quoted(&lists)
            )),
        }
    }

    fn unknown(&mut self, start: usize, keys: &[&str]) {
        self.problems.push(format!(
            "line {}: expected rows, found an object with the key{} {}; hint: rows are a list of objects, one object a \
             line, a list under the key `data`, or columns ({{\"input\": [...], \"output\": [...]}})",
            self.source.line_of(start),
            if keys.len() == 1 { "" } else { "s" },
            quoted(keys)
        ));
    }

    /// Whether all values are rows, as pandas writes them with orient="index".
    fn are_rows(&self, entries: &Entries<'_>) -> bool {
        let is_row = |raw: &str| {
            let row = Entries::parse(raw, "an object");
            row.is_ok_and(|row| row.get(self.names.input).is_some() && row.get(self.names.output).is_some())
        };
        let first = entries.0.first().is_some_and(|(_, raw)| is_row(raw));
        first && entries.0.iter().all(|(_, raw)| raw.starts_with('{'))
    }

    /// Reads a part of the text as a row.
    fn part(&mut self, raw: &str, place: &str) {
        let start = self.source.offset_of(raw);
        self.row(start..start + raw.len(), place);
    }

    /// Reads two columns, each a list or an object with the rows' numbers as keys.
    fn columns(&mut self, inputs: &str, outputs: &str) {
        let line = self.source.line_of(self.source.offset_of(inputs));
        let (input, output) = (self.names.input, self.names.output);
        self.notes.push(format!("the rows are in the columns {}", self.names.both()));
        if let (Some(inputs), Some(outputs)) = (value::elements(inputs), value::elements(outputs)) {
            if inputs.len() != outputs.len() {
                return self.problems.push(format!(
                    "line {line}: expected columns of one length, found {} values of `{input}` and {} of `{output}`",
                    inputs.len(),
                    outputs.len()
                ));
            }
            let pairs = inputs.into_iter().zip(outputs).enumerate();
            return pairs.for_each(|(i, (a, b))| self.cells(a, b, &format!(", row {}", i + 1)));
        }
        let entries = |raw| Entries::parse(raw, "an object").ok();
        let (Some(inputs), Some(outputs)) = (entries(inputs), entries(outputs)) else {
            return self.problems.push(format!(
                "line {line}: expected the columns {} to be both lists or both objects, found one of each",
                self.names.both()
            ));
        };
        let mut by_key: HashMap<&str, &str> =
            outputs.0.iter().map(|(key, raw)| (key.as_str(), *raw)).collect();
        for (key, raw) in &inputs.0 {
            match by_key.remove(key.as_str()) {
                Some(cell) => self.cells(raw, cell, &format!(", row `{key}`")),
                None => {
                    self.problems.push(format!("line {line}: row `{key}` is in `{input}`, not in `{output}`"))
                }
            }
        }
        let mut left: Vec<&str> = by_key.into_keys().collect();
        left.sort_unstable();
        left.into_iter().for_each(|key| {
            self.problems.push(format!("line {line}: row `{key}` is in `{output}`, not in `{input}`"));
        });
    }

    /// Reads the two cells of a row.
    fn cells(&mut self, input: &str, output: &str, place: &str) {
        let line = self.source.line_of(self.source.offset_of(input));
        let texts = [(self.names.input, input), (self.names.output, output)];
        match texts.map(|(name, raw)| value::text(name, raw, self.notes)) {
            [Ok(input), Ok(output)] => self.records.push(Record { input, output, line }),
            texts => {
                let faults: Vec<String> = texts.into_iter().filter_map(Result::err).collect();
                self.fault(Fault { line, text: faults.join("; "), common: false, placed: true }, place);
            }
        }
    }

    /// Reads names of columns and lists of cells, as pandas writes them with orient="split".
    fn split(&mut self, columns: &[String], rows: &str) {
        let line = self.source.line_of(self.source.offset_of(rows));
        let find = |name: &str| columns.iter().position(|column| column == name);
        let (Some(input), Some(output)) = (find(self.names.input), find(self.names.output)) else {
            let names: Vec<&str> = columns.iter().map(String::as_str).collect();
            return self.problems.push(format!(
                "line {line}: expected the columns {}, found {}",
                self.names.both(),
                quoted(&names)
            ));
        };
        self.notes.push("the rows are the lists under the key `data`, their names those under `columns`");
        for (i, row) in value::elements(rows).unwrap_or_default().into_iter().enumerate() {
            let cells = value::elements(row).unwrap_or_default();
            match (cells.get(input), cells.get(output)) {
                (Some(a), Some(b)) if cells.len() == columns.len() => {
                    self.cells(a, b, &format!(", row {}", i + 1));
                }
                _ => self.problems.push(format!(
                    "line {}, row {}: expected a list of {} values",
                    self.source.line_of(self.source.offset_of(row)),
                    i + 1,
                    columns.len()
                )),
            }
        }
    }
}

/// The key of the only list of objects; all such keys if it is unclear which list holds the rows.
fn list<'a>(entries: &'a Entries<'_>) -> Result<Option<&'a str>, Vec<&'a str>> {
    let is_list = |raw: &str| {
        let rows = raw.strip_prefix('[').map(str::trim_start);
        rows.is_some_and(|rows| rows.starts_with('{'))
    };
    let lists: Vec<&str> =
        entries.0.iter().filter(|(_, raw)| is_list(raw)).map(|(key, _)| key.as_str()).collect();
    let known: Vec<&str> = lists.iter().copied().filter(|key| LISTS.contains(key)).collect();
    match (&lists[..], &known[..]) {
        ([], _) => Ok(None),
        ([only], _) => Ok(Some(only)),
        // Other lists next to it describe the rows, unless they may be rows of another split.
        (all, [only])
            if *only != "train" || all.iter().all(|key| !key.contains("test") && !key.contains("val")) =>
        {
            Ok(Some(only))
        }
        _ => Err(lists),
    }
}

fn strings(raw: &str) -> Option<Vec<String>> {
    serde_json::from_str(raw).ok()
}

/// Names in backquotes; the first ones if there are many.
fn quoted(names: &[&str]) -> String {
    let mut text = names.iter().take(KEYS).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    if names.len() > KEYS {
        text += &format!(" and {} more", names.len() - KEYS);
    }
    text
}
