//! The messages to a furniture rental under `data/messages`: counts, form, lengths, and no message told twice.

use crate::corpus::{
    Sample, assert_label_counts, assert_no_near_copies, assert_trimmed, assert_utf8_with_line_feeds,
    read_file,
};

const LABELS: [&str; 4] = ["billing", "delivery", "damage", "praise"];

/// Name of a file and its rows of each label.
const FILES: [(&str, usize); 3] =
    [("messages/train.csv", 80), ("messages/validation.csv", 15), ("messages/test.csv", 25)];

fn all() -> Vec<Sample> {
    FILES.into_iter().flat_map(|(file, _)| read_file(file)).collect()
}

#[test]
fn files_have_their_counts_and_balance() {
    for (file, of_each) in FILES {
        assert_label_counts(file, &read_file(file), &LABELS.map(|label| (label, of_each)));
    }
}

#[test]
fn files_are_plain_utf8_with_line_feeds() {
    for (file, _) in FILES {
        assert_utf8_with_line_feeds(file);
    }
}

#[test]
fn a_message_has_trimmed_lines_and_40_to_160_words() {
    for message in all() {
        let words = message.word_count();
        assert!((40..=160).contains(&words), "{words} words: {}", message.place());
        assert_trimmed(&message, true);
        assert!(!message.text.contains("Label:"), "label cue in the text: {}", message.place());
    }
}

/// The length must not tell the label: the median of each is that of all within five words.
#[test]
fn labels_have_like_lengths() {
    let median = |mut lengths: Vec<usize>| {
        lengths.sort_unstable();
        lengths[lengths.len() / 2]
    };
    let messages = all();
    let of_all = median(messages.iter().map(Sample::word_count).collect());
    assert!((75..=85).contains(&of_all), "median of {of_all} words");
    for label in LABELS {
        let of_label = messages.iter().filter(|message| message.label == label);
        let of_label = median(of_label.map(Sample::word_count).collect());
        assert!(of_label.abs_diff(of_all) <= 5, "{label}: median of {of_label} words, {of_all} of all");
    }
}

#[test]
fn no_message_is_told_twice() {
    let messages = all();
    assert_eq!(messages.len(), 480);
    assert_no_near_copies(&messages);
}
