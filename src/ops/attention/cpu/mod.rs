//! Attention on the CPU: a task is a run of neighbouring segments with one key and value head. Its products are small matrix
//! products in scratch memory of a block of queries.

mod backward;
mod bf16_heads;
mod packed_side;
mod products;
mod query_blocks;
mod real_heads;

use super::{AttentionOutput, AttentionOutputSaved, AttentionShape, GradTargets, Gradients, Inputs};
use crate::Result;
use crate::ops::Segment;
use crate::ops::bf16::Isa;
use crate::ops::cpu::{self, Disjoint, Fma, MatMut, Real, StorageFloat, UninitBuffer, View, with_real};
use bf16_heads::Bf16Heads;
use candle_core::{DType, Tensor};
use products::{Direction, HeadBlock, HeadMatrices, HeadProducts, QkvSlices, submatrix};
use query_blocks::{LANES, SegmentRun, blocks, runs};
use real_heads::RealHeads;

/// Opens the tensors of `$inputs` as [`QkvSlices`] of `$T` for `$body`.
macro_rules! with_slices {
    ($inputs:expr, $T:ty, $slices:ident => $body:expr) => {{
        let (q, kv) = ($inputs.qkv.queries(), $inputs.qkv.keys_values());
        let prefix = $inputs.prefix.unwrap_or(kv);
        let views = [q, kv, prefix].map(|t| View::<$T>::new("attention", t));
        let [q_view, kv_view, prefix_view] = views;
        let (q_view, kv_view, prefix_view) = (q_view?, kv_view?, prefix_view?);
        let $slices = QkvSlices {
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

use with_slices;

/// Whether the products are those of bf16.
fn is_bf16(inputs: &Inputs) -> bool {
    inputs.qkv.queries().dtype() == DType::BF16 && Isa::best().is_some()
}

pub(super) fn forward(shape: &AttentionShape, inputs: Inputs) -> Result<AttentionOutput> {
    if is_bf16(&inputs) {
        return forward_in::<f32, Bf16Heads>(shape, inputs);
    }
    with_real!("attention", inputs.qkv.queries().dtype(), T => forward_in::<T, RealHeads<T>>(shape, inputs))
}

pub(super) fn backward(
    shape: &AttentionShape,
    inputs: Inputs,
    saved: &AttentionOutputSaved,
    dout: &Tensor,
    targets: GradTargets,
) -> Result<Gradients> {
    if is_bf16(&inputs) {
        return backward::run::<f32, Bf16Heads>(shape, inputs, &saved.lse, dout, targets);
    }
    with_real!("attention backward", dout.dtype(), T => {
        backward::run::<T, RealHeads<T>>(shape, inputs, &saved.lse, dout, targets)
    })
}

/// The forward pass with scores in `T` and products of `P`.
fn forward_in<T: Real, P: HeadProducts<T>>(
    shape: &AttentionShape,
    inputs: Inputs,
) -> Result<AttentionOutput> {
    let queries = inputs.qkv.queries().dims()[0];
    let runs = runs(inputs.segments);
    let mut out = UninitBuffer::<P::Operand>::new(queries * shape.q_width());
    let mut lse = UninitBuffer::<T>::new(queries * shape.heads);
    with_slices!(inputs, P::Operand, slices => {
        let outputs = (Disjoint::new(out.as_slice()), Disjoint::new(lse.as_slice()));
        cpu::par_tasks(runs.len() * shape.kv_heads, &|task| {
            let (run, kv_head) = (&runs[task / shape.kv_heads], task % shape.kv_heads);
            forward_task::<T, P>(shape, &slices, &inputs.segments[run.segments.clone()], (run, kv_head), outputs);
        });
    });
    // SAFETY: every query belongs to one segment, and every head to one task, which wrote its output and log-sum-exp.
    unsafe {
        let (out, lse) =
            (out.into_tensor((queries, shape.q_width()))?, lse.into_tensor((queries, shape.heads))?);
        Ok(AttentionOutput { out, lse, out_is_needed: false })
    }
}

fn forward_task<T: Real, P: HeadProducts<T>>(
    shape: &AttentionShape,
    slices: &QkvSlices<P::Operand>,
    segments: &[Segment],
    (run, kv_head): (&SegmentRun, usize),
    (out, lse): (Disjoint<P::Operand>, Disjoint<T>),
) {
    let (d, group) = (shape.head_dim, shape.heads / shape.kv_heads);
    let (prefix, scale) = (run.prefix.as_ref().map_or(0, |p| p.len()), T::nearest(shape.scale));
    let heads = HeadMatrices::new(shape, slices, run, kv_head);
    // SAFETY: the segments were checked against the matrices.
    let mut products = unsafe { P::new(&heads, Direction::Forward) };
    let (mut sums, mut weighted) = (Vec::new(), Vec::new());
    for block in blocks(segments, prefix) {
        let task = HeadBlock { heads: &heads, block: &block };
        // SAFETY: as above.
        unsafe { products.begin(task) };
        sums.resize(block.rows, (T::zero(), T::zero()));
        weighted.resize(block.rows * d, T::zero());
        for head in kv_head * group..(kv_head + 1) * group {
            let q = submatrix(slices.q, slices.q_width, block.query, head * d);
            // SAFETY: as above.
            unsafe { products.scores(task, q, scale) };
            products.probabilities(
                task,
                #[inline(always)]
                |row, scores, fma| sums[row.index] = exponentials(scores, row.visible, fma),
            );
            // SAFETY: the memory has the block's rows.
            unsafe { products.weighted_values(task, MatMut::rows(&mut weighted, d)) };
            cpu::simd(
                #[inline(always)]
                |_| {
                    for (i, (x, &(largest, sum))) in weighted.chunks_exact_mut(d).zip(&sums).enumerate() {
                        let (row, inverse) = (block.query + i, sum.recip());
                        x.iter_mut().for_each(|x| *x *= inverse);
                        // SAFETY: a task writes the rows of its run in the columns of its heads, and no other task does.
                        unsafe {
                            lse.element(row * shape.heads + head).write(largest + sum.ln());
                            let out = out.element(row * shape.q_width() + head * d).cast();
                            P::Operand::store_slice(x, std::slice::from_raw_parts_mut(out, d));
                        }
                    }
                },
            );
        }
    }
}

/// Replaces a row's visible scores by the exponentials of their difference from the largest score, and sets the other columns
/// to zero. Returns the largest score and the sum of the exponentials.
#[inline(always)]
fn exponentials<T: Real>(scores: &mut [T], visible: usize, fma: Fma) -> (T, T) {
    let end = visible.next_multiple_of(LANES);
    scores[visible..end].fill(T::neg_infinity());
    let largest = cpu::largest(&scores[..end]);
    scores[..end].iter_mut().for_each(|s| *s = (*s - largest).fast_exp(fma));
    scores[visible..].fill(T::zero());
    (largest, cpu::sum(&scores[..end]))
}
