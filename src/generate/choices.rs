//! Answers that are one of some given texts: the texts' tokens as a trie, along which an answer walks.
//!
//! ```text
//!   texts "no", "none", "yes" of tokens [no], [no, ne], [y, es]
//!
//!   root ┬ no ─ (whole) ─ ne ─ (whole, nothing follows: the answer ends)
//!        └ y ── es ─ (whole, nothing follows)
//! ```
//!
//! At a whole text that others begin with, an end-of-text token is the choice to end.

use std::collections::BTreeSet;
use std::sync::Arc;

/// The token sequences that an answer may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choices {
    /// The root first.
    nodes: Vec<Node>,
    end: Arc<[u32]>,
    longest: usize,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Node {
    /// Tokens that may follow, with their nodes.
    next: Vec<(u32, usize)>,
    /// Whether a sequence ends here.
    whole: bool,
}

impl Choices {
    /// Of these sequences, none of them empty. The tokens `end` say that an answer ends which could go on.
    pub fn new(sequences: &[Vec<u32>], end: Arc<[u32]>) -> Self {
        let mut nodes = vec![Node::default()];
        for sequence in sequences {
            let mut at = 0;
            for token in sequence {
                at = match nodes[at].next.iter().find(|(next, _)| next == token) {
                    Some((_, node)) => *node,
                    None => {
                        nodes.push(Node::default());
                        let node = nodes.len() - 1;
                        nodes[at].next.push((*token, node));
                        node
                    }
                };
            }
            nodes[at].whole = true;
        }
        Self { nodes, end, longest: sequences.iter().map(Vec::len).max().unwrap_or(0) }
    }

    /// Tokens of the longest sequence.
    pub fn longest(&self) -> usize {
        self.longest
    }

    /// All tokens that an answer may have, and those that end one.
    pub fn tokens(&self) -> BTreeSet<u32> {
        let next = self.nodes.iter().flat_map(|node| node.next.iter().map(|(token, _)| *token));
        next.chain(self.end.iter().copied()).collect()
    }
}

/// How far an answer has come.
pub(super) struct Walk {
    choices: Arc<Choices>,
    node: usize,
    ended: bool,
}

impl Walk {
    pub(super) fn new(choices: Arc<Choices>) -> Self {
        Self { choices, node: 0, ended: false }
    }

    /// Leaves the logits [V] of the tokens that may come now, and none of others.
    pub(super) fn mask(&self, logits: &mut [f32]) {
        let node = &self.choices.nodes[self.node];
        let next = node.next.iter().map(|(token, _)| *token);
        let end = if node.whole { &self.choices.end[..] } else { &[] };
        only(logits, next.chain(end.iter().copied()));
    }

    /// Takes the token that was chosen.
    pub(super) fn step(&mut self, token: u32) {
        let node = &self.choices.nodes[self.node];
        match node.next.iter().find(|(next, _)| *next == token) {
            Some((_, next)) => self.node = *next,
            None => self.ended = true,
        }
    }

    /// Whether the last token was one that ends the text.
    pub(super) fn has_ended(&self) -> bool {
        self.ended
    }

    /// Whether the text is whole and nothing can follow.
    pub(super) fn is_complete(&self) -> bool {
        let node = &self.choices.nodes[self.node];
        node.whole && node.next.is_empty()
    }
}

/// Leaves the logits [V] of `tokens` alone.
pub(super) fn only(logits: &mut [f32], tokens: impl Iterator<Item = u32>) {
    let kept: Vec<(u32, f32)> =
        tokens.filter_map(|token| Some((token, *logits.get(token as usize)?))).collect();
    logits.fill(f32::NEG_INFINITY);
    for (token, logit) in kept {
        logits[token as usize] = logit;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tokens that may come, of 9.
    fn allowed(walk: &Walk) -> Vec<u32> {
        let mut logits = [0.5f32; 9];
        walk.mask(&mut logits);
        (0u32..).zip(logits).filter(|(_, logit)| *logit > f32::NEG_INFINITY).map(|(token, _)| token).collect()
    }

    #[test]
    fn choices_offer_what_goes_on_and_the_end_of_what_is_whole() {
        let choices = Choices::new(&[vec![1], vec![1, 2, 3], vec![4, 1], vec![1]], Arc::from([7, 8]));
        assert_eq!((choices.longest(), choices.nodes.len()), (3, 6));
        assert_eq!(choices.tokens().into_iter().collect::<Vec<_>>(), [1, 2, 3, 4, 7, 8]);
        let mut walk = Walk::new(Arc::new(choices.clone()));
        assert_eq!(allowed(&walk), [1, 4]);
        walk.step(1);
        assert_eq!((allowed(&walk), walk.is_complete()), (vec![2, 7, 8], false));
        walk.step(2);
        assert_eq!(allowed(&walk), [3]);
        walk.step(3);
        assert!(walk.is_complete() && !walk.has_ended());
        let mut walk = Walk::new(Arc::new(choices));
        walk.step(1);
        walk.step(8);
        assert!(walk.has_ended() && !walk.is_complete());
    }

    #[test]
    fn tokens_beyond_the_logits_are_never_allowed() {
        let mut logits = [1.0f32, 2.0];
        only(&mut logits, [1, 5, 1].into_iter());
        assert_eq!(logits, [f32::NEG_INFINITY, 2.0]);
    }
}
