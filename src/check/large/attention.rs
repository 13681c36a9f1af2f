//! The cases of shared-prefix attention: all rows of a batch, the queries of target rows alone, and prefixes of another
//! pass. Expected values follow the formula of [`crate::ops::attention`], one segment at a time.

use super::shapes::{Batch, Shape};
use super::{Large, Result};
use crate::check::ResultKind::{Gradient, Value};
use crate::ops::Segments;
use crate::ops::attention::{AttentionShape, GradTargets, Gradients, Inputs, Qkv, Segment};
use candle_core::{DType, Device, Tensor};
use std::ops::Range;

/// Number of values in the matrices of a case, in f32 and under test, times 4 bytes.
const COPIES: usize = 12;

pub(super) fn check(large: &mut Large, shape: &Shape, batch: &Batch) -> Result<()> {
    let attention = shape.attention();
    let (t, packed) = (batch.rows(), &batch.packed);
    let (q, kv) = (attention.q_width(), attention.kv_width());
    let heads = format!("{} of {} heads of {}", shape.heads, shape.kv_heads, shape.head_dim);
    let bytes = 4 * COPIES * t * (2 * q + kv);
    large.case(&format!("{heads}, {t} rows"), bytes, |large, case| {
        let qkv = Qkv::Fused(large.random((t, q + kv), 1.0)?);
        let segments = packed.segments.clone();
        LargeAttentionCase { name: case, shape: attention, segments, qkv, prefix: None }
            .check(large, &[GradTargets::All, GradTargets::Prefixes])
    })?;
    let targets = packed.target_rows.len();
    large.case(&format!("{heads}, {targets} target rows of {t}"), bytes, |large, case| {
        let qkv = Qkv::Split { q: large.random((targets, q), 1.0)?, kv: large.random((t, kv), 1.0)? };
        let segments = packed.target_segments.clone();
        LargeAttentionCase { name: case, shape: attention, segments, qkv, prefix: None }
            .check(large, &[GradTargets::All])
    })?;
    let own = t - packed.prefix_rows;
    large.case(&format!("{heads}, {own} rows after prefixes of another pass"), bytes, |large, case| {
        let qkv = Qkv::Fused(large.random((own, q + kv), 1.0)?);
        let prefix = Some(large.random((packed.prefix_rows, kv), 1.0)?);
        let moved = |rows: &Range<usize>| rows.start - packed.prefix_rows..rows.end - packed.prefix_rows;
        let sequences = packed.segments.iter().filter(|s| s.prefix.is_some()).cloned();
        let segments: Segments =
            sequences.map(|s| Segment { queries: moved(&s.queries), keys: moved(&s.keys), ..s }).collect();
        LargeAttentionCase { name: case, shape: attention, segments, qkv, prefix }
            .check(large, &[GradTargets::All])
    })
}

struct LargeAttentionCase<'a> {
    name: &'a str,
    shape: AttentionShape,
    segments: Segments,
    qkv: Qkv,
    prefix: Option<Tensor>,
}

impl LargeAttentionCase<'_> {
    fn inputs(&self) -> Inputs<'_> {
        Inputs { segments: &self.segments, qkv: &self.qkv, prefix: self.prefix.as_ref() }
    }

    fn check(&self, large: &mut Large, needs: &[GradTargets]) -> Result<()> {
        let queries = self.qkv.queries().dims()[0];
        let dout = large.random((queries, self.shape.q_width()), 1.0)?;
        let expected = Expected::compute(&self.shape, self.inputs(), &dout, None)?;
        let naive = Expected::compute(&self.shape, self.inputs(), &dout, Some(large.target.dtype))?;
        let ours = large.run(|| self.shape.forward(self.inputs()))?;
        let compare =
            |large: &mut Large, (what, kind), ours: &Tensor, of: &dyn Fn(&Expected) -> Result<Tensor>| {
                large.compare_with((self.name, what, kind), ours, &of(&expected)?, &of(&naive)?)
            };
        compare(large, ("out", Value), &ours.out, &|e| Ok(e.out.clone()))?;
        compare(large, ("lse", Value), &ours.lse, &|e| Ok(e.lse.clone()))?;
        let kept = ours.saved();
        for needs in needs {
            let found = large.run(|| self.shape.backward(self.inputs(), &kept, &dout, *needs))?;
            let Gradients { qkv, prefix, .. } = found;
            if let Some(found) = &qkv {
                let (q, kv) = (self.shape.q_width(), self.shape.kv_width());
                let queries = found.queries().narrow(1, 0, q)?;
                let keys = found.keys_values();
                let keys = keys.narrow(1, keys.dims()[1] - kv, kv)?;
                let rows = |matrix: &Tensor, of: &Tensor| Ok(matrix.narrow(0, 0, of.dims()[0])?);
                compare(large, ("dq", Gradient), &queries, &|e| rows(&e.dq, &queries))?;
                compare(large, ("dkv", Gradient), &keys, &|e| rows(&e.dkv, &keys))?;
            }
            match (&prefix, &expected.dprefix, &naive.dprefix) {
                (Some(found), Some(exact), Some(naive)) => {
                    large.compare_with((self.name, "dprefix", Gradient), found, exact, naive)?;
                }
                (None, None, None) => {}
                _ => return Err(crate::Error::Invalid(format!("{}: another set of gradients", self.name))),
            }
        }
        Ok(())
    }
}

/// Output and gradients in f32, or in f64 for inputs in f64; or the results of plain ops in a dtype, which round every
/// result to it.
pub(super) struct Expected {
    /// [queries, H D].
    pub(super) out: Tensor,
    /// [queries, H].
    pub(super) lse: Tensor,
    /// [queries, H D].
    pub(super) dq: Tensor,
    /// [T, 2K D].
    pub(super) dkv: Tensor,
    /// Gradients of prefixes in another pass, [their rows, 2K D].
    pub(super) dprefix: Option<Tensor>,
}

/// The matrices of one segment: [K, (H/K) n, D] of n queries, [K, m, D] of m keys.
struct Own {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
}

impl Expected {
    pub(super) fn compute(
        shape: &AttentionShape,
        inputs: Inputs,
        dout: &Tensor,
        rounded: Option<DType>,
    ) -> Result<Self> {
        let (q, kv) = (inputs.qkv.queries(), inputs.qkv.keys_values());
        let dtype = if q.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let prefix_matrix = inputs.prefix.unwrap_or(kv);
        let mut sums = KeySums { rows: kv.dims()[0], own: Vec::new(), prefixes: Vec::new() };
        let (mut outs, mut lses, mut dqs) = (Vec::new(), Vec::new(), Vec::new());
        for segment in inputs.segments.iter().filter(|s| !s.queries.is_empty()) {
            let n = segment.queries.len();
            let visible = segment.keys.start..segment.keys.start + segment.first + n;
            let keys = |value: usize| -> Result<Tensor> {
                let own = shape.keys(kv, &visible, value)?;
                let all = match &segment.prefix {
                    Some(rows) => Tensor::cat(&[&shape.keys(prefix_matrix, rows, value)?, &own], 1)?,
                    None => own,
                };
                Ok(all.to_dtype(dtype)?.contiguous()?)
            };
            let queries = |matrix: &Tensor| shape.heads(&matrix.narrow(0, segment.queries.start, n)?, dtype);
            let own = Own { q: queries(q)?, k: keys(0)?, v: keys(1)?, dout: queries(dout)? };
            let part = own.gradients(shape, n, rounded)?;
            outs.push(shape.rows(&part.out, n)?);
            dqs.push(shape.rows(&part.dq, n)?);
            lses.push(part.lse);
            let dkv = shape.key_rows(&part.dk, &part.dv)?;
            let p = segment.prefix.as_ref().map_or(0, Range::len);
            if let Some(rows) = &segment.prefix {
                sums.add_to_prefix(rows, &dkv.narrow(0, 0, p)?)?;
            }
            sums.own.push((visible, dkv.narrow(0, p, dkv.dims()[0] - p)?));
        }
        let prefixes = std::mem::take(&mut sums.prefixes);
        let (width, device) = (shape.kv_width(), q.device());
        let zeros = |rows: usize| Ok(Tensor::zeros((rows, width), dtype, device)?);
        let mut dkv = placed(sums.rows, sums.own, zeros)?;
        let mut of_prefixes = placed(prefix_matrix.dims()[0], prefixes, zeros)?;
        let dprefix = match inputs.prefix {
            Some(_) => Some(of_prefixes),
            None => {
                of_prefixes = (of_prefixes + &dkv)?;
                dkv = of_prefixes;
                None
            }
        };
        let all = |parts: Vec<Tensor>| Tensor::cat(&parts, 0);
        Ok(Self { out: all(outs)?, lse: all(lses)?, dq: all(dqs)?, dkv, dprefix })
    }
}

/// Gradients of keys and values by their rows.
struct KeySums {
    rows: usize,
    own: Vec<(Range<usize>, Tensor)>,
    prefixes: Vec<(Range<usize>, Tensor)>,
}

impl KeySums {
    fn add_to_prefix(&mut self, rows: &Range<usize>, more: &Tensor) -> Result<()> {
        match self.prefixes.iter_mut().find(|(of, _)| of == rows) {
            Some((_, sum)) => *sum = (&*sum + more)?,
            None => self.prefixes.push((rows.clone(), more.clone())),
        }
        Ok(())
    }
}

/// `parts` at their rows of a matrix with `rows` rows, zeros elsewhere.
fn placed(
    rows: usize,
    mut parts: Vec<(Range<usize>, Tensor)>,
    zeros: impl Fn(usize) -> Result<Tensor>,
) -> Result<Tensor> {
    parts.sort_by_key(|(at, _)| at.start);
    let (mut all, mut end) = (Vec::new(), 0);
    for (at, part) in parts.into_iter().filter(|(at, _)| !at.is_empty()) {
        if at.start > end {
            all.push(zeros(at.start - end)?);
        }
        end = at.end;
        all.push(part);
    }
    if rows > end {
        all.push(zeros(rows - end)?);
    }
    Ok(Tensor::cat(&all, 0)?)
}

/// Results of one segment: out and dq [K, (H/K) n, D], lse [n, H], dk and dv [K, m, D].
struct SegmentResult {
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
}

impl Own {
    fn gradients(&self, shape: &AttentionShape, n: usize, rounded: Option<DType>) -> Result<SegmentResult> {
        let round = |t: Tensor| match rounded {
            Some(dtype) => t.to_dtype(dtype)?.to_dtype(t.dtype()),
            None => Ok(t),
        };
        let Self { q, k, v, dout } = self;
        let (kv_heads, group, m) = (shape.kv_heads, shape.heads / shape.kv_heads, k.dims()[1]);
        let s = round((round(q.matmul(&k.t()?)?)? * shape.scale)?)?.reshape((kv_heads, group, n, m))?;
        let mask = mask(n, m, q.device())?.to_dtype(q.dtype())?;
        let s = s.broadcast_add(&mask)?.reshape((kv_heads, group * n, m))?;
        let most = s.max_keepdim(2)?;
        let weights = s.broadcast_sub(&most)?.exp()?;
        let sum = weights.sum_keepdim(2)?;
        let p = round(weights.broadcast_div(&sum)?)?;
        let lse = (sum.log()? + most)?.reshape((kv_heads * group, n))?.t()?.contiguous()?;
        let dp = round(dout.matmul(&v.t()?)?)?;
        let delta = round(round((&p * &dp)?)?.sum_keepdim(2)?)?;
        let ds = round(((&p * dp.broadcast_sub(&delta)?)? * shape.scale)?)?;
        Ok(SegmentResult {
            out: p.matmul(v)?,
            lse,
            dq: ds.matmul(k)?,
            dk: ds.t()?.contiguous()?.matmul(q)?,
            dv: p.t()?.contiguous()?.matmul(dout)?,
        })
    }
}

/// [n, m]: the last n of m keys belong to the queries; query i attends to the first i + 1 of them.
fn mask(n: usize, m: usize, device: &Device) -> Result<Tensor> {
    let hidden = |i: usize, j: usize| if j > m - n + i { f32::NEG_INFINITY } else { 0.0 };
    let values: Vec<f32> = (0..n).flat_map(|i| (0..m).map(move |j| hidden(i, j))).collect();
    Ok(Tensor::from_vec(values, (n, m), device)?)
}

impl AttentionShape {
    /// The query heads of `rows` [n, at least H D], with the heads of a key head one after the other: [K, (H/K) n, D].
    fn heads(&self, rows: &Tensor, dtype: DType) -> Result<Tensor> {
        let (n, group) = (rows.dims()[0], self.heads / self.kv_heads);
        let heads = rows.narrow(1, 0, self.q_width())?.reshape((n, self.kv_heads, group, self.head_dim))?;
        let heads = heads.permute((1, 2, 0, 3))?.contiguous()?.to_dtype(dtype)?;
        Ok(heads.reshape((self.kv_heads, group * n, self.head_dim))?)
    }

    /// The inverse: [n, H D] of [K, (H/K) n, D].
    fn rows(&self, heads: &Tensor, n: usize) -> Result<Tensor> {
        let heads = heads.reshape((self.kv_heads, self.heads / self.kv_heads, n, self.head_dim))?;
        Ok(heads.permute((2, 0, 1, 3))?.contiguous()?.reshape((n, self.q_width()))?)
    }

    /// The keys (0) or the values (1) of some rows of a matrix that ends with them: [K, m, D].
    fn keys(&self, matrix: &Tensor, rows: &Range<usize>, value: usize) -> Result<Tensor> {
        let (width, part) = (matrix.dims()[1], self.kv_heads * self.head_dim);
        let columns =
            matrix.narrow(0, rows.start, rows.len())?.narrow(1, width - (2 - value) * part, part)?;
        Ok(columns.reshape((rows.len(), self.kv_heads, self.head_dim))?.transpose(0, 1)?.contiguous()?)
    }

    /// [m, 2K D] of two [K, m, D].
    fn key_rows(&self, keys: &Tensor, values: &Tensor) -> Result<Tensor> {
        let part = |heads: &Tensor| -> Result<Tensor> {
            let m = heads.dims()[1];
            Ok(heads.transpose(0, 1)?.contiguous()?.reshape((m, self.kv_heads * self.head_dim))?)
        };
        Ok(Tensor::cat(&[&part(keys)?, &part(values)?], 1)?)
    }
}
