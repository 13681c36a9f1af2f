//! Matrices in slices, and their products.

use crate::ops::cpu::{self, Gemm, Mat, MatMut, Real};

/// A matrix whose rows begin `stride` elements apart in `values`, or the transpose of one.
#[derive(Clone, Copy)]
pub(super) struct Operand<'a, T> {
    pub(super) values: &'a [T],
    pub(super) stride: usize,
    transposed: bool,
}

impl<'a, T: Real> Operand<'a, T> {
    pub(super) fn new(values: &'a [T], stride: usize) -> Self {
        Self { values, stride, transposed: false }
    }

    pub(super) fn transposed(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }

    pub(super) fn is_transposed(self) -> bool {
        self.transposed
    }

    /// The part from a row and a column of the stored matrix on.
    pub(super) fn from(self, row: usize, column: usize) -> Self {
        Self { values: &self.values[row * self.stride + column..], ..self }
    }

    /// The first `width` elements of a stored row.
    #[inline(always)]
    pub(super) fn row(self, row: usize, width: usize) -> &'a [T] {
        &self.values[row * self.stride..][..width]
    }

    fn holds(&self, rows: usize, columns: usize) -> bool {
        let (rows, columns) = if self.transposed { (columns, rows) } else { (rows, columns) };
        rows == 0 || columns == 0 || (rows - 1) * self.stride + columns <= self.values.len()
    }

    fn mat(self) -> Mat<'a, T> {
        let rows = Mat::rows(self.values, self.stride);
        if self.transposed { rows.transposed() } else { rows }
    }
}

/// A matrix that is written, whose rows begin `stride` elements apart.
pub(super) struct ProductRows<'a, T> {
    pub(super) values: &'a mut [T],
    pub(super) stride: usize,
    /// Whether products are added to it.
    pub(super) accumulate: bool,
}

/// `out [m, n] = a [m, k] b [k, n] (+ out)`, on this thread.
///
/// # Panics
/// Panics if the matrices do not have those sizes.
pub(super) fn multiply<T: Real>(
    (m, n, k): (usize, usize, usize),
    a: Operand<T>,
    b: Operand<T>,
    out: ProductRows<T>,
) {
    let ProductRows { values, stride, accumulate } = out;
    let holds_output = m == 0 || n == 0 || (m - 1) * stride + n <= values.len();
    assert!(a.holds(m, k) && b.holds(k, n) && holds_output, "matrices of a product of {m}, {n}, {k}");
    let (a, b) = (a.mat(), b.mat());
    let product = Gemm { size: (m, n, k), a, b, scale: T::one(), accumulate, parallel: false };
    // SAFETY: the sizes lie inside the matrices.
    unsafe { cpu::gemm(&product, MatMut::rows(values, stride)) };
}
