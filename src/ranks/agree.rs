//! What all ranks must have alike before they share work.

use super::Ranks;
use crate::{Error, Result};

/// A value that must be the same on every rank.
pub struct SharedValue {
    /// Its name in errors.
    pub what: &'static str,
    /// What to do about a difference.
    pub hint: &'static str,
    /// Words for the value of rank 0 and another one.
    pub difference: fn(&str, &str) -> String,
}

/// Two short values.
pub fn both(first: &str, other: &str) -> String {
    format!("{first} and {other}")
}

/// The version of the program.
pub const VERSION: SharedValue =
    SharedValue { what: "version of gneiss", hint: "the same program on every machine", difference: both };

/// The resolved configuration as text; `difference` names the keys in which two of them differ.
pub const fn configuration(difference: fn(&str, &str) -> String) -> SharedValue {
    SharedValue {
        what: "configuration",
        hint: "the same file and the same options on every machine",
        difference,
    }
}

/// A line for each of `shared` in which a rank differs from rank 0. `values` has those of each rank, in the order of `shared`.
pub fn differences(shared: &[SharedValue], values: &[Vec<String>]) -> Vec<String> {
    let Some((first, others)) = values.split_first() else { return Vec::new() };
    let mut lines = Vec::new();
    for (i, SharedValue { what, hint, difference }) in shared.iter().enumerate() {
        for (rank, other) in (1..).zip(others).filter(|(_, other)| other.get(i) != first.get(i)) {
            let text = |values: &[String]| values.get(i).cloned().unwrap_or_default();
            let found = difference(&text(first), &text(other));
            lines.push(format!(
                "{what}: expected the same on ranks 0 and {rank}, found {found}; hint: {hint}"
            ));
        }
    }
    lines
}

impl dyn Ranks + '_ {
    /// Compares the ranks' values of `shared`, which `own` has in this order.
    ///
    /// # Errors
    /// Returns [`Error::Ranks`] on all ranks if one of them has an error or another value than rank 0.
    pub fn agree(&self, shared: &[SharedValue], own: Result<Vec<String>>) -> Result<()> {
        if self.size() == 1 {
            return own.map(drop);
        }
        self.combine(own.and_then(|own| encode(&own)), |all| {
            let values = all.iter().map(|bytes| decode(bytes)).collect::<Result<Vec<Vec<String>>>>()?;
            match &differences(shared, &values)[..] {
                [] => Ok(Vec::new()),
                lines => Err(Error::Ranks { problem: lines.join("\n"), is_bad_input: true }),
            }
        })
        .map(drop)
    }
}

/// A message as JSON.
///
/// # Errors
/// Returns [`Error::Invalid`] if the value has no JSON.
pub fn encode<T: serde::Serialize>(message: &T) -> Result<Vec<u8>> {
    serde_json::to_vec(message).map_err(|error| Error::Invalid(format!("ranks: {error}")))
}

/// A message that [`encode`] made on another rank.
///
/// # Errors
/// Returns [`Error::Ranks`] if it is none of this version.
pub fn decode<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|error| Error::Ranks {
        problem: format!("expected the same version of gneiss on all ranks: {error}"),
        is_bad_input: true,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ranks::Threads;

    const SHARED: [SharedValue; 2] =
        [VERSION, SharedValue { what: "file", hint: "copy it", difference: |_, _| "two files".into() }];

    #[test]
    fn agree_names_the_value_and_the_ranks() {
        let problems = Threads::run(4, |ranks| {
            let version = if ranks.rank() == 2 { "1.2" } else { "1.1" };
            let file = if ranks.rank() < 3 { "a" } else { "b" };
            ranks.agree(&SHARED, Ok(vec![version.into(), file.into()])).unwrap_err()
        });
        for problem in problems {
            assert!(problem.is_bad_input());
            assert_eq!(
                problem.to_string(),
                "version of gneiss: expected the same on ranks 0 and 2, found 1.1 and 1.2; hint: the same program on every \
                 machine\nfile: expected the same on ranks 0 and 3, found two files; hint: copy it"
            );
        }
    }

    #[test]
    fn agree_is_silent_about_equal_values_and_passes_an_error_on() {
        let all = Threads::run(3, |ranks| ranks.agree(&SHARED, Ok(vec!["1".into(), "a".into()])).is_ok());
        assert_eq!(all, [true; 3]);
        let all = Threads::run(2, |ranks| {
            let own = match ranks.rank() {
                0 => Ok(vec!["1".into(), "a".into()]),
                _ => Err(Error::Invalid("no such file".into())),
            };
            ranks.agree(&SHARED, own).unwrap_err().to_string()
        });
        assert!(all.iter().all(|text| text == "rank 1: no such file"), "{all:?}");
    }
}
