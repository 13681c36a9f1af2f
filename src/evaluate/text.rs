//! Metrics of generated texts; `tests/evaluate/main.rs` checks them against torchmetrics' and rouge-score's values.

use super::metrics::{ratio, wilson};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;

/// Generated texts against the expected ones; means over the rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TextScores {
    /// Share of texts that equal the expected text, apart from surrounding white space.
    pub exact_match: f64,
    /// Its Wilson interval, 95 %.
    pub exact_match_interval: [f64; 2],
    /// Texts that equal the expected text.
    pub correct: usize,
    /// All texts.
    pub total: usize,
    /// F1 of the words in common, as SQuAD counts it.
    pub token_f1: f64,
    /// ROUGE-L: F1 of the longest common subsequence of words.
    pub rouge_l: f64,
}

/// One generated text against the expected one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowScores {
    /// Whether the two are equal, apart from surrounding white space.
    pub exact: bool,
    /// F1 of the words in common, as SQuAD 2.0's script counts it: without case, ASCII punctuation and the articles a,
    /// an and the; 1 if neither text has a word left, 0 if only one has.
    pub token_f1: f64,
    /// F1 of the longest common subsequence of words, as Google's rouge-score counts it without a stemmer: a word is a
    /// run of a to z and 0 to 9, without case. Text in other scripts has no such words and scores 0.
    pub rouge_l: f64,
}

impl TextScores {
    /// Scores of (expected, generated) pairs.
    pub fn from_pairs<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        Self::mean(&RowScores::all(pairs))
    }

    /// Means of rows' scores; 0 if there are none.
    pub fn mean(rows: &[RowScores]) -> Self {
        let correct = rows.iter().filter(|row| row.exact).count();
        let mean = |of: fn(&RowScores) -> f64| rows.iter().map(of).sum::<f64>() / rows.len().max(1) as f64;
        Self {
            exact_match: ratio(correct, rows.len()),
            exact_match_interval: wilson(correct, rows.len()),
            correct,
            total: rows.len(),
            token_f1: mean(|row| row.token_f1),
            rouge_l: mean(|row| row.rouge_l),
        }
    }
}

impl RowScores {
    /// Scores of one text.
    pub fn compare(expected: &str, generated: &str) -> Self {
        Self {
            exact: expected.trim() == generated.trim(),
            token_f1: token_f1(&squad_words(expected), &squad_words(generated)),
            rouge_l: rouge_l(expected, generated),
        }
    }

    /// Scores of (expected, generated) pairs, one each.
    pub fn all<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Vec<Self> {
        let pairs: Vec<_> = pairs.into_iter().collect();
        pairs.par_iter().map(|(expected, generated)| Self::compare(expected, generated)).collect()
    }
}

/// F1 of the words that two texts have in common, regardless of order.
fn token_f1(expected: &[String], generated: &[String]) -> f64 {
    if expected.is_empty() || generated.is_empty() {
        return f64::from(expected.is_empty() && generated.is_empty());
    }
    let mut left: HashMap<&str, usize> = HashMap::new();
    for word in expected {
        *left.entry(word).or_default() += 1;
    }
    let mut common = 0;
    for word in generated {
        if let Some(n) = left.get_mut(word.as_str()).filter(|n| **n > 0) {
            *n -= 1;
            common += 1;
        }
    }
    // The harmonic mean of common / generated and common / expected.
    ratio(2 * common, expected.len() + generated.len())
}

/// Words of a text, normalised as by SQuAD's script: <https://rajpurkar.github.io/SQuAD-explorer/>.
fn squad_words(text: &str) -> Vec<String> {
    let unpunctuated: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    // An article is a complete run of letters and digits: "apple—a" contains one, "cat" none.
    let mut without_articles = String::with_capacity(unpunctuated.len());
    let mut rest = unpunctuated.as_str();
    while let Some(first) = rest.chars().next() {
        let word = first.is_alphanumeric();
        let end = rest.find(|c: char| c.is_alphanumeric() != word).unwrap_or(rest.len());
        let run = &rest[..end];
        without_articles.push_str(if matches!(run, "a" | "an" | "the") { " " } else { run });
        rest = &rest[end..];
    }
    // Python's white space has four more separators than Unicode's.
    let white = |c: char| c.is_whitespace() || ('\x1c'..='\x1f').contains(&c);
    without_articles.split(white).filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

/// F-measure of ROUGE-L (Lin, 2004), as in <https://github.com/google-research/google-research/tree/master/rouge>.
fn rouge_l(expected: &str, generated: &str) -> f64 {
    let [expected, generated] = [expected, generated].map(str::to_lowercase);
    let words = |text: &'_ str| -> Vec<String> {
        let runs = text.split(|c: char| !(c.is_ascii_lowercase() || c.is_ascii_digit()));
        runs.filter(|run| !run.is_empty()).map(str::to_owned).collect()
    };
    let (expected, generated) = (words(&expected), words(&generated));
    ratio(2 * common_subsequence(&expected, &generated), expected.len() + generated.len())
}

/// Length of the longest common subsequence (Hunt and Szymanski, 1977). It needs as many steps as there are pairs of
/// equal words, times a logarithm, and memory for one text only.
fn common_subsequence(a: &[String], b: &[String]) -> usize {
    let mut places: HashMap<&str, Vec<usize>> = HashMap::new();
    for (i, word) in a.iter().enumerate() {
        places.entry(word).or_default().push(i);
    }
    // The positions in `a` at which the earliest common subsequence of 1, 2, ... words ends.
    let mut ends: Vec<usize> = Vec::new();
    for word in b {
        // Backwards, so that a word of `b` is used once.
        for &i in places.get(word.as_str()).into_iter().flatten().rev() {
            let n = ends.partition_point(|end| *end < i);
            match ends.get_mut(n) {
                Some(end) => *end = i,
                None => ends.push(i),
            }
        }
    }
    ends.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The table of the definition.
    fn by_table(a: &[String], b: &[String]) -> usize {
        let mut table = vec![vec![0; b.len() + 1]; a.len() + 1];
        for (i, x) in a.iter().enumerate() {
            for (j, y) in b.iter().enumerate() {
                table[i + 1][j + 1] =
                    if x == y { table[i][j] + 1 } else { table[i][j + 1].max(table[i + 1][j]) };
            }
        }
        table[a.len()][b.len()]
    }

    proptest! {
        #[test]
        fn the_longest_common_subsequence_is_the_tables(a in "[abcd]{0,40}", b in "[abcd]{0,40}") {
            let words = |text: &str| text.chars().map(String::from).collect::<Vec<_>>();
            let (a, b) = (words(&a), words(&b));
            prop_assert_eq!(common_subsequence(&a, &b), by_table(&a, &b));
        }
    }

    #[test]
    fn a_text_of_one_word_over_and_over_is_no_trouble() {
        let words = vec!["dog".to_owned(); 2000];
        assert_eq!(common_subsequence(&words, &words[..1500]), 1500);
    }

    #[test]
    fn exact_match_minds_case_and_not_the_white_space_around() {
        let scores =
            TextScores::from_pairs([(" Good dog\n", "Good dog"), ("Good dog", "good dog"), ("1", "1.")]);
        assert_eq!((scores.correct, scores.total, scores.exact_match), (1, 3, 1.0 / 3.0));
        assert_eq!(scores.exact_match_interval, wilson(1, 3));
        assert_eq!(TextScores::from_pairs([]).token_f1, 0.0);
    }
}
