//! The CPU kernel: a task is a run of neighbouring segments with one key and value head. Its products are
//! small matrix products in scratch memory of a block of queries.

use super::blocks::{LANES, Run, blocks, runs};
use super::products::{Gradient, Heads, Pass, Products, Source, at, from_row_mut};
use super::{Attended, AttentionShape, Gradients, Inputs, Needs, Qkv, Segment};
use crate::Result;
use crate::ops::cpu::{self, Disjoint, Fma, Mat, Real, Stored, View};
use candle_core::{Tensor, WithDType};
use rayon::prelude::*;

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
    let (mut sums, mut attended) = (Vec::new(), Vec::new());
    for block in blocks(&segments[run.segments.clone()], prefix) {
        products.begin(&block);
        sums.resize(block.rows, (T::zero(), T::zero()));
        attended.resize(block.rows * d, T::zero());
        for head in kv_head * group..(kv_head + 1) * group {
            let q = at(source.q, source.q_width, block.query, head * d);
            // SAFETY: a task writes the rows of its run in the columns of its heads, and no other task does.
            unsafe {
                products.scores(&block, q, scale);
                products.probabilities(
                    &block,
                    #[inline(always)]
                    |row, scores, fma| sums[row.index] = exponentials(scores, row.visible, fma),
                );
                products.attend(&block, Mat::rows(attended.as_mut_ptr(), d));
                cpu::simd(
                    #[inline(always)]
                    |_| {
                        for (i, (x, &(largest, sum))) in attended.chunks_exact_mut(d).zip(&sums).enumerate() {
                            let (row, inverse) = (block.query + i, sum.recip());
                            *lse.at(row * shape.heads + head) = largest + sum.ln();
                            x.iter_mut().for_each(|x| *x *= inverse);
                            let out = out.at(row * shape.q_width() + head * d);
                            P::Operand::store_slice(x, std::slice::from_raw_parts_mut(out, d));
                        }
                    },
                );
            }
        }
    }
}

/// Exponentials of a row's visible scores less the largest of them, zero in the other columns; returns that score and
/// the exponentials' sum.
#[inline(always)]
fn exponentials<T: Real>(scores: &mut [T], visible: usize, fma: Fma) -> (T, T) {
    let end = visible.next_multiple_of(LANES);
    scores[visible..end].fill(T::neg_infinity());
    let largest = cpu::largest(&scores[..end]);
    scores[..end].iter_mut().for_each(|s| *s = (*s - largest).exp_(fma));
    scores[visible..].fill(T::zero());
    (largest, cpu::sum(&scores[..end]))
}

/// A row of scores becomes the probabilities `p`, and the gradients of those in `ds` become the scores' gradients; both are
/// zero in columns that are not visible. The sum of p dp is taken of those very values and not of `do * out`, which is the
/// same number only if nothing was rounded: ds is small where dp is near that sum, and has to be the difference of the two
/// alone.
#[inline(always)]
fn gradients<T: Real>((p, ds): (&mut [T], &mut [T]), visible: usize, (lse, scale): (T, T), fma: Fma) {
    let end = visible.next_multiple_of(LANES);
    p[..end].iter_mut().for_each(|p| *p = (*p - lse).exp_(fma));
    p[visible..].fill(T::zero());
    ds[visible..].fill(T::zero());
    let delta = cpu::dot(&p[..end], &ds[..end], fma);
    p[..end].iter().zip(&mut ds[..end]).for_each(|(&p, ds)| *ds = scale * p * (*ds - delta));
    // What is not finite does not leave the visible columns.
    ds[visible..end].fill(T::zero());
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
    let (q_width, kv_width) = (q.dims()[1], kv.dims()[1]);
    let own_kv = match inputs.qkv {
        Qkv::Split { .. } => kv_rows * kv_width,
        Qkv::Fused(_) => 0,
    };
    let (mut dkv, mut partial) = (Vec::new(), Vec::new());
    let mut dq = with_source!(inputs, P::Operand, source => cpu::overwrite::<T>(q_rows * q_width, |dq| {
        dkv = cpu::overwrite::<T>(own_kv, |dkv| {
            if !covers(inputs.segments, kv_rows) {
                (if own_kv > 0 { &mut *dkv } else { &mut *dq }).fill(T::zero());
            }
            let q = Disjoint(dq.as_mut_ptr());
            let kv = if own_kv > 0 { Disjoint(dkv.as_mut_ptr()) } else { q };
            let target = Target { q, q_width, kv, kv_width };
            let saved = Saved { lse: &lse, dout: &dout };
            let task = |task: usize| {
                let (run, kv_head) = (&runs[task / shape.kv_heads], task % shape.kv_heads);
                let own = needs == Needs::All || run.prefix.is_none();
                let work = Work { shape, source: &source, saved: &saved, own };
                work.task::<P>(&inputs.segments[run.segments.clone()], run, kv_head, target)
            };
            partial = (0..runs.len() * shape.kv_heads).into_par_iter().map(task).collect::<Vec<Vec<T>>>();
        });
    }));
    let width = shape.kv_width();
    let mut dprefix = inputs.prefix.map(|p| vec![T::zero(); p.dims()[0] * width]);
    // In the order of the tasks, whichever ran first: repeats are equal bit for bit.
    for (task, partial) in partial.iter().enumerate().filter(|(_, p)| !p.is_empty()) {
        let (run, kv_head) = (&runs[task / shape.kv_heads], task % shape.kv_heads);
        let first = run.prefix.as_ref().map_or(0, |p| p.start);
        let (matrix, columns) = match &mut dprefix {
            Some(matrix) => (matrix, width),
            None if dkv.is_empty() => (&mut dq, kv_width),
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

/// Whether each of the first `rows` rows of keys is a segment's own, so that its task writes their gradients.
fn covers(segments: &[Segment], rows: usize) -> bool {
    let mut next = 0;
    let adjoin = segments.iter().all(|s| std::mem::replace(&mut next, s.keys.end) == s.keys.start);
    adjoin && next >= rows
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
        let [keys, values] = self.gradients(&mut dprefix, target, kv_head);
        for row in segments.iter().flat_map(|segment| segment.keys.clone()) {
            for matrix in [keys.own, values.own].into_iter().flatten() {
                // SAFETY: as below.
                unsafe { std::slice::from_raw_parts_mut(from_row_mut(matrix, row).ptr, d) }.fill(T::zero());
            }
        }
        for block in blocks(segments, prefix) {
            products.begin(&block);
            for head in kv_head * group..(kv_head + 1) * group {
                let q = at(self.source.q, self.source.q_width, block.query, head * d);
                let dout = at(self.saved.dout, shape.q_width(), block.query, head * d);
                // SAFETY: a task writes the rows of its run in the columns of its heads, and no other task
                // does; the target has those rows if `own` is set.
                unsafe {
                    products.scores(&block, q, scale);
                    products.probability_gradients(&block, dout);
                    products.score_gradients(
                        &block,
                        #[inline(always)]
                        |row, p, ds, fma| {
                            let lse = self.saved.lse[(block.query + row.index) * shape.heads + head];
                            gradients((p, ds), row.visible, (lse, scale), fma);
                        },
                    );
                    products.add_gradients(&block, true, dout, values);
                    products.add_gradients(&block, false, q, keys);
                    if self.own {
                        let dq = target.q.at(block.query * target.q_width + head * d);
                        products.query_gradients(&block, Mat::rows(dq, target.q_width));
                    }
                }
            }
        }
        dprefix
    }

    /// Where the gradients of the head's keys and of its values are added up.
    fn gradients(&self, dprefix: &mut [T], target: Target<T>, kv_head: usize) -> [Gradient<T>; 2] {
        let (d, k) = (self.shape.head_dim, self.shape.kv_heads * self.shape.head_dim);
        [0, 1].map(|values| {
            let column = target.kv_width - (2 - values) * k + kv_head * d;
            Gradient {
                prefix: Mat::rows(dprefix.as_mut_ptr().wrapping_add(values * d), 2 * d),
                own: self.own.then(|| Mat::rows(target.kv.0.wrapping_add(column), target.kv_width)),
            }
        })
    }
}
