//! Examples, and the prefixes that they share.

use crate::{Error, Result};
use std::ops::Range;

/// One example's token ids; neither side is empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// BOS, instruction and rendered template.
    pub input: Vec<u32>,
    /// The output's tokens and eos; without eos if it was cut.
    pub target: Vec<u32>,
    /// Line of the dataset that the record starts on, counted from 1.
    pub line: usize,
}

/// A prefix and the sequences that follow it.
///
/// ```text
/// before   prompt   head │ input   target
/// └────── prefix ───────┘ └── sequence ──┘
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrefixGroup {
    /// Tokens before the soft prompt, with which every input begins; none if the prompt stands at the start.
    pub before: Vec<u32>,
    /// Rows of the matrix of prompts that are this group's soft prompt; empty for the base model.
    pub prompt: Range<u32>,
    /// Tokens that all inputs begin with, those of `before` left out; they belong to the prefix.
    pub head: Vec<u32>,
    /// Each example's own tokens, after those that all share.
    pub sequences: Vec<Sequence>,
}

/// One example's own tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence {
    /// The rest of the input; at least one token.
    pub input: Vec<u32>,
    /// The target, whose end is not a row.
    pub target: Vec<u32>,
}

impl Sequence {
    /// Rows that it takes in a batch.
    pub fn rows(&self) -> usize {
        self.input.len() + self.target.len().saturating_sub(1)
    }

    /// Its last rows that predict: one for each target token, or the one after which a target would be
    /// generated.
    pub(super) fn target_rows(&self) -> usize {
        self.target.len().max(1)
    }
}

impl PrefixGroup {
    /// Moves the longest common beginning of the inputs into the prefix, but for one token of each input:
    /// its last row predicts the target, and is the example's own.
    pub fn new<'a>(prompt: Range<u32>, examples: impl IntoIterator<Item = &'a Example>) -> Self {
        let examples: Vec<&Example> = examples.into_iter().collect();
        let head = common_head(examples.iter().map(|e| e.input.as_slice())).to_vec();
        Self::with_head(prompt, head, examples)
    }

    /// A group whose shared tokens are known to be `head`; inputs must begin with it and have more.
    pub fn with_head<'a>(
        prompt: Range<u32>,
        head: Vec<u32>,
        examples: impl IntoIterator<Item = &'a Example>,
    ) -> Self {
        let sequence =
            |e: &Example| Sequence { input: e.input[head.len()..].to_vec(), target: e.target.clone() };
        let sequences = examples.into_iter().map(sequence).collect();
        Self { before: Vec::new(), prompt, sequences, head }
    }

    /// Checks that a prompt can stand after the tokens `before` of the examples' inputs.
    ///
    /// # Errors
    /// Returns [`Error::Invalid`] if an input does not begin with these tokens or has no other one.
    pub fn check_before<'a>(before: &[u32], examples: impl IntoIterator<Item = &'a Example>) -> Result<()> {
        let begins = |e: &&Example| e.input.len() > before.len() && e.input.starts_with(before);
        match examples.into_iter().find(|e| !begins(e)) {
            None => Ok(()),
            Some(example) => Err(Error::Invalid(format!(
                "line {}: expected an input that begins with the tokens {before:?}, after which the soft prompt stands, and \
                 has more, found another beginning",
                example.line
            ))),
        }
    }

    /// As [`PrefixGroup::new`], for a prompt that stands after the tokens `before`.
    ///
    /// # Errors
    /// Returns [`Error::Invalid`] if an input does not begin with these tokens or has no other one.
    pub fn after<'a>(
        before: &[u32],
        prompt: Range<u32>,
        examples: impl IntoIterator<Item = &'a Example>,
    ) -> Result<Self> {
        let examples: Vec<&Example> = examples.into_iter().collect();
        Self::check_before(before, examples.iter().copied())?;
        let mut group = Self::new(prompt, examples);
        group.head.drain(..before.len());
        group.before = before.to_vec();
        Ok(group)
    }

    /// Rows of the prefix, P.
    pub fn prefix_rows(&self) -> usize {
        self.before.len() + self.prompt.len() + self.head.len()
    }

    /// Rows of the prefix and of the sequences.
    pub fn rows(&self) -> usize {
        self.prefix_rows() + self.sequences.iter().map(Sequence::rows).sum::<usize>()
    }

    /// The examples again: inputs and targets.
    pub fn unpack(&self) -> impl Iterator<Item = (Vec<u32>, Vec<u32>)> + '_ {
        let input = |s: &Sequence| [self.before.as_slice(), &self.head, &s.input].concat();
        self.sequences.iter().map(move |s| (input(s), s.target.clone()))
    }
}

/// The longest common beginning of `inputs`, less one token of the shortest.
pub fn common_head<'a>(mut inputs: impl Iterator<Item = &'a [u32]>) -> &'a [u32] {
    let Some(first) = inputs.next() else { return &[] };
    let mut n = first.len().saturating_sub(1);
    for input in inputs {
        n = n.min(input.len().saturating_sub(1));
        n = first[..n].iter().zip(input).take_while(|(a, b)| a == b).count();
    }
    &first[..n]
}
