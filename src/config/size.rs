//! An amount of memory as people write it: `24GB`, `900MB`, `16GiB`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Units with their bytes, the largest first.
const UNITS: [(&str, u64); 9] = [
    ("TiB", 1 << 40),
    ("TB", 1_000_000_000_000),
    ("GiB", 1 << 30),
    ("GB", 1_000_000_000),
    ("MiB", 1 << 20),
    ("MB", 1_000_000),
    ("KiB", 1 << 10),
    ("KB", 1_000),
    ("B", 1),
];

/// Most memory that a run may use: a number and its unit, or `""` for the memory that the device has free.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MemoryBudget {
    /// `None` for the memory that the device has free.
    pub bytes: Option<usize>,
}

impl fmt::Display for MemoryBudget {
    /// In the largest unit that needs no fraction.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(bytes) = self.bytes.map(|bytes| bytes as u64) else { return f.pad("") };
        let largest =
            UNITS.iter().filter(|(_, unit)| bytes.is_multiple_of(*unit)).min_by_key(|u| bytes / u.1);
        match largest {
            Some((name, unit)) => f.pad(&format!("{}{name}", bytes / unit)),
            None => f.pad(&format!("{bytes}B")),
        }
    }
}

impl FromStr for MemoryBudget {
    type Err = Error;

    /// Returns [`Error::Invalid`] if `text` is no such amount; the case of the unit's letters does not matter.
    fn from_str(text: &str) -> Result<Self> {
        let invalid = || {
            Error::Invalid(format!(
                "expected a size such as \"24GB\", \"900MB\" or \"16GiB\", or \"\" for the memory that the device has free, \
                 found {text:?}"
            ))
        };
        let text = text.trim();
        if text.is_empty() {
            return Ok(Self::default());
        }
        let (number, unit) = text.split_at(text.find(|c: char| c.is_alphabetic()).ok_or_else(invalid)?);
        let unit = UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)).ok_or_else(invalid)?.1;
        let number = number.trim_end();
        let is_number = number.bytes().all(|b| b.is_ascii_digit() || b == b'.');
        let number = number.parse::<f64>().ok().filter(|_| is_number).ok_or_else(invalid)?;
        let bytes = (number * unit as f64).round();
        // Above 2^53 a float can't represent every count of bytes, and no machine has that much memory.
        if !(1.0..9e15).contains(&bytes) {
            return Err(invalid());
        }
        Ok(Self { bytes: Some(bytes as usize) })
    }
}

impl TryFrom<String> for MemoryBudget {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<MemoryBudget> for String {
    fn from(budget: MemoryBudget) -> Self {
        budget.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_read() {
        for (text, bytes) in [
            ("24GB", 24_000_000_000),
            ("900MB", 900_000_000),
            ("16GiB", 16 << 30),
            ("1.5 gib", 3 << 29),
            (" 512 kB ", 512_000),
            ("7b", 7),
            ("0.5TiB", 1 << 39),
        ] {
            assert_eq!(text.parse::<MemoryBudget>().unwrap().bytes, Some(bytes), "{text:?}");
        }
        assert_eq!("".parse::<MemoryBudget>().unwrap().bytes, None);
    }

    #[test]
    fn what_is_no_amount_is_refused() {
        for text in
            ["24", "GB", "-1GB", "1e3GB", "24 GBs", "0GB", "nanGB", "infGB", "99999TB", "1.2.3GB", "all"]
        {
            let error = text.parse::<MemoryBudget>().unwrap_err().to_string();
            assert!(error.contains("\"24GB\"") && error.contains(&format!("{text:?}")), "{error}");
        }
    }

    #[test]
    fn what_is_written_reads_back() {
        for text in ["24GB", "16GiB", "900MB", "1500MB", "7B", "1023KiB", ""] {
            assert_eq!(text.parse::<MemoryBudget>().unwrap().to_string(), text);
        }
        assert_eq!("1.5GB".parse::<MemoryBudget>().unwrap().to_string(), "1500MB");
        assert_eq!("1000MB".parse::<MemoryBudget>().unwrap().to_string(), "1GB");
    }
}
