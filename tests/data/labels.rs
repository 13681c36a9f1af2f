//! Labels in one form, and what is said of those that differ. The normal forms are Unicode's own (UAX #15): Python's
//! unicodedata gives the same for each pair here.

use super::*;
use gneiss::data::labels::{escaped, normalize, warnings};

#[test]
fn what_looks_alike_is_one_label() {
    for (written, label) in [
        ("positive", "positive"),
        (" positive\t\r\n", "positive"),
        ("positive\u{a0}", "positive"),
        ("\u{feff}positive", "positive"),
        ("pos\u{200b}itive", "positive"),
        ("posi\u{ad}tive\u{2060}", "positive"),
        ("\u{200e}positive\u{202c}", "positive"),
        ("positive\u{200d}", "positive"),
        ("very\u{a0}good", "very good"),
        ("very\u{3000}good", "very good"),
        ("very\u{2009}good", "very good"),
        ("two\r\nlines", "two\nlines"),
        ("cafe\u{301}", "caf\u{e9}"),
        ("cafe\u{200b}\u{301}", "caf\u{e9}"),
        ("\u{212b}ngstrom", "\u{c5}ngstrom"),
        ("\u{1112}\u{1161}\u{11ab}", "\u{d55c}"),
        // Case, width and inner white space are the file's.
        ("Positive", "Positive"),
        ("\u{ff11}", "\u{ff11}"),
        ("very  good", "very  good"),
        // Joiners make a difference in Persian and in emoji.
        (
            "\u{646}\u{645}\u{6cc}\u{200c}\u{62e}\u{648}\u{627}\u{647}\u{645}",
            "\u{646}\u{645}\u{6cc}\u{200c}\u{62e}\u{648}\u{627}\u{647}\u{645}",
        ),
        ("\u{1f468}\u{200d}\u{1f469}", "\u{1f468}\u{200d}\u{1f469}"),
    ] {
        assert_eq!(normalize(written), label, "{}", escaped(written));
        assert_eq!(normalize(label), label, "{} again", escaped(label));
    }
}

#[test]
fn escaped_shows_what_cannot_be_seen() {
    assert_eq!(escaped("a\u{a0}\u{200b}b\"\n"), r#""a\u{a0}\u{200b}b\"\n""#);
    assert_eq!(escaped("cafe\u{301}"), r#""cafe\u{301}""#);
    assert_eq!(escaped("caf\u{e9}"), "\"caf\u{e9}\"");
    assert_eq!(escaped("\u{212b}"), r#""\u{212b}""#);
}

fn labelled(rows: &[(&str, &str)]) -> Dataset {
    let records = rows.iter().enumerate().map(|(i, (input, output))| record(input, output, i + 2)).collect();
    Dataset { path: "d.csv".into(), records, notes: Vec::new(), warnings: Vec::new() }
}

#[test]
fn normalize_labels_says_which_ones_it_changed() {
    let rows =
        [("a", "spam"), ("b", "spam "), ("c", "spam\u{a0}"), ("d", "ham"), ("e", "spam "), ("f", "spam ")];
    let mut dataset = labelled(&[&rows[..], &[("g", "spam "), ("h", "ham\n")]].concat());
    dataset.normalize_labels().unwrap();
    let outputs: Vec<&str> = dataset.records.iter().map(|r| r.output.as_str()).collect();
    assert_eq!(outputs, ["spam", "spam", "spam", "ham", "spam", "spam", "spam", "ham"]);
    assert_eq!(
        dataset.warnings,
        [
            "6 of 8 labels are trained and scored without white space around them, invisible characters and other forms of \
          a character: \"spam \" is \"spam\" (lines 3, 6, 7 and 1 more), \"spam\\u{a0}\" is \"spam\" (line 4), \"ham\\n\" \
          is \"ham\" (line 9); hint: write each label one way in the file"
        ]
    );
    // A second time there is nothing to say.
    dataset.warnings.clear();
    dataset.normalize_labels().unwrap();
    assert!(dataset.warnings.is_empty());
    let mut dataset = labelled(&[("a", "\u{200b}")]);
    assert_eq!(
        dataset.normalize_labels().unwrap_err().to_string(),
        "d.csv: line 2: field `output`: expected a label, found \"\\u{200b}\", of which nothing can be seen"
    );
}

fn warned(rows: &[(&str, &str)]) -> Vec<String> {
    warnings(&labelled(rows).records)
}

#[test]
fn labels_that_look_alike_are_named() {
    assert!(warned(&[("a", "0"), ("b", "1"), ("c", "10"), ("d", "very good"), ("e", "verygood")]).is_empty());
    assert_eq!(
        warned(&[
            ("a", "Spam"),
            ("b", "spam"),
            ("c", "ham"),
            ("d", "spam"),
            ("e", "1"),
            ("f", "1.0"),
            ("g", "01")
        ]),
        [
            "labels that look alike are different ones: \"01\" (1 row) and \"1\" (1 row) and \"1.0\" (1 row), \"Spam\" (1 \
          row) and \"spam\" (2 rows); hint: if they mean the same, write them one way"
        ]
    );
    let family = "\u{1f468}\u{200d}\u{1f469}";
    let found = warned(&[("a", family), ("b", "\u{1f468}\u{1f469}")]);
    assert!(found.len() == 1 && found[0].contains("\\u{200d}"), "{found:?}");
}

#[test]
fn the_same_input_with_different_labels_is_named_with_its_lines() {
    assert!(warned(&[("a", "0"), ("a", "0"), ("b", "1")]).is_empty());
    let rows = [
        ("Late again", "0"),
        ("late  again\n", "1"),
        ("other", "1"),
        ("late again", "0"),
        ("late\u{a0}again", "0"),
    ];
    assert_eq!(
        warned(&rows),
        [
            "4 of 5 rows give the same input different labels, so no prompt can learn them all: \"late again\" is labelled \
          \"0\" in lines 2, 5, 6 and \"1\" in line 3; hint: keep one label for each input"
        ]
    );
    let many: Vec<(String, &str)> =
        (0..20_000).map(|i| (format!("text {}", i / 2), ["0", "1"][i % 2])).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|(input, label)| (input.as_str(), *label)).collect();
    let found = warned(&many);
    assert!(found.len() == 1 && found[0].len() < 700, "{found:?}");
    assert!(found[0].contains("\"text 0\" is labelled \"0\" in line 2 and \"1\" in line 3"), "{found:?}");
    assert!(found[0].contains("and 9996 more inputs"), "{found:?}");
}

#[test]
fn missing_values_that_became_text_are_named() {
    let found = warned(&[("a", "1"), ("b", "nan"), ("c", "None"), ("d", "nan")]);
    assert_eq!(
        found,
        [
            "labels that look like missing values are trained as text: \"None\" (line 4), \"nan\" (lines 3, 5); hint: take \
          these rows out if nobody labelled them"
        ]
    );
}
