//! Floating-point operations that a step cannot do without, a multiply and an add counting as two.
//!
//! T, P and M are the rows, the prefix rows and the target rows of the step's packed batch, L its layers.
//! Rows that are computed twice because memory is short (activation checkpointing), padding, norms and
//! activation functions do not count.
//!
//! ```text
//! a projection                  2 in out a row; its backward pass the same: no weight gets a gradient
//!   forward   layers 1 .. L-1   T rows of q, k, v, o, gate, up, down
//!             layer L           T rows of k, v; M rows of q, o, gate, up, down
//!   backward  layer L           as forward
//!             layers L-1 .. 2   T rows of all
//!             layer 1           T rows of o, gate, up, down; P rows of q, k, v
//! the head                      2 C V a target row forward, the same backward
//! attention                     2 D H a product and pair of a query row and a key row that it sees
//!   forward   2 products        q kᵀ, p v; in layer L for the queries of target rows only
//!   backward  5 products        q kᵀ again, do vᵀ, pᵀ do, dsᵀ q, ds k
//!             layer 1           5 for pairs inside a prefix; 4 (without ds k) for a sequence's row and a prefix
//!                               row; none for pairs inside a sequence
//! ```
//!
//! experts                       as projections, of the k experts that a row goes to
//! the scan of a Mamba2 layer    by chunks of Q rows, a row of which sees q = (Q + 1) / 2 rows of its chunk on average
//!   forward                     2 I (N + q) + 2 N q a row; 2 I N more if the chunk's end state is read
//!   backward                    4 I (N + q) + 6 N q a row; 6 I N more if the chunk's end state is read
//!
//! In a model of one layer that layer is the first and the last: its backward pass has M rows of o, gate, up,
//! down, P rows of k, v, and 4 products for pairs of a target row and a prefix row.

use crate::batch::{PackedBatch, Passes};
use crate::checkpoint::tensors::{LayerTensors, ProjectionRows};
use crate::checkpoint::{MambaConfig, MixerKind, ModelConfig};
use crate::ops::ssd;

/// Useful floating-point operations of one optimizer step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Flops {
    /// Of the layers' projections.
    pub linear: f64,
    /// Of attention's products.
    pub attention: f64,
    /// Of the scans of Mamba2 layers.
    pub scan: f64,
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

/// Rows of a step.
#[derive(Clone, Copy)]
struct FlopRows {
    all: f64,
    prefix: f64,
    targets: f64,
}

impl FlopRows {
    /// Rows that a projection of layer `i` of `layers` multiplies, forward and backward together.
    fn multiplied(self, projection: ProjectionRows, i: usize, layers: usize) -> f64 {
        let (is_first, is_last) = (i == 0, i + 1 == layers);
        let outputs = if is_last { self.targets } else { self.all };
        match projection {
            ProjectionRows::Keys => self.all + if is_first { self.prefix } else { self.all },
            // No target row is a prefix row.
            ProjectionRows::Queries if is_first && is_last => outputs,
            ProjectionRows::Queries => outputs + if is_first { self.prefix } else { outputs },
            ProjectionRows::Outputs => 2.0 * outputs,
        }
    }
}

impl Flops {
    /// Of a step over the passes of a batch that was not split.
    pub fn of_step(config: &ModelConfig, passes: &Passes) -> Self {
        let rows = FlopRows {
            all: passes.rows() as f64,
            // No gradient goes below the first layer's attention if prompts are its keys and values.
            prefix: if passes.given.is_some() { 0.0 } else { passes.prefix_pass.prefix_rows as f64 },
            targets: passes.iter().map(|batch| batch.target_rows.len()).sum::<usize>() as f64,
        };
        let layers = config.num_hidden_layers;
        let mut linear = 0.0;
        for i in 0..layers {
            for stack in LayerTensors::new(config, i, false).stacks() {
                let matrices = stack.experts.map_or(1, |experts| experts.per_token);
                for projection in &stack.projections {
                    let of_row = 2.0 * (matrices * stack.inputs * projection.outputs) as f64;
                    linear += of_row * rows.multiplied(projection.rows, i, layers);
                }
            }
        }
        let mut pairs = Pairs::default();
        for batch in passes.iter() {
            for (segment, targets) in batch.segments.iter().zip(&batch.target_segments) {
                pairs.add(segment, targets);
            }
        }
        let attention = (0..layers).filter(|i| config.mixer(*i) == MixerKind::Attention);
        let products: f64 = attention.map(|i| pairs.products(i, layers)).sum();
        let head = 2.0 * (config.hidden_size * config.vocab_size) as f64;
        let d = config.head_dim;
        let product = 2.0 * (d * config.num_attention_heads) as f64;
        let scan = config
            .mamba
            .as_ref()
            .map_or(0.0, |mamba| passes.iter().map(|batch| scan_flops(config, mamba, batch)).sum::<f64>());
        Self { linear, attention: product * products, scan, head: 2.0 * rows.targets * head }
    }

    /// All of them.
    pub fn total(&self) -> f64 {
        self.linear + self.attention + self.scan + self.head
    }
}

impl Pairs {
    /// Products of pairs in layer `i` of `layers`, forward and backward together.
    fn products(&self, i: usize, layers: usize) -> f64 {
        match (i == 0, i + 1 == layers) {
            (true, true) => 2.0 * self.targets + 4.0 * self.targets_to_prefixes,
            (true, false) => 2.0 * self.all + 5.0 * self.inside_prefixes + 4.0 * self.to_prefixes,
            (false, true) => 7.0 * self.targets,
            (false, false) => 7.0 * self.all,
        }
    }

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

/// Operations of the scans of all Mamba2 layers, forward and backward.
fn scan_flops(config: &ModelConfig, mamba: &MambaConfig, batch: &PackedBatch) -> f64 {
    let (i, n) = (mamba.inner() as f64, (mamba.groups * mamba.state) as f64);
    let of_chunk = |rows: usize, has_end: bool| {
        let seen = (rows as f64 + 1.0) / 2.0;
        let row = 6.0 * i * (mamba.state as f64 + seen) + 8.0 * n * seen;
        rows as f64 * (row + if has_end { 8.0 * i * mamba.state as f64 } else { 0.0 })
    };
    let of_segment = |segment: &crate::ops::Segment| -> f64 {
        let (rows, is_prefix) = (segment.queries.len(), segment.queries.end <= batch.prefix_rows);
        let chunks = rows.div_ceil(ssd::CHUNK);
        let chunk = |c: usize| of_chunk(ssd::CHUNK.min(rows - c * ssd::CHUNK), is_prefix || c + 1 < chunks);
        (0..chunks).map(chunk).sum()
    };
    let layers = config.layers_with(MixerKind::Mamba2) as f64;
    layers * batch.segments.iter().map(of_segment).sum::<f64>()
}
