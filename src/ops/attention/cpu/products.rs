//! The matrix products of the CPU kernel, of one key and value head, in the dtype of the activations or in bf16.

use super::AttentionShape;
use super::blocks::{Block, Row, Run};
use crate::ops::cpu::{self, Fma, Mat, Real, Stored};

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

/// The products of a task, and the scores that they make and read; scores and sums are in `T`. Addresses are those of
/// matrices whose columns lie side by side. The methods are called in the order in which they stand here.
pub(super) trait Products<T: Real>: Sized {
    /// How queries, keys, values and the gradient of the output are stored.
    type Operand: Stored<T>;

    /// Of the keys and values of `heads`.
    fn new(heads: Heads<Self::Operand>, pass: Pass) -> Self;

    /// Turns to another block of queries.
    fn begin(&mut self, block: &Block);

    /// Scores of the block's queries `q` [rows, D]: `scale * q · keysᵀ`, the prefix's columns first.
    ///
    /// # Safety
    /// `q` has the rows of the block, which is the one that `begin` was given.
    unsafe fn scores(&mut self, block: &Block, q: Mat<*const Self::Operand>, scale: T);

    /// Makes probabilities of the scores, row by row; `f` writes every column.
    fn probabilities(&mut self, block: &Block, f: impl FnMut(Row, &mut [T], Fma));

    /// `out[rows, D] = probabilities · values`.
    ///
    /// # Safety
    /// As for `scores`; `out` has the block's rows and is not aliased.
    unsafe fn attend(&mut self, block: &Block, out: Mat<*mut T>);

    /// Gradients of the probabilities from that of the output, `dout` [rows, D]: `dout · valuesᵀ`.
    ///
    /// # Safety
    /// As for `scores`.
    unsafe fn probability_gradients(&mut self, block: &Block, dout: Mat<*const Self::Operand>);

    /// Makes, row by row, probabilities of the scores and gradients of the scores of those of the probabilities; `f` gets
    /// both rows and writes every column.
    fn score_gradients(&mut self, block: &Block, f: impl FnMut(Row, &mut [T], &mut [T], Fma));

    /// Adds `probabilitiesᵀ · dout` to the gradient of the values, or `score gradientsᵀ · q` to that of the keys.
    ///
    /// # Safety
    /// As for `scores`; the gradients are not aliased.
    unsafe fn add_gradients(
        &mut self,
        block: &Block,
        values: bool,
        x: Mat<*const Self::Operand>,
        to: Gradient<T>,
    );

    /// `out[rows, D] = score gradients · keys`.
    ///
    /// # Safety
    /// As for `attend`.
    unsafe fn query_gradients(&mut self, block: &Block, out: Mat<*mut T>);
}

/// Where the gradient of a head's keys, or of its values, is added up.
#[derive(Clone, Copy)]
pub(super) struct Gradient<T> {
    /// Of the prefix, [P, D].
    pub(super) prefix: Mat<*mut T>,
    /// Of the rows of all segments, if it is wanted.
    pub(super) own: Option<Mat<*mut T>>,
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

/// As [`from_row`], of a matrix that is written.
pub(super) fn from_row_mut<T>(m: Mat<*mut T>, row: usize) -> Mat<*mut T> {
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
pub(super) struct Whole<T> {
    heads: Heads<T>,
    /// Scores, then probabilities.
    p: Vec<T>,
    /// Gradients of the probabilities, then of the scores.
    ds: Vec<T>,
}

impl<T: Real> Products<T> for Whole<T> {
    type Operand = T;

    fn new(heads: Heads<T>, _: Pass) -> Self {
        Self { heads, p: Vec::new(), ds: Vec::new() }
    }

    fn begin(&mut self, block: &Block) {
        self.p.resize(block.rows * block.columns, T::zero());
        self.ds.resize(block.rows * block.columns, T::zero());
    }

    unsafe fn scores(&mut self, block: &Block, q: Mat<*const T>, scale: T) {
        // SAFETY: the caller's promise.
        unsafe { self.heads.times(false, block, q, &mut self.p, scale) }
    }

    fn probabilities(&mut self, block: &Block, mut f: impl FnMut(Row, &mut [T], Fma)) {
        cpu::simd(
            #[inline(always)]
            |fma| {
                for row in block.each_row(self.heads.prefix) {
                    f(row, &mut self.p[row.index * block.columns..][..block.columns], fma);
                }
            },
        );
    }

    unsafe fn attend(&mut self, block: &Block, out: Mat<*mut T>) {
        // SAFETY: the caller's promise.
        unsafe { self.heads.sum(true, block, &self.p, out) }
    }

    unsafe fn probability_gradients(&mut self, block: &Block, dout: Mat<*const T>) {
        // SAFETY: the caller's promise.
        unsafe { self.heads.times(true, block, dout, &mut self.ds, T::one()) }
    }

    fn score_gradients(&mut self, block: &Block, mut f: impl FnMut(Row, &mut [T], &mut [T], Fma)) {
        cpu::simd(
            #[inline(always)]
            |fma| {
                for row in block.each_row(self.heads.prefix) {
                    let of_row = row.index * block.columns..(row.index + 1) * block.columns;
                    f(row, &mut self.p[of_row.clone()], &mut self.ds[of_row], fma);
                }
            },
        );
    }

    unsafe fn add_gradients(&mut self, block: &Block, values: bool, x: Mat<*const T>, to: Gradient<T>) {
        let Heads { d, prefix, .. } = self.heads;
        let weights = Mat::rows(if values { &self.p } else { &self.ds }.as_ptr(), block.columns);
        // SAFETY: the caller's promise; the pieces' rows and columns are inside the block.
        unsafe {
            let size = (prefix, d, block.rows);
            cpu::gemm(size, to.prefix, true, weights.t(), x, T::one(), false);
            let Some(own) = to.own else { return };
            for piece in &block.pieces {
                let of_piece = from_row(weights, piece.rows.start);
                let weights = Mat { ptr: of_piece.ptr.add(prefix), ..of_piece };
                let size = (piece.keys(), d, piece.rows.len());
                let (x, to) = (from_row(x, piece.rows.start), from_row_mut(own, piece.key));
                cpu::gemm(size, to, true, weights.t(), x, T::one(), false);
            }
        }
    }

    unsafe fn query_gradients(&mut self, block: &Block, out: Mat<*mut T>) {
        // SAFETY: the caller's promise.
        unsafe { self.heads.sum(false, block, &self.ds, out) }
    }
}

impl<T: Real> Heads<T> {
    /// `out[rows, columns] = beta * x[rows, D] · (keys or values)ᵀ`.
    ///
    /// # Safety
    /// `x` and `out` have the rows of the block; the segments were checked against the matrices.
    unsafe fn times(&self, values: bool, block: &Block, x: Mat<*const T>, out: &mut [T], beta: T) {
        let Self { d, prefix: count, .. } = *self;
        let (own, prefix) = self.side(values);
        let scores = out.as_mut_ptr();
        // SAFETY: the pieces lie inside the block and its columns.
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

    /// `out[rows, D] = weights[rows, columns] · (keys or values)`.
    ///
    /// # Safety
    /// As for [`Heads::times`].
    unsafe fn sum(&self, values: bool, block: &Block, weights: &[T], out: Mat<*mut T>) {
        let Self { d, prefix: count, .. } = *self;
        let (own, prefix) = self.side(values);
        // SAFETY: as in [`Heads::times`].
        unsafe {
            if count > 0 {
                let weights = Mat::rows(weights.as_ptr(), block.columns);
                cpu::gemm((block.rows, d, count), out, false, weights, prefix, T::one(), false);
            }
            for piece in &block.pieces {
                let first = piece.rows.start * block.columns + count;
                let weights = Mat::rows(weights.as_ptr().add(first), block.columns);
                let size = (piece.rows.len(), d, piece.keys());
                let out = from_row_mut(out, piece.rows.start);
                cpu::gemm(size, out, count > 0, weights, from_row(own, piece.key), T::one(), false);
            }
        }
    }
}
