//! The dog-grooming reviews under `data/`: counts, form, lengths, and no review told twice.

use crate::corpus::{
    Sample, assert_label_counts, assert_no_near_copies, assert_trimmed, assert_utf8_with_line_feeds,
    read_file,
};

/// Name of a file, its rows labelled 1, its rows labelled 0.
const FILES: [(&str, usize, usize); 3] =
    [("train.csv", 195, 158), ("validation.csv", 30, 30), ("test.csv", 58, 58)];

/// The reviews of a file without the frame around them.
fn read(file: &'static str) -> Vec<Sample> {
    let unframed = |sample: Sample| {
        let text = sample
            .text
            .strip_prefix("Comment: ")
            .and_then(|text| text.strip_suffix("\nSatisfaction:\n"))
            .unwrap_or_else(|| panic!("not of the form: {}", sample.place()))
            .to_owned();
        Sample { text, ..sample }
    };
    read_file(file).into_iter().map(unframed).collect()
}

fn all() -> Vec<Sample> {
    FILES.into_iter().flat_map(|(file, ..)| read(file)).collect()
}

#[test]
fn files_have_their_counts_and_balance() {
    for (file, ones, zeros) in FILES {
        assert_label_counts(file, &read(file), &[("1", ones), ("0", zeros)]);
    }
}

#[test]
fn files_are_plain_utf8_with_line_feeds() {
    for (file, ..) in FILES {
        assert_utf8_with_line_feeds(file);
    }
}

#[test]
fn a_review_is_one_trimmed_line_of_4_to_80_words() {
    for review in all() {
        let words = review.word_count();
        assert!((4..=80).contains(&words), "{words} words: {}", review.place());
        assert_trimmed(&review, false);
        assert!(!review.text.contains("Satisfaction:"), "label cue in the text: {}", review.place());
    }
}

#[test]
fn no_review_is_told_twice() {
    let reviews = all();
    assert_eq!(reviews.len(), 529);
    assert_no_near_copies(&reviews);
}
