//! The products of a task by the CPU's bf16 instructions: queries, keys and values are bf16, probabilities and their gradients
//! are rounded to it, scores and sums are f32. Keys and values are packed once for all query heads that share them.

use super::packed_side::{PackedSide, PackingOrders, first_pairs, pairs, values};
use super::products::{Direction, HeadBlock, HeadMatrices, HeadProducts, Side, SideGradient};
use super::query_blocks::ScoreRow;
use crate::ops::bf16::Isa;
use crate::ops::bf16::kernel::{self, BlockProduct, Epilogue, Left, OutputBlock};
use crate::ops::cpu::{self, Fma, Mat, MatMut};
use half::bf16;
use std::cell::Cell;

/// Products in bf16 with sums in f32.
pub(super) struct Bf16Heads {
    isa: Isa,
    direction: Direction,
    scratch: HeadScratch,
}

/// Memory of a task; a thread keeps it from task to task.
#[derive(Default)]
struct HeadScratch {
    /// Keys and values of the prefix.
    prefix: [PackedSide; 2],
    /// Keys and values of the block's pieces.
    pieces: Vec<[PackedSide; 2]>,
    /// Scores, then probabilities.
    p: Vec<f32>,
    /// Gradients of the probabilities, then of the scores.
    ds: Vec<f32>,
    /// Rows of the probabilities, or of the scores' gradients, rounded: the left operand of sums over keys.
    rows: Vec<bf16>,
    /// Pairs of rows of the probabilities and of the scores' gradients, rounded: the left operands of sums over queries.
    pairs: [Vec<[bf16; 2]>; 2],
    /// Queries, or the output's gradient, as the right operand of sums over queries, in the order of `pairs`.
    right: PackedSide,
}

thread_local! {
    static SCRATCH: Cell<HeadScratch> = Cell::default();
}

impl Drop for Bf16Heads {
    fn drop(&mut self) {
        SCRATCH.set(std::mem::take(&mut self.scratch));
    }
}

const SIDES: [Side; 2] = [Side::Keys, Side::Values];

/// How keys, or values, are packed.
fn packing_orders(direction: Direction, side: Side) -> PackingOrders {
    let (by_rows, by_columns) = match (direction, side) {
        (Direction::Forward, Side::Keys) => (true, false),
        (Direction::Forward, Side::Values) => (false, true),
        (Direction::Backward, Side::Keys) => (true, true),
        (Direction::Backward, Side::Values) => (true, false),
    };
    PackingOrders { by_rows, by_columns }
}

impl Bf16Heads {
    /// `scale * x[rows, D] · (keys or values)ᵀ`: scores from keys, gradients of the probabilities from values.
    ///
    /// # Safety
    /// `x` has the rows of the block.
    unsafe fn multiply_transposed(&mut self, task: HeadBlock<bf16>, side: Side, x: Mat<bf16>, scale: f32) {
        let HeadBlock { heads, block } = task;
        let (depth, count, epilogue) = (heads.d, heads.prefix, Epilogue { alpha: scale, accumulate: false });
        let HeadScratch { prefix, pieces, p, ds, .. } = &mut self.scratch;
        let out = match side {
            Side::Keys => p,
            Side::Values => ds,
        };
        // SAFETY: the caller's promise.
        let left = Left::rows(unsafe { values(x, (block.rows, depth)) }, x.row_stride as usize);
        let right = prefix[side as usize].by_rows();
        let mut to = OutputBlock::new(out, block.rows, count, block.columns);
        kernel::multiply(self.isa, BlockProduct { left, right, depth, epilogue }, &mut to);
        for (piece, packed) in block.pieces.iter().zip(pieces) {
            let out = &mut out[piece.rows.start * block.columns + count..];
            let mut to = OutputBlock::new(out, piece.rows.len(), piece.keys(), block.columns);
            let (left, right) = (left.from(piece.rows.start, 0), packed[side as usize].by_rows());
            kernel::multiply(self.isa, BlockProduct { left, right, depth, epilogue }, &mut to);
        }
    }

    /// `out[rows, D]` is the product of the rounded rows and the keys, or the values.
    ///
    /// # Safety
    /// `out` has the block's rows.
    unsafe fn weighted_sum(&self, HeadBlock { heads, block }: HeadBlock<bf16>, side: Side, out: MatMut<f32>) {
        let (d, count) = (heads.d, heads.prefix);
        let HeadScratch { prefix, pieces, rows, .. } = &self.scratch;
        if count > 0 {
            let (left, right) = (Left::rows(rows, block.columns), prefix[side as usize].by_columns());
            let product = BlockProduct { left, right, depth: count, epilogue: Epilogue::WRITE };
            // SAFETY: the caller's promise.
            let mut to = unsafe { OutputBlock::from_raw(out.ptr, block.rows, d, out.stride) };
            kernel::multiply(self.isa, product, &mut to);
        }
        let epilogue = if count > 0 { Epilogue::ADD } else { Epilogue::WRITE };
        for (piece, packed) in block.pieces.iter().zip(pieces) {
            let left = Left::rows(&rows[piece.rows.start * block.columns + count..], block.columns);
            let right = packed[side as usize].by_columns();
            let product = BlockProduct { left, right, depth: piece.keys(), epilogue };
            let out = out.skip_rows(piece.rows.start);
            // SAFETY: the caller's promise; the piece's rows are inside the block, and were written if there is a prefix.
            let mut to = unsafe { OutputBlock::from_raw(out.ptr, piece.rows.len(), d, out.stride) };
            kernel::multiply(self.isa, product, &mut to);
        }
    }
}

impl HeadProducts<f32> for Bf16Heads {
    type Operand = bf16;

    unsafe fn new(heads: &HeadMatrices<bf16>, direction: Direction) -> Self {
        let Some(isa) = Isa::best() else {
            unreachable!("the caller checked that the CPU has products of bf16")
        };
        let mut scratch = SCRATCH.take();
        for (side, packed) in SIDES.into_iter().zip(&mut scratch.prefix) {
            let size = (heads.prefix, heads.d);
            // SAFETY: the caller's promise.
            unsafe { packed.fill(isa, heads.prefix_side(side), size, packing_orders(direction, side)) };
        }
        Self { isa, direction, scratch }
    }

    unsafe fn begin(&mut self, HeadBlock { heads, block }: HeadBlock<bf16>) {
        let HeadScratch { pieces, p, ds, rows, pairs: both, .. } = &mut self.scratch;
        let (scores, in_pairs) = (block.rows * block.columns, pairs(block) * block.columns);
        p.resize(scores, 0.0);
        rows.resize(scores, bf16::ZERO);
        if self.direction == Direction::Backward {
            ds.resize(scores, 0.0);
            both.iter_mut().for_each(|pairs| pairs.resize(in_pairs, [bf16::ZERO; 2]));
        }
        pieces.resize_with(pieces.len().max(block.pieces.len()), Default::default);
        for (piece, both) in block.pieces.iter().zip(pieces) {
            for (side, packed) in SIDES.into_iter().zip(both) {
                let (matrix, size) = (heads.own(side).skip_rows(piece.key), (piece.keys(), heads.d));
                // SAFETY: the caller's promise.
                unsafe { packed.fill(self.isa, matrix, size, packing_orders(self.direction, side)) };
            }
        }
    }

    unsafe fn scores(&mut self, task: HeadBlock<bf16>, q: Mat<bf16>, scale: f32) {
        // SAFETY: the caller's promise.
        unsafe { self.multiply_transposed(task, Side::Keys, q, scale) }
    }

    fn probabilities(
        &mut self,
        HeadBlock { heads, block }: HeadBlock<bf16>,
        mut f: impl FnMut(ScoreRow, &mut [f32], Fma),
    ) {
        let HeadScratch { p, rows, .. } = &mut self.scratch;
        cpu::simd(
            #[inline(always)]
            |fma| {
                for row in block.score_rows(heads.prefix) {
                    let columns = row.index * block.columns..(row.index + 1) * block.columns;
                    let p = &mut p[columns.clone()];
                    f(row, p, fma);
                    cpu::round_slice(p, &mut rows[columns]);
                }
            },
        );
    }

    unsafe fn weighted_values(&mut self, task: HeadBlock<bf16>, out: MatMut<f32>) {
        // SAFETY: the caller's promise.
        unsafe { self.weighted_sum(task, Side::Values, out) }
    }

    unsafe fn probability_gradients(&mut self, task: HeadBlock<bf16>, dout: Mat<bf16>) {
        // SAFETY: the caller's promise.
        unsafe { self.multiply_transposed(task, Side::Values, dout, 1.0) }
    }

    fn score_gradients(
        &mut self,
        HeadBlock { heads, block }: HeadBlock<bf16>,
        mut f: impl FnMut(ScoreRow, &mut [f32], &mut [f32], Fma),
    ) {
        let columns = block.columns;
        let HeadScratch { p, ds, rows, pairs: [p_pairs, ds_pairs], .. } = &mut self.scratch;
        cpu::simd(
            #[inline(always)]
            |fma| {
                let mut pairs = p_pairs.chunks_exact_mut(columns).zip(ds_pairs.chunks_exact_mut(columns));
                for piece in &block.pieces {
                    for first in piece.rows.clone().step_by(2) {
                        let both = first..(first + 2).min(piece.rows.end);
                        let pair_range = both.start * columns..both.end * columns;
                        let (p, ds) = (&mut p[pair_range.clone()], &mut ds[pair_range.clone()]);
                        for (i, row) in both.enumerate() {
                            let range = i * columns..(i + 1) * columns;
                            let row = piece.score_row(row, heads.prefix);
                            f(row, &mut p[range.clone()], &mut ds[range], fma);
                        }
                        cpu::round_slice(ds, &mut rows[pair_range]);
                        let Some((p_pair, ds_pair)) = pairs.next() else {
                            unreachable!("counted by `pairs`")
                        };
                        for (from, to) in [(p, p_pair), (ds, ds_pair)] {
                            let (first, second) = from.split_at(columns);
                            cpu::round_pairs(first, (!second.is_empty()).then_some(second), to);
                        }
                    }
                }
            },
        );
    }

    unsafe fn add_gradients(
        &mut self,
        HeadBlock { heads, block }: HeadBlock<bf16>,
        side: Side,
        x: Mat<bf16>,
        to: SideGradient<f32>,
    ) {
        let (d, count, epilogue) = (heads.d, heads.prefix, Epilogue::ADD);
        let HeadScratch { pairs: [p, ds], right, .. } = &mut self.scratch;
        let weights = match side {
            Side::Values => p,
            Side::Keys => ds,
        };
        let left = Left::interleaved(weights.as_flattened(), 2 * block.columns);
        // SAFETY: the caller's promise.
        unsafe {
            right.fill_pairs(self.isa, x, block, d);
            let mut out = OutputBlock::from_raw(to.prefix.ptr, count, d, to.prefix.stride);
            let product = BlockProduct { left, right: right.pairs_from(0), depth: right.n, epilogue };
            kernel::multiply(self.isa, product, &mut out);
            let Some(own) = to.own else { return };
            for (piece, pair) in block.pieces.iter().zip(first_pairs(block)) {
                let own = own.skip_rows(piece.key);
                let mut out = OutputBlock::from_raw(own.ptr, piece.keys(), d, own.stride);
                let (left, right) = (left.from(count, pair), right.pairs_from(pair));
                let depth = piece.rows.len().next_multiple_of(2);
                kernel::multiply(self.isa, BlockProduct { left, right, depth, epilogue }, &mut out);
            }
        }
    }

    unsafe fn query_gradients(&mut self, task: HeadBlock<bf16>, out: MatMut<f32>) {
        // SAFETY: the caller's promise.
        unsafe { self.weighted_sum(task, Side::Keys, out) }
    }
}
