//! Checks that the data sets under `data/` share: reading, labels, form of the files, no near copies.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Texts shorter than this have too few trigrams to compare.
const SHORT: usize = 6;
/// Share of the shorter text's word trigrams that may also stand in the other.
const CONTAINMENT: f64 = 0.5;
/// Likeness of the word sets if one of the two texts is short.
const JACCARD: f64 = 0.8;

/// A row of a data set. `file` is a path below `data/`, `number` counts the rows from 1.
pub struct Sample {
    pub file: &'static str,
    pub number: usize,
    pub text: String,
    pub label: String,
}

impl Sample {
    pub fn place(&self) -> String {
        format!("{} row {} ({:?})", self.file, self.number, self.text)
    }

    pub fn word_count(&self) -> usize {
        self.text.split_whitespace().count()
    }
}

fn path(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data").join(file)
}

/// The rows of a file with the columns `input` and `output`.
pub fn read_file(file: &'static str) -> Vec<Sample> {
    let mut reader = csv::Reader::from_path(path(file)).unwrap();
    assert_eq!(reader.headers().unwrap(), vec!["input", "output"], "{file}: header");
    let rows = reader.records().enumerate().map(|(index, record)| {
        let record = record.unwrap();
        Sample { file, number: index + 1, text: record[0].to_owned(), label: record[1].to_owned() }
    });
    rows.collect()
}

pub fn assert_label_counts(file: &str, samples: &[Sample], expected: &[(&str, usize)]) {
    let mut counts = BTreeMap::new();
    for sample in samples {
        *counts.entry(sample.label.as_str()).or_insert(0) += 1;
    }
    assert_eq!(counts, expected.iter().copied().collect(), "{file}: rows by label");
}

pub fn assert_utf8_with_line_feeds(file: &str) {
    let text = String::from_utf8(fs::read(path(file)).unwrap()).expect(file);
    assert!(text.starts_with("input,output\n"), "{file}: header first, no byte order mark");
    assert!(!text.contains('\r'), "{file}: carriage return");
    assert!(text.ends_with('\n') && !text.ends_with("\n\n"), "{file}: one line feed at the end");
}

/// Between two words there is one blank, or one line break if `multiline`; the text has none at its ends.
pub fn assert_trimmed(sample: &Sample, multiline: bool) {
    let separator = |c: char| c == ' ' || (multiline && c == '\n');
    let blank = |part: &str| part.is_empty() || part.contains(char::is_whitespace);
    assert!(
        !sample.text.split(separator).any(blank),
        "white space other than single separators: {}",
        sample.place()
    );
}

/// A text for the comparison: lower-case words without punctuation.
struct WordSequence {
    words: Vec<String>,
    set: HashSet<String>,
    trigrams: HashSet<[String; 3]>,
}

impl WordSequence {
    fn new(text: &str) -> Self {
        let words: Vec<String> = text
            .to_lowercase()
            .replace('’', "'")
            .split(|c: char| !c.is_alphanumeric() && c != '\'')
            .map(|word| word.trim_matches('\'').to_owned())
            .filter(|word| !word.is_empty())
            .collect();
        let set = words.iter().cloned().collect();
        let trigrams = words.windows(3).map(|w| [w[0].clone(), w[1].clone(), w[2].clone()]).collect();
        Self { words, set, trigrams }
    }

    /// Why the two are near copies, if they are.
    fn likeness(&self, other: &Self) -> Option<String> {
        if self.words == other.words {
            return Some("same words".to_owned());
        }
        if self.words.len() < SHORT || other.words.len() < SHORT {
            let shared = self.set.intersection(&other.set).count() as f64;
            let jaccard = shared / self.set.union(&other.set).count() as f64;
            (jaccard >= JACCARD).then(|| format!("word sets {jaccard:.2} alike"))
        } else {
            let shared = self.trigrams.intersection(&other.trigrams).count() as f64;
            let contained = shared / self.trigrams.len().min(other.trigrams.len()) as f64;
            (contained >= CONTAINMENT).then(|| format!("{contained:.2} of the trigrams shared"))
        }
    }
}

pub fn assert_no_near_copies(samples: &[Sample]) {
    let sequences: Vec<WordSequence> = samples.iter().map(|sample| WordSequence::new(&sample.text)).collect();
    let mut copies = Vec::new();
    for (i, one) in sequences.iter().enumerate() {
        for (j, other) in sequences.iter().enumerate().skip(i + 1) {
            if let Some(why) = one.likeness(other) {
                copies.push(format!("{why}: {} and {}", samples[i].place(), samples[j].place()));
            }
        }
    }
    assert!(copies.is_empty(), "near copies:\n{}", copies.join("\n"));
}

#[test]
fn the_comparison_sees_reworded_copies_and_passes_new_text() {
    let near = |a, b| WordSequence::new(a).likeness(&WordSequence::new(b)).is_some();
    let tale = "They shaved our spaniel without asking and then charged us for the bow.";
    assert!(near(tale, "they SHAVED our spaniel without asking, and then charged us extra!"));
    assert!(near(
        tale,
        "So: they shaved our spaniel without asking and then charged us for the bow. Never again."
    ));
    assert!(!near(tale, "They bathed our spaniel without fuss and then dried him by the stove."));
    assert!(near("Never going back there.", "never going back there, ever"));
    assert!(near("Nails done, no fuss.", "No fuss, nails done!"));
    assert!(!near("Never going back there.", "Always going back there."));
}
