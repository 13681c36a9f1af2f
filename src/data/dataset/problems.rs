//! The problems of a file's rows, and notes about them.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;

use crate::{Error, Result};

/// Most problems that one error lists; the others are counted.
const LISTED: usize = 20;
/// Most lines that are listed by number.
const NAMED: usize = 3;
/// Most values that a note shows.
const SHOWN: usize = 4;

/// Lines of a file: the numbers of the first ones, and the count of all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Lines {
    first: Vec<usize>,
    count: usize,
    /// Whether a line other than the first was added.
    many: bool,
}

impl Lines {
    pub(crate) fn push(&mut self, line: usize) {
        self.many |= self.first.first().is_some_and(|first| *first != line);
        if self.first.len() < NAMED {
            self.first.push(line);
        }
        self.count += 1;
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// The first one; 0 of none.
    pub(crate) fn first(&self) -> usize {
        self.first.first().copied().unwrap_or_default()
    }

    /// `line 2`, or `lines 2, 4, 6 and 9 more`, or `line 1 (9 rows)` if the rows are on one line; `word` replaces
    /// "line".
    fn text(&self, word: &str) -> String {
        if self.count > 1 && !self.many {
            return format!("{word} {} ({} rows)", self.first(), self.count);
        }
        let numbers: Vec<String> = self.first.iter().map(usize::to_string).collect();
        let more = self.count - self.first.len();
        match (&numbers[..], more) {
            ([only], 0) => format!("{word} {only}"),
            (_, 0) => format!("{word}s {}", numbers.join(", ")),
            _ => format!("{word}s {} and {more} more", numbers.join(", ")),
        }
    }
}

impl fmt::Display for Lines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text("line"))
    }
}

/// The problems of a file: one entry for each row, or one for all rows with the same fault.
#[derive(Debug, Default)]
pub(crate) struct Problems {
    entries: Vec<ProblemEntry>,
    more: usize,
}

#[derive(Debug)]
enum ProblemEntry {
    Row(String),
    /// `place` says where on the line the first one is.
    Rows {
        word: &'static str,
        lines: Lines,
        place: String,
        fault: String,
    },
}

impl fmt::Display for ProblemEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Row(text) => f.write_str(text),
            Self::Rows { word, lines, place, fault } if lines.count() == 1 => {
                write!(f, "{}{place}: {fault}", lines.text(word))
            }
            Self::Rows { word, lines, fault, .. } => write!(f, "{}: {fault}", lines.text(word)),
        }
    }
}

impl Problems {
    /// Adds a problem of one row, or of the file.
    pub(crate) fn push(&mut self, problem: String) {
        self.add(ProblemEntry::Row(problem));
    }

    /// Adds a fault that many rows may have: equal faults become one problem. `word` replaces "line" in the message.
    #[cfg(any(test, feature = "parquet"))]
    pub(crate) fn push_common(&mut self, word: &'static str, line: usize, fault: String) {
        self.push_placed(word, line, "", fault);
    }

    /// As [`Problems::push_common`]; `place` follows the line if only one row has the fault.
    pub(crate) fn push_placed(&mut self, word: &'static str, line: usize, place: &str, fault: String) {
        for entry in &mut self.entries {
            if let ProblemEntry::Rows { lines, fault: listed, .. } = entry
                && *listed == fault
            {
                return lines.push(line);
            }
        }
        let mut lines = Lines::default();
        lines.push(line);
        self.add(ProblemEntry::Rows { word, lines, place: place.to_owned(), fault });
    }

    fn add(&mut self, entry: ProblemEntry) {
        if self.entries.len() < LISTED {
            self.entries.push(entry);
        } else {
            self.more += 1;
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Returns an error that names the file if there is any problem.
    pub(crate) fn into_data_error(self, path: &Path) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        let problems = self.entries.iter().map(ProblemEntry::to_string).collect();
        Err(Error::Data { path: path.to_path_buf(), problems, more: self.more })
    }

    /// The same for records that do not come from a file.
    pub(crate) fn into_invalid(self) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        let listed: Vec<String> = self.entries.iter().map(ProblemEntry::to_string).collect();
        let more = if self.more > 0 { format!("\n  and {} more", self.more) } else { String::new() };
        Err(Error::Invalid(format!("{}{more}", listed.join("\n  "))))
    }
}

/// FileNotes about values that were not read as they are written, one for each kind and file.
#[derive(Debug, Default)]
pub(super) struct FileNotes {
    list: Vec<String>,
    values: [Values; 2],
}

/// A kind of value that is not text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ValueKind {
    Number,
    Boolean,
}

/// Values of one kind that became text.
#[derive(Debug, Default)]
struct Values {
    count: usize,
    some: BTreeSet<String>,
}

impl FileNotes {
    pub(super) fn push(&mut self, note: impl Into<String>) {
        self.list.push(note.into());
    }

    /// Adds that rows are chats under `key`.
    pub(super) fn chat(&mut self, key: &str) {
        let note = format!("each row's user message under `{key}` is the input, the assistant's the output");
        if !self.list.contains(&note) {
            self.list.push(note);
        }
    }

    /// Adds a value that became text as it is written.
    pub(super) fn value(&mut self, kind: ValueKind, text: &str) {
        let values = &mut self.values[kind as usize];
        values.count += 1;
        if values.some.len() < SHOWN {
            values.some.insert(text.to_owned());
        }
    }

    pub(super) fn into_list(self) -> Vec<String> {
        let mut list = self.list;
        for (name, Values { count, some }) in ["number", "boolean"].into_iter().zip(self.values) {
            if count > 0 {
                let some: Vec<String> = some.into_iter().collect();
                list.push(format!(
                    "{count} {name}{} read as text: {}{}",
                    if count == 1 { " is" } else { "s are" },
                    some.join(", "),
                    if some.len() == SHOWN { ", ..." } else { "" }
                ));
            }
        }
        list
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_names_the_first_and_counts_all() {
        let text = |numbers: &[usize]| {
            let mut lines = Lines::default();
            numbers.iter().for_each(|line| lines.push(*line));
            lines.to_string()
        };
        assert_eq!(text(&[2]), "line 2");
        assert_eq!(text(&[2, 3, 5]), "lines 2, 3, 5");
        assert_eq!(text(&[2, 3, 5, 8, 9]), "lines 2, 3, 5 and 2 more");
    }

    #[test]
    fn push_common_says_the_fault_of_many_rows_once() {
        let mut problems = Problems::default();
        (1..=10_000).for_each(|line| problems.push_common("line", line, "too long".into()));
        problems.push_common("line", 7, "too short".into());
        let error = problems.into_data_error(Path::new("d")).unwrap_err().to_string();
        assert_eq!(error, "d: 2 problems\n  lines 1, 2, 3 and 9997 more: too long\n  line 7: too short");
    }
}
