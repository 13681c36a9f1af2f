//! Shapes of three Granite models, and the packed rows of a step of reviews.

use crate::batch::{PackedBatch, Passes, PrefixGroup};
use crate::bench::Lengths;
use crate::checkpoint::{ModelConfig, ModelType};
use crate::ops::AttentionShape;
use crate::ops::rope::Rope;

/// Virtual tokens of a batch.
const VIRTUAL_TOKENS: usize = 100;

/// Examples of a batch: 8 x 32, which are 8,166 rows after 100 virtual tokens.
const EXAMPLES: usize = 256;

/// Sizes of a model that decide the shapes of its ops; a test compares them with the files of `configs/models`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Shape {
    /// Name of the file in `configs/models`.
    pub(super) name: &'static str,
    /// Hidden size, C.
    pub(super) hidden: usize,
    /// Feed-forward size, F.
    pub(super) feed_forward: usize,
    /// Query heads, H.
    pub(super) heads: usize,
    /// Key and value heads, K.
    pub(super) kv_heads: usize,
    /// Size of a head, D.
    pub(super) head_dim: usize,
    /// Vocabulary size, V.
    pub(super) vocab: usize,
    /// Granite's `attention_multiplier`.
    pub(super) scale: f64,
    /// Granite's `residual_multiplier`.
    pub(super) residual: f64,
    /// Granite's `logits_scaling`.
    pub(super) logits_scaling: f64,
}

pub(super) const SHAPES: [Shape; 3] = [
    Shape {
        name: "granite-4.0-350m",
        hidden: 1024,
        feed_forward: 2048,
        heads: 16,
        kv_heads: 4,
        head_dim: 64,
        vocab: 100_352,
        scale: 0.015625,
        residual: 0.263,
        logits_scaling: 4.0,
    },
    Shape {
        name: "granite-3.3-2b",
        hidden: 2048,
        feed_forward: 8192,
        heads: 32,
        kv_heads: 8,
        head_dim: 64,
        vocab: 49_155,
        scale: 0.015625,
        residual: 0.22,
        logits_scaling: 8.0,
    },
    Shape {
        name: "granite-4.1-8b",
        hidden: 4096,
        feed_forward: 12_800,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        vocab: 100_352,
        scale: 0.0078125,
        residual: 0.22,
        logits_scaling: 16.0,
    },
];

impl Shape {
    /// The shape with all sizes except that of a head divided by `scale`. The remainder of a size modulo 8 stays, so
    /// that rows are aligned as in the real model, and so does the number of query heads per key head.
    pub(super) fn scaled(&self, scale: usize) -> Self {
        let size = |n: usize| if scale <= 1 { n } else { (n / scale / 8).max(1) * 8 + n % 8 };
        let kv_heads = (self.kv_heads / scale.max(1)).max(1);
        Self {
            hidden: size(self.hidden),
            feed_forward: size(self.feed_forward),
            heads: self.heads / self.kv_heads * kv_heads,
            kv_heads,
            vocab: size(self.vocab),
            ..*self
        }
    }

    pub(super) fn attention(&self) -> AttentionShape {
        let Self { heads, kv_heads, head_dim, scale, .. } = *self;
        AttentionShape { heads, kv_heads, head_dim, scale }
    }

    /// A model of this shape with `layers` layers.
    pub(super) fn config(&self, layers: usize) -> ModelConfig {
        ModelConfig {
            model_type: ModelType::Granite,
            vocab_size: self.vocab,
            hidden_size: self.hidden,
            intermediate_size: self.feed_forward,
            num_hidden_layers: layers,
            num_attention_heads: self.heads,
            num_key_value_heads: self.kv_heads,
            head_dim: self.head_dim,
            max_position_embeddings: 4096,
            rms_norm_eps: 1e-5,
            rope: Some(Rope::new(1e7)),
            tie_word_embeddings: true,
            attention_bias: false,
            mlp_bias: false,
            embedding_multiplier: 12.0,
            residual_multiplier: self.residual,
            attention_multiplier: self.scale,
            logits_scaling: self.logits_scaling,
            mamba: None,
            experts: None,
        }
    }
}

/// The rows of a step of reviews.
pub(super) struct Batch {
    pub(super) virtual_tokens: usize,
    pub(super) packed: PackedBatch,
}

impl Batch {
    /// A step of 8 x 32 reviews, or `1 / scale` of it.
    pub(super) fn new(shape: &Shape, scale: usize) -> Self {
        let group = group(shape, scale, EXAMPLES.div_ceil(scale));
        Self { virtual_tokens: group.prompt.len(), packed: Passes::new(&[group], usize::MAX).prefix_pass }
    }

    /// Rows, T.
    pub(super) fn rows(&self) -> usize {
        self.packed.ids.len()
    }
}

/// This many reviews after 100 virtual tokens, or `1 / scale` of them.
pub(super) fn group(shape: &Shape, scale: usize, examples: usize) -> PrefixGroup {
    let virtual_tokens = (VIRTUAL_TOKENS / scale).max(1) as u32;
    PrefixGroup::new(0..virtual_tokens, &Lengths::reviews().examples(examples, shape.vocab))
}
