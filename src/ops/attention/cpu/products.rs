//! The matrix products of a task on the CPU: those of the query heads that share one key and value head.

use super::query_blocks::{QueryBlock, ScoreRow, SegmentRun};
use crate::ops::AttentionShape;
use crate::ops::cpu::{Fma, Mat, MatMut, Real, StorageFloat};

/// The matrices that a pass reads.
pub(super) struct QkvSlices<'a, S> {
    pub(super) q: &'a [S],
    pub(super) q_width: usize,
    pub(super) kv: &'a [S],
    pub(super) kv_width: usize,
    pub(super) prefix: &'a [S],
    pub(super) prefix_width: usize,
}

/// Whether a task computes the forward or the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    Forward,
    Backward,
}

/// Keys and values of one head.
pub(super) struct HeadMatrices<'a, S> {
    /// Head size, D.
    pub(super) d: usize,
    pub(super) keys: Mat<'a, S>,
    pub(super) values: Mat<'a, S>,
    pub(super) prefix_keys: Mat<'a, S>,
    pub(super) prefix_values: Mat<'a, S>,
    /// Rows of the prefix, P.
    pub(super) prefix: usize,
}

/// Keys or values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Keys,
    Values,
}

/// A block of queries with the keys and values of their head.
#[derive(Clone, Copy)]
pub(super) struct HeadBlock<'a, S> {
    pub(super) heads: &'a HeadMatrices<'a, S>,
    pub(super) block: &'a QueryBlock,
}

/// The products of a task, and the scores that they write and read; scores and sums are in `T`. The methods are called in
/// the order in which they stand here.
pub(super) trait HeadProducts<T: Real>: Sized {
    /// The dtype of queries, keys, values and the gradient of the output.
    type Operand: StorageFloat<T>;

    /// Products with the keys and values of `heads`.
    ///
    /// # Safety
    /// The prefix's rows are inside of its matrices.
    unsafe fn new(heads: &HeadMatrices<Self::Operand>, direction: Direction) -> Self;

    /// Goes on to another block of queries, of the heads that `new` was called with.
    ///
    /// # Safety
    /// The keys of the block's pieces are inside of their matrices.
    unsafe fn begin(&mut self, task: HeadBlock<Self::Operand>);

    /// Scores of the block's queries `q` [rows, D]: `scale * q · keysᵀ`, the prefix's columns first.
    ///
    /// # Safety
    /// `q` has the rows of the block, which is the one that `begin` was called with.
    unsafe fn scores(&mut self, task: HeadBlock<Self::Operand>, q: Mat<Self::Operand>, scale: T);

    /// Turns scores into probabilities, row by row; `f` writes every column.
    fn probabilities(&mut self, task: HeadBlock<Self::Operand>, f: impl FnMut(ScoreRow, &mut [T], Fma));

    /// `out[rows, D] = probabilities · values`.
    ///
    /// # Safety
    /// As for `scores`; `out` has the block's rows.
    unsafe fn weighted_values(&mut self, task: HeadBlock<Self::Operand>, out: MatMut<T>);

    /// Gradients of the probabilities from that of the output, `dout` [rows, D]: `dout · valuesᵀ`.
    ///
    /// # Safety
    /// As for `scores`.
    unsafe fn probability_gradients(&mut self, task: HeadBlock<Self::Operand>, dout: Mat<Self::Operand>);

    /// Turns, row by row, scores into probabilities and gradients of the probabilities into those of the scores; `f` is called
    /// with both rows and writes every column.
    fn score_gradients(
        &mut self,
        task: HeadBlock<Self::Operand>,
        f: impl FnMut(ScoreRow, &mut [T], &mut [T], Fma),
    );

    /// Adds `probabilitiesᵀ · dout` to the gradient of the values, or `score gradientsᵀ · q` to that of the keys; `x` is `dout`
    /// or `q`.
    ///
    /// # Safety
    /// As for `scores`; the gradients have the rows of the prefix and of the block's keys, and are initialised.
    unsafe fn add_gradients(
        &mut self,
        task: HeadBlock<Self::Operand>,
        side: Side,
        x: Mat<Self::Operand>,
        to: SideGradient<T>,
    );

    /// `out[rows, D] = score gradients · keys`.
    ///
    /// # Safety
    /// As for `weighted_values`.
    unsafe fn query_gradients(&mut self, task: HeadBlock<Self::Operand>, out: MatMut<T>);
}

/// The gradient of a head's keys, or of its values.
pub(super) struct SideGradient<'a, T> {
    /// Of the prefix, [P, D].
    pub(super) prefix: MatMut<'a, T>,
    /// Of the rows of all segments, if it is wanted.
    pub(super) own: Option<MatMut<'a, T>>,
}

impl<T> Clone for SideGradient<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for SideGradient<'_, T> {}

/// The part of a matrix of rows of `width` elements that begins with `matrix[row, column]`.
pub(super) fn submatrix<S>(matrix: &[S], width: usize, row: usize, column: usize) -> Mat<'_, S> {
    Mat::rows(&matrix[(row * width + column).min(matrix.len())..], width)
}

impl<'a, S> HeadMatrices<'a, S> {
    /// Those of key and value head `kv_head`, with the prefix of `run`.
    pub(super) fn new(
        shape: &AttentionShape,
        slices: &QkvSlices<'a, S>,
        run: &SegmentRun,
        kv_head: usize,
    ) -> Self {
        let (d, k) = (shape.head_dim, shape.kv_heads * shape.head_dim);
        let (kv, width) = (slices.kv, slices.kv_width);
        let (first, prefix) = run.prefix.as_ref().map_or((0, 0), |p| (p.start, p.len()));
        let (column, prefix_column) =
            (width - 2 * k + kv_head * d, slices.prefix_width - 2 * k + kv_head * d);
        Self {
            d,
            keys: submatrix(kv, width, 0, column),
            values: submatrix(kv, width, 0, column + k),
            prefix_keys: submatrix(slices.prefix, slices.prefix_width, first, prefix_column),
            prefix_values: submatrix(slices.prefix, slices.prefix_width, first, prefix_column + k),
            prefix,
        }
    }

    /// Keys or values of the segments' own rows.
    pub(super) fn own(&self, side: Side) -> Mat<'a, S> {
        match side {
            Side::Keys => self.keys,
            Side::Values => self.values,
        }
    }

    /// Keys or values of the prefix.
    pub(super) fn prefix_side(&self, side: Side) -> Mat<'a, S> {
        match side {
            Side::Keys => self.prefix_keys,
            Side::Values => self.prefix_values,
        }
    }
}
