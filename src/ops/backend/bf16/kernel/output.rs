//! Outputs of products: blocks of a matrix, in f32 or bf16.

use super::Epilogue;
#[cfg(target_arch = "x86_64")]
use super::element;
use crate::ops::cpu::{self, F32Rows, StorageFloat};
use half::bf16;
use rayon::prelude::*;
use std::cell::RefCell;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

/// A block of an output matrix; nothing else uses its elements. They are initialised if they are read: by a product that
/// accumulates.
pub(crate) struct OutputBlock<'a, T = f32> {
    pub(super) ptr: *mut T,
    pub(super) stride: usize,
    /// The block's rows of the matrix.
    pub(crate) rows: Range<usize>,
    /// The block's columns of the matrix.
    pub(crate) columns: Range<usize>,
    pub(super) matrix: PhantomData<&'a mut [T]>,
}

// SAFETY: it is a `&mut` of its elements.
unsafe impl<T: Send> Send for OutputBlock<'_, T> {}

impl<'a> OutputBlock<'a> {
    /// The first `columns` columns of rows that are `stride` elements apart.
    pub(crate) fn new(matrix: &'a mut [f32], rows: usize, columns: usize, stride: usize) -> Self {
        assert!(columns <= stride && (rows == 0 || (rows - 1) * stride + columns <= matrix.len()));
        Self { ptr: matrix.as_mut_ptr(), stride, rows: 0..rows, columns: 0..columns, matrix: PhantomData }
    }

    /// As [`OutputBlock::new`], of elements at `ptr`.
    ///
    /// # Safety
    /// During `'a` the elements live and nothing else uses them. They are initialised if a product accumulates to them.
    pub(crate) unsafe fn from_raw(ptr: *mut f32, rows: usize, columns: usize, stride: usize) -> Self {
        Self { ptr, stride, rows: 0..rows, columns: 0..columns, matrix: PhantomData }
    }
}

impl<'a, T: Send> OutputBlock<'a, T> {
    /// Cuts a matrix of rows of `width` elements into blocks of at most `rows` by `columns`, those of the same rows one after
    /// another.
    ///
    /// # Safety
    /// The elements are initialised if a block's elements are read.
    pub(crate) unsafe fn blocks(
        matrix: &'a mut [MaybeUninit<T>],
        width: usize,
        rows: usize,
        columns: usize,
    ) -> impl IndexedParallelIterator<Item = Self> {
        let height = matrix.len() / width.max(1);
        let (down, across) = (height.div_ceil(rows), width.div_ceil(columns));
        let start = MatrixStart(matrix.as_mut_ptr().cast::<T>());
        (0..down * across).into_par_iter().map(move |i| {
            let (row, column) = (i / across * rows, i % across * columns);
            let MatrixStart(start) = &start;
            Self {
                // SAFETY: the element is inside the matrix.
                ptr: unsafe { start.add(row * width + column) },
                stride: width,
                rows: row..(row + rows).min(height),
                columns: column..(column + columns).min(width),
                matrix: PhantomData,
            }
        })
    }

    /// Cuts the block into blocks of at most `columns` columns.
    pub(crate) fn split(&mut self, columns: usize) -> impl Iterator<Item = OutputBlock<'_, T>> {
        let (ptr, stride) = (self.ptr, self.stride);
        let (rows, all) = (self.rows.clone(), self.columns.clone());
        all.clone().step_by(columns).map(move |start| OutputBlock {
            // SAFETY: the column is inside the block.
            ptr: unsafe { ptr.add(start - all.start) },
            stride,
            rows: rows.clone(),
            columns: start..(start + columns).min(all.end),
            matrix: PhantomData,
        })
    }

    /// The block's row `i`.
    ///
    /// # Safety
    /// The elements are initialised.
    #[inline(always)]
    pub(super) unsafe fn row(&mut self, i: usize) -> &mut [T] {
        assert!(i < self.rows.len());
        // SAFETY: the row is inside the block, which borrows its elements mutably; the caller initialised them.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(i * self.stride), self.columns.len()) }
    }
}

/// A dtype of outputs.
pub(crate) trait OutputElement: StorageFloat<f32> + Send {
    /// Runs `f` on a block in f32 and stores it in `out`. The block holds the elements of `out` if `load` is set, and unspecified
    /// values otherwise.
    fn with_f32_block(out: OutputBlock<Self>, load: bool, f: impl FnOnce(OutputBlock));

    /// Writes 32 sums, those of the columns whose bit in `mask` is set.
    ///
    /// # Safety
    /// The CPU has `avx512f`, `avx512bw` and `avx512bf16`; `sums` are 32 values at a multiple of 64 bytes; nothing
    /// else uses the elements of those columns at `to`, which are initialised if the epilogue accumulates.
    #[cfg(target_arch = "x86_64")]
    unsafe fn store_row(sums: *const f32, to: *mut Self, mask: u32, epilogue: Epilogue);
}

impl OutputElement for f32 {
    fn with_f32_block(out: OutputBlock<Self>, _: bool, f: impl FnOnce(OutputBlock)) {
        f(out)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn store_row(sums: *const Self, to: *mut Self, mask: u32, epilogue: Epilogue) {
        // SAFETY: the caller's promise.
        unsafe { element::store_f32(sums, to, mask, epilogue) };
    }
}

impl OutputElement for bf16 {
    /// The block in f32 is memory of the thread.
    fn with_f32_block(mut out: OutputBlock<Self>, load: bool, f: impl FnOnce(OutputBlock)) {
        thread_local! {
            static SUMS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
        }
        let (rows, columns) = (out.rows.len(), out.columns.len());
        SUMS.with_borrow_mut(|sums| {
            sums.resize(sums.len().max(rows * columns), 0.0);
            if load {
                for (i, sums) in sums.chunks_exact_mut(columns.max(1)).take(rows).enumerate() {
                    // SAFETY: with `load` set the caller's elements are initialised.
                    let row = unsafe { out.row(i) };
                    sums.iter_mut().zip(row).for_each(|(y, x)| *y = x.load());
                }
            }
            let mut block = OutputBlock::new(sums, rows, columns, columns);
            (block.rows, block.columns) = (out.rows.clone(), out.columns.clone());
            f(block);
            cpu::simd(
                #[inline(always)]
                |_| {
                    let rows = F32Rows { from: &sums[..rows * columns], columns };
                    // SAFETY: the rows are those of the block, which borrows them mutably.
                    unsafe { rows.round(out.ptr, out.stride) };
                },
            );
        });
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn store_row(sums: *const f32, to: *mut Self, mask: u32, epilogue: Epilogue) {
        // SAFETY: the caller's promise.
        unsafe { element::store_bf16(sums, to, mask, epilogue) };
    }
}

/// The first element of a matrix.
pub(super) struct MatrixStart<T>(pub(super) *mut T);
// SAFETY: tasks make disjoint blocks of the matrix.
unsafe impl<T: Send> Send for MatrixStart<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for MatrixStart<T> {}
