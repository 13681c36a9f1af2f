//! Labels: the outputs of a classification, in one form for training and for scoring.
//!
//! Labels that look the same to a reader must be one label; otherwise the model learns two answers and is scored
//! against either. They can differ by a space at the end, a no-break space, an invisible character, or an accent that
//! is a character of its own.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};

use unicode_normalization::UnicodeNormalization;
use unicode_normalization::char::is_combining_mark;

use super::dataset::{Lines, Problems, Record};

/// Most labels or inputs that a warning shows.
const SHOWN: usize = 4;
/// Most characters of an input that a warning shows.
const WIDTH: usize = 60;
/// How libraries write a missing value.
const MISSING: [&str; 10] = ["nan", "NaN", "NAN", "null", "NULL", "None", "<NA>", "#N/A", "<null>", "NaT"];

/// The distinct outputs of some rows, sorted: the labels of a classification.
pub fn distinct<'a>(records: impl IntoIterator<Item = &'a Record>) -> Vec<String> {
    let all: BTreeSet<&str> = records.into_iter().map(|r| r.output.trim()).collect();
    all.into_iter().map(str::to_owned).collect()
}

/// The form in which a label is trained and scored: without invisible characters, in Unicode's normal form C, with
/// plain spaces for all kinds of space, LF for line breaks, and without surrounding white space.
///
/// The joiners U+200C and U+200D stay between two characters beyond ASCII, where scripts and emoji need them.
pub fn normalize(label: &str) -> Cow<'_, str> {
    if label.is_ascii() && !label.contains("\r\n") {
        return Cow::Borrowed(label.trim());
    }
    let characters: Vec<char> = label.chars().filter(|c| !is_invisible(*c)).collect();
    let joined = |i: usize| {
        let beyond_ascii = |c: Option<&char>| c.is_some_and(|c| !c.is_ascii() && !is_space(*c));
        i > 0 && beyond_ascii(characters.get(i - 1)) && beyond_ascii(characters.get(i + 1))
    };
    let visible =
        characters.iter().enumerate().filter(|(i, c)| !is_joiner(**c) || joined(*i)).map(|(_, c)| *c);
    let text: String = visible.nfc().map(|c| if is_space(c) { ' ' } else { c }).collect();
    Cow::Owned(text.replace("\r\n", "\n").trim().to_owned())
}

/// Characters without a width, which only programs see. They include marks of direction.
fn is_invisible(c: char) -> bool {
    matches!(
        c,
        '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}'
            | '\u{2060}'..='\u{2064}' | '\u{2066}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}'
    )
}

fn is_joiner(c: char) -> bool {
    matches!(c, '\u{200c}' | '\u{200d}')
}

/// Unicode's space separators except the plain space.
fn is_space(c: char) -> bool {
    matches!(c, '\u{a0}' | '\u{1680}' | '\u{2000}'..='\u{200a}' | '\u{202f}' | '\u{205f}' | '\u{3000}')
}

/// The token sequences by which labels are scored, from the tokens of each label. If one label's tokens begin with those of
/// another, the end-of-text token is appended to all: without it, the shorter label would always be at least as likely.
///
/// # Errors
/// Returns the indices of two labels that have the same tokens.
pub fn targets(tokens: &[Vec<u32>], eos_token_id: u32) -> std::result::Result<Vec<Vec<u32>>, (usize, usize)> {
    let mut needs_end = false;
    for (i, label) in tokens.iter().enumerate() {
        for (j, other) in tokens.iter().enumerate().filter(|(j, other)| *j != i && other.starts_with(label)) {
            if label == other {
                return Err((i, j));
            }
            needs_end = true;
        }
    }
    let end = if needs_end { &[eos_token_id][..] } else { &[] };
    Ok(tokens.iter().map(|label| [label, end].concat()).collect())
}

/// A text in quotes, with escapes for everything that can't be seen or told apart.
pub fn escaped(text: &str) -> String {
    let decomposed = text.nfc().ne(text.chars());
    let mut shown = String::from("\"");
    for c in text.chars() {
        let hidden = is_invisible(c) || is_joiner(c) || is_space(c) || is_combining_mark(c);
        if hidden || (decomposed && !c.is_ascii()) {
            shown.extend(c.escape_unicode());
        } else {
            shown.extend(c.escape_debug());
        }
    }
    shown.push('"');
    shown
}

/// Brings the outputs of `records` into the form of [`normalize`]. Returns the labels of which nothing was left, and a
/// warning that lists the outputs that differed from the form.
pub(crate) fn normalize_records(records: &mut [Record]) -> (Problems, Option<String>) {
    let mut problems = Problems::default();
    let mut changed: BTreeMap<String, (String, Lines)> = BTreeMap::new();
    let mut rows = 0;
    for record in records.iter_mut() {
        let label = normalize(&record.output);
        if label == record.output {
            continue;
        }
        if label.is_empty() {
            problems.push(format!(
                "line {}: field `output`: expected a label, found {}, of which nothing can be seen",
                record.line,
                escaped(&record.output)
            ));
            continue;
        }
        rows += 1;
        let label = label.into_owned();
        let written = std::mem::replace(&mut record.output, label.clone());
        changed.entry(written).or_insert_with(|| (label, Lines::default())).1.push(record.line);
    }
    let warning = (rows > 0).then(|| {
        let mut changed: Vec<_> = changed.into_iter().collect();
        changed.sort_by_key(|(_, (_, lines))| lines.first());
        let show = |(written, (label, lines)): &(String, (String, Lines))| {
            format!("{} is {} ({lines})", escaped(written), escaped(label))
        };
        format!(
            "{rows} of {} labels are trained and scored without white space around them, invisible characters and \
             other forms of a character: {}; hint: write each label one way in the file",
            records.len(),
            listed(&changed, "more", show)
        )
    });
    (problems, warning)
}

/// The first entries, and the number of the others.
fn listed<T>(entries: &[T], more: &str, show: impl Fn(&T) -> String) -> String {
    let mut text = entries.iter().take(SHOWN).map(show).collect::<Vec<_>>().join(", ");
    if entries.len() > SHOWN {
        text += &format!(" and {} {more}", entries.len() - SHOWN);
    }
    text
}

/// Probable mistakes in the labels of `records`: labels that look alike, the same input with different labels, and
/// missing values written as text.
pub fn warnings(records: &[Record]) -> Vec<String> {
    [look_alikes(records), conflicts(records), missing(records)].into_iter().flatten().collect()
}

/// The rows of each label.
fn rows(records: &[Record]) -> BTreeMap<&str, Lines> {
    let mut rows = BTreeMap::<&str, Lines>::new();
    records.iter().for_each(|record| rows.entry(&record.output).or_default().push(record.line));
    rows
}

/// Labels that differ only in case, white space, joiners, width or how a number is written.
fn look_alikes(records: &[Record]) -> Option<String> {
    let mut groups = BTreeMap::<String, Vec<(&str, usize)>>::new();
    for (label, lines) in rows(records) {
        groups.entry(skeleton(label)).or_default().push((label, lines.count()));
    }
    let groups: Vec<_> = groups.into_values().filter(|group| group.len() > 1).collect();
    if groups.is_empty() {
        return None;
    }
    let show = |group: &Vec<(&str, usize)>| {
        let labels: Vec<String> = group
            .iter()
            .map(|(label, n)| format!("{} ({n} row{})", escaped(label), if *n == 1 { "" } else { "s" }))
            .collect();
        labels.join(" and ")
    };
    Some(format!(
        "labels that look alike are different ones: {}; hint: if they mean the same, write them one way",
        listed(&groups, "more groups", show)
    ))
}

/// A label reduced to what a quick reader sees.
fn skeleton(label: &str) -> String {
    let simplified: String = label
        .nfkc()
        .filter(|c| !is_invisible(*c) && !is_joiner(*c) && !matches!(c, '\u{fe00}'..='\u{fe0f}'))
        .flat_map(char::to_lowercase)
        .collect();
    let simplified = simplified.split_whitespace().collect::<Vec<_>>().join(" ");
    let is_number = simplified.bytes().all(|b| b.is_ascii_digit() || b"+-.".contains(&b));
    match simplified.parse::<f64>() {
        Ok(number) if is_number => number.to_string(),
        _ => simplified,
    }
}

/// An input in lower case and with single spaces: inputs that are equal in this form count as the same.
pub(crate) fn plain_input(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase()
}

/// Inputs that occur with more than one label.
fn conflicts(records: &[Record]) -> Option<String> {
    let mut inputs = HashMap::<String, BTreeMap<&str, Lines>>::with_capacity(records.len());
    for record in records {
        let labels = inputs.entry(plain_input(&normalize(&record.input))).or_default();
        labels.entry(&record.output).or_default().push(record.line);
    }
    let mut conflicts: Vec<_> = inputs.into_iter().filter(|(_, labels)| labels.len() > 1).collect();
    if conflicts.is_empty() {
        return None;
    }
    conflicts.sort_by_key(|(_, labels)| labels.values().map(Lines::first).min());
    let in_rows: usize = conflicts.iter().flat_map(|(_, labels)| labels.values()).map(Lines::count).sum();
    let show = |(input, labels): &(String, BTreeMap<&str, Lines>)| {
        let labels: Vec<String> =
            labels.iter().map(|(label, lines)| format!("{} in {lines}", escaped(label))).collect();
        let cut = input.char_indices().nth(WIDTH).map_or("", |_| "…");
        let start: String = input.chars().take(WIDTH).collect();
        format!("{}{cut} is labelled {}", escaped(&start), labels.join(" and "))
    };
    Some(format!(
        "{in_rows} of {} rows give the same input different labels, so no prompt can learn them all: {}; hint: keep one \
         label for each input",
        records.len(),
        listed(&conflicts, "more inputs", show)
    ))
}

/// Labels that are a library's way to write a missing value.
fn missing(records: &[Record]) -> Option<String> {
    let found: Vec<_> = rows(records).into_iter().filter(|(label, _)| MISSING.contains(label)).collect();
    if found.is_empty() {
        return None;
    }
    Some(format!(
        "labels that look like missing values are trained as text: {}; hint: take these rows out if nobody labelled them",
        listed(&found, "more", |(label, lines)| format!("{} ({lines})", escaped(label)))
    ))
}
