//! Which fields of a request are obeyed, which have no effect on the answer, and which are refused.
//!
//! A route has a [`FieldTable`]. A field that the table does not list is unknown. An unknown field whose name is close
//! to that of an obeyed one is refused as a misspelling. Any other is ignored, and the response's header [`IGNORED`]
//! names it, because clients send fields of their own that no engine uses.

mod engines;
mod openai;
mod watsonx;
mod watsonx_chat;

use crate::serve::api_error::ApiError;
use axum::http::{HeaderName, HeaderValue};
use axum::response::Response;
use serde_json::{Map, Value};

pub(super) use openai::{CHAT, COMPLETIONS, RESPONSES};
pub(super) use watsonx::{CLASSIFY, GENERATION};
pub(super) use watsonx_chat::{TOKENIZATION, WATSONX_CHAT};

/// The response header that names the ignored fields.
pub(super) const IGNORED: HeaderName = HeaderName::from_static("x-gneiss-ignored-fields");
/// Most names in the header.
const MAX_NAMES: usize = 16;
/// Most characters of a name in the header.
const MAX_NAME_CHARS: usize = 64;

/// The fields of an object in a request.
#[derive(Debug)]
pub(crate) struct FieldTable {
    /// The request that has these fields, as the documentation calls it.
    pub request: &'static str,
    /// Fields that have an effect.
    pub obeyed: &'static [&'static [&'static str]],
    /// Known fields that have no effect on an answer of this server.
    pub without_effect: &'static [&'static [&'static str]],
    /// Known fields that would change the answer, but that the server does not support.
    pub refused: &'static [&'static [RefusedFields]],
    /// Tables of fields that are objects.
    pub nested: &'static [(&'static str, &'static FieldTable)],
}

/// Fields that are refused, unless their values mean that they are off.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RefusedFields {
    /// Their names. A name that ends in `*` stands for all names with this beginning.
    pub names: &'static [&'static str],
    /// Values that mean that a field is off.
    pub off: Off,
    /// What the client can do instead.
    pub hint: &'static str,
}

/// Values that mean that a field is off.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Off {
    /// `null`.
    Null,
    /// `null` and `true`.
    True,
    /// `null` and `false`.
    False,
    /// `null`, `false`, `""`, `[]` and `{}`.
    Empty,
    /// Those of `Empty`, and this number.
    Number(f64),
    /// Those of `Empty`, any of these words, and a list of these words only.
    Words(&'static [&'static str]),
}

/// Fields that are refused unless they are off.
pub(crate) const fn refused(names: &'static [&'static str], off: Off, hint: &'static str) -> RefusedFields {
    RefusedFields { names, off, hint }
}

impl Off {
    fn covers(self, value: &Value) -> bool {
        match (self, value) {
            (_, Value::Null) => true,
            (Self::Null, _) => false,
            (Self::True, value) => *value == Value::Bool(true),
            (_, Value::Bool(false)) => true,
            (Self::False, _) => false,
            (Self::Number(off), Value::Number(number)) => number.as_f64() == Some(off),
            (Self::Words(words), Value::String(text)) => text.is_empty() || words.contains(&text.as_str()),
            (Self::Words(words), Value::Array(items)) => {
                items.iter().all(|item| item.as_str().is_some_and(|text| words.contains(&text)))
            }
            (_, Value::String(text)) => text.is_empty(),
            (_, Value::Array(items)) => items.is_empty(),
            (_, Value::Object(map)) => map.is_empty(),
            _ => false,
        }
    }
}

/// Names of fields that were ignored.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Ignored(Vec<String>);

impl Ignored {
    /// Adds a name.
    pub fn note(&mut self, name: String) {
        self.0.push(name);
    }

    /// The names.
    pub fn names(&self) -> &[String] {
        &self.0
    }

    /// Names them in a header of the response.
    pub fn add_header(&self, mut response: Response) -> Response {
        let shown = |name: &String| {
            let plain = |c: char| if c.is_ascii_graphic() && c != ',' { c } else { '?' };
            name.chars().take(MAX_NAME_CHARS).map(plain).collect::<String>()
        };
        let mut names: Vec<String> = self.0.iter().take(MAX_NAMES).map(shown).collect();
        if self.0.len() > MAX_NAMES {
            names.push("...".into());
        }
        if !names.is_empty()
            && let Ok(value) = HeaderValue::from_str(&names.join(", "))
        {
            response.headers_mut().insert(IGNORED, value);
        }
        response
    }
}

impl FieldTable {
    /// Checks every field of a request.
    ///
    /// # Errors
    /// Returns 400 if a field is refused, or if the name of an unknown field is close to that of an obeyed one.
    pub fn check(&self, object: &Map<String, Value>) -> Result<Ignored, ApiError> {
        let mut ignored = Ignored::default();
        self.check_below("", object, &mut ignored)?;
        Ok(ignored)
    }

    fn check_below(
        &self,
        prefix: &str,
        object: &Map<String, Value>,
        ignored: &mut Ignored,
    ) -> Result<(), ApiError> {
        for (key, value) in object {
            let name = format!("{prefix}{key}");
            if let (Some(table), Value::Object(inner)) = (self.nested(key), value) {
                table.check_below(&format!("{name}."), inner, ignored)?;
            }
            if lists(self.obeyed, key) || lists(self.without_effect, key) {
                continue;
            }
            if let Some(refused) = self.refusal(key) {
                if !refused.off.covers(value) {
                    return Err(ApiError::unsupported(name, refused.hint));
                }
            } else if value.is_null() {
                // As if it were absent.
            } else if let Some(meant) = self.nearest(key) {
                let problem = format!("there is no such field; did you mean `{prefix}{meant}`?");
                return Err(ApiError { code: "unknown_parameter", ..ApiError::invalid(name, problem) });
            } else {
                ignored.0.push(name);
            }
        }
        Ok(())
    }

    /// Whether the table lists a field of this name.
    pub fn knows(&self, key: &str) -> bool {
        lists(self.obeyed, key) || lists(self.without_effect, key) || self.refusal(key).is_some()
    }

    /// The table of a field that is an object.
    pub fn nested(&self, key: &str) -> Option<&'static FieldTable> {
        self.nested.iter().find(|(name, _)| *name == key).map(|(_, table)| *table)
    }

    /// The names of the refused fields, each with how it is refused.
    fn refusals(&self) -> impl Iterator<Item = (&'static str, &'static RefusedFields)> + use<> {
        let all = self.refused.iter().flat_map(|list| list.iter());
        all.flat_map(|refused| refused.names.iter().map(move |name| (*name, refused)))
    }

    /// How the field of this name is refused: by the full name, else by its beginning.
    fn refusal(&self, key: &str) -> Option<&'static RefusedFields> {
        let begins = |name: &str| name.strip_suffix('*').is_some_and(|beginning| key.starts_with(beginning));
        let mut all = self.refusals();
        let found =
            all.find(|(name, _)| *name == key).or_else(|| self.refusals().find(|(name, _)| begins(name)));
        found.map(|(_, refused)| refused)
    }

    /// The obeyed field of which an unknown name is a misspelling: the same but for case and underscores, or, if the
    /// name is long enough, with a letter missing, added, changed or moved.
    fn nearest(&self, key: &str) -> Option<&'static str> {
        let bare = |name: &str| {
            name.chars().filter(|c| *c != '_' && *c != '-').flat_map(char::to_lowercase).collect::<String>()
        };
        let given = bare(key);
        let near = |name: &&str| {
            let known = bare(name);
            let slips = match known.len().min(given.len()) {
                0..5 => 0,
                5..10 => 1,
                _ => 2,
            };
            strsim::osa_distance(&known, &given) <= slips
        };
        self.obeyed.iter().flat_map(|list| list.iter().copied()).find(|name| near(name))
    }
}

fn lists(lists: &[&[&str]], key: &str) -> bool {
    lists.iter().any(|list| list.contains(&key))
}

#[cfg(test)]
mod pages;
#[cfg(test)]
mod tests;
