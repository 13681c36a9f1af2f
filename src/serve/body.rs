//! Reads a request's body, with limits of size and time, decompresses it, and parses its JSON.

use super::content_encoding::{GZIP_MAGIC, decompress};
use crate::serve::api_error::ApiError;
use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, StatusCode, header};
use http_body_util::BodyExt;
use serde_json::{Map, Value};
use std::time::Duration;

/// Bodies that are too large are read to their end up to this number of bytes, and discarded: otherwise a client that
/// is still writing would see its connection reset instead of the answer.
const MAX_DRAINED_BYTES: usize = 64 << 20;

/// The mark that some editors and Windows programs write before UTF-8.
const BYTE_ORDER_MARK: &str = "\u{feff}";

/// How large a body may be and how long it may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BodyLimits {
    /// Most bytes, compressed and decompressed.
    pub bytes: usize,
    /// Most seconds until the body is complete.
    pub seconds: f64,
}

/// The body's bytes, decompressed and without a byte order mark.
///
/// # Errors
/// Returns 413 if there are too many bytes, compressed or decompressed; 408 if they take too long; 415 if the encoding
/// is not supported; 400 if the connection breaks or the body does not have its encoding.
pub(crate) async fn read(limits: BodyLimits, headers: &HeaderMap, body: Body) -> Result<Bytes, ApiError> {
    let most = limits.bytes;
    let announced =
        headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()).and_then(|v| v.parse().ok());
    if announced.is_some_and(|length: usize| length > most && length > MAX_DRAINED_BYTES) {
        return Err(too_large(most));
    }
    let limit = Duration::from_secs_f64(limits.seconds);
    let Ok(read) = tokio::time::timeout(limit, collect(body, most)).await else {
        let message = format!("expected the whole body within {} s", limits.seconds);
        return Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, "request_timeout", message));
    };
    let bytes = Bytes::from(decompress(headers, read?, most)?);
    let mark = if bytes.starts_with(BYTE_ORDER_MARK.as_bytes()) { BYTE_ORDER_MARK.len() } else { 0 };
    Ok(bytes.slice(mark..))
}

async fn collect(mut body: Body, most: usize) -> Result<Vec<u8>, ApiError> {
    let (mut bytes, mut total) = (Vec::new(), 0);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| ApiError::malformed(format!("reading the body: {error}")))?;
        let Ok(data) = frame.into_data() else { continue };
        total += data.len();
        if total <= most {
            bytes.extend_from_slice(&data);
        } else if total > most.max(MAX_DRAINED_BYTES) {
            break;
        } else {
            bytes = Vec::new();
        }
    }
    if total > most { Err(too_large(most)) } else { Ok(bytes) }
}

fn too_large(most: usize) -> ApiError {
    let message = format!("expected a body of at most {most} bytes, found a larger one");
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "request_too_large", message)
}

/// The JSON object in a body.
///
/// # Errors
/// Returns 400, with the position, if the body is not UTF-8 or not JSON, or is another JSON value than an object.
pub(crate) fn object(bytes: &[u8]) -> Result<Map<String, Value>, ApiError> {
    let text = std::str::from_utf8(bytes).map_err(|error| not_utf8(bytes, error))?;
    match serde_json::from_str(text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(other) => Err(ApiError::malformed(format!(
            "expected a JSON object as the body, found {}",
            describe(&other)
        ))),
        Err(error) => {
            Err(ApiError::malformed(format!("expected JSON as the body: {error}{}", hint(text, &error))))
        }
    }
}

/// The error for a body that is not UTF-8, with what the bytes look like.
fn not_utf8(bytes: &[u8], error: std::str::Utf8Error) -> ApiError {
    let valid = error.valid_up_to();
    let looks = match bytes {
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => "the body looks like UTF-16".to_owned(),
        bytes if bytes.starts_with(&GZIP_MAGIC) => {
            "the body is gzip: say so by the header `content-encoding: gzip`".to_owned()
        }
        _ => {
            let (line, column) = position(&bytes[..valid]);
            let byte = bytes[valid];
            let latin = format!("in Latin-1 that is {:?}", char::from(byte));
            let cut = "the text ends inside of a character".to_owned();
            let looks = if error.error_len().is_none() { cut } else { latin };
            format!("byte 0x{byte:02x} at line {line} column {column} is not UTF-8; {looks}")
        }
    };
    ApiError::malformed(format!("expected JSON in UTF-8 as the body: {looks}"))
}

/// Line and column of the byte after `before`, both from 1. Columns count bytes, as serde_json's do.
fn position(before: &[u8]) -> (usize, usize) {
    let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
    let column = before.iter().rev().take_while(|byte| **byte != b'\n').count() + 1;
    (line, column)
}

/// A hint about what the client sent instead of JSON, if it can be recognised.
fn hint(text: &str, error: &serde_json::Error) -> String {
    let start = text.trim_start();
    let hint = if start.is_empty() {
        "the body is empty"
    } else if text.starts_with('\'') {
        "it begins with ', which a shell should have taken away: in cmd.exe write -d \"{\\\"model\\\": ...}\""
    } else if start.starts_with("--") && start.contains("form-data") {
        "it is a form with parts: send JSON instead, with curl by -d and not by -F"
    } else if start.contains('=') && !start.starts_with(['{', '[', '"']) {
        "it is a form: send JSON instead, in Python by requests.post(url, json=...)"
    } else if let Some(word) = python(start, error) {
        return format!("; {word}");
    } else {
        return String::new();
    };
    format!("; {hint}")
}

/// A hint about numbers and dictionaries as Python writes them, which are not JSON.
fn python(text: &str, error: &serde_json::Error) -> Option<String> {
    let line = text.split('\n').nth(error.line().saturating_sub(1)).unwrap_or_default().as_bytes();
    let around = line.get(error.column().saturating_sub(2).min(line.len())..).unwrap_or_default();
    let near = |word: &str| {
        let mut places = around.windows(word.len().min(around.len().max(1))).take(3);
        places.any(|place| place == word.as_bytes())
    };
    if let Some(word) = ["NaN", "Infinity", "-Infinity"].into_iter().find(|word| near(word)) {
        return Some(format!("{word} is no JSON number"));
    }
    let words = ["True", "False", "None"].into_iter().any(near);
    let quotes = around.iter().take(2).any(|byte| *byte == b'\'');
    (words || quotes).then(|| {
        "it looks like Python's text of a dictionary: JSON has \"...\", true, false and null (json.dumps)"
            .into()
    })
}

/// A value in an error message: short, and with its type visible.
pub(crate) fn describe(value: &Value) -> String {
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
    fn body_that_is_not_json_gets_a_hint() {
        let message = |bytes: &[u8]| object(bytes).unwrap_err().message;
        for (body, words) in [
            (&b""[..], "the body is empty"),
            (b" \n", "the body is empty"),
            (b"'{model:", "cmd.exe"),
            (b"model=m&prompt=caf%C3%A9", "it is a form"),
            (b"--x\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nm", "form with parts"),
            (b"{'model': 'm'}", "Python"),
            (b"{\"stream\": True}", "Python"),
            (b"{\"stop\": None}", "Python"),
            (
                b"{\"model\":\"m\",\n\"prompt\":\"caf\xe9\"}",
                "byte 0xe9 at line 2 column 14 is not UTF-8; in Latin-1 that is '\u{e9}'",
            ),
            (b"{\"model\":\"\xe2\x82", "ends inside of a character"),
            (b"\xff\xfe{\0\"\0", "UTF-16"),
            (b"\x1f\x8b\x08\0", "`content-encoding: gzip`"),
        ] {
            assert!(message(body).contains(words), "{words} is not in {}", message(body));
        }
        assert!(!message(b"{\"a\": \"b=c\", }").contains("form"));
    }

    #[test]
    fn nested_too_deeply_is_an_error_and_no_overflow() {
        let text = format!("{{\"a\": {}", "[".repeat(100_000));
        assert!(object(text.as_bytes()).unwrap_err().message.contains("recursion limit"));
    }
}
