//! JSON values that are not parsed yet: their place, and their text.

use std::fmt;

use serde::de::{DeserializeSeed, MapAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Deserializer, Value};

use super::super::problems::ValueKind;
use super::super::{FileNotes, blank};

/// The keys of an object in order, duplicates included, with the text of their values.
pub(super) struct Entries<'a>(pub(super) Vec<(String, &'a str)>);

impl<'a> Entries<'a> {
    /// Parses the text of an object; the message about another value names `expected`.
    pub(super) fn parse(text: &'a str, expected: &str) -> serde_json::Result<Self> {
        Object { expected }.deserialize(&mut Deserializer::from_str(text))
    }

    /// The value of a key, the first if there are several.
    pub(super) fn get(&self, name: &str) -> Option<&'a str> {
        self.0.iter().find(|(key, _)| key == name).map(|(_, value)| *value)
    }

    pub(super) fn keys(&self) -> Vec<&str> {
        self.0.iter().map(|(key, _)| key.as_str()).collect()
    }
}

struct Object<'a> {
    expected: &'a str,
}

impl<'de> DeserializeSeed<'de> for Object<'_> {
    type Value = Entries<'de>;

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<Entries<'de>, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Object<'_> {
    type Value = Entries<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expected)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries<'de>, A::Error> {
        let mut entries = Vec::new();
        while let Some((key, value)) = map.next_entry::<String, &RawValue>()? {
            entries.push((key, value.get()));
        }
        Ok(Entries(entries))
    }
}

/// The elements of the text of a list.
pub(super) fn elements(text: &str) -> Option<Vec<&str>> {
    let elements: Vec<&RawValue> = serde_json::from_str(text).ok()?;
    Some(elements.into_iter().map(RawValue::get).collect())
}

/// The text of the value of field `name`: a string's content, a number or a boolean as it is written.
pub(super) fn text(name: &str, raw: &str, notes: &mut FileNotes) -> Result<String, String> {
    let wrong = |found: &str| Err(format!("field `{name}`: expected a string, found {found}"));
    match serde_json::from_str::<Value>(raw) {
        Ok(Value::String(text)) => match blank(&text) {
            Some(why) => Err(format!("field `{name}`: {why}")),
            None => Ok(text),
        },
        Ok(Value::Number(_)) => {
            notes.value(ValueKind::Number, raw);
            Ok(raw.to_owned())
        }
        Ok(Value::Bool(_)) => {
            notes.value(ValueKind::Boolean, raw);
            Ok(raw.to_owned())
        }
        Ok(Value::Null) => wrong("null"),
        Ok(Value::Array(_)) => wrong("a list"),
        Ok(Value::Object(_)) => wrong("an object"),
        Err(e) => Err(format!("field `{name}`: {}", not_text(raw, &e))),
    }
}

/// Why a well-formed JSON value can't be text.
pub(super) fn not_text(raw: &str, e: &serde_json::Error) -> String {
    match lone_surrogate(raw) {
        Some(escape) => format!(
            "expected text, found the lone surrogate {escape}, half of a character; hint: the text was cut within a \
             character such as an emoji"
        ),
        None => super::bare(e),
    }
}

/// The first escape that is one half of a surrogate pair.
fn lone_surrogate(raw: &str) -> Option<&str> {
    let unit = |at: usize| {
        let digits = raw.get(at..at + 6)?.strip_prefix("\\u")?;
        u16::from_str_radix(digits, 16).ok()
    };
    let mut at = 0;
    while let Some(found) = raw[at..].find('\\') {
        at += found;
        match (unit(at), unit(at + 6)) {
            (Some(0xD800..=0xDBFF), Some(0xDC00..=0xDFFF)) => at += 12,
            (Some(0xD800..=0xDFFF), _) => return raw.get(at..at + 6),
            // The escaped character may be a backslash itself.
            _ => at += 1 + raw[at + 1..].chars().next().map_or(0, char::len_utf8),
        }
    }
    None
}

/// A word or quote outside strings that is not JSON but Python or JavaScript, and a hint.
pub(super) fn foreign_word(text: &str) -> Option<(&str, &'static str)> {
    const WORDS: [(&str, &str); 8] = [
        ("NaN", "JSON has no NaN; give the field a value, or take the row out"),
        ("Infinity", "JSON has no infinite numbers"),
        ("nan", "JSON has no NaN; give the field a value, or take the row out"),
        ("undefined", "JSON has no undefined; give the field a value, or take the row out"),
        ("None", PYTHON),
        ("True", PYTHON),
        ("False", PYTHON),
        ("'", PYTHON),
    ];
    const PYTHON: &str = "this is Python's notation; json.dumps writes JSON, str and repr do not";
    let (mut inside, mut escaped) = (false, false);
    for (at, c) in text.char_indices() {
        match (inside, c) {
            (true, _) if escaped => escaped = false,
            (true, '\\') => escaped = true,
            (_, '"') => inside = !inside,
            (true, _) => {}
            (false, c) if c.is_ascii_alphabetic() || c == '\'' => {
                let rest = &text[at..];
                if let Some((word, hint)) = WORDS.iter().find(|(word, _)| rest.starts_with(word)) {
                    return Some((&rest[..word.len()], hint));
                }
                let is_json = ["true", "false", "null"].iter().any(|word| rest.starts_with(word));
                let in_word = text[..at].ends_with(|c: char| c.is_ascii_alphanumeric());
                if !is_json && !in_word {
                    return None;
                }
            }
            (false, _) => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lone_surrogate_passes_over_pairs_and_escaped_backslashes() {
        assert_eq!(lone_surrogate(r#""\ud83d\ude00 \\ud83d""#), None);
        assert_eq!(lone_surrogate(r#""a \ud83d b""#), Some(r"\ud83d"));
        assert_eq!(lone_surrogate(r#""\ude00\ud83d""#), Some(r"\ude00"));
        assert_eq!(lone_surrogate(r#""\\\ud83d\n""#), Some(r"\ud83d"));
    }

    #[test]
    fn foreign_word_looks_outside_strings_alone() {
        let word = |text: &str| foreign_word(text).map(|(word, _)| word.to_owned());
        assert_eq!(word(r#"{"a": "NaN, it's None", "b": -Infinity}"#).as_deref(), Some("Infinity"));
        assert_eq!(word(r#"{"a\"": true, "b": NaN}"#).as_deref(), Some("NaN"));
        assert_eq!(word("{'a': 1}").as_deref(), Some("'"));
        assert_eq!(word(r#"{"a": truth}"#), None);
    }
}
