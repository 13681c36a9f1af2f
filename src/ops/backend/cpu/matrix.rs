//! Strided matrices as operands of products.

use std::marker::PhantomData;

/// A strided matrix that is read. The value borrows the elements; whether a product's rows and columns lie inside of them is
/// the promise of the product's caller.
pub(crate) struct Mat<'a, T> {
    /// Address of the first element.
    pub(crate) ptr: *const T,
    /// Elements from a row to the next one.
    pub(crate) row_stride: isize,
    /// Elements from a column to the next one.
    pub(crate) column_stride: isize,
    elements: PhantomData<&'a [T]>,
}

impl<T> Clone for Mat<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Mat<'_, T> {}

impl<'a, T> Mat<'a, T> {
    /// Rows that begin `stride` elements apart, the first of them with `elements`.
    pub(crate) fn rows(elements: &'a [T], stride: usize) -> Self {
        Self { ptr: elements.as_ptr(), row_stride: stride as isize, column_stride: 1, elements: PhantomData }
    }

    /// The transpose.
    pub(crate) fn transposed(self) -> Self {
        Self { row_stride: self.column_stride, column_stride: self.row_stride, ..self }
    }

    /// The rows after the first `rows`.
    pub(crate) fn skip_rows(self, rows: usize) -> Self {
        Self { ptr: self.ptr.wrapping_offset(rows as isize * self.row_stride), ..self }
    }

    /// The columns after the first `columns`.
    pub(crate) fn skip_columns(self, columns: usize) -> Self {
        Self { ptr: self.ptr.wrapping_offset(columns as isize * self.column_stride), ..self }
    }
}

/// A matrix that is written: rows of neighbouring elements.
pub(crate) struct MatMut<'a, T> {
    /// Address of the first element.
    pub(crate) ptr: *mut T,
    /// Elements from a row to the next one.
    pub(crate) stride: usize,
    elements: PhantomData<&'a mut [T]>,
}

impl<T> Clone for MatMut<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for MatMut<'_, T> {}

impl<'a, T> MatMut<'a, T> {
    /// Rows that begin `stride` elements apart, the first of them with `elements`.
    pub(crate) fn rows(elements: &'a mut [T], stride: usize) -> Self {
        Self { ptr: elements.as_mut_ptr(), stride, elements: PhantomData }
    }

    /// As [`MatMut::rows`], of elements that lie at `ptr`.
    ///
    /// # Safety
    /// During `'a` the elements that are reached through this value live, and nothing else uses them.
    pub(crate) unsafe fn from_raw(ptr: *mut T, stride: usize) -> Self {
        Self { ptr, stride, elements: PhantomData }
    }

    /// The rows after the first `rows`.
    pub(crate) fn skip_rows(self, rows: usize) -> Self {
        Self { ptr: self.ptr.wrapping_add(rows * self.stride), ..self }
    }

    /// The columns after the first `columns`.
    pub(crate) fn skip_columns(self, columns: usize) -> Self {
        Self { ptr: self.ptr.wrapping_add(columns), ..self }
    }
}
