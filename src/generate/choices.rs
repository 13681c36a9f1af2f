//! Answers that must be one of some given texts. The texts' tokens form a trie, and an answer follows a path in it.
//!
//! ```text
//!   texts "no", "none", "yes" of tokens [no], [no, ne], [y, es]
//!
//!   root ┬ no ─ (complete) ─ ne ─ (complete, no token follows: the answer ends)
//!        └ y ── es ─ (complete, no token follows)
//! ```
//!
//! If a complete text is the beginning of another, an end-of-text token ends the answer there.

use std::collections::BTreeSet;
use std::sync::Arc;

/// The token sequences that an answer may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choices {
    /// The first node is the root.
    nodes: Vec<Node>,
    end: Arc<[u32]>,
    /// Each sequence once, in their order.
    sequences: Vec<Vec<u32>>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Node {
    /// Tokens that may follow, and their nodes.
    next: Vec<(u32, usize)>,
    /// Whether a sequence ends here.
    is_end: bool,
}

impl Choices {
    /// The choices `sequences`, none of them empty. The tokens `end` end an answer that could continue.
    pub fn new(sequences: &[Vec<u32>], end: Arc<[u32]>) -> Self {
        let (mut nodes, mut distinct) = (vec![Node::default()], Vec::new());
        for sequence in sequences {
            let mut node = 0;
            for token in sequence {
                node = match nodes[node].next.iter().find(|(next, _)| next == token) {
                    Some((_, next)) => *next,
                    None => {
                        nodes.push(Node::default());
                        let next = nodes.len() - 1;
                        nodes[node].next.push((*token, next));
                        next
                    }
                };
            }
            if !std::mem::replace(&mut nodes[node].is_end, true) {
                distinct.push(sequence.clone());
            }
        }
        Self { nodes, end, sequences: distinct }
    }

    /// Number of tokens of the longest sequence.
    pub fn longest(&self) -> usize {
        self.sequences.iter().map(Vec::len).max().unwrap_or(0)
    }

    /// Each of the sequences once, in their order.
    pub fn sequences(&self) -> &[Vec<u32>] {
        &self.sequences
    }

    /// All tokens that may be chosen, including those that end an answer.
    pub fn tokens(&self) -> BTreeSet<u32> {
        let next = self.nodes.iter().flat_map(|node| node.next.iter().map(|(token, _)| *token));
        next.chain(self.end.iter().copied()).collect()
    }
}

/// The position of an answer in the trie.
pub(super) struct ChoiceState {
    choices: Arc<Choices>,
    node: usize,
    ended: bool,
}

impl ChoiceState {
    pub(super) fn new(choices: Arc<Choices>) -> Self {
        Self { choices, node: 0, ended: false }
    }

    /// Sets the logits [V] of all tokens that may not follow to minus infinity.
    pub(super) fn mask(&self, logits: &mut [f32]) {
        let node = &self.choices.nodes[self.node];
        let next = node.next.iter().map(|(token, _)| *token);
        let end = if node.is_end { &self.choices.end[..] } else { &[] };
        mask_all_but(logits, next.chain(end.iter().copied()));
    }

    /// Follows the chosen token.
    pub(super) fn step(&mut self, token: u32) {
        let node = &self.choices.nodes[self.node];
        match node.next.iter().find(|(next, _)| *next == token) {
            Some((_, next)) => self.node = *next,
            None => self.ended = true,
        }
    }

    /// Whether the last token ended the answer.
    pub(super) fn has_ended(&self) -> bool {
        self.ended
    }

    /// Whether the answer is complete and no token can follow.
    pub(super) fn is_complete(&self) -> bool {
        let node = &self.choices.nodes[self.node];
        node.is_end && node.next.is_empty()
    }
}

/// Sets all logits [V] but those of `tokens` to minus infinity.
pub(super) fn mask_all_but(logits: &mut [f32], tokens: impl Iterator<Item = u32>) {
    let unmasked: Vec<(u32, f32)> =
        tokens.filter_map(|token| Some((token, *logits.get(token as usize)?))).collect();
    logits.fill(f32::NEG_INFINITY);
    for (token, logit) in unmasked {
        logits[token as usize] = logit;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tokens that may come, of 9.
    fn allowed(state: &ChoiceState) -> Vec<u32> {
        let mut logits = [0.5f32; 9];
        state.mask(&mut logits);
        (0u32..).zip(logits).filter(|(_, logit)| *logit > f32::NEG_INFINITY).map(|(token, _)| token).collect()
    }

    #[test]
    fn choices_allow_continuations_and_the_end_of_complete_texts() {
        let choices = Choices::new(&[vec![1], vec![1, 2, 3], vec![4, 1], vec![1]], Arc::from([7, 8]));
        assert_eq!((choices.longest(), choices.nodes.len()), (3, 6));
        assert_eq!(choices.tokens().into_iter().collect::<Vec<_>>(), [1, 2, 3, 4, 7, 8]);
        let mut state = ChoiceState::new(Arc::new(choices.clone()));
        assert_eq!(allowed(&state), [1, 4]);
        state.step(1);
        assert_eq!((allowed(&state), state.is_complete()), (vec![2, 7, 8], false));
        state.step(2);
        assert_eq!(allowed(&state), [3]);
        state.step(3);
        assert!(state.is_complete() && !state.has_ended());
        let mut state = ChoiceState::new(Arc::new(choices));
        state.step(1);
        state.step(8);
        assert!(state.has_ended() && !state.is_complete());
    }

    #[test]
    fn tokens_beyond_the_logits_are_never_allowed() {
        let mut logits = [1.0f32, 2.0];
        mask_all_but(&mut logits, [1, 5, 1].into_iter());
        assert_eq!(logits, [f32::NEG_INFINITY, 2.0]);
    }
}
