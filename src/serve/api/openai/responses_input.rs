//! Translates a body of `POST /v1/responses` to one of `POST /v1/chat/completions`.

use crate::serve::api_error::ApiError;
use crate::serve::body::describe;
use crate::serve::fields::RESPONSES;
use crate::serve::params::Fields;
use serde_json::{Map, Value, json};

/// The value of `include` that has an effect.
const LOGPROBS: &str = "message.output_text.logprobs";
/// The other values of `include`. They are about tools, images and reasoning, which no answer of this server has.
const NOTHING_TO_INCLUDE: [&str; 7] = [
    "file_search_call.results", "web_search_call.results", "web_search_call.action.sources",
    "message.input_image.image_url", "computer_call_output.output.image_url",
    "code_interpreter_call.outputs", "reasoning.encrypted_content",
];

/// Most entries of `include`.
const MOST_INCLUDED: usize = 32;

/// Names of fields in chats and in responses, if they differ.
pub(super) const NAMES: [(&str, &str); 3] = [
    ("max_completion_tokens", "max_output_tokens"),
    ("response_format", "text.format"),
    ("messages", "input"),
];

/// Fields that are translated here and not copied.
const TRANSLATED: [&str; 6] =
    ["input", "instructions", "max_output_tokens", "include", "text", "stream_options"];

/// The body of the chat that is equivalent to a response's body.
///
/// # Errors
/// Returns 400 if a value is invalid. Values that are copied are checked when the chat is read.
pub(super) fn chat(fields: &Fields, object: &Map<String, Value>) -> Result<Map<String, Value>, ApiError> {
    let obeyed = |key: &str| RESPONSES.obeyed.iter().any(|list| list.contains(&key));
    let passed = object.iter().filter(|(key, _)| obeyed(key) && !TRANSLATED.contains(&key.as_str()));
    let mut chat: Map<String, Value> = passed.map(|(key, value)| (key.clone(), value.clone())).collect();
    let mut messages = Vec::new();
    if let Some(instructions) = fields.string("instructions")?.filter(|text| !text.is_empty()) {
        messages.push(json!({"role": "system", "content": instructions}));
    }
    messages.extend(input(fields)?);
    chat.insert("messages".into(), messages.into());
    if let Some(most) = fields.count("max_output_tokens", 1..=usize::MAX)? {
        chat.insert("max_completion_tokens".into(), most.into());
    }
    let top = fields.get("top_logprobs").is_some_and(|top| top.as_u64() != Some(0));
    if logprobs(fields)? || top {
        chat.insert("logprobs".into(), true.into());
    }
    if let Some(text) = fields.object("text", "text.")?
        && let Some(format) = text.object("format", "text.format.")?
    {
        chat.insert("response_format".into(), response_format(&format)?);
    }
    Ok(chat)
}

/// `input`: a text, or messages of text.
fn input(fields: &Fields) -> Result<Vec<Value>, ApiError> {
    match fields.get("input") {
        None => Err(ApiError::missing("input", "a string, or a list of messages")),
        Some(Value::String(text)) => Ok(vec![json!({"role": "user", "content": text})]),
        Some(Value::Array(items)) if !items.is_empty() => {
            items.iter().enumerate().map(|(i, item)| message(item, &format!("input[{i}]"))).collect()
        }
        Some(other) => Err(fields.wrong("input", "a string, or a list of one message or more", other)),
    }
}

/// One message of `input`. It may be a message of an earlier response.
fn message(item: &Value, key: &str) -> Result<Value, ApiError> {
    if !item.is_object() {
        let problem = format!("expected a message with `role` and `content`, found {}", describe(item));
        return Err(ApiError::invalid(key, problem));
    }
    match item["type"].as_str() {
        None | Some("message") => {}
        Some(kind) => {
            let problem = format!("this server takes messages of text; found an item of type {kind}");
            return Err(ApiError::unsupported(key, &problem));
        }
    }
    let role = match item["role"].as_str() {
        Some(role @ ("user" | "assistant" | "system" | "developer")) => role,
        _ => {
            let found = describe(&item["role"]);
            let problem = format!("expected user, assistant, system or developer, found {found}");
            return Err(ApiError::invalid(format!("{key}.role"), problem));
        }
    };
    let content = match &item["content"] {
        text @ Value::String(_) => text.clone(),
        Value::Array(parts) => {
            let named = |(j, part)| content_part(part, &format!("{key}.content[{j}]"));
            parts.iter().enumerate().map(named).collect::<Result<Vec<_>, _>>()?.into()
        }
        other => {
            let problem = format!("expected a string or a list of text parts, found {}", describe(other));
            return Err(ApiError::invalid(format!("{key}.content"), problem));
        }
    };
    Ok(json!({"role": role, "content": content}))
}

/// One part of a message's content.
fn content_part(part: &Value, key: &str) -> Result<Value, ApiError> {
    match (part["type"].as_str(), part["text"].as_str()) {
        (Some("input_text" | "output_text" | "text"), Some(text)) => {
            Ok(json!({"type": "text", "text": text}))
        }
        (Some(kind), None) if !kind.ends_with("text") => {
            Err(ApiError::unsupported(key, &format!("expected text, found a part of type {kind}")))
        }
        _ => {
            let problem = format!("expected `type` input_text and `text`, found {}", describe(part));
            Err(ApiError::invalid(key, problem))
        }
    }
}

/// Whether `include` asks for log-probabilities.
fn logprobs(fields: &Fields) -> Result<bool, ApiError> {
    let included = fields.strings("include", MOST_INCLUDED)?.unwrap_or_default();
    let known = |name: &&String| *name == LOGPROBS || NOTHING_TO_INCLUDE.contains(&name.as_str());
    if let Some(unknown) = included.iter().find(|name| !known(name)) {
        let problem = format!("this server has {LOGPROBS} to include, found {unknown}");
        return Err(ApiError::unsupported("include", &problem));
    }
    Ok(included.iter().any(|name| name == LOGPROBS))
}

/// A chat's `response_format`, in which a schema and its name form an object.
fn response_format(format: &Fields) -> Result<Value, ApiError> {
    let entries = || format.entries().map(|(key, value)| (key.clone(), value.clone()));
    match format.string("type")? {
        Some("json_schema") => {
            let schema: Map<String, Value> = entries().filter(|(key, _)| key != "type").collect();
            Ok(json!({"type": "json_schema", "json_schema": schema}))
        }
        _ => Ok(entries().collect::<Map<String, Value>>().into()),
    }
}
