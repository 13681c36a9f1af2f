//! The matrix products of the CPU kernel, of one key and value head, in the dtype of the activations or in bf16.

use super::AttentionShape;
use super::blocks::{Block, Run};
use crate::ops::cpu::{self, Mat, Real, Stored};

/// The matrices that a pass reads.
pub(super) struct Source<'a, T> {
    pub(super) q: &'a [T],
    pub(super) q_width: usize,
    pub(super) kv: &'a [T],
    pub(super) kv_width: usize,
    pub(super) prefix: &'a [T],
    pub(super) prefix_width: usize,
}

/// Which products a task makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pass {
    Forward,
    Backward,
}

/// The products of a task, with scores and sums in `T`. Addresses are of matrices whose columns lie side by side.
pub(super) trait Products<T: Real>: Sized {
    /// How queries, keys, values and the gradient of the output are stored.
    type Operand: Stored<T>;

    /// Of the keys and values of `heads`.
    fn new(heads: Heads<Self::Operand>, pass: Pass) -> Self;

    /// Turns to another block of queries.
    fn begin(&mut self, block: &Block);

    /// `out[rows, columns] = beta * x[rows, D] · (keys or values)ᵀ`, prefix columns first.
    ///
    /// # Safety
    /// `x` has the rows of the block, which is the one that `begin` was given; `out` has room for them.
    unsafe fn against_keys(
        &mut self,
        block: &Block,
        x: Mat<*const Self::Operand>,
        values: bool,
        out: &mut [T],
        beta: T,
    );

    /// `out[rows, D] = p[rows, columns] · (keys or values)`.
    ///
    /// # Safety
    /// As in `against_keys`; `out` has the block's rows and is not aliased.
    unsafe fn over_keys(&mut self, block: &Block, p: &[T], values: bool, out: Mat<*mut T>);

    /// `out[n, D] += w[m, n]ᵀ · x[m, D]` of `size` (m, n).
    ///
    /// # Safety
    /// The operands' elements lie in live memory, `out`'s are not aliased.
    unsafe fn add_transposed(
        &mut self,
        size: (usize, usize),
        w: Mat<*const T>,
        x: Mat<*const Self::Operand>,
        out: Mat<*mut T>,
    );
}

/// Where one key and value head lies.
pub(super) struct Heads<T> {
    pub(super) d: usize,
    pub(super) k: Mat<*const T>,
    pub(super) v: Mat<*const T>,
    pub(super) prefix_k: Mat<*const T>,
    pub(super) prefix_v: Mat<*const T>,
    /// Keys of the prefix.
    pub(super) prefix: usize,
}

/// Address of `matrix[row, column]`, where rows are `matrix`'s.
pub(super) fn at<T>(matrix: &[T], width: usize, row: usize, column: usize) -> Mat<*const T> {
    Mat::rows(matrix[(row * width + column).min(matrix.len())..].as_ptr(), width)
}

/// The rows of `m` from `row` on.
pub(super) fn from_row<T>(m: Mat<*const T>, row: usize) -> Mat<*const T> {
    Mat { ptr: m.ptr.wrapping_offset(row as isize * m.rs), ..m }
}

impl<T> Heads<T> {
    pub(super) fn new(shape: &AttentionShape, source: &Source<T>, run: &Run, kv_head: usize) -> Self {
        let (d, k) = (shape.head_dim, shape.kv_heads * shape.head_dim);
        let (kv, w) = (source.kv, source.kv_width);
        let (first, prefix) = run.prefix.as_ref().map_or((0, 0), |p| (p.start, p.len()));
        let (column, prefix_column) = (w - 2 * k + kv_head * d, source.prefix_width - 2 * k + kv_head * d);
        Self {
            d,
            k: at(kv, w, 0, column),
            v: at(kv, w, 0, column + k),
            prefix_k: at(source.prefix, source.prefix_width, first, prefix_column),
            prefix_v: at(source.prefix, source.prefix_width, first, prefix_column + k),
            prefix,
        }
    }

    /// Keys or values: the segments' own, and the prefix's.
    pub(super) fn side(&self, values: bool) -> (Mat<*const T>, Mat<*const T>) {
        if values { (self.v, self.prefix_v) } else { (self.k, self.prefix_k) }
    }
}

/// Products in the dtype of the activations.
pub(super) struct Whole<T>(Heads<T>);

impl<T: Real> Products<T> for Whole<T> {
    type Operand = T;

    fn new(heads: Heads<T>, _: Pass) -> Self {
        Self(heads)
    }

    fn begin(&mut self, _: &Block) {}

    unsafe fn against_keys(&mut self, block: &Block, x: Mat<*const T>, values: bool, out: &mut [T], beta: T) {
        let Heads { d, prefix: count, .. } = self.0;
        let (own, prefix) = self.0.side(values);
        let scores = out.as_mut_ptr();
        // SAFETY: the pieces lie inside the block and its columns; the segments were checked against the matrices.
        unsafe {
            let size = (block.rows, count, d);
            cpu::gemm(size, Mat::rows(scores, block.columns), false, x, prefix.t(), beta, false);
            for piece in &block.pieces {
                let out = Mat::rows(scores.add(piece.rows.start * block.columns + count), block.columns);
                let (x, keys) = (from_row(x, piece.rows.start), from_row(own, piece.key));
                cpu::gemm((piece.rows.len(), piece.keys(), d), out, false, x, keys.t(), beta, false);
            }
        }
    }

    unsafe fn over_keys(&mut self, block: &Block, p: &[T], values: bool, out: Mat<*mut T>) {
        let Heads { d, prefix: count, .. } = self.0;
        let (own, prefix) = self.0.side(values);
        // SAFETY: as in `against_keys`.
        unsafe {
            if count > 0 {
                let p = Mat::rows(p.as_ptr(), block.columns);
                cpu::gemm((block.rows, d, count), out, false, p, prefix, T::one(), false);
            }
            for piece in &block.pieces {
                let p = Mat::rows(p.as_ptr().add(piece.rows.start * block.columns + count), block.columns);
                let out = Mat { ptr: out.ptr.offset(piece.rows.start as isize * out.rs), ..out };
                let size = (piece.rows.len(), d, piece.keys());
                cpu::gemm(size, out, count > 0, p, from_row(own, piece.key), T::one(), false);
            }
        }
    }

    unsafe fn add_transposed(
        &mut self,
        (m, n): (usize, usize),
        w: Mat<*const T>,
        x: Mat<*const T>,
        out: Mat<*mut T>,
    ) {
        // SAFETY: the caller's promise.
        unsafe { cpu::gemm((n, self.0.d, m), out, true, w.t(), x, T::one(), false) }
    }
}
