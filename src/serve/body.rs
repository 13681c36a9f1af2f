//! Reads a request's body: so many bytes in so much time, and JSON in it.

use super::app::Options;
use super::failure::Failure;
use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, StatusCode, header};
use http_body_util::BodyExt;
use serde_json::{Map, Value};
use std::time::Duration;

/// A body that is too large is read to its end up to this many bytes, and forgotten: a client that is still writing
/// would see its connection reset instead of the answer.
const DRAINED: usize = 64 << 20;

/// The body's bytes.
///
/// # Errors
/// 413 of more than `max_body_bytes`; 408 where they do not come within `body_seconds`; 400 of a broken connection.
pub(super) async fn read(options: &Options, headers: &HeaderMap, body: Body) -> Result<Bytes, Failure> {
    let most = options.max_body_bytes;
    let announced =
        headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()).and_then(|v| v.parse().ok());
    if announced.is_some_and(|length: usize| length > most && length > DRAINED) {
        return Err(too_large(most));
    }
    let limit = Duration::from_secs_f64(options.body_seconds);
    let Ok(read) = tokio::time::timeout(limit, whole(body, most)).await else {
        let message = format!("expected the whole body within {} s", options.body_seconds);
        return Err(Failure::new(StatusCode::REQUEST_TIMEOUT, "request_timeout", message));
    };
    read
}

async fn whole(mut body: Body, most: usize) -> Result<Bytes, Failure> {
    let (mut bytes, mut total) = (Vec::new(), 0);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Failure::malformed(format!("reading the body: {error}")))?;
        let Ok(data) = frame.into_data() else { continue };
        total += data.len();
        if total <= most {
            bytes.extend_from_slice(&data);
        } else if total > most.max(DRAINED) {
            break;
        } else {
            bytes = Vec::new();
        }
    }
    if total > most { Err(too_large(most)) } else { Ok(bytes.into()) }
}

fn too_large(most: usize) -> Failure {
    let message = format!("expected a body of at most {most} bytes, found a larger one");
    Failure::new(StatusCode::PAYLOAD_TOO_LARGE, "request_too_large", message)
}

/// The object in a body.
///
/// # Errors
/// 400 with the position of what is no JSON, or with what is there instead of an object.
pub(super) fn object(bytes: &[u8]) -> Result<Map<String, Value>, Failure> {
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(other) => {
            Err(Failure::malformed(format!("expected a JSON object as the body, found {}", describe(&other))))
        }
        Err(error) => {
            Err(Failure::malformed(format!("expected JSON as the body: {error}{}", hint(bytes, &error))))
        }
    }
}

/// Python writes numbers that JSON does not have.
fn hint(bytes: &[u8], error: &serde_json::Error) -> String {
    let line = bytes.split(|b| *b == b'\n').nth(error.line().saturating_sub(1)).unwrap_or_default();
    let around = line.get(error.column().saturating_sub(2).min(line.len())..).unwrap_or_default();
    let word = ["NaN", "Infinity", "-Infinity"].iter().find(|word| {
        let mut places = around.windows(word.len().min(around.len().max(1))).take(3);
        places.any(|place| place == word.as_bytes())
    });
    word.map(|word| format!("; {word} is no JSON number")).unwrap_or_default()
}

/// A value in an error message: short, and with its type visible.
pub(super) fn describe(value: &Value) -> String {
    match value {
        Value::Array(items) => format!("a list of {}", items.len()),
        Value::Object(_) => "an object".into(),
        Value::String(text) if text.chars().count() > 40 => "a string".into(),
        scalar => scalar.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn malformed_json_is_named_by_its_position() {
        let message = |text: &str| object(text.as_bytes()).unwrap_err().message;
        assert!(message("{\n \"a\": }").contains("line 2 column 7"), "{}", message("{\n \"a\": }"));
        assert!(message("[1]").contains("found a list of 1"));
        assert!(message("").contains("EOF"), "{}", message(""));
        for (text, word) in [
            (r#"{"temperature": NaN}"#, "NaN is no"),
            (r#"{"temperature": -Infinity}"#, "Infinity is no"),
            (r#"{"temperature": Infinity}"#, "Infinity is no"),
        ] {
            assert!(message(text).contains(word), "{}", message(text));
        }
        assert!(message(r#"{"temperature": 1e999}"#).contains("out of range"));
        assert!(!message(r#"{"a": x, "b": "NaN"}"#).contains("NaN"));
        assert_eq!(object(br#"{"a": 1}"#).unwrap()["a"], 1);
    }

    #[test]
    fn nested_too_deeply_is_an_error_and_no_overflow() {
        let text = format!("{{\"a\": {}", "[".repeat(100_000));
        assert!(object(text.as_bytes()).unwrap_err().message.contains("recursion limit"));
    }
}
