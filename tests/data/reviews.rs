//! The dog-grooming reviews under `data/`: counts, form, lengths, and no review told twice.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Reviews shorter than this have too few trigrams to compare.
const SHORT: usize = 6;
/// Share of the shorter review's word trigrams that may also stand in the other.
const CONTAINMENT: f64 = 0.5;
/// Likeness of the word sets, where one of the two reviews is short.
const JACCARD: f64 = 0.8;

/// Name of a file, its rows labelled 1, its rows labelled 0.
const FILES: [(&str, usize, usize); 3] =
    [("train.csv", 195, 158), ("validation.csv", 30, 30), ("test.csv", 58, 58)];

struct Review {
    file: &'static str,
    row: usize,
    text: String,
    label: String,
}

impl Review {
    fn place(&self) -> String {
        format!("{} row {} ({:?})", self.file, self.row, self.text)
    }
}

/// A review as the comparison sees it: lower-case words without punctuation.
struct Words {
    list: Vec<String>,
    set: HashSet<String>,
    trigrams: HashSet<[String; 3]>,
}

impl Words {
    fn of(text: &str) -> Self {
        let list: Vec<String> = text
            .to_lowercase()
            .replace('’', "'")
            .split(|c: char| !c.is_alphanumeric() && c != '\'')
            .map(|word| word.trim_matches('\'').to_owned())
            .filter(|word| !word.is_empty())
            .collect();
        let set = list.iter().cloned().collect();
        let trigrams = list.windows(3).map(|w| [w[0].clone(), w[1].clone(), w[2].clone()]).collect();
        Self { list, set, trigrams }
    }

    /// Why the two are near copies, if they are.
    fn near(&self, other: &Self) -> Option<String> {
        if self.list.len() < SHORT || other.list.len() < SHORT {
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

fn path(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data").join(file)
}

fn read(file: &'static str) -> Vec<Review> {
    let mut reader = csv::Reader::from_path(path(file)).unwrap();
    assert_eq!(reader.headers().unwrap(), vec!["input", "output"], "{file}: header");
    let rows = reader.records().enumerate().map(|(index, record)| {
        let (row, record) = (index + 1, record.unwrap());
        let text = record[0]
            .strip_prefix("Comment: ")
            .and_then(|rest| rest.strip_suffix("\nSatisfaction:\n"))
            .unwrap_or_else(|| panic!("{file} row {row}: not of the form: {:?}", &record[0]));
        Review { file, row, text: text.to_owned(), label: record[1].to_owned() }
    });
    rows.collect()
}

fn all() -> Vec<Review> {
    FILES.into_iter().flat_map(|(file, ..)| read(file)).collect()
}

#[test]
fn files_have_their_counts_and_balance() {
    for (file, ones, zeros) in FILES {
        let mut counts = HashMap::new();
        for review in read(file) {
            *counts.entry(review.label).or_insert(0) += 1;
        }
        let expected = HashMap::from([("1".to_owned(), ones), ("0".to_owned(), zeros)]);
        assert_eq!(counts, expected, "{file}: rows by label");
    }
}

#[test]
fn files_are_plain_utf8_with_line_feeds() {
    for (file, ..) in FILES {
        let text = String::from_utf8(fs::read(path(file)).unwrap()).expect(file);
        assert!(text.starts_with("input,output\n"), "{file}: header first, no byte order mark");
        assert!(!text.contains('\r'), "{file}: carriage return");
        assert!(text.ends_with('\n') && !text.ends_with("\n\n"), "{file}: one line feed at the end");
    }
}

#[test]
fn a_review_is_one_trimmed_line_of_4_to_80_words() {
    for review in all() {
        let words = review.text.split_whitespace().count();
        assert!((4..=80).contains(&words), "{words} words: {}", review.place());
        let single: Vec<&str> = review.text.split(' ').collect();
        let blank = |part: &&str| part.is_empty() || part.contains(char::is_whitespace);
        assert!(!single.iter().any(blank), "white space other than single blanks: {}", review.place());
        assert!(!review.text.contains("Satisfaction:"), "label cue in the text: {}", review.place());
    }
}

#[test]
fn no_review_is_told_twice() {
    let reviews = all();
    assert_eq!(reviews.len(), 529);
    let words: Vec<Words> = reviews.iter().map(|review| Words::of(&review.text)).collect();
    let mut found = Vec::new();
    for (i, one) in words.iter().enumerate() {
        for (j, other) in words.iter().enumerate().skip(i + 1) {
            let same = (one.list == other.list).then(|| "same words".to_owned());
            if let Some(why) = same.or_else(|| one.near(other)) {
                found.push(format!("{why}: {} and {}", reviews[i].place(), reviews[j].place()));
            }
        }
    }
    assert!(found.is_empty(), "near copies:\n{}", found.join("\n"));
}

#[test]
fn the_comparison_sees_reworded_copies_and_passes_new_text() {
    let near = |a, b| Words::of(a).near(&Words::of(b)).is_some();
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
