//! The CPU kernel: a task is a run of neighbouring segments with one key and value head. Its products are
//! small matrix products in scratch memory of a block of queries.

use super::blocks::{Block, LANES, Run, blocks, runs};
use super::products::{Heads, Pass, Products, Source, at, from_row};
use super::{Attended, AttentionShape, Gradients, Inputs, Needs, Qkv, Segment};
use crate::Result;
use crate::ops::cpu::{self, Disjoint, Mat, Real, Stored, View};
use candle_core::{Tensor, WithDType};
use rayon::prelude::*;

/// The scores that a row sees, `visible` of them and what fills up their last lanes.
#[inline(always)]
fn lanes<T>(row: &mut [T], visible: usize) -> &mut [[T; LANES]] {
    row[..visible.next_multiple_of(LANES)].as_chunks_mut().0
}

/// Opens the tensors of `$inputs` as a [`Source`] for `$body`.
macro_rules! with_source {
    ($inputs:expr, $T:ty, $source:ident => $body:expr) => {{
        let (q, kv) = ($inputs.qkv.queries(), $inputs.qkv.keys_values());
        let prefix = $inputs.prefix.unwrap_or(kv);
        let views = [q, kv, prefix].map(|t| View::<$T>::new("attention", t));
        let [q_view, kv_view, prefix_view] = views;
        let (q_view, kv_view, prefix_view) = (q_view?, kv_view?, prefix_view?);
        let $source = Source {
            q: &q_view,
            q_width: q.dims()[1],
            kv: &kv_view,
            kv_width: kv.dims()[1],
            prefix: &prefix_view,
            prefix_width: prefix.dims()[1],
        };
        $body
    }};
}

pub(super) fn forward<T: Real, P: Products<T>>(shape: &AttentionShape, inputs: Inputs) -> Result<Attended> {
    let queries = inputs.qkv.queries().dims()[0];
    let runs = runs(inputs.segments);
    with_source!(inputs, P::Operand, source => {
        let mut lse = Vec::new();
        let out = cpu::overwrite::<P::Operand>(queries * shape.q_width(), |out| {
            lse = cpu::overwrite::<T>(queries * shape.heads, |lse| {
                let (out, lse) = (Disjoint(out.as_mut_ptr()), Disjoint(lse.as_mut_ptr()));
                let tasks = runs.len() * shape.kv_heads;
                (0..tasks).into_par_iter().for_each(|task| {
                    let (run, kv_head) = (&runs[task / shape.kv_heads], task % shape.kv_heads);
                    forward_task::<T, P>(shape, &source, inputs.segments, (run, kv_head), (out, lse));
                });
            });
        });
        Ok(Attended { out: cpu::tensor(out, (queries, shape.q_width()))?, lse: cpu::tensor(lse, (queries, shape.heads))? })
    })
}

fn forward_task<T: Real, P: Products<T>>(
    shape: &AttentionShape,
    source: &Source<P::Operand>,
    segments: &[Segment],
    (run, kv_head): (&Run, usize),
    (out, lse): (Disjoint<P::Operand>, Disjoint<T>),
) {
    let (d, group) = (shape.head_dim, shape.heads / shape.kv_heads);
    let (prefix, scale) = (run.prefix.as_ref().map_or(0, |p| p.len()), T::of(shape.scale));
    let mut products = P::new(Heads::new(shape, source, run, kv_head), Pass::Forward);
    let (mut scores, mut sums, mut attended) = (Vec::new(), Vec::new(), Vec::new());
    for block in blocks(&segments[run.segments.clone()], prefix) {
        products.begin(&block);
        scores.resize(block.rows * block.columns, T::zero());
        attended.resize(block.rows * d, T::zero());
        for head in kv_head * group..(kv_head + 1) * group {
            let q = at(source.q, source.q_width, block.query, head * d);
            // SAFETY: a task writes the rows of its run in the columns of its heads, and no other task does.
            unsafe {
                products.against_keys(&block, q, false, &mut scores, scale);
                cpu::simd(
                    #[inline(always)]
                    || softmax_rows(&block, prefix, &mut scores, &mut sums),
                );
                products.over_keys(&block, &scores, true, Mat::rows(attended.as_mut_ptr(), d));
                cpu::simd(
                    #[inline(always)]
                    || {
                        for (i, (x, &(largest, sum))) in attended.chunks_exact(d).zip(&sums).enumerate() {
                            let row = block.query + i;
                            *lse.at(row * shape.heads + head) = largest + sum.ln();
                            let out = out.at(row * shape.q_width() + head * d);
                            let (out, inverse) = (std::slice::from_raw_parts_mut(out, d), sum.recip());
                            out.iter_mut().zip(x).for_each(|(y, &x)| *y = P::Operand::stored(x * inverse));
                        }
                    },
                );
            }
        }
    }
}

/// Exponentials of each row less its largest score, zero where masked; `sums` gets (largest, sum) of each row.
#[inline(always)]
fn softmax_rows<T: Real>(block: &Block, prefix: usize, scores: &mut [T], sums: &mut Vec<(T, T)>) {
    sums.clear();
    for piece in &block.pieces {
        for (i, row) in piece.rows.clone().enumerate() {
            let row = &mut scores[row * block.columns..][..block.columns];
            let visible = prefix + piece.visible + i;
            row[visible..visible.next_multiple_of(LANES)].fill(T::neg_infinity());
            let lanes = lanes(row, visible);
            let largest = cpu::largest(lanes.as_flattened());
            let mut sum = [T::zero(); LANES];
            for lane in lanes {
                lane.iter_mut().zip(&mut sum).for_each(|(s, sum)| {
                    *s = (*s - largest).exp_();
                    *sum += *s;
                });
            }
            row[visible..].fill(T::zero());
            sums.push((largest, sum.into_iter().sum()));
        }
    }
}

/// Where a task of the backward pass writes: columns of the matrices that hold dq, dk and dv.
#[derive(Clone, Copy)]
struct Target<T> {
    q: Disjoint<T>,
    q_width: usize,
    kv: Disjoint<T>,
    kv_width: usize,
}

pub(super) fn backward<T: Real, P: Products<T>>(
    shape: &AttentionShape,
    inputs: Inputs,
    lse: &Tensor,
    dout: &Tensor,
    needs: Needs,
) -> Result<Gradients> {
    const OP: &str = "attention backward";
    let lse = View::<T>::new(OP, lse)?;
    let dout = cpu::stored(OP, dout, P::Operand::DTYPE)?;
    let dout = View::<P::Operand>::new(OP, &dout)?;
    let runs = runs(inputs.segments);
    let (q, kv) = (inputs.qkv.queries(), inputs.qkv.keys_values());
    let (q_rows, kv_rows) = match needs {
        Needs::All => (q.dims()[0], kv.dims()[0]),
        Needs::Prefixes => inputs.prefix_rows(),
    };
    let mut dq = vec![T::zero(); q_rows * q.dims()[1]];
    let mut dkv = match inputs.qkv {
        Qkv::Split { .. } => vec![T::zero(); kv_rows * kv.dims()[1]],
        Qkv::Fused(_) => Vec::new(),
    };
    let q_address = Disjoint(dq.as_mut_ptr());
    let target = Target {
        q: q_address,
        q_width: q.dims()[1],
        kv: if dkv.is_empty() { q_address } else { Disjoint(dkv.as_mut_ptr()) },
        kv_width: kv.dims()[1],
    };
    let partial: Vec<Vec<T>> = with_source!(inputs, P::Operand, source => {
        let saved = Saved { lse: &lse, dout: &dout };
        let task = |task: usize| {
            let (run, kv_head) = (&runs[task / shape.kv_heads], task % shape.kv_heads);
            let own = needs == Needs::All || run.prefix.is_none();
            let work = Work { shape, source: &source, saved: &saved, own };
            work.task::<P>(&inputs.segments[run.segments.clone()], run, kv_head, target)
        };
        (0..runs.len() * shape.kv_heads).into_par_iter().map(task).collect()
    });
    let width = shape.kv_width();
    let mut dprefix = inputs.prefix.map(|p| vec![T::zero(); p.dims()[0] * width]);
    // In the order of the tasks, whichever ran first: repeats are equal bit for bit.
    for (task, partial) in partial.iter().enumerate().filter(|(_, p)| !p.is_empty()) {
        let (run, kv_head) = (&runs[task / shape.kv_heads], task % shape.kv_heads);
        let first = run.prefix.as_ref().map_or(0, |p| p.start);
        let (matrix, columns) = match &mut dprefix {
            Some(matrix) => (matrix, width),
            None if dkv.is_empty() => (&mut dq, kv.dims()[1]),
            None => (&mut dkv, width),
        };
        add_prefix(shape, matrix, columns, first, kv_head, partial);
    }
    let dprefix = match (dprefix, inputs.prefix) {
        (Some(buffer), Some(p)) => Some(cpu::tensor(buffer, (p.dims()[0], width))?),
        _ => None,
    };
    let elsewhere = needs == Needs::Prefixes && inputs.prefix.is_some();
    let qkv = match inputs.qkv {
        _ if elsewhere => None,
        Qkv::Fused(_) => Some(Qkv::Fused(cpu::tensor(dq, (q_rows, q.dims()[1]))?)),
        Qkv::Split { .. } => Some(Qkv::Split {
            q: cpu::tensor(dq, (q_rows, q.dims()[1]))?,
            kv: cpu::tensor(dkv, (kv_rows, width))?,
        }),
    };
    Ok(Gradients { qkv, prefix: dprefix, rotated_back: false })
}

/// Adds a task's gradient of its prefix, [P, 2D], to the columns of its head.
fn add_prefix<T: Real>(
    shape: &AttentionShape,
    matrix: &mut [T],
    width: usize,
    first: usize,
    kv_head: usize,
    partial: &[T],
) {
    let (d, k) = (shape.head_dim, shape.kv_heads * shape.head_dim);
    for (i, row) in partial.chunks_exact(2 * d).enumerate() {
        let at = (first + i) * width + width - 2 * k + kv_head * d;
        matrix[at..at + d].iter_mut().zip(&row[..d]).for_each(|(y, &x)| *y += x);
        matrix[at + k..at + k + d].iter_mut().zip(&row[d..]).for_each(|(y, &x)| *y += x);
    }
}

/// What the forward pass left, and the gradient of its output.
struct Saved<'a, T, S> {
    lse: &'a [T],
    dout: &'a [S],
}

struct Work<'a, T, S> {
    shape: &'a AttentionShape,
    source: &'a Source<'a, S>,
    saved: &'a Saved<'a, T, S>,
    /// Whether gradients of the segments' own queries, keys and values are made too.
    own: bool,
}

impl<T: Real, S: Stored<T>> Work<'_, T, S> {
    /// Writes the gradients of one run and head, and returns that of its prefix, [P, 2D] (dk, dv).
    fn task<P: Products<T, Operand = S>>(
        &self,
        segments: &[Segment],
        run: &Run,
        kv_head: usize,
        target: Target<T>,
    ) -> Vec<T> {
        let shape = self.shape;
        let (prefix, scale) = (run.prefix.as_ref().map_or(0, |p| p.len()), T::of(shape.scale));
        let mut products = P::new(Heads::new(shape, self.source, run, kv_head), Pass::Backward);
        let (d, group) = (shape.head_dim, shape.heads / shape.kv_heads);
        let mut dprefix = vec![T::zero(); prefix * 2 * d];
        let (mut p, mut ds) = (Vec::new(), Vec::new());
        for block in blocks(segments, prefix) {
            products.begin(&block);
            p.resize(block.rows * block.columns, T::zero());
            ds.resize(block.rows * block.columns, T::zero());
            for head in kv_head * group..(kv_head + 1) * group {
                let q = at(self.source.q, self.source.q_width, block.query, head * d);
                let dout = at(self.saved.dout, shape.q_width(), block.query, head * d);
                // SAFETY: a task writes the rows of its run in the columns of its heads, and no other task
                // does; the target has those rows wherever `own` is set.
                unsafe {
                    products.against_keys(&block, q, false, &mut p, scale);
                    products.against_keys(&block, dout, true, &mut ds, T::one());
                    cpu::simd(
                        #[inline(always)]
                        || self.score_gradients(&block, prefix, head, &mut p, &mut ds),
                    );
                    self.key_gradients(
                        &mut products,
                        &block,
                        (&p, dout),
                        true,
                        &mut dprefix,
                        target,
                        kv_head,
                    );
                    self.key_gradients(&mut products, &block, (&ds, q), false, &mut dprefix, target, kv_head);
                    if self.own {
                        let dq = target.q.at(block.query * target.q_width + head * d);
                        products.over_keys(&block, &ds, false, Mat::rows(dq, target.q_width));
                    }
                }
            }
        }
        dprefix
    }

    /// From scores to probabilities in `p`, and from dp to ds in `ds`; both zero where masked. The sum of p dp is taken of
    /// those very values and not of `do * out`, which is the same number only where nothing was rounded: ds is small
    /// where dp is near that sum, and has to be the difference of the two alone.
    #[inline(always)]
    fn score_gradients(&self, block: &Block, prefix: usize, head: usize, p: &mut [T], ds: &mut [T]) {
        let scale = T::of(self.shape.scale);
        for piece in &block.pieces {
            for (i, in_block) in piece.rows.clone().enumerate() {
                let (row, visible) = (block.query + in_block, prefix + piece.visible + i);
                let lse = self.saved.lse[row * self.shape.heads + head];
                let of_row = in_block * block.columns..(in_block + 1) * block.columns;
                let (p, ds) = (&mut p[of_row.clone()], &mut ds[of_row]);
                let end = visible.next_multiple_of(LANES);
                p[visible..end].fill(T::neg_infinity());
                ds[visible..end].fill(T::zero());
                let mut sums = [T::zero(); LANES];
                for (p, dp) in lanes(p, visible).iter_mut().zip(lanes(ds, visible)) {
                    for ((p, &mut dp), sum) in p.iter_mut().zip(dp).zip(&mut sums) {
                        *p = (*p - lse).exp_();
                        *sum += *p * dp;
                    }
                }
                let delta: T = sums.into_iter().sum();
                for (p, ds) in lanes(p, visible).iter_mut().zip(lanes(ds, visible)) {
                    p.iter().zip(ds).for_each(|(&p, ds)| *ds = scale * p * (*ds - delta));
                }
                p[visible..].fill(T::zero());
                ds[visible..].fill(T::zero());
            }
        }
    }

    /// Adds `wᵀ x` to dv (`w` probabilities, `x` dout) or to dk (`w` ds, `x` queries).
    ///
    /// # Safety
    /// As in [`Work::task`].
    #[allow(clippy::too_many_arguments)]
    unsafe fn key_gradients<P: Products<T, Operand = S>>(
        &self,
        products: &mut P,
        block: &Block,
        (w, x): (&[T], Mat<*const S>),
        values: bool,
        dprefix: &mut [T],
        target: Target<T>,
        kv_head: usize,
    ) {
        let (d, k) = (self.shape.head_dim, self.shape.kv_heads * self.shape.head_dim);
        let prefix = dprefix.len() / (2 * d);
        // SAFETY: the caller's promise.
        unsafe {
            let out = Mat::rows(dprefix.as_mut_ptr().wrapping_add(if values { d } else { 0 }), 2 * d);
            products.add_transposed((block.rows, prefix), Mat::rows(w.as_ptr(), block.columns), x, out);
            if !self.own {
                return;
            }
            let column = target.kv_width - 2 * k + kv_head * d + if values { k } else { 0 };
            for piece in &block.pieces {
                let out = Mat::rows(target.kv.at(piece.key * target.kv_width + column), target.kv_width);
                let w = w.as_ptr().add(piece.rows.start * block.columns + prefix);
                let x = from_row(x, piece.rows.start);
                let size = (piece.rows.len(), piece.keys());
                products.add_transposed(size, Mat::rows(w, block.columns), x, out);
            }
        }
    }
}
