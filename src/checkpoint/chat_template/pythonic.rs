//! Makes minijinja write the same text as Jinja2: Python's names of values, its JSON, its string methods.

use super::{raise_exception, strftime_now};
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State};

/// Adds the filters and functions that transformers adds to Jinja2.
pub(super) fn adapt(environment: &mut Environment) {
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(format);
    environment.add_filter("tojson", tojson);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
}

/// Writes a value as Python's `str` does.
fn format(output: &mut Output, _: &mut State, value: &Value) -> Result<(), Error> {
    let text = match value.kind() {
        ValueKind::Undefined => return Ok(()),
        ValueKind::Bool | ValueKind::None => word(value).to_owned(),
        _ => value.to_string(),
    };
    output.write_str(&text).map_err(Error::from)
}

fn word(value: &Value) -> &'static str {
    match value.kind() {
        ValueKind::Bool if value.is_true() => "True",
        ValueKind::Bool => "False",
        _ => "None",
    }
}

/// `json.dumps(value, ensure_ascii=False)` with transformers' parameters: `indent`, `separators`, `sort_keys`.
fn tojson(value: &Value, kwargs: Kwargs) -> Result<String, Error> {
    let ensure_ascii: Option<bool> = kwargs.get("ensure_ascii")?;
    let indent: Option<Value> = kwargs.get("indent")?;
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let sort_keys: Option<bool> = kwargs.get("sort_keys")?;
    kwargs.assert_all_used()?;
    let indent = match indent.filter(|indent| !indent.is_none()) {
        None => None,
        Some(indent) => Some(match (indent.as_str(), indent.as_usize()) {
            (Some(text), _) => text.to_owned(),
            (None, Some(spaces)) => " ".repeat(spaces.min(16)),
            (None, None) => {
                return Err(Error::new(ErrorKind::InvalidOperation, "tojson: indent is no number"));
            }
        }),
    };
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "tojson: expected two separators")),
        // Python leaves out the space at the end of a line.
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let (ascii, sort_keys) = (ensure_ascii.unwrap_or(false), sort_keys.unwrap_or(false));
    let mut json = Json { text: String::new(), indent, item, key, ascii, sort_keys };
    json.write(value, 0)?;
    Ok(json.text)
}

/// A JSON text that is being written.
struct Json {
    text: String,
    indent: Option<String>,
    item: String,
    key: String,
    ascii: bool,
    sort_keys: bool,
}

impl Json {
    fn write(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None | ValueKind::Undefined => self.text.push_str("null"),
            ValueKind::Bool => self.text.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.list(['{', '}'], keys.len(), depth, |json, i| {
                    json.string(&keys[i].to_string());
                    let between = json.key.clone();
                    json.text.push_str(&between);
                    json.write(&value.get_item(&keys[i])?, depth + 1)
                })?;
            }
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.list(['[', ']'], items.len(), depth, |json, i| json.write(&items[i], depth + 1))?;
            }
            _ => self.text.push_str(&value.to_string()),
        }
        Ok(())
    }

    fn list(
        &mut self,
        [open, close]: [char; 2],
        count: usize,
        depth: usize,
        mut each: impl FnMut(&mut Self, usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.text.push(open);
        for i in 0..count {
            if i > 0 {
                let between = self.item.clone();
                self.text.push_str(&between);
            }
            self.line(depth + 1);
            each(self, i)?;
        }
        if count > 0 {
            self.line(depth);
        }
        self.text.push(close);
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.text.push('\n');
            self.text.push_str(&indent.repeat(depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.text.push('"');
        for letter in text.chars() {
            match letter {
                '"' => self.text.push_str("\\\""),
                '\\' => self.text.push_str("\\\\"),
                '\n' => self.text.push_str("\\n"),
                '\r' => self.text.push_str("\\r"),
                '\t' => self.text.push_str("\\t"),
                '\u{8}' => self.text.push_str("\\b"),
                '\u{c}' => self.text.push_str("\\f"),
                control if (control as u32) < 0x20 || (self.ascii && !control.is_ascii()) => {
                    let units = control
                        .encode_utf16(&mut [0; 2])
                        .iter()
                        .map(|u| format!("\\u{u:04x}"))
                        .collect::<String>();
                    self.text.push_str(&units);
                }
                other => self.text.push(other),
            }
        }
        self.text.push('"');
    }
}

/// The template with line feeds as line ends, as Jinja2 reads it (`jinja2/lexer.py`, `newline_re`).
pub(super) fn with_line_feeds(template: &str) -> String {
    template.replace("\r\n", "\n").replace('\r', "\n")
}

/// The template with tags that minijinja reads in the same way as Jinja2 with transformers' extensions. `{% generation
/// %}` and `{% endgeneration %}`, which mark the assistant's part for training, are removed; their effect on the spaces
/// around them stays. The line end after `{% raw %}` is text, which `trim_blocks` keeps.
pub(super) fn with_known_tags(template: &str) -> String {
    let mut text = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let inside = &rest[start + 2..start + length];
        let name = inside.trim_matches(|letter: char| letter.is_whitespace() || matches!(letter, '-' | '+'));
        text.push_str(&rest[..start + 2]);
        text.push_str(&match name {
            "generation" => inside.replacen(name, "if true", 1),
            "endgeneration" => inside.replacen(name, "endif", 1),
            "raw" if !inside.ends_with(['-', '+']) => format!("{}+", inside.trim_end()),
            _ => inside.to_owned(),
        });
        text.push_str("%}");
        rest = &rest[start + length + 2..];
    }
    text.push_str(rest);
    text
}
