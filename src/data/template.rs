//! The verbalizer: a text with one place for the input.

use crate::{Error, Result};

const PLACE: &str = "{{input}}";

/// A parsed verbalizer in watsonx's form: `head {{input}} tail`.
///
/// ```text
/// "classify {0, 1} {{input}}\nLabel:"
///  └──── head ────┘          └ tail ┘
/// ```
///
/// Single braces are literal, and so is a `}}` that no `{{` opens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    head: String,
    tail: String,
}

impl Template {
    /// Parses a verbalizer, which must contain `{{input}}` exactly once and no other `{{name}}`.
    ///
    /// # Errors
    /// Returns [`Error::Config`] with every problem and its position (characters, counted from 1).
    pub fn parse(verbalizer: &str) -> Result<Self> {
        let mut problems = Vec::new();
        let mut found: Option<(usize, usize)> = None; // (byte, character) of the first `{{input}}`
        for place in places(verbalizer) {
            let at = verbalizer[..place.start].chars().count() + 1;
            match (place.name, found) {
                (Some("input"), None) => found = Some((place.start, at)),
                (Some("input"), Some((_, first))) => problems.push(format!(
                    "expected {PLACE} once, found it at character {first} and again at character {at}"
                )),
                (Some(name), _) => problems.push(format!(
                    "unknown placeholder {{{{{name}}}}} at character {at}; the only one is {PLACE}"
                )),
                (None, _) => problems.push(format!(
                    "the {{{{ at character {at} has no closing }}}}; a single {{ is literal text"
                )),
            }
        }
        match found {
            Some((start, _)) if problems.is_empty() => Ok(Self {
                head: verbalizer[..start].to_string(),
                tail: verbalizer[start + PLACE.len()..].to_string(),
            }),
            _ => {
                if found.is_none() {
                    problems.push(format!(
                        "expected {PLACE} once, found no {PLACE} in `{verbalizer}`; it marks the input's \
                         place"
                    ));
                }
                Err(Error::Config { origin: "verbalizer".into(), problems })
            }
        }
    }

    /// The text with `input` in its place.
    pub fn render(&self, input: &str) -> String {
        [self.head.as_str(), input, self.tail.as_str()].concat()
    }

    /// The text before the input; it is the same for every example.
    pub fn head(&self) -> &str {
        &self.head
    }

    /// The text after the input.
    pub fn tail(&self) -> &str {
        &self.tail
    }
}

/// A `{{name}}`; `name` is `None` if it isn't closed.
struct Placeholder<'a> {
    start: usize,
    name: Option<&'a str>,
}

/// All places of `text`, in order.
fn places(text: &str) -> impl Iterator<Item = Placeholder<'_>> {
    let mut from = 0;
    std::iter::from_fn(move || {
        let run = from + text[from..].find("{{")?;
        // With three or more braces the innermost two open the place: `{{{input}}}` is `{`, place, `}`.
        let inner = run + text[run..].bytes().take_while(|b| *b == b'{').count();
        let name = text[inner..].find("}}").map(|len| &text[inner..inner + len]);
        from = name.map_or(text.len(), |name| inner + name.len() + 2);
        Some(Placeholder { start: inner - 2, name })
    })
}
