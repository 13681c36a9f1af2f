//! Numbers, times and texts for people.

pub(super) use crate::text::grouped;
use std::time::{Duration, UNIX_EPOCH};

/// Between a number and its unit.
const NBSP: char = '\u{a0}';

/// Text for a missing value.
const NONE: &str = "–";

/// `12,345`.
pub(super) fn count(n: u64) -> String {
    grouped(&n.to_string())
}

/// A number with about four significant digits: `0.0447`, `1.287`, `1,234`, `1.2e-7`.
pub(super) fn number(value: impl Into<Option<f64>>) -> String {
    let Some(value) = value.into().filter(|v| v.is_finite()) else { return NONE.into() };
    let size = value.abs();
    match size {
        0.0 => "0".into(),
        1e7.. => format!("{value:.3e}"),
        1000.0.. => grouped(&format!("{value:.0}")),
        100.0.. => format!("{value:.1}"),
        10.0.. => format!("{value:.2}"),
        1.0.. => format!("{value:.3}"),
        1e-3.. => format!("{value:.4}"),
        _ => format!("{value:.2e}"),
    }
}

/// A loss in the form of [`number`], or `NaN` or `inf` if it is not finite.
pub(super) fn loss(value: Option<f64>) -> String {
    match value.filter(|value| !value.is_finite()) {
        Some(value) => value.to_string(),
        None => number(value),
    }
}

/// A number with three significant digits: `8.71`, `0.400`, `12,345`.
pub(super) fn three(value: f64) -> String {
    match value.abs() {
        1e-3..1000.0 => {
            let decimals = (2.0 - value.abs().log10().floor()).clamp(0.0, 5.0) as usize;
            format!("{value:.decimals$}")
        }
        _ => number(value),
    }
}

/// A share in per cent: `96.6 %`.
pub(super) fn percent(share: f64) -> String {
    if share.is_finite() { format!("{:.1}{NBSP}%", 100.0 * share) } else { NONE.into() }
}

/// A small share in per cent with two significant digits: `0.011 %`.
pub(super) fn small_percent(share: f64) -> String {
    let percent = 100.0 * share;
    if !percent.is_finite() || percent <= 0.0 || percent >= 10.0 {
        return self::percent(share);
    }
    let decimals = (1.0 - percent.log10().floor()).clamp(1.0, 12.0) as usize;
    format!("{percent:.decimals$}{NBSP}%")
}

/// A difference of shares in percentage points: `+12.1`.
pub(super) fn points(difference: f64) -> String {
    // A minus sign has the width of the plus sign.
    format!("{:+.1}", 100.0 * difference).replace('-', "−")
}

/// A p-value: `0.031`, `4.1e-18`.
pub(super) fn p_value(p: f64) -> String {
    if p < 0.001 { format!("{p:.1e}") } else { format!("{p:.3}") }
}

/// Wall time: `0.4 s`, `42.7 s`, `3 min 37 s`, `2 h 05 min`.
pub(super) fn duration(seconds: f64) -> String {
    if !seconds.is_finite() {
        return NONE.into();
    }
    crate::text::duration(seconds).replace(' ', &NBSP.to_string())
}

/// Bytes in kB, MB or GB, powers of 1,000.
pub(super) fn bytes(n: u64) -> String {
    crate::text::bytes(n).replace(' ', "\u{a0}")
}

/// A time, seconds since 1970-01-01, as `2026-11-22 20:44 UTC`.
pub(super) fn date(seconds: u64) -> String {
    let utc = crate::calendar::written(UNIX_EPOCH + Duration::from_secs(seconds));
    format!("{} UTC", utc[..16].replace('T', " "))
}

/// The first `width` characters of a text, cut at a space if one is near, with an ellipsis; `None` if the whole text
/// fits.
pub(super) fn cut(text: &str, width: usize) -> Option<String> {
    let (end, _) = text.char_indices().nth(width)?;
    let head = &text[..end];
    let at = head.rfind(char::is_whitespace).filter(|at| *at * 5 > end * 4).unwrap_or(end);
    Some(format!("{}…", head[..at].trim_end()))
}

/// A word in the shell's quoting.
pub(super) fn shell(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=:@%,~".contains(c);
    if !word.is_empty() && !word.starts_with('~') && word.chars().all(plain) {
        word.into()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        let all = [0.04471, 1.28694, 6.0, 12.345, 134.5, 12_345.6, 1.5e9, 1.2e-7, 0.0, -0.5];
        let expected =
            ["0.0447", "1.287", "6.000", "12.35", "134.5", "12,346", "1.500e9", "1.20e-7", "0", "-0.5000"];
        assert_eq!(all.map(number), expected);
        assert_eq!([number(None), number(f64::NAN)], ["–", "–"]);
        assert_eq!([8.7104, 0.4, 12.345, 134.6, 0.0].map(three), ["8.71", "0.400", "12.3", "135", "0"]);
        assert_eq!([1, 999, 1000, 134_515_008].map(count), ["1", "999", "1,000", "134,515,008"]);
        assert_eq!(["-1234.5678", "-123", "1234567"].map(grouped), ["-1,234.5678", "-123", "1,234,567"]);
        assert_eq!([percent(0.96551), percent(1.0)], ["96.6\u{a0}%", "100.0\u{a0}%"]);
        assert_eq!([small_percent(0.000_107), small_percent(0.5)], ["0.011\u{a0}%", "50.0\u{a0}%"]);
        assert_eq!([points(0.121), points(-0.05)], ["+12.1", "−5.0"]);
        assert_eq!([p_value(0.0312), p_value(3.85e-34), p_value(1.0)], ["0.031", "3.9e-34", "1.000"]);
    }

    #[test]
    fn times_and_sizes() {
        let plain = |text: String| text.replace('\u{a0}', " ");
        let all = [0.42, 42.71, 216.6, 7512.0].map(|s| plain(duration(s)));
        assert_eq!(all, ["0.4 s", "42.7 s", "3 min 37 s", "2 h 05 min"]);
        assert_eq!(
            [500, 12_000_000, 970_000_000, 1_050_000_000].map(|n| plain(bytes(n))),
            ["0.5 kB", "12 MB", "970 MB", "1.05 GB"]
        );
    }

    /// GNU date: `date -u -d @N +'%F %H:%M UTC'`.
    #[test]
    fn dates() {
        let all = [0, 951_782_400, 951_868_800, 1_795_380_271, 4_107_542_399].map(date);
        assert_eq!(
            all,
            [
                "1970-01-01 00:00 UTC", "2000-02-29 00:00 UTC", "2000-03-01 00:00 UTC",
                "2026-11-22 20:44 UTC", "2100-02-28 23:59 UTC"
            ]
        );
    }

    #[test]
    fn texts() {
        assert_eq!(cut("short", 5), None);
        assert_eq!(cut("one two three four", 15).as_deref(), Some("one two three…"));
        assert_eq!(cut("ééééé", 3).as_deref(), Some("ééé…"));
        assert_eq!([shell("runs/a-1"), shell("it's"), shell("")], ["runs/a-1", "'it'\\''s'", "''"]);
    }
}
