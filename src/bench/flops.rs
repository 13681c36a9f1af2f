//! Floating-point operations that a step cannot do without, a multiply and an add counting as two.
//!
//! T, P and M are the rows, the prefix rows and the target rows of the step's packed batch, L its blocks.
//! Rows that are computed twice because memory is short (activation checkpointing), padding, norms and
//! activation functions do not count.
//!
//! ```text
//! a linear layer                2 in out a row; its backward pass the same: no weight gets a gradient
//!   forward   blocks 1 .. L-1   T rows of q, k, v, o, gate, up, down
//!             block L           T rows of k, v; M rows of q, o, gate, up, down
//!   backward  block L           as forward
//!             blocks L-1 .. 2   T rows of all
//!             block 1           T rows of o, gate, up, down; P rows of q, k, v
//! the head                      2 C V a target row forward, the same backward
//! attention                     2 D H a product and pair of a query row and a key row that it sees
//!   forward   2 products        q kᵀ, p v; in block L for the queries of target rows only
//!   backward  5 products        q kᵀ again, do vᵀ, pᵀ do, dsᵀ q, ds k
//!             block 1           5 for pairs inside a prefix; 4 (without ds k) for a sequence's row and a prefix
//!                               row; none for pairs inside a sequence
//! ```
//!
//! In a model of one block that block is the first and the last: its backward pass has M rows of o, gate, up,
//! down, P rows of k, v, and 4 products for pairs of a target row and a prefix row.

use crate::batch::{Passes, PrefixGroup};
use crate::checkpoint::ModelConfig;

/// Useful floating-point operations of one optimizer step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Flops {
    /// Of the blocks' linear layers.
    pub linear: f64,
    /// Of attention's products.
    pub attention: f64,
    /// Of the language-model head.
    pub head: f64,
}

/// Pairs of a query row and a key row that it sees.
#[derive(Default)]
struct Pairs {
    /// All of them.
    all: f64,
    /// Query and key in one prefix.
    inside_prefixes: f64,
    /// Query in a sequence, key in its prefix.
    to_prefixes: f64,
    /// Query in a target row.
    targets: f64,
    /// Query in a target row, key in its prefix.
    targets_to_prefixes: f64,
}

impl Flops {
    /// Of a step over `groups`.
    pub fn of_step(config: &ModelConfig, groups: &[PrefixGroup]) -> Self {
        let batch = Passes::new(groups, usize::MAX).lead;
        let (t, p) = (batch.ids.len() as f64, batch.prefix_rows as f64);
        let m = batch.target_rows.len() as f64;
        let blocks = config.num_hidden_layers as f64;
        let layer = |inputs: usize, outputs: usize| 2.0 * inputs as f64 * outputs as f64;
        let (c, f, d) = (config.hidden_size, config.intermediate_size, config.head_dim);
        let q = layer(c, config.num_attention_heads * d);
        let kv = layer(c, 2 * config.num_key_value_heads * d);
        // What stands behind attention: its output layer and the MLP.
        let behind = layer(config.num_attention_heads * d, c) + layer(c, 2 * f) + layer(f, c);
        let block = q + kv + behind;
        let last = t * kv + m * (q + behind);

        let mut pairs = Pairs::default();
        for (segment, targets) in batch.segments.iter().zip(&batch.target_segments) {
            pairs.add(segment, targets);
        }
        let forward = 2.0 * ((blocks - 1.0) * pairs.all + pairs.targets);
        let (linear, backward) = if config.num_hidden_layers == 1 {
            (last + m * behind + p * kv, 4.0 * pairs.targets_to_prefixes)
        } else {
            let first = t * behind + p * (q + kv);
            let inner = blocks - 2.0;
            let products = 5.0 * pairs.inside_prefixes + 4.0 * pairs.to_prefixes;
            (
                (blocks - 1.0) * t * block + last + last + inner * t * block + first,
                5.0 * (pairs.targets + inner * pairs.all) + products,
            )
        };
        let product = 2.0 * (d * config.num_attention_heads) as f64;
        Self {
            linear,
            attention: product * (forward + backward),
            head: 2.0 * m * layer(c, config.vocab_size),
        }
    }

    /// All of them.
    pub fn total(&self) -> f64 {
        self.linear + self.attention + self.head
    }
}

impl Pairs {
    fn add(&mut self, segment: &crate::ops::Segment, targets: &crate::ops::Segment) {
        let prefix = segment.prefix.as_ref().map_or(0, |p| p.len());
        let own = |s: &crate::ops::Segment| (1..=s.queries.len()).map(|i| s.first + i).sum::<usize>() as f64;
        let before = |s: &crate::ops::Segment| (s.queries.len() * prefix) as f64;
        self.all += own(segment) + before(segment);
        self.targets += own(targets) + before(targets);
        match segment.prefix {
            None => self.inside_prefixes += own(segment),
            Some(_) => {
                self.to_prefixes += before(segment);
                self.targets_to_prefixes += before(targets);
            }
        }
    }
}
