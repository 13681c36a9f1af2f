//! Shared-prefix attention. Each query row sees the whole prefix of its group and, causally, its own
//! segment; nothing else. The prefix's keys and values exist once, however many sequences hang on it.
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
//! GPUs take `rowsum(p * dp)` as `rowsum(do * out)`, the same sum, which needs no second pass over the keys.
//!
//! Only `lse` is kept of the scores; the backward pass makes the probabilities again, block by block, so
//! that memory is linear in T (Dao et al., 2022, arXiv:2205.14135, algorithms 1 and 4).
//! Query heads share key and value heads in consecutive groups of H / K.

mod blocks;
mod gpu;
mod kernel;
mod narrow;
mod plan;
mod prepare;
mod products;
mod segments;

use super::bf16::Isa;
use super::cpu::with_real;
use super::gpu::{Route, route};
use super::profile;
use super::{IndexView, RopeTable};
use crate::{Error, Result};
use candle_core::{D, DType, Tensor};
use narrow::Narrow;
pub(crate) use prepare::Pass;
use products::Whole;
pub use segments::Segments;
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

/// Query rows that share their keys: a prefix, or one sequence behind a prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Rows of the query matrix; those of the next segment follow on.
    pub queries: Range<usize>,
    /// Rows of the key and value matrix that are the segment's own.
    pub keys: Range<usize>,
    /// Where in `keys` the first query stands; query i sees `keys[..= first + i]`.
    pub first: usize,
    /// Rows of the prefix's keys and values, all of which every query sees.
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

/// What the attention reads.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// Who sees whom.
    pub segments: &'a Segments,
    /// Queries, keys and values of this pass.
    pub qkv: &'a Qkv,
    /// Where another pass made the prefixes: a matrix whose last 2K D columns are their keys and values.
    /// Without it the prefixes are rows of `qkv`.
    pub prefix: Option<&'a Tensor>,
}

/// Result of [`AttentionShape::forward`].
#[derive(Debug, Clone)]
pub struct Attended {
    /// [queries, H D], in the dtype of the queries.
    pub out: Tensor,
    /// Log-sum-exp of each query's scores, [queries, H]; f32, or f64 of queries in f64.
    pub lse: Tensor,
}

impl Attended {
    /// What the backward pass reads of it.
    pub fn kept(self) -> Kept {
        let out = if route(&self.out) == Route::Cpu { None } else { Some(self.out) };
        Kept { lse: self.lse, out }
    }
}

/// What [`AttentionShape::backward`] reads of a forward pass.
#[derive(Debug, Clone)]
pub struct Kept {
    lse: Tensor,
    /// The output; the CPU has no use for it.
    out: Option<Tensor>,
}

/// Which gradients [`AttentionShape::backward`] makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// Those of every row.
    All,
    /// Those of the prefixes alone: the block below is the embedding, and sequences hold frozen tokens.
    /// The prefixes are the first rows of the batch.
    Prefixes,
}

/// The rotation that queries and keys went through before the attention ([`RopeTable::forward`]).
#[derive(Clone, Copy)]
pub struct Rotation<'a> {
    /// Of heads of the attention's size.
    pub table: &'a RopeTable,
    /// Position of each row of [`Qkv::queries`].
    pub queries: IndexView<'a>,
    /// Position of each row of [`Qkv::keys_values`].
    pub keys: IndexView<'a>,
}

/// Result of [`AttentionShape::backward`].
pub struct Gradients {
    /// Gradient of [`Inputs::qkv`]; of its first rows, which are the prefixes, under [`Needs::Prefixes`].
    /// `None` where those rows are in another pass.
    pub qkv: Option<Qkv>,
    /// Gradient of the keys and values of [`Inputs::prefix`], [its rows, 2K D]; never rotated back.
    pub prefix: Option<Tensor>,
    /// Whether `qkv` is the gradient of what the rotation was given: kernels of a GPU turn gradients back as they write
    /// them. Else that is still to do ([`RopeTable::backward`]).
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
    /// Shapes or segments that do not fit.
    pub fn forward(&self, inputs: Inputs) -> Result<Attended> {
        let _timed = profile::scope("attention", inputs.qkv.queries().device());
        self.check(&inputs)?;
        let q = inputs.qkv.queries();
        match route(q) {
            Route::Cpu if inputs.narrow() => kernel::forward::<f32, Narrow>(self, inputs),
            Route::Cpu => {
                with_real!("attention", q.dtype(), T => kernel::forward::<T, Whole<T>>(self, inputs))
            }
            Route::Kernel if self.head_dim <= gpu::MAX_HEAD_DIM => gpu::forward(self, inputs),
            _ => self.reference(inputs),
        }
    }

    /// Gradients from that of the output, `dout` [queries, H D]; on the CPU in its dtype, f32 of inputs in bf16.
    ///
    /// # Errors
    /// Shapes or segments that do not fit.
    pub fn backward(&self, inputs: Inputs, kept: &Kept, dout: &Tensor, needs: Needs) -> Result<Gradients> {
        self.backward_rotated(inputs, kept, (dout, None), needs)
    }

    /// As [`AttentionShape::backward`], given the rotation that made queries and keys: its backward pass is done too
    /// where that costs nothing ([`Gradients::rotated_back`]).
    ///
    /// # Errors
    /// As there; positions that are not of the rows, or beyond the table.
    pub fn backward_rotated(
        &self,
        inputs: Inputs,
        kept: &Kept,
        (dout, rotation): (&Tensor, Option<Rotation>),
        needs: Needs,
    ) -> Result<Gradients> {
        const OP: &str = "attention backward";
        let _timed = profile::scope(OP, dout.device());
        self.check(&inputs)?;
        let expected = (inputs.qkv.queries().dims()[0], self.q_width());
        if dout.dims2().ok() != Some(expected) {
            let (expected, found) = (format!("a gradient of {expected:?}"), format!("{:?}", dout.dims()));
            return Err(Error::Shape { op: OP, expected, found });
        }
        if let Some(rotation) = &rotation {
            rotation.check(&inputs)?;
        }
        match (route(dout), &kept.out) {
            (Route::Cpu, _) if inputs.narrow() => {
                kernel::backward::<f32, Narrow>(self, inputs, &kept.lse, dout, needs)
            }
            (Route::Cpu, _) => {
                with_real!(OP, dout.dtype(), T => kernel::backward::<T, Whole<T>>(self, inputs, &kept.lse, dout, needs))
            }
            (Route::Kernel, Some(out)) if self.head_dim <= gpu::MAX_HEAD_DIM => {
                gpu::backward(self, inputs, (out, &kept.lse), (dout, rotation), needs)
            }
            _ => self.reference_backward(inputs, dout, needs),
        }
    }

    fn check(&self, inputs: &Inputs) -> Result<()> {
        let fail = |expected: String, found: String| Err(Error::Shape { op: "attention", expected, found });
        let (queries, q_width) = inputs.qkv.queries().dims2()?;
        let (rows, kv_width) = inputs.qkv.keys_values().dims2()?;
        let expected = match inputs.qkv {
            Qkv::Fused(_) => (self.q_width() + self.kv_width(), self.q_width() + self.kv_width()),
            Qkv::Split { .. } => (self.q_width(), self.kv_width()),
        };
        if (q_width, kv_width) != expected {
            return fail(format!("widths {expected:?}"), format!("{:?}", (q_width, kv_width)));
        }
        let prefix_rows = inputs.prefix.map_or(Ok(rows), |p| p.dims2().map(|d| d.0))?;
        let mut next = 0;
        for segment in inputs.segments.iter() {
            let Segment { queries, keys, first, prefix } = segment;
            let fits = queries.start == next
                && keys.end <= rows
                && (queries.is_empty() || first + queries.len() <= keys.len())
                && prefix.as_ref().is_none_or(|p| p.end <= prefix_rows);
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

    /// The formula in plain candle ops, segment by segment; scores in f32 where the inputs are narrower.
    pub fn reference(&self, inputs: Inputs) -> Result<Attended> {
        let (q, kv) = (inputs.qkv.queries(), inputs.qkv.keys_values());
        let prefix = inputs.prefix.unwrap_or(kv);
        let wide = if q.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let part = |matrix: &Tensor, rows: &Range<usize>, value: usize| -> Result<Tensor> {
            let (width, k) = (matrix.dims()[1], self.kv_heads * self.head_dim);
            let columns = matrix.narrow(1, width - (2 - value) * k, k)?.narrow(0, rows.start, rows.len())?;
            let heads = columns.reshape((rows.len(), self.kv_heads, 1, self.head_dim))?;
            let group = self.heads / self.kv_heads;
            let all = heads.broadcast_as((rows.len(), self.kv_heads, group, self.head_dim))?;
            Ok(all.reshape((rows.len(), self.heads, self.head_dim))?.transpose(0, 1)?.to_dtype(wide)?)
        };
        let (mut outs, mut lses) = (Vec::new(), Vec::new());
        for segment in inputs.segments.iter().filter(|s| !s.queries.is_empty()) {
            let n = segment.queries.len();
            let own = segment.keys.start..segment.keys.start + segment.first + n;
            let visible = |value: usize| -> Result<Tensor> {
                let own = part(kv, &own, value)?;
                Ok(match &segment.prefix {
                    Some(rows) => Tensor::cat(&[&part(prefix, rows, value)?, &own], 1)?.contiguous()?,
                    None => own.contiguous()?,
                })
            };
            let (k, v) = (visible(0)?, visible(1)?);
            let q = q.narrow(0, segment.queries.start, n)?.narrow(1, 0, self.q_width())?;
            let q =
                q.reshape((n, self.heads, self.head_dim))?.transpose(0, 1)?.to_dtype(wide)?.contiguous()?;
            let hidden = k.dims()[1] - n;
            let mask: Vec<f32> = (0..n)
                .flat_map(|i| {
                    (0..hidden + n).map(move |j| if j > hidden + i { f32::NEG_INFINITY } else { 0.0 })
                })
                .collect();
            let mask = Tensor::from_vec(mask, (1, n, hidden + n), q.device())?.to_dtype(wide)?;
            let scores = (q.matmul(&k.t()?.contiguous()?)? * self.scale)?.broadcast_add(&mask)?;
            let lse = scores.log_sum_exp(D::Minus1)?;
            let p = scores.broadcast_sub(&lse.unsqueeze(2)?)?.exp()?;
            outs.push(p.matmul(&v)?.transpose(0, 1)?.reshape((n, self.q_width()))?);
            lses.push(lse.t()?);
        }
        let dtype = q.dtype();
        if outs.is_empty() {
            let empty = |width| Tensor::zeros((0, width), dtype, q.device());
            return Ok(Attended { out: empty(self.q_width())?, lse: empty(self.heads)? });
        }
        Ok(Attended { out: Tensor::cat(&outs, 0)?.to_dtype(dtype)?, lse: Tensor::cat(&lses, 0)? })
    }

    pub(crate) fn reference_backward(
        &self,
        inputs: Inputs,
        dout: &Tensor,
        needs: Needs,
    ) -> Result<Gradients> {
        let mut leaves = vec![inputs.qkv.queries()];
        let split = matches!(inputs.qkv, Qkv::Split { .. });
        if split {
            leaves.push(inputs.qkv.keys_values());
        }
        leaves.extend(inputs.prefix);
        let mut gradients = super::autograd(&leaves, dout, |v| {
            let t = |i: usize| v[i].as_tensor().clone();
            let qkv = if split { Qkv::Split { q: t(0), kv: t(1) } } else { Qkv::Fused(t(0)) };
            let prefix = inputs.prefix.map(|_| t(v.len() - 1));
            Ok(self.reference(Inputs { qkv: &qkv, prefix: prefix.as_ref(), ..inputs })?.out)
        })?;
        let prefix = match inputs.prefix {
            Some(p) => {
                let columns = p.dims()[1] - self.kv_width();
                gradients.pop().map(|g| g.narrow(1, columns, self.kv_width())?.contiguous()).transpose()?
            }
            None => None,
        };
        if needs == Needs::Prefixes {
            let (queries, keys) = inputs.prefix_rows();
            gradients[0] = gradients[0].narrow(0, 0, queries)?;
            if split {
                gradients[1] = gradients[1].narrow(0, 0, keys)?;
            }
        }
        let kv = if split { gradients.pop() } else { None };
        let qkv = match (gradients.pop(), kv) {
            _ if needs == Needs::Prefixes && inputs.prefix.is_some() => None,
            (Some(q), Some(kv)) => Some(Qkv::Split { q, kv }),
            (qkv, _) => qkv.map(Qkv::Fused),
        };
        Ok(Gradients { qkv, prefix, rotated_back: false })
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
                return Err(Error::Shape { op: "attention backward", expected, found });
            }
        }
        Ok(())
    }
}

impl Inputs<'_> {
    /// Whether a CPU's products are those of bf16.
    fn narrow(&self) -> bool {
        self.qkv.queries().dtype() == DType::BF16 && Isa::best().is_some()
    }

    /// Queries and keys that are the prefixes': of segments that have no prefix themselves.
    fn prefix_rows(&self) -> (usize, usize) {
        prefix_rows(self.segments)
    }
}

/// [`Inputs::prefix_rows`] of these segments.
fn prefix_rows(segments: &[Segment]) -> (usize, usize) {
    let prefixes = segments.iter().filter(|s| s.prefix.is_none());
    prefixes.fold((0, 0), |(q, k), s| (q.max(s.queries.end), k.max(s.keys.end)))
}

#[cfg(test)]
mod tests;
