//! The attention in candle's ops, segment by segment.

use super::{AttentionOutput, AttentionShape, GradTargets, Gradients, Inputs, Qkv, Segment};
use crate::Result;
use crate::ops::autograd;
use candle_core::{D, DType, Tensor};
use std::ops::Range;

/// The dtype of the scores: f64 for inputs in f64, f32 otherwise.
fn score_dtype(inputs: &Inputs) -> DType {
    if inputs.qkv.queries().dtype() == DType::F64 { DType::F64 } else { DType::F32 }
}

impl AttentionShape {
    /// [`AttentionShape::forward`] in candle's ops; for tests, `gneiss check`, and heads that have no kernel.
    ///
    /// # Errors
    /// Returns an error if shapes do not match or a device operation fails.
    pub fn reference(&self, inputs: Inputs) -> Result<AttentionOutput> {
        let q = inputs.qkv.queries();
        let (mut outs, mut lses) = (Vec::new(), Vec::new());
        for segment in inputs.segments.iter().filter(|s| !s.queries.is_empty()) {
            let (out, lse) = self.segment_reference(&inputs, segment)?;
            outs.push(out);
            lses.push(lse);
        }
        let dtype = q.dtype();
        if outs.is_empty() {
            let empty = |width| Tensor::zeros((0, width), dtype, q.device());
            return Ok(AttentionOutput {
                out: empty(self.q_width())?,
                lse: empty(self.heads)?,
                out_is_needed: false,
            });
        }
        Ok(AttentionOutput {
            out: Tensor::cat(&outs, 0)?.to_dtype(dtype)?,
            lse: Tensor::cat(&lses, 0)?,
            out_is_needed: false,
        })
    }

    /// Output [n, H D] and log-sum-exp [n, H] of a segment's queries.
    fn segment_reference(&self, inputs: &Inputs, segment: &Segment) -> Result<(Tensor, Tensor)> {
        let (q, kv, dtype) = (inputs.qkv.queries(), inputs.qkv.keys_values(), score_dtype(inputs));
        let n = segment.queries.len();
        let own_rows = segment.keys.start..segment.keys.start + segment.first + n;
        let visible = |value: usize| -> Result<Tensor> {
            let own = self.heads_of_rows(kv, &own_rows, value)?.to_dtype(dtype)?;
            let Some(rows) = &segment.prefix else { return Ok(own.contiguous()?) };
            let prefix = self.heads_of_rows(inputs.prefix.unwrap_or(kv), rows, value)?.to_dtype(dtype)?;
            Ok(Tensor::cat(&[&prefix, &own], 1)?.contiguous()?)
        };
        let (k, v) = (visible(0)?, visible(1)?);
        let q = q.narrow(0, segment.queries.start, n)?.narrow(1, 0, self.q_width())?;
        let q = q.reshape((n, self.heads, self.head_dim))?.transpose(0, 1)?.to_dtype(dtype)?.contiguous()?;
        let before = k.dims()[1] - n;
        let mask: Vec<f32> = (0..n)
            .flat_map(|i| (0..before + n).map(move |j| if j > before + i { f32::NEG_INFINITY } else { 0.0 }))
            .collect();
        let mask = Tensor::from_vec(mask, (1, n, before + n), q.device())?.to_dtype(dtype)?;
        let scores = (q.matmul(&k.t()?.contiguous()?)? * self.scale)?.broadcast_add(&mask)?;
        let lse = scores.log_sum_exp(D::Minus1)?;
        let p = scores.broadcast_sub(&lse.unsqueeze(2)?)?.exp()?;
        Ok((p.matmul(&v)?.transpose(0, 1)?.reshape((n, self.q_width()))?, lse.t()?))
    }

    /// Keys (`value` 0) or values (1) of `rows`, repeated for the query heads: [H, rows, D].
    fn heads_of_rows(&self, matrix: &Tensor, rows: &Range<usize>, value: usize) -> Result<Tensor> {
        let (width, k) = (matrix.dims()[1], self.kv_heads * self.head_dim);
        let columns = matrix.narrow(1, width - (2 - value) * k, k)?.narrow(0, rows.start, rows.len())?;
        let heads = columns.reshape((rows.len(), self.kv_heads, 1, self.head_dim))?;
        let group = self.heads / self.kv_heads;
        let all = heads.broadcast_as((rows.len(), self.kv_heads, group, self.head_dim))?;
        Ok(all.reshape((rows.len(), self.heads, self.head_dim))?.transpose(0, 1)?)
    }

    /// [`AttentionShape::backward`] by candle's autograd of [`AttentionShape::reference`].
    pub(crate) fn reference_backward(
        &self,
        inputs: Inputs,
        dout: &Tensor,
        targets: GradTargets,
    ) -> Result<Gradients> {
        let mut leaves = vec![inputs.qkv.queries()];
        let split = matches!(inputs.qkv, Qkv::Split { .. });
        if split {
            leaves.push(inputs.qkv.keys_values());
        }
        leaves.extend(inputs.prefix);
        let mut gradients = autograd(&leaves, dout, |v| {
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
        if targets == GradTargets::Prefixes {
            let (queries, keys) = inputs.prefix_rows();
            gradients[0] = gradients[0].narrow(0, 0, queries)?;
            if split {
                gradients[1] = gradients[1].narrow(0, 0, keys)?;
            }
        }
        let kv = if split { gradients.pop() } else { None };
        let qkv = match (gradients.pop(), kv) {
            _ if targets == GradTargets::Prefixes && inputs.prefix.is_some() => None,
            (Some(q), Some(kv)) => Some(Qkv::Split { q, kv }),
            (qkv, _) => qkv.map(Qkv::Fused),
        };
        Ok(Gradients { qkv, prefix, rotated_back: false })
    }
}
