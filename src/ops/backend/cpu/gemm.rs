//! The one call into `gemm`, and its operands.

use super::Real;

/// A strided matrix operand: address of its first element, row stride and column stride in elements.
#[derive(Clone, Copy)]
pub(crate) struct Mat<P> {
    pub(crate) ptr: P,
    pub(crate) rs: isize,
    pub(crate) cs: isize,
}

impl<P> Mat<P> {
    /// Rows of `stride` elements, one after another.
    pub(crate) fn rows(ptr: P, stride: usize) -> Self {
        Self { ptr, rs: stride as isize, cs: 1 }
    }
    /// The transpose.
    pub(crate) fn t(self) -> Self {
        Self { ptr: self.ptr, rs: self.cs, cs: self.rs }
    }
}

/// `out[m, n] = beta * a[m, k] b[k, n]`, added to what `out` holds where `add` is set.
///
/// # Safety
/// The operands' elements lie in live memory, `out`'s are not aliased.
pub(crate) unsafe fn gemm<T: Real>(
    (m, n, k): (usize, usize, usize),
    out: Mat<*mut T>,
    add: bool,
    a: Mat<*const T>,
    b: Mat<*const T>,
    beta: T,
    parallel: bool,
) {
    if m == 0 || n == 0 {
        return;
    }
    let parallelism = if parallel { ::gemm::Parallelism::Rayon(0) } else { ::gemm::Parallelism::None };
    let alpha = if add { T::one() } else { T::zero() };
    // SAFETY: the caller's promise.
    unsafe {
        ::gemm::gemm(
            m,
            n,
            k,
            out.ptr,
            out.cs,
            out.rs,
            add,
            a.ptr,
            a.cs,
            a.rs,
            b.ptr,
            b.cs,
            b.rs,
            alpha,
            beta,
            false,
            false,
            false,
            parallelism,
        );
    }
}
