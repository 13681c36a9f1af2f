//! Overrides the defaults by a file's keys and `--set` options, and collects every problem with its place.

mod parameters;

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use toml::de::{DeTable, DeValue, ValueDeserializer};
use toml::{Spanned, Table, Value};

use super::{Config, SweepOptions};

/// How similar a known key must be to be suggested, 0 to 1: a three-letter key with one wrong letter is.
const NEAR: f64 = 0.6;

/// Where a value comes from; problems are listed in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum ValueOrigin {
    /// A line of the file, counted from 1.
    Line(usize),
    /// A `--set` option.
    Set,
    /// The defaults.
    Default,
}

/// A problem of a key, and its place.
struct KeyProblem {
    place: ValueOrigin,
    key: String,
    what: String,
}

impl fmt::Display for KeyProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { place, key, what } = self;
        match place {
            ValueOrigin::Line(line) => write!(f, "line {line}: `{key}`: {what}"),
            ValueOrigin::Set => write!(f, "`--set {key}`: {what}"),
            ValueOrigin::Default => write!(f, "`{key}`: {what}"),
        }
    }
}

/// A configuration while its values are collected.
struct Draft {
    /// The defaults, whose keys are all the keys and whose values have the keys' types.
    defaults: Table,
    /// The defaults, overridden by the values given so far.
    tree: Table,
    /// The last place where each key was given.
    places: BTreeMap<String, ValueOrigin>,
    problems: Vec<KeyProblem>,
}

/// The configuration of a TOML text and `key=value` options, or all their problems.
pub(super) fn resolve(text: &str, sets: &[String]) -> Result<Config, Vec<String>> {
    let defaults = defaults().map_err(|error| vec![error.to_string()])?;
    let tree = defaults.clone();
    let mut draft = Draft { defaults, tree, places: BTreeMap::new(), problems: Vec::new() };
    let text = &lf(text);
    let document = DeTable::parse(text).map_err(|error| vec![syntax(text, &error)])?;
    draft.read(text, "", document.get_ref());
    for set in sets {
        draft.set(&lf(set));
    }
    draft.finish()
}

/// All keys with their default values.
fn defaults() -> Result<Table, toml::ser::Error> {
    let mut defaults = Table::try_from(Config::default())?;
    // It is left out of a configuration that has no sweep.
    defaults.insert("sweep".into(), Value::try_from(SweepOptions::default())?);
    Ok(defaults)
}

/// A text with LF in place of CRLF, as Python's tomllib reads it. Lines and columns stay those of the original text.
fn lf(text: &str) -> String {
    text.replace("\r\n", "\n")
}

/// Line of the byte at `offset`, counted from 1.
pub(super) fn line_at(text: &[u8], offset: usize) -> usize {
    text[..offset].iter().filter(|byte| **byte == b'\n').count() + 1
}

fn syntax(text: &str, error: &toml::de::Error) -> String {
    let message = error.message();
    match error.span() {
        Some(span) => {
            let line_start = text[..span.start].rfind('\n').map_or(0, |at| at + 1);
            let column = text[line_start..span.start].chars().count() + 1;
            format!("line {}, column {column}: {message}", line_at(text.as_bytes(), span.start))
        }
        None => message.to_string(),
    }
}

impl Draft {
    /// Reads the keys of a table of the file; `prefix` is the table's own key.
    fn read(&mut self, text: &str, prefix: &str, table: &DeTable<'_>) {
        for (name, value) in table {
            let key = join(prefix, name.get_ref());
            let place = ValueOrigin::Line(line_at(text.as_bytes(), name.span().start));
            match (find(&self.defaults, &key), value.get_ref()) {
                (None, value) => self.unknown(place, &key, value.is_table()),
                (Some(_), DeValue::Table(inner)) if key == parameters::KEY => {
                    self.read_parameters(text, "", inner);
                }
                (Some(Value::Table(_)), DeValue::Table(inner)) => self.read(text, &key, inner),
                (Some(_), _) => match Value::deserialize(ValueDeserializer::from(Spanned::clone(value))) {
                    Ok(value) => self.assign(place, &key, value),
                    Err(error) => self.problem(place, &key, error.message()),
                },
            }
        }
    }

    /// Reads a `key=value` option.
    fn set(&mut self, option: &str) {
        let Some((key, text)) = option.split_once('=') else {
            self.problem(ValueOrigin::Set, option, "expected KEY=VALUE, found no =");
            return;
        };
        let (key, text) = (key.trim(), text.trim());
        let quoted = text.starts_with(['"', '\'']);
        match (find(&self.defaults, key), text.parse::<Value>()) {
            (None, _) => self.unknown(ValueOrigin::Set, key, false),
            (Some(Value::Table(inner)), _) => {
                let names: Vec<_> = inner.keys().map(|name| join(key, name)).collect();
                self.problem(
                    ValueOrigin::Set,
                    key,
                    format!("expected a key of this table: {}", names.join(", ")),
                );
            }
            (Some(_), Ok(value)) => self.assign(ValueOrigin::Set, key, value),
            (Some(_), Err(error)) if quoted => {
                self.problem(ValueOrigin::Set, key, format!("{} in {text}", error.message()));
            }
            (Some(_), Err(_)) => self.assign(ValueOrigin::Set, key, Value::String(text.into())),
        }
    }

    /// Sets one value if its type is right.
    fn assign(&mut self, place: ValueOrigin, key: &str, value: Value) {
        self.places.insert(key.into(), place);
        if let Some(expected) = find(&self.defaults, key).and_then(|default| mismatch(default, &value)) {
            let mut what = format!("expected {expected}, found {}", describe(&value));
            if place == ValueOrigin::Set && expected == STRING {
                what += &format!("; quote it: --set '{key}=\"{value}\"'");
            }
            return self.problem(place, key, what);
        }
        let mut tree = self.tree.clone();
        if let Some(slot) = find_mut(&mut tree, key) {
            *slot = value;
        }
        match tree.clone().try_into::<Config>() {
            Ok(_) => self.tree = tree,
            // The only failure left is a string that is not one of its key's values; TOML's message says so.
            Err(error) => {
                let what = error.message().replacen("unknown variant", "unknown value", 1);
                self.problem(place, key, what);
            }
        }
    }

    fn problem(&mut self, place: ValueOrigin, key: &str, what: impl Into<String>) {
        self.problems.push(KeyProblem { place, key: key.into(), what: what.into() });
    }

    /// Adds the problem of an unknown key, with the nearest known key or all keys of its table.
    fn unknown(&mut self, place: ValueOrigin, key: &str, is_table: bool) {
        let mut known = Vec::new();
        list(&self.defaults, "", &mut known);
        known.retain(|(_, table)| *table == is_table);
        let best =
            known.iter().map(|(name, _)| (nearness(key, name), name)).max_by(|a, b| a.0.total_cmp(&b.0));
        let hint = match best {
            Some((score, name)) if score >= NEAR => format!("did you mean `{name}`?"),
            _ => {
                let table = key.rsplit_once('.').map_or("", |(table, _)| table);
                let inside = |name: &str| name.rsplit_once('.').map_or("", |(table, _)| table) == table;
                let mut names: Vec<_> =
                    known.iter().filter(|(name, _)| inside(name)).map(|(name, _)| name.as_str()).collect();
                if names.is_empty() {
                    names = known.iter().map(|(name, _)| name.as_str()).collect();
                }
                format!("expected one of {}", names.join(", "))
            }
        };
        self.problem(place, key, format!("unknown key; {hint}"));
    }

    /// The configuration, checked as a whole.
    fn finish(mut self) -> Result<Config, Vec<String>> {
        let config: Config = self.tree.try_into().map_err(|error| vec![error.message().to_string()])?;
        let malformed: Vec<_> = self.problems.iter().map(|problem| problem.key.clone()).collect();
        let is_malformed = |key: &str| malformed.iter().any(|other| other == key);
        for problem in config.problems() {
            // A malformed value was left at its default; other checks say nothing about it.
            if !is_malformed(problem.key) && !problem.because_of.is_some_and(is_malformed) {
                let place = self.places.get(problem.key).copied().unwrap_or(ValueOrigin::Default);
                self.problems.push(KeyProblem { place, key: problem.key.into(), what: problem.what });
            }
        }
        if self.problems.is_empty() {
            return Ok(config);
        }
        self.problems.sort_by_key(|problem| problem.place);
        Err(self.problems.iter().map(KeyProblem::to_string).collect())
    }
}

const STRING: &str = "a string";

/// The expected type, if `found` can't be a value of a key with this default.
fn mismatch(default: &Value, found: &Value) -> Option<&'static str> {
    match (default, found) {
        (Value::String(_), Value::String(_))
        | (Value::Float(_), Value::Float(_) | Value::Integer(_))
        | (Value::Boolean(_), Value::Boolean(_)) => None,
        (Value::Integer(_), Value::Integer(number)) if *number >= 0 => None,
        (Value::String(_), _) => Some(STRING),
        (Value::Float(_), _) => Some("a number"),
        (Value::Integer(_), _) => Some("a whole number, 0 or more"),
        (Value::Boolean(_), _) => Some("true or false"),
        // No key is an array or a date.
        (Value::Table(_) | Value::Array(_) | Value::Datetime(_), _) => Some("a table"),
    }
}

fn describe(value: &Value) -> String {
    match value {
        Value::String(text) => format!("the string {text:?}"),
        Value::Array(_) => "an array".into(),
        Value::Table(_) => "a table".into(),
        other => other.to_string(),
    }
}

fn join(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.to_string() } else { format!("{prefix}.{name}") }
}

/// The value of a dotted key.
pub(super) fn find<'a>(table: &'a Table, key: &str) -> Option<&'a Value> {
    match key.split_once('.') {
        None => table.get(key),
        Some((first, rest)) => find(table.get(first)?.as_table()?, rest),
    }
}

pub(super) fn find_mut<'a>(table: &'a mut Table, key: &str) -> Option<&'a mut Value> {
    match key.split_once('.') {
        None => table.get_mut(key),
        Some((first, rest)) => find_mut(table.get_mut(first)?.as_table_mut()?, rest),
    }
}

/// All dotted keys of a table, each with whether it is a table itself.
fn list(table: &Table, prefix: &str, keys: &mut Vec<(String, bool)>) {
    for (name, value) in table {
        let key = join(prefix, name);
        keys.push((key.clone(), value.is_table()));
        if let Value::Table(inner) = value {
            list(inner, &key, keys);
        }
    }
}

/// The dotted keys, tables excepted, whose values differ between two configurations.
pub(super) fn changed_keys(before: &Table, after: &Table) -> Vec<String> {
    let mut keys = Vec::new();
    list(before, "", &mut keys);
    let changed =
        keys.into_iter().filter(|(key, is_table)| !is_table && find(before, key) != find(after, key));
    changed.map(|(key, _)| key).collect()
}

/// Similarity of two dotted keys, 0 to 1. The last names count nearly as much as the whole keys, so that a key in the
/// wrong table is recognised.
fn nearness(a: &str, b: &str) -> f64 {
    let last = |key: &str| key.rsplit('.').next().unwrap_or_default().to_string();
    let whole = strsim::normalized_damerau_levenshtein(a, b);
    whole.max(0.95 * strsim::normalized_damerau_levenshtein(&last(a), &last(b)))
}
