//! The CPU kernel: a task is a run of neighbouring segments with one key and value head. Its products are
//! small matrix products in scratch memory of a block of queries.

use super::blocks::{Block, Run, blocks, runs};
use super::{Attended, AttentionShape, Gradients, Inputs, Needs, Qkv, Segment};
use crate::Result;
use crate::ops::cpu::{self, Disjoint, Mat, Real, View};
use candle_core::Tensor;
use rayon::prelude::*;

/// Addresses of one task: matrices of one key and value head, and of one of its query heads.
struct Heads<T> {
    scale: T,
    d: usize,
    k: Mat<*const T>,
    v: Mat<*const T>,
    prefix_k: Mat<*const T>,
    prefix_v: Mat<*const T>,
    /// Keys of the prefix.
    prefix: usize,
}

/// Address of `matrix[row, column]`, where rows are `matrix`'s.
fn at<T>(matrix: &[T], width: usize, row: usize, column: usize) -> Mat<*const T> {
    Mat::rows(matrix[(row * width + column).min(matrix.len())..].as_ptr(), width)
}

/// The rows of `m` from `row` on.
fn from_row<T>(m: Mat<*const T>, row: usize) -> Mat<*const T> {
    Mat { ptr: m.ptr.wrapping_offset(row as isize * m.rs), ..m }
}

impl<T: Real> Heads<T> {
    fn new(shape: &AttentionShape, source: &Source<T>, run: &Run, kv_head: usize) -> Self {
        let (d, k) = (shape.head_dim, shape.kv_heads * shape.head_dim);
        let (kv, w) = (source.kv, source.kv_width);
        let (first, prefix) = run.prefix.as_ref().map_or((0, 0), |p| (p.start, p.len()));
        let (column, prefix_column) = (w - 2 * k + kv_head * d, source.prefix_width - 2 * k + kv_head * d);
        Self {
            scale: T::of(shape.scale),
            d,
            k: at(kv, w, 0, column),
            v: at(kv, w, 0, column + k),
            prefix_k: at(source.prefix, source.prefix_width, first, prefix_column),
            prefix_v: at(source.prefix, source.prefix_width, first, prefix_column + k),
            prefix,
        }
    }

    /// `out[rows, columns] = beta * x[rows, D] · (keys or values)ᵀ`, prefix columns first.
    ///
    /// # Safety
    /// `x` has the block's rows; `out` has room for them.
    unsafe fn against_keys(&self, block: &Block, x: Mat<*const T>, values: bool, out: &mut [T], beta: T) {
        let (own, prefix) = if values { (self.v, self.prefix_v) } else { (self.k, self.prefix_k) };
        let scores = out.as_mut_ptr();
        // SAFETY: the pieces lie inside the block and its columns; the segments were checked against the matrices.
        unsafe {
            let size = (block.rows, self.prefix, self.d);
            cpu::gemm(size, Mat::rows(scores, block.columns), false, x, prefix.t(), beta, false);
            for piece in &block.pieces {
                let out =
                    Mat::rows(scores.add(piece.rows.start * block.columns + self.prefix), block.columns);
                let (x, keys) = (from_row(x, piece.rows.start), from_row(own, piece.key));
                cpu::gemm((piece.rows.len(), piece.keys(), self.d), out, false, x, keys.t(), beta, false);
            }
        }
    }

    /// `out[rows, D] = p[rows, columns] · (keys or values)`.
    ///
    /// # Safety
    /// `out` has the block's rows and is not aliased.
    unsafe fn over_keys(&self, block: &Block, p: &[T], values: bool, out: Mat<*mut T>) {
        let (own, prefix) = if values { (self.v, self.prefix_v) } else { (self.k, self.prefix_k) };
        // SAFETY: as in `against_keys`.
        unsafe {
            if self.prefix > 0 {
                let p = Mat::rows(p.as_ptr(), block.columns);
                cpu::gemm((block.rows, self.d, self.prefix), out, false, p, prefix, T::one(), false);
            }
            for piece in &block.pieces {
                let p =
                    Mat::rows(p.as_ptr().add(piece.rows.start * block.columns + self.prefix), block.columns);
                let out = Mat { ptr: out.ptr.offset(piece.rows.start as isize * out.rs), ..out };
                let size = (piece.rows.len(), self.d, piece.keys());
                cpu::gemm(size, out, self.prefix > 0, p, from_row(own, piece.key), T::one(), false);
            }
        }
    }
}

/// The visible part of each row of a block's scores, and the masked part behind it.
fn rows<'a, T>(
    block: &'a Block,
    prefix: usize,
    scores: &'a mut [T],
) -> impl Iterator<Item = (&'a mut [T], &'a mut [T])> {
    let ends = block
        .pieces
        .iter()
        .flat_map(move |p| (0..p.rows.len()).map(move |i| (prefix + p.visible + i, prefix + p.keys())));
    scores
        .chunks_exact_mut(block.columns)
        .zip(ends)
        .map(|(row, (visible, end))| row[..end].split_at_mut(visible))
}

/// The matrices that a pass reads.
struct Source<'a, T> {
    q: &'a [T],
    q_width: usize,
    kv: &'a [T],
    kv_width: usize,
    prefix: &'a [T],
    prefix_width: usize,
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

pub(super) fn forward<T: Real>(shape: &AttentionShape, inputs: Inputs) -> Result<Attended> {
    let queries = inputs.qkv.queries().dims()[0];
    let runs = runs(inputs.segments);
    with_source!(inputs, T, source => {
        let mut lse = Vec::new();
        let out = cpu::overwrite::<T>(queries * shape.q_width(), |out| {
            lse = cpu::overwrite::<T>(queries * shape.heads, |lse| {
                let (out, lse) = (Disjoint(out.as_mut_ptr()), Disjoint(lse.as_mut_ptr()));
                let tasks = runs.len() * shape.kv_heads;
                (0..tasks).into_par_iter().for_each(|task| {
                    let (run, kv_head) = (&runs[task / shape.kv_heads], task % shape.kv_heads);
                    forward_task(shape, &source, inputs.segments, (run, kv_head), (out, lse));
                });
            });
        });
        Ok(Attended { out: cpu::tensor(out, (queries, shape.q_width()))?, lse: cpu::tensor(lse, (queries, shape.heads))? })
    })
}

fn forward_task<T: Real>(
    shape: &AttentionShape,
    source: &Source<T>,
    segments: &[Segment],
    (run, kv_head): (&Run, usize),
    (out, lse): (Disjoint<T>, Disjoint<T>),
) {
    let heads = Heads::new(shape, source, run, kv_head);
    let (d, group) = (shape.head_dim, shape.heads / shape.kv_heads);
    let mut scores = Vec::new();
    for block in blocks(&segments[run.segments.clone()], heads.prefix) {
        scores.resize(block.rows * block.columns, T::zero());
        for head in kv_head * group..(kv_head + 1) * group {
            let q = at(source.q, source.q_width, block.query, head * d);
            // SAFETY: a task writes the rows of its run in the columns of its heads, and no other task does.
            unsafe {
                heads.against_keys(&block, q, false, &mut scores, heads.scale);
                let o = out.at(block.query * shape.q_width() + head * d);
                let sums = cpu::simd(
                    #[inline(always)]
                    || softmax_rows(&block, heads.prefix, &mut scores),
                );
                heads.over_keys(&block, &scores, true, Mat::rows(o, shape.q_width()));
                for (i, (largest, sum)) in sums.into_iter().enumerate() {
                    *lse.at((block.query + i) * shape.heads + head) = largest + sum.ln();
                    let row = std::slice::from_raw_parts_mut(o.add(i * shape.q_width()), d);
                    row.iter_mut().for_each(|o| *o /= sum);
                }
            }
        }
    }
}

/// Exponentials of each row less its largest score, zero where masked; (largest, sum) of each row.
#[inline(always)]
fn softmax_rows<T: Real>(block: &Block, prefix: usize, scores: &mut [T]) -> Vec<(T, T)> {
    rows(block, prefix, scores)
        .map(|(visible, masked)| {
            let largest = cpu::largest(visible);
            masked.fill(T::zero());
            visible.iter_mut().for_each(|s| *s = (*s - largest).exp_());
            let mut lanes = [T::zero(); 16];
            let mut parts = visible.chunks_exact(16);
            for part in &mut parts {
                lanes.iter_mut().zip(part).for_each(|(lane, &p)| *lane += p);
            }
            let tail: T = parts.remainder().iter().copied().sum();
            (largest, lanes.into_iter().sum::<T>() + tail)
        })
        .collect()
}

/// Where a task of the backward pass writes: columns of the matrices that hold dq, dk and dv.
#[derive(Clone, Copy)]
struct Target<T> {
    q: Disjoint<T>,
    q_width: usize,
    kv: Disjoint<T>,
    kv_width: usize,
}

pub(super) fn backward<T: Real>(
    shape: &AttentionShape,
    inputs: Inputs,
    attended: &Attended,
    dout: &Tensor,
    needs: Needs,
) -> Result<Gradients> {
    const OP: &str = "attention backward";
    let (out, lse) = (View::<T>::new(OP, &attended.out)?, View::<T>::new(OP, &attended.lse)?);
    let dout = View::<T>::new(OP, dout)?;
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
    let partial: Vec<Vec<T>> = with_source!(inputs, T, source => {
        let saved = Saved { out: &out, lse: &lse, dout: &dout };
        let task = |task: usize| {
            let (run, kv_head) = (&runs[task / shape.kv_heads], task % shape.kv_heads);
            let own = needs == Needs::All || run.prefix.is_none();
            let work = Work { shape, source: &source, saved: &saved, own };
            work.task(&inputs.segments[run.segments.clone()], run, kv_head, target)
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
    Ok(Gradients { qkv, prefix: dprefix })
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
struct Saved<'a, T> {
    out: &'a [T],
    lse: &'a [T],
    dout: &'a [T],
}

struct Work<'a, T> {
    shape: &'a AttentionShape,
    source: &'a Source<'a, T>,
    saved: &'a Saved<'a, T>,
    /// Whether gradients of the segments' own queries, keys and values are made too.
    own: bool,
}

impl<T: Real> Work<'_, T> {
    /// Writes the gradients of one run and head, and returns that of its prefix, [P, 2D] (dk, dv).
    fn task(&self, segments: &[Segment], run: &Run, kv_head: usize, target: Target<T>) -> Vec<T> {
        let shape = self.shape;
        let heads = Heads::new(shape, self.source, run, kv_head);
        let (d, group) = (shape.head_dim, shape.heads / shape.kv_heads);
        let mut dprefix = vec![T::zero(); heads.prefix * 2 * d];
        let (mut p, mut ds) = (Vec::new(), Vec::new());
        for block in blocks(segments, heads.prefix) {
            p.resize(block.rows * block.columns, T::zero());
            ds.resize(block.rows * block.columns, T::zero());
            for head in kv_head * group..(kv_head + 1) * group {
                let q = at(self.source.q, self.source.q_width, block.query, head * d);
                let dout = at(self.saved.dout, shape.q_width(), block.query, head * d);
                // SAFETY: a task writes the rows of its run in the columns of its heads, and no other task
                // does; the target has those rows wherever `own` is set.
                unsafe {
                    heads.against_keys(&block, q, false, &mut p, heads.scale);
                    heads.against_keys(&block, dout, true, &mut ds, T::one());
                    cpu::simd(
                        #[inline(always)]
                        || self.score_gradients(&block, heads.prefix, head, &mut p, &mut ds),
                    );
                    self.key_gradients(&heads, &block, (&p, dout), true, &mut dprefix, target, kv_head);
                    self.key_gradients(&heads, &block, (&ds, q), false, &mut dprefix, target, kv_head);
                    if self.own {
                        let dq = target.q.at(block.query * target.q_width + head * d);
                        heads.over_keys(&block, &ds, false, Mat::rows(dq, target.q_width));
                    }
                }
            }
        }
        dprefix
    }

    /// From scores to probabilities in `p`, and from dp to ds in `ds`; both zero where masked.
    #[inline(always)]
    fn score_gradients(&self, block: &Block, prefix: usize, head: usize, p: &mut [T], ds: &mut [T]) {
        let (d, width) = (self.shape.head_dim, self.shape.q_width());
        let scale = T::of(self.shape.scale);
        let both = rows(block, prefix, p).zip(rows(block, prefix, ds)).enumerate();
        for (i, ((p, p_masked), (ds, ds_masked))) in both {
            let row = block.query + i;
            let at = row * width + head * d;
            let delta: T = (at..at + d).map(|j| self.saved.out[j] * self.saved.dout[j]).sum();
            let lse = self.saved.lse[row * self.shape.heads + head];
            p_masked.fill(T::zero());
            ds_masked.fill(T::zero());
            for (p, ds) in p.iter_mut().zip(ds) {
                *p = (*p - lse).exp_();
                *ds = scale * *p * (*ds - delta);
            }
        }
    }

    /// Adds `wᵀ x` to dv (`w` probabilities, `x` dout) or to dk (`w` ds, `x` queries).
    ///
    /// # Safety
    /// As in [`Work::task`].
    #[allow(clippy::too_many_arguments)]
    unsafe fn key_gradients(
        &self,
        heads: &Heads<T>,
        block: &Block,
        (w, x): (&[T], Mat<*const T>),
        values: bool,
        dprefix: &mut [T],
        target: Target<T>,
        kv_head: usize,
    ) {
        let (d, k) = (heads.d, self.shape.kv_heads * self.shape.head_dim);
        let one = T::one();
        // SAFETY: the caller's promise.
        unsafe {
            let out = Mat::rows(dprefix.as_mut_ptr().wrapping_add(if values { d } else { 0 }), 2 * d);
            let all = Mat::rows(w.as_ptr(), block.columns).t();
            cpu::gemm((heads.prefix, d, block.rows), out, true, all, x, one, false);
            if !self.own {
                return;
            }
            let column = target.kv_width - 2 * k + kv_head * d + if values { k } else { 0 };
            for piece in &block.pieces {
                let out = Mat::rows(target.kv.at(piece.key * target.kv_width + column), target.kv_width);
                let w = w.as_ptr().add(piece.rows.start * block.columns + heads.prefix);
                let (w, x) = (Mat::rows(w, block.columns).t(), from_row(x, piece.rows.start));
                cpu::gemm((piece.keys(), d, piece.rows.len()), out, true, w, x, one, false);
            }
        }
    }
}
