//! The row that an object gives: two fields, or a chat.

use std::ops::Range;

use serde_json::Value;

use super::super::chat::{self, Message, MessageContent};
use super::super::problems::FileNotes;
use super::super::source::SourceFile;
use super::super::{FieldNames, Record, found_names};
use super::value::{self, Entries};

/// The fault of a row.
pub(super) struct Fault {
    pub(super) line: usize,
    pub(super) text: String,
    /// Whether many rows are likely to have it; then it is reported once.
    pub(super) common: bool,
    /// Whether the row's place in a list is reported if it is the only row with the fault.
    pub(super) placed: bool,
}

/// The record of a value that is known to be JSON.
pub(super) fn read(
    source: &SourceFile<'_>,
    range: Range<usize>,
    names: FieldNames<'_>,
    notes: &mut FileNotes,
) -> Result<Record, Fault> {
    let line = source.line_of(range.start);
    let fault = |text: String| Fault { line, text, common: false, placed: true };
    let text = source.text(range).map_err(|e| Fault { line: e.line, ..fault(e.to_string()) })?;
    let expected = format!("an object with the keys {}", names.both());
    let entries = Entries::parse(text, &expected).map_err(|e| fault(value::not_text(text, &e)))?;
    let keys = entries.keys();
    // The form in which the hub serves the rows of a data set.
    if keys.contains(&"row_idx")
        && let Some(row) = entries.get("row").filter(|raw| raw.starts_with('{'))
    {
        let start = source.offset_of(row);
        return read(source, start..start + row.len(), names, notes);
    }
    if let Some(key) = chat::key(names, &keys) {
        let pair = chat_pair(key, &entries);
        let (input, output) = pair.map_err(|text| Fault { line, text, common: true, placed: false })?;
        notes.chat(key);
        return Ok(Record { input, output, line });
    }
    let absent = [names.input, names.output].map(|name| !keys.contains(&name));
    let fault = |text: String| Fault { common: absent.contains(&true), ..fault(text) };
    match (field(names.input, &entries, &keys, notes), field(names.output, &entries, &keys, notes)) {
        (Ok(input), Ok(output)) => Ok(Record { input, output, line }),
        (Err(text), Ok(_)) | (Ok(_), Err(text)) => Err(fault(text)),
        (Err(_), Err(_)) if absent == [true, true] && keys.len() >= 2 => {
            let list: Vec<String> = keys.iter().map(|key| format!("`{key}`")).collect();
            Err(fault(format!(
                "no keys {}; found {}; hint: name the two that hold them, data.input and data.output in a configuration, \
                 --input and --output of `gneiss inspect`",
                names.both(),
                list.join(", ")
            )))
        }
        (Err(input), Err(output)) => Err(fault(format!("{input}; {output}"))),
    }
}

/// The text of a key, which must occur once in the object.
fn field(name: &str, entries: &Entries<'_>, keys: &[&str], notes: &mut FileNotes) -> Result<String, String> {
    match keys.iter().filter(|key| **key == name).count() {
        0 => Err(format!("no key `{name}`{}", found_names(name, "key", keys))),
        1 => value::text(name, entries.get(name).unwrap_or_default(), notes),
        n => Err(format!("field `{name}`: expected the key once, found it {n} times")),
    }
}

/// Input and output of the chat under `key`.
fn chat_pair(key: &str, entries: &Entries<'_>) -> Result<(String, String), String> {
    let raw = entries.get(key).unwrap_or_default();
    let messages: Value =
        serde_json::from_str(raw).map_err(|e| format!("`{key}`: {}", value::not_text(raw, &e)))?;
    let Value::Array(messages) = messages else {
        return Err(format!("`{key}`: expected a list of messages, found another value"));
    };
    let context: Vec<&str> = chat::CONTEXT
        .into_iter()
        .filter(|name| entries.get(name).is_some_and(|raw| !["null", "\"\"", "[]"].contains(&raw)))
        .collect();
    let messages =
        messages.into_iter().map(|message| parse_message(key, message)).collect::<Result<_, _>>()?;
    chat::pair(key, messages, &context)
}

/// A message in the form of OpenAI's (`role`, `content`) or ShareGPT's (`from`, `value`) files.
fn parse_message(key: &str, message: Value) -> Result<Message, String> {
    let either = |names: [&str; 2]| names.iter().find_map(|name| message.get(*name));
    let Some(Value::String(role)) = either(["role", "from"]) else {
        return Err(format!("`{key}`: expected messages with `role` and `content`, or `from` and `value`"));
    };
    let calls = ["tool_calls", "function_call"];
    let has_calls = calls.iter().any(|name| message.get(*name).is_some_and(|calls| !calls.is_null()));
    let content = match either(["content", "value"]) {
        _ if has_calls => MessageContent::Other("tool calls"),
        Some(Value::String(text)) => MessageContent::Text(text.clone()),
        Some(Value::Array(parts)) => match &parts[..] {
            [part] if part["type"] == "text" => match &part["text"] {
                Value::String(text) => MessageContent::Text(text.clone()),
                _ => MessageContent::Other("a part without text"),
            },
            _ => MessageContent::Other("a list of parts"),
        },
        None | Some(Value::Null) => MessageContent::Other("null"),
        Some(_) => MessageContent::Other("another value"),
    };
    let ignored = message.get("weight").is_some_and(|weight| weight.as_f64() == Some(0.0));
    Ok(Message { role: role.to_lowercase(), content, ignored })
}
