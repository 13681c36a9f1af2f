//! Numbers for people, in a terminal as in a report.

/// Bytes in kB, MB or GB, powers of 1,000.
pub fn bytes(n: u64) -> String {
    match n {
        0..1_000_000 => format!("{:.1} kB", n as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.0} MB", n as f64 / 1e6),
        _ => format!("{:.2} GB", n as f64 / 1e9),
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
