//! JSON: a list of objects, or (JSON Lines) one object a line.

use std::fmt;
use std::ops::Range;

use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, Visitor};
use serde_json::{Deserializer, Value};

use super::source::Source;
use super::{Names, Problems, Record, blank, found_names};

/// Reads a list of objects, element by element, so that a bad one is reported and the next ones are read.
pub(super) fn read_list(source: &Source<'_>, names: Names<'_>, problems: &mut Problems) -> Vec<Record> {
    let mut records = Vec::new();
    let open = source.skip_blank(source.start);
    let line = source.line_of(open);
    match source.bytes.get(open) {
        Some(b'[') => {}
        Some(b'{') => {
            problems.push(format!(
                "line {line}: expected a list of objects, found an object; hint: name the file .jsonl if \
                 each line is an object, otherwise put [ ] around it"
            ));
            return records;
        }
        _ => {
            problems.push(format!("line {line}: expected a list of objects, which starts with `[`"));
            return records;
        }
    }
    let mut elements = Elements { source, at: open + 1, count: 0, done: false };
    while let Some(element) = elements.next() {
        let read = element.and_then(|range| {
            record(source, range, names)
                .map_err(|fault| format!("line {}, element {}: {}", fault.line, elements.count, fault.text))
        });
        match read {
            Ok(record) => records.push(record),
            Err(fault) => problems.push(fault),
        }
    }
    if records.is_empty() && problems.is_empty() {
        problems.push(format!("line {line}: expected objects, found an empty list"));
    }
    records
}

/// Reads one object a line; blank lines are skipped.
pub(super) fn read_lines(source: &Source<'_>, names: Names<'_>, problems: &mut Problems) -> Vec<Record> {
    let mut records = Vec::new();
    for line in source.lines() {
        let start = line.end - source.bytes[line.clone()].trim_ascii_start().len();
        let range = start..start + source.bytes[start..line.end].trim_ascii_end().len();
        if range.is_empty() {
            continue;
        }
        let read = match serde_json::from_slice::<IgnoredAny>(&source.bytes[range.clone()]) {
            Ok(_) => {
                record(source, range, names).map_err(|fault| format!("line {}: {}", fault.line, fault.text))
            }
            Err(e) if e.is_eof() => Err(format!(
                "line {}: expected a whole object, found the line's end inside it; hint: put each object on \
                 one line",
                source.line_of(start)
            )),
            Err(e) => Err(syntax_fault(source, start, "", &e)),
        };
        match read {
            Ok(record) => records.push(record),
            Err(fault) if source.bytes[start] == b'[' => {
                problems.push(format!("{fault}; hint: a JSON list belongs in a .json file"));
            }
            Err(fault) => problems.push(fault),
        }
    }
    records
}

/// The elements of a list; ends after the list or at the first fault of its syntax.
struct Elements<'a> {
    source: &'a Source<'a>,
    /// After the list's `[`, or after the last element.
    at: usize,
    /// Elements so far.
    count: usize,
    done: bool,
}

impl Elements<'_> {
    fn next(&mut self) -> Option<Result<Range<usize>, String>> {
        if self.done {
            return None;
        }
        let element = self.step();
        self.done = !matches!(element, Ok(Some(_)));
        element.transpose()
    }

    fn step(&mut self) -> Result<Option<Range<usize>>, String> {
        let source = self.source;
        let mut start = source.skip_blank(self.at);
        let line = source.line_of(start);
        match (source.bytes.get(start), self.count) {
            (Some(b']'), _) => {
                let rest = source.skip_blank(start + 1);
                if rest < source.bytes.len() {
                    let line = source.line_of(rest);
                    return Err(format!(
                        "line {line}: expected the file's end after the list, found more text"
                    ));
                }
                return Ok(None);
            }
            (Some(b','), 1..) => {
                start = source.skip_blank(start + 1);
                if source.bytes.get(start) == Some(&b']') {
                    let count = self.count;
                    return Err(format!(
                        "line {line}, after element {count}: expected another element after the comma, found \
                         `]`"
                    ));
                }
            }
            (Some(_), 1..) => {
                let count = self.count;
                return Err(format!(
                    "line {line}, after element {count}: expected `,` or `]`, found other text"
                ));
            }
            _ => {}
        }
        if start == source.bytes.len() {
            let line = source.line_of(start);
            return Err(format!(
                "line {line}, after element {}: expected `]`, found the file's end; hint: is the file cut \
                 off?",
                self.count
            ));
        }
        self.count += 1;
        let mut stream = Deserializer::from_slice(&source.bytes[start..]).into_iter::<IgnoredAny>();
        if let Some(Err(e)) = stream.next() {
            return Err(self.fault(start, &e));
        }
        self.at = start + stream.byte_offset();
        Ok(Some(start..self.at))
    }

    fn fault(&self, start: usize, e: &serde_json::Error) -> String {
        if e.is_eof() {
            return format!(
                "line {}, element {}: expected the element's end, found the file's end; hint: is the file \
                 cut off?",
                self.source.line_of(start),
                self.count
            );
        }
        syntax_fault(self.source, start, &format!(", element {}", self.count), e)
    }
}

/// A fault of syntax in the value that begins at `start`, placed in the file.
fn syntax_fault(source: &Source<'_>, start: usize, element: &str, e: &serde_json::Error) -> String {
    let line = source.line_of(start) + e.line() - 1;
    let before = if e.line() == 1 { source.column_of(start) - 1 } else { 0 };
    format!("line {line}, column {}{element}: {}", before + e.column(), bare(e))
}

/// serde_json's message without its position, which counts from the value's start.
fn bare(e: &serde_json::Error) -> String {
    let message = e.to_string();
    let position = format!(" at line {} column {}", e.line(), e.column());
    message.strip_suffix(&position).unwrap_or(&message).to_string()
}

struct Fault {
    line: usize,
    text: String,
}

/// The record of a value that is known to be JSON.
fn record(source: &Source<'_>, range: Range<usize>, names: Names<'_>) -> Result<Record, Fault> {
    let line = source.line_of(range.start);
    let text = source.text(range).map_err(|e| Fault { line: e.line, text: e.to_string() })?;
    let mut deserializer = Deserializer::from_str(text);
    let fields =
        Object { names }.deserialize(&mut deserializer).map_err(|e| Fault { line, text: bare(&e) })?;
    let keys: Vec<&str> = fields.keys.iter().map(String::as_str).collect();
    match (string(names.input, fields.input, &keys), string(names.output, fields.output, &keys)) {
        (Ok(input), Ok(output)) => Ok(Record { input, output, line }),
        (Err(text), Ok(_)) | (Ok(_), Err(text)) => Err(Fault { line, text }),
        (Err(input), Err(output)) => Err(Fault { line, text: format!("{input}; {output}") }),
    }
}

/// The one string that a key has, of all values that the object gives it.
fn string(name: &str, mut values: Vec<Value>, keys: &[&str]) -> Result<String, String> {
    if values.len() > 1 {
        return Err(format!("field `{name}`: expected the key once, found it {} times", values.len()));
    }
    match values.pop() {
        None => Err(format!("no key `{name}`{}", found_names(name, "key", keys))),
        Some(Value::String(text)) => match blank(&text) {
            Some(why) => Err(format!("field `{name}`: {why}")),
            None => Ok(text),
        },
        Some(Value::Number(n)) => Err(unquoted(name, "number", &n)),
        Some(Value::Bool(b)) => Err(unquoted(name, "boolean", &b)),
        Some(Value::Null) => Err(format!("field `{name}`: expected a string, found null")),
        Some(Value::Array(_)) => Err(format!("field `{name}`: expected a string, found a list")),
        Some(Value::Object(_)) => Err(format!("field `{name}`: expected a string, found an object")),
    }
}

fn unquoted(name: &str, kind: &str, value: &dyn fmt::Display) -> String {
    format!(
        "field `{name}`: expected a string, found the {kind} {value}; hint: put it in quotes: \"{value}\""
    )
}

/// Collects the two fields of an object, however often each is there, and all keys.
struct Object<'a> {
    names: Names<'a>,
}

#[derive(Default)]
struct Fields {
    input: Vec<Value>,
    output: Vec<Value>,
    keys: Vec<String>,
}

impl<'de> DeserializeSeed<'de> for Object<'_> {
    type Value = Fields;

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<Fields, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Object<'_> {
    type Value = Fields;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Names { input, output } = self.names;
        write!(f, "an object with the keys `{input}` and `{output}`")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
        let mut fields = Fields::default();
        while let Some(key) = map.next_key::<String>()? {
            if key == self.names.input {
                fields.input.push(map.next_value()?);
            } else if key == self.names.output {
                fields.output.push(map.next_value()?);
            } else {
                map.next_value::<IgnoredAny>()?;
            }
            fields.keys.push(key);
        }
        Ok(fields)
    }
}
