//! The values of a request, each checked for its type and range. Errors name the key, the expected value and the actual
//! one.

use super::body::describe;
use super::fields::{FieldTable, Ignored};
use crate::serve::api_error::ApiError;
use serde_json::{Map, Value};
use std::ops::RangeInclusive;

/// The least number over 0: the lower end of a range without 0.
pub(crate) const OVER_0: f64 = f64::MIN_POSITIVE;

/// A JSON object of a request. A key whose value is `null` counts as absent, as with OpenAI.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    map: &'a Map<String, Value>,
    /// Precedes keys in messages.
    prefix: &'static str,
    /// The table that lists the fields, if there is one.
    table: Option<&'static FieldTable>,
}

impl<'a> Fields<'a> {
    pub fn new(map: &'a Map<String, Value>) -> Self {
        Self { map, prefix: "", table: None }
    }

    /// The fields of a request to the route of `table`, and those that have no effect.
    ///
    /// # Errors
    /// Returns the errors of [`FieldTable::check`].
    pub fn checked(
        map: &'a Map<String, Value>,
        table: &'static FieldTable,
    ) -> Result<(Self, Ignored), ApiError> {
        let ignored = table.check(map)?;
        Ok((Self { table: Some(table), ..Self::new(map) }, ignored))
    }

    /// The key as a message names it.
    pub fn name(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    pub fn get(&self, key: &str) -> Option<&'a Value> {
        // A field that is read but not listed would be refused as unknown, or named as ignored.
        debug_assert!(
            self.table.is_none_or(|table| table.knows(key)),
            "{key} is not in the table of {}",
            self.table.map_or("", |table| table.request)
        );
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn typed<T>(
        &self,
        key: &str,
        expected: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| self.wrong(key, expected, value))
    }

    /// The error for a value that is not as expected.
    pub fn wrong(&self, key: &str, expected: &str, found: &Value) -> ApiError {
        ApiError::invalid(self.name(key), format!("expected {expected}, found {}", describe(found)))
    }

    pub fn string(&self, key: &str) -> Result<Option<&'a str>, ApiError> {
        self.typed(key, "a string", Value::as_str)
    }

    pub fn boolean(&self, key: &str) -> Result<Option<bool>, ApiError> {
        self.typed(key, "true or false", Value::as_bool)
    }

    pub fn number(&self, key: &str, range: RangeInclusive<f64>) -> Result<Option<f64>, ApiError> {
        let (low, high) = (*range.start(), *range.end());
        let expected = match (low == OVER_0, high == f64::MAX) {
            (true, true) => "a number over 0".into(),
            (true, false) => format!("a number over 0 and at most {high}"),
            (false, true) => format!("a number, {low} or more"),
            (false, false) => format!("a number from {low} to {high}"),
        };
        self.typed(key, &expected, |value| value.as_f64().filter(|number| range.contains(number)))
    }

    pub fn integer(&self, key: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, ApiError> {
        let expected = match (*range.start(), *range.end()) {
            (i64::MIN, i64::MAX) => "a whole number".into(),
            (low, i64::MAX) => format!("a whole number, {low} or more"),
            (low, high) => format!("a whole number from {low} to {high}"),
        };
        self.typed(key, &expected, |value| whole_number(value).filter(|number| range.contains(number)))
    }

    /// A whole number that is a count.
    pub fn count(&self, key: &str, range: RangeInclusive<usize>) -> Result<Option<usize>, ApiError> {
        let end = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        let number = self.integer(key, end(*range.start())..=end(*range.end()))?;
        Ok(number.and_then(|number| usize::try_from(number).ok()))
    }

    /// A list of at most `most` strings, none of them empty.
    pub fn strings(&self, key: &str, most: usize) -> Result<Option<Vec<String>>, ApiError> {
        let expected = format!("a list of at most {most} strings, none of them empty");
        self.typed(key, &expected, |value| {
            let items = value.as_array().filter(|items| items.len() <= most)?;
            items.iter().map(|item| Some(item.as_str().filter(|s| !s.is_empty())?.to_owned())).collect()
        })
    }

    /// A list of token ids, each under `vocabulary`.
    pub fn token_ids(&self, key: &str, vocabulary: u32) -> Result<Option<Vec<u32>>, ApiError> {
        let expected = format!("a list of token ids, each from 0 to {}", vocabulary.saturating_sub(1));
        self.typed(key, &expected, |value| token_ids(value, vocabulary))
    }

    /// An object. Errors name its keys with `prefix` before them.
    pub fn object(&self, key: &str, prefix: &'static str) -> Result<Option<Fields<'a>>, ApiError> {
        let map = self.typed(key, "an object", Value::as_object)?;
        let table = self.table.and_then(|table| table.nested(key));
        Ok(map.map(|map| Fields { map, prefix, table }))
    }

    /// The object's keys and values.
    pub fn entries(&self) -> impl Iterator<Item = (&'a String, &'a Value)> {
        self.map.iter()
    }
}

/// A list of token ids, each under `vocabulary`.
pub(crate) fn token_ids(value: &Value, vocabulary: u32) -> Option<Vec<u32>> {
    let id = |value: &Value| u32::try_from(value.as_u64()?).ok().filter(|id| *id < vocabulary);
    value.as_array()?.iter().map(id).collect()
}

/// A whole number; some clients write 1 as 1.0.
fn whole_number(value: &Value) -> Option<i64> {
    let exact =
        |number: f64| (number.fract() == 0.0 && number.abs() < (1u64 << 53) as f64).then_some(number as i64);
    value.as_i64().or_else(|| exact(value.as_f64()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn errors_name_the_key_the_range_and_what_was_found() {
        let value = json!({"t": 3, "p": 0, "n": 1.5, "s": ["", "a"], "k": 4.0, "none": null, "text": 5, "ids": [1, 9]});
        let map = value.as_object().unwrap();
        let fields = Fields::new(map);
        let message = |result: Result<(), ApiError>| result.unwrap_err().message;
        let cases = [
            (fields.number("t", 0.0..=2.0).map(drop), "`t`: expected a number from 0 to 2, found 3"),
            (
                fields.number("p", OVER_0..=1.0).map(drop),
                "`p`: expected a number over 0 and at most 1, found 0",
            ),
            (fields.count("n", 1..=128).map(drop), "`n`: expected a whole number from 1 to 128, found 1.5"),
            (
                fields.strings("s", 4).map(drop),
                "`s`: expected a list of at most 4 strings, none of them empty, found a list of 2",
            ),
            (fields.string("text").map(drop), "`text`: expected a string, found 5"),
            (
                fields.token_ids("ids", 9).map(drop),
                "`ids`: expected a list of token ids, each from 0 to 8, found a list of 2",
            ),
        ];
        for (result, expected) in cases {
            assert_eq!(message(result), expected);
        }
        assert_eq!(fields.count("k", 0..=9).unwrap(), Some(4));
        assert_eq!(fields.string("none").unwrap(), None);
        let nested = json!({"parameters": {"top_k": "x"}});
        let nested =
            Fields::new(nested.as_object().unwrap()).object("parameters", "parameters.").unwrap().unwrap();
        assert_eq!(nested.count("top_k", 1..=100).unwrap_err().param.as_deref(), Some("parameters.top_k"));
    }
}
