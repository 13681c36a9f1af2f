//! The products of the CPU kernel by the CPU's own bf16 instructions: queries, keys and values are bf16, probabilities
//! and their gradients are rounded to it, scores and sums are f32. Keys and values are packed once for all query heads
//! that share them.

use super::blocks::{Block, Row};
use super::products::{Gradient, Heads, Pass, Products, from_row, from_row_mut};
use crate::ops::bf16::kernel::{self, Left, Line, Out, Panels};
use crate::ops::bf16::{Isa, PANEL, STEP, Then, pack_sums};
use crate::ops::cpu::{self, Fma, Mat};
use half::bf16;
use std::cell::Cell;

/// Products in bf16 with sums in f32.
pub(super) struct Narrow {
    isa: Isa,
    heads: Heads<bf16>,
    pass: Pass,
    scratch: Scratch,
}

/// What a task needs room for; a thread keeps it from task to task.
#[derive(Default)]
struct Scratch {
    prefix: [Packed; 2],
    /// Keys and values of the block's pieces.
    pieces: Vec<[Packed; 2]>,
    /// Scores, then probabilities.
    p: Vec<f32>,
    /// Gradients of the probabilities, then of the scores.
    ds: Vec<f32>,
    /// Rows of the probabilities, or of the scores' gradients, rounded: the left operand of sums over keys.
    rows: Vec<bf16>,
    /// Pairs of rows of the probabilities and of the scores' gradients, rounded: the left operands of sums over queries.
    pairs: [Vec<[bf16; 2]>; 2],
    /// Queries, or the output's gradient, as the right operand of sums over queries, in the order of `pairs`.
    right: Packed,
}

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
}

impl Drop for Narrow {
    fn drop(&mut self) {
        SCRATCH.set(std::mem::take(&mut self.scratch));
    }
}

/// A matrix [n, D], packed.
#[derive(Default)]
struct Packed {
    n: usize,
    d: usize,
    /// For `x · matrixᵀ`, sums over D.
    across: Vec<Line>,
    /// For `p · matrix`, sums over its rows.
    along: Vec<Line>,
}

/// Lines that sums over `depth` values take.
fn lines(depth: usize) -> usize {
    depth.next_multiple_of(STEP) / 2
}

impl Packed {
    /// Packs the rows of `matrix`, in the ways that are asked for.
    ///
    /// # Safety
    /// The elements lie in live memory.
    unsafe fn fill(
        &mut self,
        isa: Isa,
        matrix: Mat<*const bf16>,
        (n, d): (usize, usize),
        Ways { across, along }: Ways,
    ) {
        (self.n, self.d) = (n, d);
        // SAFETY: the caller's promise.
        let (from, stride) = unsafe { (elements(matrix, (n, d)), matrix.rs as usize) };
        if across {
            self.across.resize(n.div_ceil(PANEL) * lines(d), Line::ZERO);
            for (i, panel) in self.across.chunks_mut(lines(d)).enumerate() {
                let rows = PANEL.min(n - i * PANEL);
                kernel::pack_rows(isa, &from[i * PANEL * stride..], stride, rows, d, panel);
            }
        }
        if along {
            self.along.resize(d.next_multiple_of(STEP) / PANEL * lines(n), Line::ZERO);
            pack_sums(isa, from, (n, d), stride, &mut self.along, lines(n));
        }
    }

    /// Packs the rows of `matrix` [rows, D] for sums over them, pair by pair as [`pair_of`] counts them. After the last pair
    /// come zeros, as many lines as a whole step reads beyond it.
    ///
    /// # Safety
    /// The elements lie in live memory.
    unsafe fn fill_pairs(&mut self, isa: Isa, matrix: Mat<*const bf16>, block: &Block, d: usize) {
        let pairs = pairs(block);
        (self.n, self.d) = (2 * pairs, d);
        let stride = pair_lines(pairs);
        self.along.resize(d.next_multiple_of(STEP) / PANEL * stride, Line::ZERO);
        // SAFETY: the caller's promise.
        let (from, row_stride) = unsafe { (elements(matrix, (block.rows, d)), matrix.rs as usize) };
        for (piece, first) in block.pieces.iter().zip(first_pairs(block)) {
            let from = &from[piece.rows.start * row_stride..];
            pack_sums(isa, from, (piece.rows.len(), d), row_stride, &mut self.along[first..], stride);
        }
        self.along.chunks_mut(stride).for_each(|panel| panel[pairs..].fill(Line::ZERO));
    }

    fn across(&self) -> Panels<'_> {
        Panels::new(&self.across, lines(self.d))
    }

    fn along(&self) -> Panels<'_> {
        Panels::new(&self.along, lines(self.n))
    }

    /// What `fill_pairs` packed, from pair `pair` on.
    fn pairs_from(&self, pair: usize) -> Panels<'_> {
        Panels::new(&self.along[pair..], pair_lines(self.n / 2))
    }
}

/// Pairs of neighbouring rows of each piece; the row of an odd piece that is left over makes one with a row of zeros. So a
/// sum over the rows of a piece is one over whole pairs, and so is that over all rows of the block.
fn pairs(block: &Block) -> usize {
    block.pieces.iter().map(|piece| piece.rows.len().div_ceil(2)).sum()
}

/// The first pair of each piece.
fn first_pairs(block: &Block) -> impl Iterator<Item = usize> {
    block.pieces.iter().scan(0, |next, piece| {
        let first = *next;
        *next += piece.rows.len().div_ceil(2);
        Some(first)
    })
}

/// Lines of a panel of `pairs` pairs: those that packing writes beyond them, half a panel at a time, and those that a whole
/// step reads. An odd number, so that panels do not share a few sets of the first-level cache.
fn pair_lines(pairs: usize) -> usize {
    (pairs + STEP / 2) | 1
}

/// The elements of `matrix` from its first to its last; none where it has no element.
///
/// # Safety
/// They lie in live memory, which nobody writes.
unsafe fn elements<'a>(matrix: Mat<*const bf16>, (rows, columns): (usize, usize)) -> &'a [bf16] {
    match (rows, columns) {
        (0, _) | (_, 0) => &[],
        // SAFETY: the caller's promise.
        _ => unsafe { std::slice::from_raw_parts(matrix.ptr, (rows - 1) * matrix.rs as usize + columns) },
    }
}

/// How a matrix is packed.
#[derive(Clone, Copy)]
struct Ways {
    /// For products that sum over D.
    across: bool,
    /// For products that sum over its rows.
    along: bool,
}

/// How keys, or values, are packed.
fn ways(pass: Pass, values: bool) -> Ways {
    let (across, along) = match (pass, values) {
        (Pass::Forward, false) => (true, false),
        (Pass::Forward, true) => (false, true),
        (Pass::Backward, false) => (true, true),
        (Pass::Backward, true) => (true, false),
    };
    Ways { across, along }
}

impl Narrow {
    /// `x[rows, D] · (keys or values)ᵀ`, times `scale`: scores of keys, gradients of the probabilities of values.
    ///
    /// # Safety
    /// `x` has the rows of the block.
    unsafe fn times(&mut self, block: &Block, values: bool, x: Mat<*const bf16>, scale: f32) {
        let (d, count, then) = (self.heads.d, self.heads.prefix, Then { scale, add: false });
        let Scratch { prefix, pieces, p, ds, .. } = &mut self.scratch;
        let (out, side) = (if values { ds } else { p }, usize::from(values));
        // SAFETY: the caller's promise.
        let left = Left::rows(unsafe { elements(x, (block.rows, d)) }, x.rs as usize);
        let mut to = Out::new(out, block.rows, count, block.columns);
        kernel::block(self.isa, left, prefix[side].across(), d, &mut to, then);
        for (piece, packed) in block.pieces.iter().zip(pieces) {
            let out = &mut out[piece.rows.start * block.columns + count..];
            let mut to = Out::new(out, piece.rows.len(), piece.keys(), block.columns);
            let left = left.from(piece.rows.start, 0);
            kernel::block(self.isa, left, packed[side].across(), d, &mut to, then);
        }
    }

    /// `out[rows, D]` is the product of the rounded rows and the keys, or the values.
    ///
    /// # Safety
    /// `out` has the block's rows and is not aliased.
    unsafe fn sum(&self, block: &Block, values: bool, out: Mat<*mut f32>) {
        let (d, count, side) = (self.heads.d, self.heads.prefix, usize::from(values));
        let Scratch { prefix, pieces, rows, .. } = &self.scratch;
        let (left, stride) = (Left::rows(rows, block.columns), out.rs as usize);
        if count > 0 {
            // SAFETY: the caller's promise.
            let mut to = unsafe { Out::at(out.ptr, block.rows, d, stride) };
            kernel::block(self.isa, left, prefix[side].along(), count, &mut to, Then::WRITE);
        }
        for (piece, packed) in block.pieces.iter().zip(pieces) {
            let out = from_row_mut(out, piece.rows.start).ptr;
            // SAFETY: the caller's promise; the piece's rows are inside the block.
            let mut to = unsafe { Out::at(out, piece.rows.len(), d, stride) };
            let left = Left::rows(&rows[piece.rows.start * block.columns + count..], block.columns);
            let then = Then { scale: 1.0, add: count > 0 };
            kernel::block(self.isa, left, packed[side].along(), piece.keys(), &mut to, then);
        }
    }
}

impl Products<f32> for Narrow {
    type Operand = bf16;

    fn new(heads: Heads<bf16>, pass: Pass) -> Self {
        let Some(isa) = Isa::best() else {
            unreachable!("the caller asked for products in bf16 where there are some")
        };
        let mut scratch = SCRATCH.take();
        for (values, packed) in [false, true].into_iter().zip(&mut scratch.prefix) {
            let size = (heads.prefix, heads.d);
            // SAFETY: the segments were checked against the matrices.
            unsafe { packed.fill(isa, heads.side(values).1, size, ways(pass, values)) };
        }
        Self { isa, heads, pass, scratch }
    }

    fn begin(&mut self, block: &Block) {
        let Scratch { pieces, p, ds, rows, pairs: both, .. } = &mut self.scratch;
        let (scores, in_pairs) = (block.rows * block.columns, pairs(block) * block.columns);
        p.resize(scores, 0.0);
        rows.resize(scores, bf16::ZERO);
        if self.pass == Pass::Backward {
            ds.resize(scores, 0.0);
            both.iter_mut().for_each(|pairs| pairs.resize(in_pairs, [bf16::ZERO; 2]));
        }
        pieces.resize_with(pieces.len().max(block.pieces.len()), Default::default);
        for (piece, both) in block.pieces.iter().zip(pieces) {
            for (values, packed) in [false, true].into_iter().zip(both) {
                let size = (piece.keys(), self.heads.d);
                let keys = from_row(self.heads.side(values).0, piece.key);
                // SAFETY: the segments were checked against the matrices.
                unsafe { packed.fill(self.isa, keys, size, ways(self.pass, values)) };
            }
        }
    }

    unsafe fn scores(&mut self, block: &Block, q: Mat<*const bf16>, scale: f32) {
        // SAFETY: the caller's promise.
        unsafe { self.times(block, false, q, scale) }
    }

    fn probabilities(&mut self, block: &Block, mut f: impl FnMut(Row, &mut [f32], Fma)) {
        let Scratch { p, rows, .. } = &mut self.scratch;
        cpu::simd(
            #[inline(always)]
            |fma| {
                for row in block.each_row(self.heads.prefix) {
                    let of_row = row.index * block.columns..(row.index + 1) * block.columns;
                    let p = &mut p[of_row.clone()];
                    f(row, p, fma);
                    cpu::round_slice(p, &mut rows[of_row]);
                }
            },
        );
    }

    unsafe fn attend(&mut self, block: &Block, out: Mat<*mut f32>) {
        // SAFETY: the caller's promise.
        unsafe { self.sum(block, true, out) }
    }

    unsafe fn probability_gradients(&mut self, block: &Block, dout: Mat<*const bf16>) {
        // SAFETY: the caller's promise.
        unsafe { self.times(block, true, dout, 1.0) }
    }

    fn score_gradients(&mut self, block: &Block, mut f: impl FnMut(Row, &mut [f32], &mut [f32], Fma)) {
        let (columns, prefix) = (block.columns, self.heads.prefix);
        let Scratch { p, ds, rows, pairs: [p_pairs, ds_pairs], .. } = &mut self.scratch;
        cpu::simd(
            #[inline(always)]
            |fma| {
                let mut pairs = p_pairs.chunks_exact_mut(columns).zip(ds_pairs.chunks_exact_mut(columns));
                for piece in &block.pieces {
                    for first in piece.rows.clone().step_by(2) {
                        let both = first..(first + 2).min(piece.rows.end);
                        let of_rows = both.start * columns..both.end * columns;
                        let (p, ds) = (&mut p[of_rows.clone()], &mut ds[of_rows.clone()]);
                        for (i, row) in both.enumerate() {
                            let of_row = i * columns..(i + 1) * columns;
                            f(piece.row(row, prefix), &mut p[of_row.clone()], &mut ds[of_row], fma);
                        }
                        cpu::round_slice(ds, &mut rows[of_rows]);
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

    unsafe fn add_gradients(&mut self, block: &Block, values: bool, x: Mat<*const bf16>, to: Gradient<f32>) {
        let (d, count, columns) = (self.heads.d, self.heads.prefix, block.columns);
        let Scratch { pairs: [p, ds], right, .. } = &mut self.scratch;
        let left = Left::interleaved(if values { p } else { ds }.as_flattened(), 2 * columns);
        let then = Then { scale: 1.0, add: true };
        // SAFETY: the caller's promise; rows of own keys are inside of their matrix, as the segments were checked.
        unsafe {
            right.fill_pairs(self.isa, x, block, d);
            let mut out = Out::at(to.prefix.ptr, count, d, to.prefix.rs as usize);
            kernel::block(self.isa, left, right.pairs_from(0), right.n, &mut out, then);
            let Some(own) = to.own else { return };
            for (piece, pair) in block.pieces.iter().zip(first_pairs(block)) {
                let (out, depth) = (from_row_mut(own, piece.key), piece.rows.len().next_multiple_of(2));
                let mut out = Out::at(out.ptr, piece.keys(), d, out.rs as usize);
                let left = left.from(count, pair);
                kernel::block(self.isa, left, right.pairs_from(pair), depth, &mut out, then);
            }
        }
    }

    unsafe fn query_gradients(&mut self, block: &Block, out: Mat<*mut f32>) {
        // SAFETY: the caller's promise.
        unsafe { self.sum(block, false, out) }
    }
}
