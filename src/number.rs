//! Quantiles, and the numbers in the JSON files that a run writes. JSON has no number that is not finite: `serde_json`
//! writes null instead, which readers do not accept as a number. Here such a number is the text `"NaN"`, `"inf"` or
//! `"-inf"`, which Python's `float` reads. Null, which gneiss 0.1.0 wrote, is read as NaN.
//!
//! `#[serde(with = "crate::number")]` stands before an `f64`, `#[serde(default, with = "crate::number::optional")]` before an
//! `Option<f64>`, whose `None` is null.

use serde::de::{Error, Visitor};
use serde::{Deserializer, Serialize, Serializer};
use std::fmt;

/// Writes a number.
pub(crate) fn serialize<S: Serializer>(value: &f64, out: S) -> Result<S::Ok, S::Error> {
    match value.is_finite() {
        true => value.serialize(out),
        // `NaN`, `inf`, `-inf`.
        false => out.collect_str(value),
    }
}

/// Reads a number.
pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(optional::deserialize(from)?.unwrap_or(f64::NAN))
}

/// Numbers that may be missing.
pub(crate) mod optional {
    use super::{AnyNumber, serialize as number};
    use serde::{Deserializer, Serializer};

    /// Writes a number, or null.
    pub(crate) fn serialize<S: Serializer>(value: &Option<f64>, out: S) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => number(value, out),
            None => out.serialize_none(),
        }
    }

    /// Reads a number, or null.
    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<f64>, D::Error> {
        from.deserialize_any(AnyNumber)
    }
}

/// Quantile of values that are sorted and at least one; linear between two of them.
pub(crate) fn quantile(sorted: &[f64], q: f64) -> f64 {
    let place = q * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    below + (above - below) * place.fract()
}

struct AnyNumber;

impl<'de> Visitor<'de> for AnyNumber {
    type Value = Option<f64>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a number, \"NaN\", \"inf\", \"-inf\" or null")
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Self::Value, E> {
        Ok(Some(value))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Self::Value, E> {
        Ok(Some(value as f64))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Self::Value, E> {
        Ok(Some(value as f64))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
        match text {
            "NaN" => Ok(Some(f64::NAN)),
            "inf" => Ok(Some(f64::INFINITY)),
            "-inf" => Ok(Some(f64::NEG_INFINITY)),
            other => Err(E::invalid_value(serde::de::Unexpected::Str(other), &self)),
        }
    }

    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_none<E: Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_some<D: Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
        from.deserialize_any(self)
    }
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};
    use serde_json::{from_str, to_string};

    #[derive(Serialize, Deserialize)]
    struct Row {
        #[serde(with = "crate::number")]
        loss: f64,
        #[serde(default, with = "crate::number::optional")]
        validation: Option<f64>,
    }

    #[test]
    fn a_number_that_is_not_finite_is_read_back() {
        for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.1, -0.0, 1e300, 5e-324] {
            let text = to_string(&Row { loss: value, validation: Some(value) }).unwrap();
            let row: Row = from_str(&text).unwrap();
            let bits = |x: f64| if x.is_nan() { f64::NAN.to_bits() } else { x.to_bits() };
            assert_eq!(bits(row.loss), bits(value), "{text}");
            assert_eq!(row.validation.map(bits), Some(bits(value)), "{text}");
            assert!(!text.contains("null"), "{text}");
        }
    }

    #[test]
    fn a_missing_number_is_null_and_a_null_number_is_nan() {
        assert_eq!(
            to_string(&Row { loss: 2.0, validation: None }).unwrap(),
            r#"{"loss":2.0,"validation":null}"#
        );
        let row: Row = from_str(r#"{"loss": null}"#).unwrap();
        assert!(row.loss.is_nan() && row.validation.is_none());
        let row: Row = from_str(r#"{"loss": 3, "validation": -2}"#).unwrap();
        assert_eq!((row.loss, row.validation), (3.0, Some(-2.0)));
        for bad in [r#"{"loss": "much"}"#, r#"{"loss": true}"#, r#"{}"#, r#"{"loss": 1, "validation": []}"#] {
            assert!(from_str::<Row>(bad).is_err(), "{bad}");
        }
    }
}
