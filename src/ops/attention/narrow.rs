//! The products of the CPU kernel by the CPU's own bf16 instructions: queries, keys and values are bf16, probabilities
//! and their gradients are rounded to it, scores and sums are f32. Keys and values are packed once for all query heads
//! that share them.

use super::blocks::Block;
use super::products::{Heads, Pass, Products, from_row};
use crate::ops::cpu::{self, Mat, Stored};
use crate::ops::packed::kernel::{self, Left, Line, Out, Panels};
use crate::ops::packed::{self, Isa, PANEL, STEP, Then};
use half::bf16;

/// Products in bf16 with sums in f32.
pub(super) struct Narrow {
    isa: Isa,
    heads: Heads<bf16>,
    pass: Pass,
    prefix: [Packed; 2],
    /// Keys and values of the block's pieces.
    pieces: Vec<[Packed; 2]>,
    /// Scores as the left operand, rounded.
    left: Vec<bf16>,
    /// Queries, or the output's gradient, as the right operand.
    right: Packed,
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
        across: bool,
        along: bool,
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
            packed::pack_sums(isa, from, (n, d), stride, &mut self.along, lines(n));
        }
    }

    fn across(&self) -> Panels<'_> {
        Panels::new(&self.across, lines(self.d))
    }

    fn along(&self) -> Panels<'_> {
        Panels::new(&self.along, lines(self.n))
    }
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

/// Rounds `values` into `to`.
fn round(values: &[f32], to: &mut Vec<bf16>) {
    to.resize(values.len(), bf16::ZERO);
    cpu::simd(
        #[inline(always)]
        || to.iter_mut().zip(values).for_each(|(y, &x)| *y = Stored::stored(x)),
    );
}

impl Products<f32> for Narrow {
    type Operand = bf16;

    fn new(heads: Heads<bf16>, pass: Pass) -> Self {
        let Some(isa) = Isa::best() else {
            unreachable!("the caller asked for products in bf16 where there are some")
        };
        let mut prefix = [Packed::default(), Packed::default()];
        for (values, packed) in [false, true].into_iter().zip(&mut prefix) {
            let size = (heads.prefix, heads.d);
            let (across, along) = ways(pass, values);
            // SAFETY: the segments were checked against the matrices.
            unsafe { packed.fill(isa, heads.side(values).1, size, across, along) };
        }
        let (pieces, left) = (Vec::new(), Vec::new());
        Self { isa, heads, pass, prefix, pieces, left, right: Packed::default() }
    }

    fn begin(&mut self, block: &Block) {
        self.pieces.resize_with(self.pieces.len().max(block.pieces.len()), Default::default);
        for (piece, both) in block.pieces.iter().zip(&mut self.pieces) {
            for (values, packed) in [false, true].into_iter().zip(both) {
                let size = (piece.keys(), self.heads.d);
                let (across, along) = ways(self.pass, values);
                let rows = from_row(self.heads.side(values).0, piece.key);
                // SAFETY: the segments were checked against the matrices.
                unsafe { packed.fill(self.isa, rows, size, across, along) };
            }
        }
    }

    unsafe fn against_keys(
        &mut self,
        block: &Block,
        x: Mat<*const bf16>,
        values: bool,
        out: &mut [f32],
        beta: f32,
    ) {
        let (d, count) = (self.heads.d, self.heads.prefix);
        let then = Then { scale: beta, add: false };
        // SAFETY: the caller's promise.
        let left = Left::rows(unsafe { elements(x, (block.rows, d)) }, x.rs as usize);
        let right = self.prefix[usize::from(values)].across();
        kernel::block(self.isa, left, right, d, &mut Out::new(out, block.rows, count, block.columns), then);
        for (piece, packed) in block.pieces.iter().zip(&self.pieces) {
            let out = &mut out[piece.rows.start * block.columns + count..];
            let mut out = Out::new(out, piece.rows.len(), piece.keys(), block.columns);
            let right = packed[usize::from(values)].across();
            kernel::block(self.isa, left.from(piece.rows.start, 0), right, d, &mut out, then);
        }
    }

    unsafe fn over_keys(&mut self, block: &Block, p: &[f32], values: bool, out: Mat<*mut f32>) {
        let (d, count) = (self.heads.d, self.heads.prefix);
        let stride = out.rs as usize;
        round(p, &mut self.left);
        let left = Left::rows(&self.left, block.columns);
        if count > 0 {
            let right = self.prefix[usize::from(values)].along();
            // SAFETY: the caller's promise.
            let mut out = unsafe { Out::at(out.ptr, block.rows, d, stride) };
            kernel::block(self.isa, left, right, count, &mut out, Then::WRITE);
        }
        for (piece, packed) in block.pieces.iter().zip(&self.pieces) {
            // SAFETY: the caller's promise; the piece's rows are inside the block.
            let mut out =
                unsafe { Out::at(out.ptr.add(piece.rows.start * stride), piece.rows.len(), d, stride) };
            let left = Left::rows(&self.left[piece.rows.start * block.columns + count..], block.columns);
            let then = Then { scale: 1.0, add: count > 0 };
            kernel::block(self.isa, left, packed[usize::from(values)].along(), piece.keys(), &mut out, then);
        }
    }

    unsafe fn add_transposed(
        &mut self,
        (m, n): (usize, usize),
        w: Mat<*const f32>,
        x: Mat<*const bf16>,
        out: Mat<*mut f32>,
    ) {
        let d = self.heads.d;
        // SAFETY: the caller's promise.
        unsafe {
            interleave(w, (m, n), &mut self.left);
            self.right.fill(self.isa, x, (m, d), false, true);
            let mut out = Out::at(out.ptr, n, d, out.rs as usize);
            let left = Left::interleaved(&self.left, 2 * n);
            kernel::block(self.isa, left, self.right.along(), m, &mut out, Then { scale: 1.0, add: true });
        }
    }
}

/// How keys, or values, are packed: for products that sum over D, and for products that sum over them.
fn ways(pass: Pass, values: bool) -> (bool, bool) {
    match (pass, values) {
        (Pass::Forward, false) => (true, false),
        (Pass::Forward, true) => (false, true),
        (Pass::Backward, false) => (true, true),
        (Pass::Backward, true) => (true, false),
    }
}

/// Rounds `w` [m, n] into `to`, each two rows interleaved; the row behind an odd one is zero.
///
/// # Safety
/// The elements lie in live memory.
unsafe fn interleave(w: Mat<*const f32>, (m, n): (usize, usize), to: &mut Vec<bf16>) {
    to.resize(m.next_multiple_of(2) * n, bf16::ZERO);
    cpu::simd(
        #[inline(always)]
        || {
            for (i, to) in to.chunks_exact_mut((2 * n).max(1)).enumerate() {
                // SAFETY: the caller's promise; the second row is read where there is one.
                let row = |i: usize| unsafe { std::slice::from_raw_parts(from_row(w, i).ptr, n) };
                let to = to.as_chunks_mut::<2>().0;
                if 2 * i + 1 < m {
                    for ((y, &a), &b) in to.iter_mut().zip(row(2 * i)).zip(row(2 * i + 1)) {
                        *y = [bf16::stored(a), bf16::stored(b)];
                    }
                } else {
                    to.iter_mut().zip(row(2 * i)).for_each(|(y, &a)| *y = [bf16::stored(a), bf16::ZERO]);
                }
            }
        },
    );
}
