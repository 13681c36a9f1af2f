//! What looks wrong with the files of a run.

use crate::config::{Config, Task};
use crate::data::{Record, labels};
use std::collections::{BTreeMap, HashMap};

/// Share of rows with one label from which on a file counts as unbalanced.
const UNBALANCED: f64 = 0.8;
/// What looks wrong with the files of a configuration: one label far more frequent than all others, labels that training
/// never sees, test or validation inputs that are in the training file too. Problems within one file are found by
/// [`crate::data::Dataset`].
pub fn data(
    config: &Config,
    train: &[Record],
    validation: Option<&[Record]>,
    test: Option<&[Record]>,
) -> Vec<String> {
    let others = [("data.validation", validation), ("data.test", test)];
    let others = || others.iter().filter_map(|(key, records)| records.map(|records| (*key, records)));
    let mut warnings = Vec::new();
    if config.data.task == Task::Classification {
        warnings.extend(unbalanced(train));
        warnings.extend(others().filter_map(|(key, records)| unknown_labels(key, train, records)));
    }
    warnings.extend(others().filter_map(|(key, records)| shared(key, train, records)));
    warnings
}

pub(super) fn counts(records: &[Record]) -> BTreeMap<&str, usize> {
    let mut rows = BTreeMap::new();
    records.iter().for_each(|record| *rows.entry(record.output.trim()).or_default() += 1);
    rows
}

fn unbalanced(train: &[Record]) -> Option<String> {
    let counts = counts(train);
    let (label, most) = counts.iter().max_by_key(|(_, n)| **n)?;
    let share = *most as f64 / train.len() as f64;
    if counts.len() == 1 {
        return Some(format!("data.train: every row is labelled {label:?}: there is nothing to tell apart"));
    }
    (share >= UNBALANCED).then(|| {
        format!(
            "data.train: {most} of {} rows ({:.0} %) are labelled {label:?}, so a prompt that always answers it looks \
             good: balance the labels, and judge by macro F1",
            train.len(),
            100.0 * share
        )
    })
}

fn unknown_labels(key: &str, train: &[Record], records: &[Record]) -> Option<String> {
    let known = counts(train);
    let unknown: Vec<_> = counts(records).into_keys().filter(|label| !known.contains_key(label)).collect();
    let first: Vec<_> = unknown.iter().take(3).map(|label| format!("{label:?}")).collect();
    (!unknown.is_empty()).then(|| {
        format!(
            "{key}: {} that no row of data.train has ({}): the prompt can't learn to answer {}",
            if unknown.len() == 1 { "a label".to_owned() } else { format!("{} labels", unknown.len()) },
            first.join(", ") + if unknown.len() > 3 { ", ..." } else { "" },
            if unknown.len() == 1 { "it" } else { "them" },
        )
    })
}

/// Inputs that differ in nothing but case and white space are the same.
fn shared(key: &str, train: &[Record], records: &[Record]) -> Option<String> {
    let plain = labels::plain_input;
    let in_training: HashMap<String, usize> = train.iter().map(|r| (plain(&r.input), r.line)).collect();
    let same: Vec<(usize, usize)> =
        records.iter().filter_map(|r| Some((r.line, *in_training.get(&plain(&r.input))?))).collect();
    let &(line, train_line) = same.first()?;
    Some(format!(
        "{key}: {} of {} inputs also stand in data.train (line {line} there is line {train_line} here): figures of them \
         show memory, not learning; take them out of one of the files",
        same.len(),
        records.len()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tune::health::tests::{labels, records};

    fn classification() -> Config {
        let mut config = Config::default();
        config.data.task = Task::Classification;
        config
    }

    #[test]
    fn balanced_files_without_shared_inputs_are_well() {
        let (train, test) = (labels(&[("0", 6), ("1", 8)]), records(&[("new", "1"), ("other", "0")]));
        assert_eq!(data(&classification(), &train, Some(&test), Some(&test)), [""; 0]);
    }

    #[test]
    fn one_label_above_all_others_is_told() {
        let of = |counts: &[(&str, usize)]| data(&classification(), &labels(counts), None, None);
        let found = of(&[("0", 2), ("1", 8)]);
        assert!(found.len() == 1 && found[0].contains("8 of 10 rows (80 %) are labelled \"1\""), "{found:?}");
        assert!(of(&[("0", 21), ("1", 79)]).is_empty());
        assert!(of(&[("1", 3)])[0].contains("every row is labelled \"1\""));
        // Free texts have no labels.
        assert!(data(&Config::default(), &labels(&[("0", 1), ("1", 9)]), None, None).is_empty());
    }

    #[test]
    fn a_label_that_training_never_sees_is_told() {
        let train = labels(&[("0", 3), ("1", 3)]);
        let found = data(&classification(), &train, None, Some(&records(&[("a", "1"), ("b", "maybe")])));
        assert!(found.len() == 1 && found[0].starts_with("data.test: a label"), "{found:?}");
        assert!(found[0].contains("\"maybe\""), "{found:?}");
    }

    #[test]
    fn inputs_that_stand_in_the_training_file_are_told_with_their_lines() {
        let train = records(&[("Good  dog", "1"), ("bad dog", "0")]);
        let test = records(&[("new", "1"), (" good dog\n", "1"), ("BAD DOG", "0")]);
        let found = data(&Config::default(), &train, Some(&train[..1]), Some(&test));
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].starts_with("data.validation: 1 of 1 inputs"), "{found:?}");
        assert!(
            found[1].starts_with("data.test: 2 of 3 inputs also stand in data.train (line 3 there is line 2")
        );
    }
}
