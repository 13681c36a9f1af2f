//! Numbers for people, on a terminal and in a report.

/// Bytes in kB, MB or GB, powers of 1,000.
pub fn bytes(n: u64) -> String {
    match n {
        0..1_000_000 => format!("{:.1} kB", n as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.0} MB", n as f64 / 1e6),
        _ => format!("{:.2} GB", n as f64 / 1e9),
    }
}

/// Wall time: `0.4 s`, `42.7 s`, `3 min 37 s`, `2 h 05 min`.
pub fn duration(seconds: f64) -> String {
    let rounded = seconds.round() as u64;
    match rounded {
        0..60 => format!("{seconds:.1} s"),
        60..3600 => format!("{} min {:02} s", rounded / 60, rounded % 60),
        _ => format!("{} h {:02} min", rounded / 3600, rounded / 60 % 60),
    }
}

/// A written number with commas between thousands.
pub fn grouped(number: &str) -> String {
    let whole = number.find('.').unwrap_or(number.len());
    let mut text = String::with_capacity(number.len() + 4);
    for (i, c) in number.char_indices() {
        let left = whole.saturating_sub(i);
        if c.is_ascii_digit() && i < whole && left % 3 == 0 && text.ends_with(|c: char| c.is_ascii_digit()) {
            text.push(',');
        }
        text.push(c);
    }
    text
}

/// The encoding of a text in UTF-16 or UTF-32, with or without a byte order mark; `None` for other encodings.
pub(crate) fn other_unicode(bytes: &[u8]) -> Option<&'static str> {
    match bytes {
        [0xFF, 0xFE, 0, 0, ..] | [0, 0, 0xFE, 0xFF, ..] => return Some("the byte order mark of UTF-32"),
        [0xFF, 0xFE, ..] | [0xFE, 0xFF, ..] => return Some("the byte order mark of UTF-16"),
        _ => {}
    }
    // Without a mark the encoding shows in the first letters, which are ASCII: every other byte is 0.
    let pairs: Vec<[bool; 2]> =
        bytes.chunks_exact(2).take(8).map(|pair| [pair[0] != 0, pair[1] != 0]).collect();
    if pairs.len() < 2 {
        return None;
    }
    let all = |expected: [bool; 2]| pairs.iter().all(|pair| *pair == expected);
    match (all([true, false]), all([false, true])) {
        (true, _) => Some("UTF-16 (little-endian, without a byte order mark)"),
        (_, true) => Some("UTF-16 (big-endian, without a byte order mark)"),
        _ => None,
    }
}
