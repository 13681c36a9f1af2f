//! `[sweep.parameters]`: keys of the configuration, each with the values that the trials of a sweep have.

use super::{Draft, ValueOrigin, describe, find, find_mut, join, line_at, mismatch};
use crate::config::sweep::can_vary;
use serde::Deserialize;
use toml::de::{DeTable, DeValue, ValueDeserializer};
use toml::{Spanned, Table, Value};

/// The table's own key.
pub(super) const KEY: &str = "sweep.parameters";

/// What a parameter can be.
const EXPECTED: &str =
    "expected { values = [...] } or { min = ..., max = ..., log = false, count = ... }, found ";

impl Draft {
    /// Reads the table. `prefix` is the key of a table within it, of keys that are not quoted.
    pub(super) fn read_parameters(&mut self, text: &str, prefix: &str, table: &DeTable<'_>) {
        for (name, value) in table {
            let key = join(prefix, name.get_ref());
            let place = ValueOrigin::Line(line_at(text.as_bytes(), name.span().start));
            match (find(&self.defaults, &key), value.get_ref()) {
                (Some(Value::Table(_)), DeValue::Table(inner)) => self.read_parameters(text, &key, inner),
                (None, _) => self.unknown(place, &key, false),
                (Some(_), _) if !can_vary(&key) => self.problem(
                    place,
                    &key,
                    "is the same for all trials of a sweep; [sweep.parameters] can have the keys of [prompt], \
                     data.verbalizer and the hyperparameters of [train]",
                ),
                (Some(_), DeValue::Table(_)) => {
                    match Table::deserialize(ValueDeserializer::from(Spanned::clone(value))) {
                        Ok(given) => self.parameter(place, &key, given),
                        Err(error) => self.problem(place, &key, error.message()),
                    }
                }
                (Some(_), other) => {
                    let what = format!("{EXPECTED}{}", other.type_str());
                    self.problem(place, &key, what);
                }
            }
        }
    }

    /// Takes the values of one key, if each of them could be the key's value.
    fn parameter(&mut self, place: ValueOrigin, key: &str, given: Table) {
        let names: Vec<&str> = given.keys().map(String::as_str).collect();
        let of_range = |name: &&str| ["min", "max", "log", "count"].contains(name);
        let problem = match &names[..] {
            ["values"] => self.values_problem(key, &given["values"]),
            names if names.iter().all(of_range) && names.contains(&"min") && names.contains(&"max") => {
                self.range_problem(key, &given)
            }
            [] => Some(format!("{EXPECTED}an empty table")),
            names => Some(format!("{EXPECTED}{}", names.join(", "))),
        };
        if let Some(what) = problem {
            return self.problem(place, key, what);
        }
        self.places.insert(KEY.into(), place);
        if let Some(Value::Table(parameters)) = find_mut(&mut self.tree, KEY) {
            parameters.insert(key.into(), Value::Table(given));
        }
    }

    /// What is wrong with a list of values.
    fn values_problem(&self, key: &str, values: &Value) -> Option<String> {
        let Value::Array(values) = values else {
            return Some(format!("values: expected an array, found {}", describe(values)));
        };
        if values.is_empty() {
            return Some("values: expected at least one value, found none".into());
        }
        if let Some((i, value)) = values.iter().enumerate().find(|(i, value)| values[..*i].contains(value)) {
            return Some(format!(
                "values: expected different values, found {value} again at place {}",
                i + 1
            ));
        }
        values.iter().find_map(|value| self.value_problem(key, value))
    }

    /// Why `value` can't be the value of `key`.
    fn value_problem(&self, key: &str, value: &Value) -> Option<String> {
        if let Some(expected) = find(&self.defaults, key).and_then(|default| mismatch(default, value)) {
            return Some(format!("values: expected {expected}, found {}", describe(value)));
        }
        let mut tree = self.tree.clone();
        *find_mut(&mut tree, key)? = value.clone();
        let error = tree.try_into::<crate::config::Config>().err()?;
        Some(format!("values: {}", error.message().replacen("unknown variant", "unknown value", 1)))
    }

    /// What is wrong with a range of numbers.
    fn range_problem(&self, key: &str, range: &Table) -> Option<String> {
        if !matches!(find(&self.defaults, key), Some(Value::Float(_) | Value::Integer(_))) {
            return Some("expected { values = [...] }, since it is no number; found min and max".into());
        }
        let number = |name: &str| match &range[name] {
            Value::Float(number) => Some(*number),
            Value::Integer(number) => Some(*number as f64),
            _ => None,
        };
        let (Some(min), Some(max)) = (number("min"), number("max")) else {
            return Some("min, max: expected numbers".into());
        };
        if !(min.is_finite() && max.is_finite() && min < max) {
            return Some(format!(
                "expected finite numbers with min below max, found min = {min}, max = {max}"
            ));
        }
        match range.get("log") {
            Some(Value::Boolean(true)) if min <= 0.0 => {
                return Some(format!("min: expected a number above 0 with log = true, found {min}"));
            }
            None | Some(Value::Boolean(_)) => {}
            Some(other) => return Some(format!("log: expected true or false, found {}", describe(other))),
        }
        match range.get("count") {
            None => None,
            Some(Value::Integer(2..)) => None,
            Some(other) => Some(format!("count: expected 2 or more, found {}", describe(other))),
        }
    }
}
