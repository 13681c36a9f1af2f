//! The one call of `gemm`.

use super::{Mat, MatMut, Real};

/// A product `scale * a[m, k] b[k, n]`.
pub(crate) struct Gemm<'a, T> {
    /// m, n, k.
    pub(crate) size: (usize, usize, usize),
    /// [m, k].
    pub(crate) a: Mat<'a, T>,
    /// [k, n].
    pub(crate) b: Mat<'a, T>,
    /// Multiplies the product.
    pub(crate) scale: T,
    /// Whether the product is added to the output; it replaces the output otherwise.
    pub(crate) accumulate: bool,
    /// Whether the thread pool shares the work.
    pub(crate) parallel: bool,
}

/// `out[m, n] = scale * a[m, k] b[k, n] (+ out if accumulate)`.
///
/// # Safety
/// The sizes lie inside the three matrices; the elements of `out` are initialised if the product accumulates.
pub(crate) unsafe fn gemm<T: Real>(product: &Gemm<T>, out: MatMut<T>) {
    let Gemm { size: (m, n, k), a, b, scale, accumulate, parallel } = *product;
    if m == 0 || n == 0 {
        return;
    }
    let parallelism = if parallel { ::gemm::Parallelism::Rayon(0) } else { ::gemm::Parallelism::None };
    // The crate's `alpha` multiplies the old output, its `beta` the product.
    let alpha = if accumulate { T::one() } else { T::zero() };
    // SAFETY: the caller's promise.
    unsafe {
        ::gemm::gemm(
            m, n, k, out.ptr, 1, out.stride as isize, accumulate, a.ptr, a.column_stride, a.row_stride,
            b.ptr, b.column_stride, b.row_stride, alpha, scale, false, false, false, parallelism,
        );
    }
}
