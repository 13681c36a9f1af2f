//! The backward pass on the CPU.

use super::products::{
    Direction, HeadBlock, HeadMatrices, HeadProducts, QkvSlices, Side, SideGradient, submatrix,
};
use super::query_blocks::{LANES, SegmentRun, blocks, runs};
use super::with_slices;
use crate::ops::attention::{AttentionShape, GradTargets, Gradients, Inputs, Qkv, Segment};
use crate::ops::cpu::{self, Disjoint, Fma, MatMut, Real, StorageFloat, UninitBuffer, View};
use crate::{Error, Result};
use candle_core::{Tensor, WithDType};
use rayon::prelude::*;
use std::mem::MaybeUninit;

/// Replaces a row of scores `p` by the probabilities, and the gradients of the probabilities `ds` by those of the scores; both
/// are zero in columns that are not visible. The sum of p dp is computed from these values and not as `do * out`, which is
/// equal only if nothing was rounded: ds is small if dp is near that sum, and must then be the difference of just these two.
#[inline(always)]
fn score_gradients<T: Real>((p, ds): (&mut [T], &mut [T]), visible: usize, (lse, scale): (T, T), fma: Fma) {
    let end = visible.next_multiple_of(LANES);
    p[..end].iter_mut().for_each(|p| *p = (*p - lse).fast_exp(fma));
    p[visible..].fill(T::zero());
    ds[visible..].fill(T::zero());
    let delta = cpu::dot(&p[..end], &ds[..end], fma);
    p[..end].iter().zip(&mut ds[..end]).for_each(|(&p, ds)| *ds = scale * p * (*ds - delta));
    // Values that are not finite stay in the visible columns.
    ds[visible..end].fill(T::zero());
}

/// The matrices of the gradients of queries, keys and values; those of fused inputs are one matrix.
struct GradBuffers<T> {
    q: UninitBuffer<T>,
    q_rows: usize,
    q_width: usize,
    /// Keys and values of split inputs; none otherwise.
    kv: UninitBuffer<T>,
    kv_rows: usize,
    kv_width: usize,
}

impl<T: Real> GradBuffers<T> {
    fn new(inputs: &Inputs, targets: GradTargets) -> Self {
        let (q, kv) = (inputs.qkv.queries(), inputs.qkv.keys_values());
        let (q_rows, kv_rows) = match targets {
            GradTargets::All => (q.dims()[0], kv.dims()[0]),
            GradTargets::Prefixes => inputs.prefix_rows(),
        };
        let (q_width, kv_width) = (q.dims()[1], kv.dims()[1]);
        let split_kv = match inputs.qkv {
            Qkv::Split { .. } => kv_rows * kv_width,
            Qkv::Fused(_) => 0,
        };
        let (q, kv) = (UninitBuffer::new(q_rows * q_width), UninitBuffer::new(split_kv));
        let mut buffers = Self { q, q_rows, q_width, kv, kv_rows, kv_width };
        if !covers(inputs.segments, kv_rows) {
            let rows = if split_kv > 0 { &mut buffers.kv } else { &mut buffers.q };
            rows.as_slice().fill(MaybeUninit::new(T::zero()));
        }
        buffers
    }

    fn outputs(&mut self) -> GradOutputs<'_, T> {
        let is_split = !self.kv.as_slice().is_empty();
        let q = Disjoint::new(self.q.as_slice());
        let kv = if is_split { Disjoint::new(self.kv.as_slice()) } else { q };
        GradOutputs { q, q_width: self.q_width, kv, kv_width: self.kv_width }
    }
}

/// The columns of the gradients' matrices, for the tasks.
struct GradOutputs<'a, T> {
    q: Disjoint<'a, T>,
    q_width: usize,
    kv: Disjoint<'a, T>,
    kv_width: usize,
}

/// Returns an error if two segments have a row of keys in common: the tasks write the gradients of their segments' rows.
fn check_disjoint(op: &'static str, segments: &[Segment]) -> Result<()> {
    let mut rows: Vec<_> =
        segments.iter().map(|s| (s.keys.start, s.keys.end)).filter(|(start, end)| start < end).collect();
    rows.sort_unstable();
    match rows.windows(2).find(|pair| pair[0].1 > pair[1].0) {
        None => Ok(()),
        Some(pair) => Err(Error::shape(op, "segments with keys of their own", format!("{pair:?}"))),
    }
}

/// The backward pass with scores in `T` and products of `P`.
pub(super) fn run<T: Real, P: HeadProducts<T>>(
    shape: &AttentionShape,
    inputs: Inputs,
    lse: &Tensor,
    dout: &Tensor,
    targets: GradTargets,
) -> Result<Gradients> {
    const OP: &str = "attention backward";
    check_disjoint(OP, inputs.segments)?;
    let lse = View::<T>::new(OP, lse)?;
    let dout = cpu::to_storage(OP, dout, P::Operand::DTYPE)?;
    let dout = View::<P::Operand>::new(OP, &dout)?;
    let runs = runs(inputs.segments);
    let mut buffers = GradBuffers::<T>::new(&inputs, targets);
    let partials: Vec<Vec<T>> = with_slices!(inputs, P::Operand, slices => {
        let outputs = buffers.outputs();
        let task = |task: usize| {
            let (run, kv_head) = (&runs[task / shape.kv_heads], task % shape.kv_heads);
            let segments = &inputs.segments[run.segments.clone()];
            let own = targets == GradTargets::All || run.prefix.is_none();
            let task = BackwardTask {
                shape, slices: &slices, lse: &lse, dout: &dout, segments, run, kv_head, outputs: &outputs, own
            };
            task.run::<P>()
        };
        (0..runs.len() * shape.kv_heads).into_par_iter().map(task).collect()
    });
    let GradBuffers { q, q_rows, q_width, kv, kv_rows, kv_width } = buffers;
    // SAFETY: every query and every row of keys that a segment has were written by their tasks, for each head. If there are
    // other rows, all rows were zero before.
    let (mut dq, mut dkv) = unsafe { (q.into_vec(), kv.into_vec()) };
    let width = shape.kv_width();
    let mut dprefix = inputs.prefix.map(|p| vec![T::zero(); p.dims()[0] * width]);
    // In the order of the tasks, not of their execution: repeats are equal bit for bit.
    for (task, partial) in partials.iter().enumerate().filter(|(_, p)| !p.is_empty()) {
        let (run, kv_head) = (&runs[task / shape.kv_heads], task % shape.kv_heads);
        let first = run.prefix.as_ref().map_or(0, |p| p.start);
        let (matrix, columns) = match &mut dprefix {
            Some(matrix) => (matrix, width),
            None if dkv.is_empty() => (&mut dq, kv_width),
            None => (&mut dkv, width),
        };
        add_prefix(shape, (matrix, columns), first, kv_head, partial);
    }
    let dprefix = match (dprefix, inputs.prefix) {
        (Some(buffer), Some(p)) => Some(cpu::tensor(buffer, (p.dims()[0], width))?),
        _ => None,
    };
    let qkv = match inputs.qkv {
        _ if targets == GradTargets::Prefixes && inputs.prefix.is_some() => None,
        Qkv::Fused(_) => Some(Qkv::Fused(cpu::tensor(dq, (q_rows, q_width))?)),
        Qkv::Split { .. } => Some(Qkv::Split {
            q: cpu::tensor(dq, (q_rows, q_width))?,
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
    (matrix, width): (&mut [T], usize),
    first: usize,
    kv_head: usize,
    partial: &[T],
) {
    let (d, k) = (shape.head_dim, shape.kv_heads * shape.head_dim);
    for (i, row) in partial.chunks_exact(2 * d).enumerate() {
        let key = (first + i) * width + width - 2 * k + kv_head * d;
        let value = key + k;
        matrix[key..key + d].iter_mut().zip(&row[..d]).for_each(|(y, &x)| *y += x);
        matrix[value..value + d].iter_mut().zip(&row[d..]).for_each(|(y, &x)| *y += x);
    }
}

/// The backward pass of one run and one key and value head.
struct BackwardTask<'a, T, S> {
    shape: &'a AttentionShape,
    slices: &'a QkvSlices<'a, S>,
    /// Log-sum-exp of the scores, [queries, H].
    lse: &'a [T],
    /// Gradient of the output, [queries, H D].
    dout: &'a [S],
    segments: &'a [Segment],
    run: &'a SegmentRun,
    kv_head: usize,
    outputs: &'a GradOutputs<'a, T>,
    /// Whether the gradients of the segments' own queries, keys and values are computed too; `outputs` has their rows then.
    own: bool,
}

impl<T: Real, S: StorageFloat<T>> BackwardTask<'_, T, S> {
    /// Writes the gradients of the run and the head, and returns that of the prefix, [P, 2D] (dk, dv).
    fn run<P: HeadProducts<T, Operand = S>>(&self) -> Vec<T> {
        let Self { shape, slices, kv_head, outputs, .. } = *self;
        let (prefix, scale) = (self.run.prefix.as_ref().map_or(0, |p| p.len()), T::nearest(shape.scale));
        let heads = HeadMatrices::new(shape, slices, self.run, kv_head);
        // SAFETY: the segments were checked against the matrices.
        let mut products = unsafe { P::new(&heads, Direction::Backward) };
        let (d, group) = (shape.head_dim, shape.heads / shape.kv_heads);
        let mut dprefix = vec![T::zero(); prefix * 2 * d];
        let [keys, values] = self.side_gradients(&mut dprefix);
        for row in self.segments.iter().flat_map(|segment| segment.keys.clone()) {
            for own in [keys.own, values.own].into_iter().flatten() {
                // SAFETY: a task writes the rows of its run in the columns of its heads, and no other task does.
                unsafe {
                    let elements = own.skip_rows(row).ptr.cast::<MaybeUninit<T>>();
                    std::slice::from_raw_parts_mut(elements, d).fill(MaybeUninit::new(T::zero()));
                }
            }
        }
        for block in blocks(self.segments, prefix) {
            let task = HeadBlock { heads: &heads, block: &block };
            // SAFETY: the segments were checked against the matrices.
            unsafe { products.begin(task) };
            for head in kv_head * group..(kv_head + 1) * group {
                let q = submatrix(slices.q, slices.q_width, block.query, head * d);
                let dout = submatrix(self.dout, shape.q_width(), block.query, head * d);
                // SAFETY: the block's queries have rows in `q` and `dout`.
                unsafe {
                    products.scores(task, q, scale);
                    products.probability_gradients(task, dout);
                }
                products.score_gradients(
                    task,
                    #[inline(always)]
                    |row, p, ds, fma| {
                        let lse = self.lse[(block.query + row.index) * shape.heads + head];
                        score_gradients((p, ds), row.visible, (lse, scale), fma);
                    },
                );
                // SAFETY: a task writes the rows of its run in the columns of its heads, and no other task does; the outputs
                // have those rows if `own` is set, and the gradients of keys and values were set to zero.
                unsafe {
                    products.add_gradients(task, Side::Values, dout, values);
                    products.add_gradients(task, Side::Keys, q, keys);
                    if self.own {
                        let dq = outputs.q.element(block.query * outputs.q_width + head * d);
                        products.query_gradients(task, MatMut::from_raw(dq, outputs.q_width));
                    }
                }
            }
        }
        dprefix
    }

    /// The gradients of the head's keys and of its values.
    fn side_gradients<'a>(&'a self, dprefix: &'a mut [T]) -> [SideGradient<'a, T>; 2] {
        let (d, k) = (self.shape.head_dim, self.shape.kv_heads * self.shape.head_dim);
        let prefix = MatMut::rows(dprefix, 2 * d);
        [0, 1].map(|values| {
            let column = self.outputs.kv_width - (2 - values) * k + self.kv_head * d;
            // SAFETY: the column is inside of a row, and no other task writes the head's columns in the rows of this run.
            let own = self
                .own
                .then(|| unsafe { MatMut::from_raw(self.outputs.kv.element(column), self.outputs.kv_width) });
            SideGradient { prefix: prefix.skip_columns(values * d), own }
        })
    }
}
