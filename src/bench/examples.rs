//! Examples for a benchmark: token ids of given lengths, generated or read from a file.

use crate::batch::Example;
use crate::{Error, Result};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;
use std::path::Path;

/// Seed of the token ids.
const SEED: u64 = 42;

/// Most problems of a file that one error lists; the others are counted.
const LISTED: usize = 20;

/// Lengths of examples, in tokens.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lengths {
    /// Description of their source.
    pub about: String,
    /// Tokens with which all inputs begin, like those of a template. An input that is not longer keeps one token of its
    /// own.
    pub head: usize,
    /// Tokens of a target.
    pub target: usize,
    /// Tokens of one example after the other, input and target; after the last one the first follows again.
    pub lengths: Vec<usize>,
}

impl Lengths {
    /// The lengths of the tutorial's reviews (`benches/reviews.json`): 25 to 84 tokens, 42.5 on average, of which the
    /// template's 10 are shared and 2 are the target.
    pub fn reviews() -> Self {
        serde_json::from_str(include_str!("../../benches/reviews.json"))
            .expect("benches/reviews.json is a part of the program, and read by its tests")
    }

    /// All examples have `tokens` tokens, with the reviews' head and target.
    ///
    /// # Errors
    /// Returns an error if there are too few tokens for a target and an input.
    pub fn uniform(tokens: usize) -> Result<Self> {
        let reviews = Self::reviews();
        if tokens <= reviews.target {
            let least = reviews.target + 1;
            return Err(Error::Invalid(format!(
                "expected at least {least} tokens, {} of them the target's, found {tokens}",
                reviews.target
            )));
        }
        Ok(Self { about: format!("{tokens} tokens each"), lengths: vec![tokens], ..reviews })
    }

    /// `n` examples of tokens drawn uniformly from the vocabulary; always the same ones.
    pub fn examples(&self, n: usize, vocab_size: usize) -> Vec<Example> {
        let mut rng = ChaCha8Rng::seed_from_u64(SEED);
        let mut tokens =
            |n: usize| -> Vec<u32> { (0..n).map(|_| rng.random_range(0..vocab_size as u32)).collect() };
        let head = tokens(self.head);
        let of_length = |(i, length): (usize, &usize)| {
            let input = length.saturating_sub(self.target).max(1);
            let shared = &head[..self.head.min(input - 1)];
            Example {
                input: [shared, &tokens(input - shared.len())].concat(),
                target: tokens(self.target),
                line: i + 1,
            }
        };
        self.lengths.iter().cycle().take(n).enumerate().map(of_length).collect()
    }
}

/// The format of the file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    examples: Vec<ExampleRow>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ExampleRow {
    input: Vec<u32>,
    target: Vec<u32>,
}

/// Reads `{"examples": [{"input": [ids], "target": [ids]}, ...]}`, the target with its end-of-text token.
///
/// # Errors
/// Returns [`Error::Io`] if the file can't be read, and [`Error::Data`] if it has another format, contains no example,
/// an empty side, or an id that is not below `vocab_size`.
pub fn read(path: &Path, vocab_size: usize) -> Result<Vec<Example>> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let bad = |problems: Vec<String>, more| Err(Error::Data { path: path.to_path_buf(), problems, more });
    let rows = match serde_json::from_str::<File>(&text) {
        Ok(file) if file.examples.is_empty() => {
            return bad(vec!["`examples`: expected at least one, found none".into()], 0);
        }
        Ok(file) => file.examples,
        Err(error) => {
            let form = r#"expected {"examples": [{"input": [ids], "target": [ids]}, ...]}"#;
            return bad(vec![format!("{form}: {error}")], 0);
        }
    };
    let mut problems = Vec::new();
    for (i, row) in rows.iter().enumerate() {
        for (side, ids) in [("input", &row.input), ("target", &row.target)] {
            if ids.is_empty() {
                problems.push(format!("`examples[{i}].{side}`: expected at least one token, found none"));
            }
            if let Some(id) = ids.iter().find(|id| **id as usize >= vocab_size) {
                let expected = format!("ids under the model's vocab_size ({vocab_size})");
                problems.push(format!("`examples[{i}].{side}`: expected {expected}, found {id}"));
            }
        }
    }
    if !problems.is_empty() {
        let more = problems.len().saturating_sub(LISTED);
        problems.truncate(LISTED);
        return bad(problems, more);
    }
    let example =
        |(i, row): (usize, ExampleRow)| Example { input: row.input, target: row.target, line: i + 1 };
    Ok(rows.into_iter().enumerate().map(example).collect())
}

/// As many whole steps of `per_step` examples as `examples` contains, in their order; if there are too few for one
/// step, they are repeated.
pub fn whole_steps(examples: &[Example], per_step: usize) -> Vec<Example> {
    let n = (examples.len() / per_step).max(1) * per_step;
    examples.iter().cycle().take(n).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::common_head;

    fn total(example: &Example) -> usize {
        example.input.len() + example.target.len()
    }

    #[test]
    fn examples_are_as_long_as_the_reviews() {
        let lengths = Lengths::reviews();
        let examples = lengths.examples(128, 49155);
        assert_eq!(examples.len(), 128);
        let found: Vec<usize> = examples.iter().map(total).collect();
        assert_eq!(found[..64], lengths.lengths);
        assert_eq!(found[..64], found[64..]);
        assert_eq!(found.iter().sum::<usize>() as f64 / 128.0, 42.46875);
        assert_eq!((found.iter().min(), found.iter().max()), (Some(&25), Some(&84)));
        assert_eq!(common_head(examples.iter().map(|e| &e.input[..])).len(), 10);
        assert!(examples.iter().all(|e| e.target.len() == 2));
        assert!(examples[0].input != examples[64].input);
        assert_eq!(examples, lengths.examples(128, 49155));
    }

    #[test]
    fn short_examples_keep_a_token_of_their_own() {
        for tokens in [3, 4, 12, 13, 200] {
            let lengths = Lengths::uniform(tokens).unwrap();
            let examples = lengths.examples(9, 1000);
            assert!(examples.iter().all(|e| total(e) == tokens && e.target.len() == 2));
            let head = common_head(examples.iter().map(|e| &e.input[..])).len();
            assert_eq!(head, 10.min(tokens - 3));
            assert!(examples.iter().flat_map(|e| &e.input).all(|id| *id < 1000));
        }
        assert!(Lengths::uniform(2).unwrap_err().to_string().contains("at least 3"));
    }

    #[test]
    fn steps_are_whole() {
        let examples = Lengths::reviews().examples(10, 100);
        let of = |per_step| whole_steps(&examples, per_step);
        assert_eq!(of(3), examples[..9]);
        assert_eq!(of(10), examples);
        let twice = of(16);
        assert_eq!((&twice[..10], &twice[10..]), (&examples[..], &examples[..6]));
    }
}
