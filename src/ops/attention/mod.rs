//! Shared-prefix attention. Each query row attends to all of the prefix of its group and, causally, to its own segment, and to
//! nothing else. The prefix's keys and values exist once, whatever the number of sequences that follow it.
//!
//! ```text
//!                 keys:  prefix P    own segment
//!   queries of a  ┌────────────────┬────────┐
//!   sequence      │ all visible    │ ◣ causal│     s = scale * q kᵀ,  p = softmax(s),  out = p v
//!                 └────────────────┴────────┘     lse = log(sum(exp(s)))
//!
//!   dv = pᵀ do    dp = do vᵀ    ds = scale * p (dp - rowsum(p * dp))    dq = ds k    dk = dsᵀ q
//! ```
//!
//! GPUs compute `rowsum(p * dp)` as `rowsum(do * out)`, which is the same sum and needs no second pass over the keys.
//!
//! Of the scores only `lse` is saved. The backward pass recomputes the probabilities block by block, so that memory is linear
//! in T (Dao et al., 2022, arXiv:2205.14135, algorithms 1 and 4).
//! Query heads share key and value heads in consecutive groups of H / K.

mod cpu;
mod gpu;
mod prepare;
mod reference;
mod segments;
#[cfg(test)]
mod tests;

pub(crate) use prepare::PlannedPass;
pub use segments::Segments;

use super::backend::{Route, route};
use super::{IndexView, RopeTable, profile};
use crate::{Error, Result};
use candle_core::Tensor;
use std::ops::Range;

/// Heads and their size.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads, H.
    pub heads: usize,
    /// Key and value heads, K; H is a multiple of it.
    pub kv_heads: usize,
    /// Size of a head, D.
    pub head_dim: usize,
    /// Multiplies the scores: Granite's `attention_multiplier`.
    pub scale: f64,
}

/// Query rows that share their keys: a prefix, or one sequence that follows a prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Rows of the query matrix; the next segment begins with the row after them.
    pub queries: Range<usize>,
    /// Rows of the key and value matrix that are the segment's own.
    pub keys: Range<usize>,
    /// Position of the first query in `keys`; query i attends to `keys[..= first + i]`.
    pub first: usize,
    /// Rows of the prefix's keys and values; every query attends to all of them.
    pub prefix: Option<Range<usize>>,
}

/// Queries, keys and values of a packed batch, heads side by side in the columns.
#[derive(Debug, Clone)]
pub enum Qkv {
    /// [T, (H + 2K) D]: queries, keys, values of every row.
    Fused(Tensor),
    /// Queries of some rows only.
    Split {
        /// [queries, H D].
        q: Tensor,
        /// [T, 2K D]: keys, values.
        kv: Tensor,
    },
}

impl Qkv {
    /// The matrix whose first H D columns are the queries.
    pub fn queries(&self) -> &Tensor {
        match self {
            Self::Fused(t) | Self::Split { q: t, .. } => t,
        }
    }

    /// The matrix whose last 2K D columns are keys and values.
    pub fn keys_values(&self) -> &Tensor {
        match self {
            Self::Fused(t) | Self::Split { kv: t, .. } => t,
        }
    }
}

/// Inputs of the attention.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// Which queries attend to which keys.
    pub segments: &'a Segments,
    /// Queries, keys and values of this pass.
    pub qkv: &'a Qkv,
    /// If another pass computed the prefixes: a matrix whose last 2K D columns are their keys and values. Otherwise the prefixes
    /// are rows of `qkv`.
    pub prefix: Option<&'a Tensor>,
}

/// Result of [`AttentionShape::forward`].
#[derive(Debug, Clone)]
pub struct AttentionOutput {
    /// [queries, H D], in the dtype of the queries.
    pub out: Tensor,
    /// Log-sum-exp of each query's scores, [queries, H]; f32, or f64 of queries in f64.
    pub lse: Tensor,
    /// Whether the backward pass reads `out`: a GPU's kernels do.
    out_is_needed: bool,
}

impl AttentionOutput {
    /// The part that the backward pass needs.
    pub fn saved(self) -> AttentionOutputSaved {
        AttentionOutputSaved { lse: self.lse, out: self.out_is_needed.then_some(self.out) }
    }
}

/// The values of a forward pass that [`AttentionShape::backward`] needs.
#[derive(Debug, Clone)]
pub struct AttentionOutputSaved {
    lse: Tensor,
    /// The output; `None` on the CPU, which does not need it.
    out: Option<Tensor>,
}

/// Which gradients [`AttentionShape::backward`] computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GradTargets {
    /// The gradients of every row.
    All,
    /// The gradients of the prefixes only: the layer below is the embedding, and sequences hold frozen tokens. The prefixes are
    /// the first rows of the batch.
    Prefixes,
}

/// The rotation of queries and keys before the attention ([`RopeTable::forward`]).
#[derive(Clone, Copy)]
pub struct Rotation<'a> {
    /// The table for heads of the attention's size.
    pub table: &'a RopeTable,
    /// Position of each row of [`Qkv::queries`].
    pub queries: IndexView<'a>,
    /// Position of each row of [`Qkv::keys_values`].
    pub keys: IndexView<'a>,
}

/// Result of [`AttentionShape::backward`].
pub struct Gradients {
    /// Gradient of [`Inputs::qkv`]; with [`GradTargets::Prefixes`] that of its first rows, which are the prefixes, or `None` if
    /// the prefixes are rows of another pass.
    pub qkv: Option<Qkv>,
    /// Gradient of the keys and values of [`Inputs::prefix`], [its rows, 2K D]; never rotated back.
    pub prefix: Option<Tensor>,
    /// Whether `qkv` is the gradient of the rotation's input: kernels of a GPU rotate gradients back as they write them.
    /// Otherwise the caller has to do it ([`RopeTable::backward`]).
    pub rotated_back: bool,
}

impl AttentionShape {
    /// Columns of the queries, H D.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Columns of keys and values together, 2K D.
    pub fn kv_width(&self) -> usize {
        2 * self.kv_heads * self.head_dim
    }

    /// Attention of every segment's queries.
    ///
    /// # Errors
    /// Returns an error if shapes or segments do not match or a device operation fails.
    pub fn forward(&self, inputs: Inputs) -> Result<AttentionOutput> {
        let _timed = profile::scope("attention", inputs.qkv.queries().device());
        self.check(&inputs)?;
        match route(inputs.qkv.queries()) {
            Route::Cpu => cpu::forward(self, inputs),
            Route::Kernel => gpu::forward(self, inputs),
        }
    }

    /// Gradients from that of the output, `dout` [queries, H D]; on the CPU in the dtype of `dout`, which is f32 for inputs in
    /// bf16.
    ///
    /// # Errors
    /// Returns an error if shapes or segments do not match or a device operation fails.
    pub fn backward(
        &self,
        inputs: Inputs,
        saved: &AttentionOutputSaved,
        dout: &Tensor,
        targets: GradTargets,
    ) -> Result<Gradients> {
        self.backward_rotated(inputs, saved, (dout, None), targets)
    }

    /// As [`AttentionShape::backward`], with the rotation of queries and keys: its backward pass is computed too if it costs
    /// nothing ([`Gradients::rotated_back`]).
    ///
    /// # Errors
    /// As [`AttentionShape::backward`]; also if the positions are not those of the rows, or beyond the table.
    pub fn backward_rotated(
        &self,
        inputs: Inputs,
        saved: &AttentionOutputSaved,
        (dout, rotation): (&Tensor, Option<Rotation>),
        targets: GradTargets,
    ) -> Result<Gradients> {
        const OP: &str = "attention backward";
        let _timed = profile::scope(OP, dout.device());
        self.check(&inputs)?;
        let expected = (inputs.qkv.queries().dims()[0], self.q_width());
        if dout.dims2().ok() != Some(expected) {
            let (expected, found) = (format!("a gradient of {expected:?}"), format!("{:?}", dout.dims()));
            return Err(Error::shape(OP, expected, found));
        }
        if let Some(rotation) = &rotation {
            rotation.check(&inputs)?;
        }
        match route(dout) {
            Route::Cpu => cpu::backward(self, inputs, saved, dout, targets),
            Route::Kernel => gpu::backward(self, inputs, saved, (dout, rotation), targets),
        }
    }

    fn check(&self, inputs: &Inputs) -> Result<()> {
        let fail = |expected: String, found: String| Err(Error::shape("attention", expected, found));
        if self.kv_heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            let found = format!("{} and {}", self.heads, self.kv_heads);
            return fail("query heads that are a multiple of the key and value heads".into(), found);
        }
        let (queries, q_width) = inputs.qkv.queries().dims2()?;
        let (rows, kv_width) = inputs.qkv.keys_values().dims2()?;
        let expected = match inputs.qkv {
            Qkv::Fused(_) => (self.q_width() + self.kv_width(), self.q_width() + self.kv_width()),
            Qkv::Split { .. } => (self.q_width(), self.kv_width()),
        };
        if (q_width, kv_width) != expected {
            return fail(format!("widths {expected:?}"), format!("{:?}", (q_width, kv_width)));
        }
        let (prefix_rows, prefix_width) = inputs.prefix.map_or(Ok((rows, kv_width)), Tensor::dims2)?;
        if prefix_width < self.kv_width() {
            return fail(format!("a prefix of {} columns", self.kv_width()), prefix_width.to_string());
        }
        let mut next = 0;
        for segment in inputs.segments.iter() {
            let Segment { queries, keys, first, prefix } = segment;
            let fits = queries.start == next
                && queries.end >= next
                && keys.start <= keys.end
                && keys.end <= rows
                && (queries.is_empty() || first + queries.len() <= keys.len())
                && prefix.as_ref().is_none_or(|p| p.start <= p.end && p.end <= prefix_rows);
            if !fits {
                let expected =
                    format!("queries from row {next} and keys under {rows}, prefixes under {prefix_rows}");
                return fail(expected, format!("{segment:?}"));
            }
            next = queries.end;
        }
        if next != queries {
            return fail(format!("segments of {queries} queries"), format!("{next}"));
        }
        Ok(())
    }
}

impl Rotation<'_> {
    fn check(&self, inputs: &Inputs) -> Result<()> {
        let rows = [inputs.qkv.queries().dims()[0], inputs.qkv.keys_values().dims()[0]];
        for (positions, rows) in [self.queries.host(), self.keys.host()].into_iter().zip(rows) {
            let end = positions.iter().max().map_or(0, |p| *p as usize + 1);
            if positions.len() != rows || end > self.table.positions() {
                let expected = format!("{rows} positions under {}", self.table.positions());
                let found = format!("{}, positions under {end}", positions.len());
                return Err(Error::shape("attention backward", expected, found));
            }
        }
        Ok(())
    }
}

impl Inputs<'_> {
    /// Numbers of query and key rows that are the prefixes': those of segments without a prefix of their own.
    fn prefix_rows(&self) -> (usize, usize) {
        prefix_rows(self.segments)
    }
}

/// [`Inputs::prefix_rows`] of these segments.
fn prefix_rows(segments: &[Segment]) -> (usize, usize) {
    let prefixes = segments.iter().filter(|s| s.prefix.is_none());
    prefixes.fold((0, 0), |(q, k), s| (q.max(s.queries.end), k.max(s.keys.end)))
}
