//! The products of a task by `gemm`, in the dtype of the activations.

use super::products::{Direction, HeadBlock, HeadMatrices, HeadProducts, Side, SideGradient};
use super::query_blocks::ScoreRow;
use crate::ops::cpu::{self, Fma, Gemm, Mat, MatMut, Real};

/// Products in f32 or f64.
pub(super) struct RealHeads<T> {
    /// Scores, then probabilities.
    p: Vec<T>,
    /// Gradients of the probabilities, then of the scores.
    ds: Vec<T>,
}

/// A product on this thread.
fn product<'a, T: Real>(
    size: (usize, usize, usize),
    a: Mat<'a, T>,
    b: Mat<'a, T>,
    (scale, accumulate): (T, bool),
) -> Gemm<'a, T> {
    Gemm { size, a, b, scale, accumulate, parallel: false }
}

impl<T: Real> HeadProducts<T> for RealHeads<T> {
    type Operand = T;

    unsafe fn new(_: &HeadMatrices<T>, _: Direction) -> Self {
        Self { p: Vec::new(), ds: Vec::new() }
    }

    unsafe fn begin(&mut self, HeadBlock { block, .. }: HeadBlock<T>) {
        self.p.resize(block.rows * block.columns, T::zero());
        self.ds.resize(block.rows * block.columns, T::zero());
    }

    unsafe fn scores(&mut self, task: HeadBlock<T>, q: Mat<T>, scale: T) {
        // SAFETY: the caller's promise.
        unsafe { multiply_transposed(task, Side::Keys, q, scale, &mut self.p) }
    }

    fn probabilities(
        &mut self,
        HeadBlock { heads, block }: HeadBlock<T>,
        mut f: impl FnMut(ScoreRow, &mut [T], Fma),
    ) {
        cpu::simd(
            #[inline(always)]
            |fma| {
                for row in block.score_rows(heads.prefix) {
                    f(row, &mut self.p[row.index * block.columns..][..block.columns], fma);
                }
            },
        );
    }

    unsafe fn weighted_values(&mut self, task: HeadBlock<T>, out: MatMut<T>) {
        // SAFETY: the caller's promise.
        unsafe { weighted_sum(task, Side::Values, &self.p, out) }
    }

    unsafe fn probability_gradients(&mut self, task: HeadBlock<T>, dout: Mat<T>) {
        // SAFETY: the caller's promise.
        unsafe { multiply_transposed(task, Side::Values, dout, T::one(), &mut self.ds) }
    }

    fn score_gradients(
        &mut self,
        HeadBlock { heads, block }: HeadBlock<T>,
        mut f: impl FnMut(ScoreRow, &mut [T], &mut [T], Fma),
    ) {
        cpu::simd(
            #[inline(always)]
            |fma| {
                for row in block.score_rows(heads.prefix) {
                    let columns = row.index * block.columns..(row.index + 1) * block.columns;
                    f(row, &mut self.p[columns.clone()], &mut self.ds[columns], fma);
                }
            },
        );
    }

    unsafe fn add_gradients(&mut self, task: HeadBlock<T>, side: Side, x: Mat<T>, to: SideGradient<T>) {
        let HeadBlock { heads, block } = task;
        let weights = match side {
            Side::Values => &self.p,
            Side::Keys => &self.ds,
        };
        let (weights, add) = (Mat::rows(weights, block.columns), (T::one(), true));
        // SAFETY: the caller's promise; the pieces' rows and columns are inside the block.
        unsafe {
            let size = (heads.prefix, heads.d, block.rows);
            cpu::gemm(&product(size, weights.transposed(), x, add), to.prefix);
            let Some(own) = to.own else { return };
            for piece in &block.pieces {
                let weights = weights.skip_rows(piece.rows.start).skip_columns(heads.prefix);
                let size = (piece.keys(), heads.d, piece.rows.len());
                let x = x.skip_rows(piece.rows.start);
                cpu::gemm(&product(size, weights.transposed(), x, add), own.skip_rows(piece.key));
            }
        }
    }

    unsafe fn query_gradients(&mut self, task: HeadBlock<T>, out: MatMut<T>) {
        // SAFETY: the caller's promise.
        unsafe { weighted_sum(task, Side::Keys, &self.ds, out) }
    }
}

/// `out[rows, columns] = scale * x[rows, D] · (keys or values)ᵀ`.
///
/// # Safety
/// `x` and `out` have the rows of the block; the keys of its pieces are inside of their matrices.
unsafe fn multiply_transposed<T: Real>(task: HeadBlock<T>, side: Side, x: Mat<T>, scale: T, out: &mut [T]) {
    let HeadBlock { heads, block } = task;
    let out = MatMut::rows(out, block.columns);
    // SAFETY: the pieces lie inside the block and its columns.
    unsafe {
        let size = (block.rows, heads.prefix, heads.d);
        cpu::gemm(&product(size, x, heads.prefix_side(side).transposed(), (scale, false)), out);
        for piece in &block.pieces {
            let out = out.skip_rows(piece.rows.start).skip_columns(heads.prefix);
            let (x, keys) = (x.skip_rows(piece.rows.start), heads.own(side).skip_rows(piece.key));
            let size = (piece.rows.len(), piece.keys(), heads.d);
            cpu::gemm(&product(size, x, keys.transposed(), (scale, false)), out);
        }
    }
}

/// `out[rows, D] = weights[rows, columns] · (keys or values)`.
///
/// # Safety
/// As for [`multiply_transposed`].
unsafe fn weighted_sum<T: Real>(task: HeadBlock<T>, side: Side, weights: &[T], out: MatMut<T>) {
    let HeadBlock { heads, block } = task;
    let weights = Mat::rows(weights, block.columns);
    // SAFETY: as in `multiply_transposed`.
    unsafe {
        if heads.prefix > 0 {
            let size = (block.rows, heads.d, heads.prefix);
            cpu::gemm(&product(size, weights, heads.prefix_side(side), (T::one(), false)), out);
        }
        for piece in &block.pieces {
            let weights = weights.skip_rows(piece.rows.start).skip_columns(heads.prefix);
            let size = (piece.rows.len(), heads.d, piece.keys());
            let (keys, out) = (heads.own(side).skip_rows(piece.key), out.skip_rows(piece.rows.start));
            cpu::gemm(&product(size, weights, keys, (T::one(), heads.prefix > 0)), out);
        }
    }
}
