//! The inner loops, and all unsafe code of the products. What is public is safe: operands are slices with their
//! strides, checked against each other before a pointer is taken, and blocks of an output are handed out such that
//! no two share an element.

// On other architectures there is no `Isa` to call these functions with, and their bodies are empty.
#![cfg_attr(not(target_arch = "x86_64"), allow(unused, unreachable_code))]

#[cfg(target_arch = "x86_64")]
pub(super) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod claims;
#[cfg(target_arch = "x86_64")]
mod element;
#[cfg(target_arch = "x86_64")]
mod fma;

use super::isa::{Isa, Kind};
use super::{PANEL, STEP};
use crate::ops::cpu::{self, Rows, Stored};
use half::bf16;
use rayon::prelude::*;
use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use crate::ops::cpu::low;
#[cfg(target_arch = "x86_64")]
pub(super) use amx::is_granted as amx_is_granted;
#[cfg(target_arch = "x86_64")]
pub(super) use claims::Claims;
#[cfg(target_arch = "x86_64")]
pub(super) use {avx512::of_registers as of_registers_bf16, fma::of_registers as of_registers_f32};

/// A pair of columns of the 16 rows of a panel.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line([bf16; STEP]);

impl Line {
    pub(crate) const ZERO: Self = Self([bf16::ZERO; STEP]);

    /// Zeros in the place of the second value of each pair.
    pub(super) fn clear_second(&mut self) {
        self.0.iter_mut().skip(1).step_by(2).for_each(|x| *x = bf16::ZERO);
    }

    /// The pair of row `row` of the panel.
    pub(super) fn pair(&self, row: usize) -> [bf16; 2] {
        [self.0[2 * row], self.0[2 * row + 1]]
    }
}

/// The left operand: rows of values, of which two neighbours (a pair) lie side by side.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    values: &'a [bf16],
    /// Values from a row to the next one.
    row: usize,
    /// Values from a pair to the next one.
    pair: usize,
}

impl<'a> Left<'a> {
    /// Rows of values side by side, `stride` values apart.
    pub(crate) fn rows(values: &'a [bf16], stride: usize) -> Self {
        Self { values, row: stride, pair: 2 }
    }

    /// Rows whose pairs are `stride` values apart, and which are 2 values apart themselves: a matrix whose columns
    /// are the product's rows, two rows of it interleaved.
    pub(crate) fn interleaved(values: &'a [bf16], stride: usize) -> Self {
        Self { values, row: 2, pair: stride }
    }

    /// From row `row` and pair `pair` on.
    pub(crate) fn from(self, row: usize, pair: usize) -> Self {
        Self { values: &self.values[row * self.row + pair * self.pair..], ..self }
    }

    /// Values up to the last that a product of `rows` rows of `depth` values reads.
    fn extent(&self, rows: usize, depth: usize) -> usize {
        match (rows, depth) {
            (0, _) | (_, 0) => 0,
            _ => (rows - 1) * self.row + (depth - 1) / 2 * self.pair + (depth - 1) % 2 + 1,
        }
    }
}

/// Panels side by side.
#[derive(Clone, Copy)]
pub(crate) struct Panels<'a> {
    lines: &'a [Line],
    stride: usize,
}

impl<'a> Panels<'a> {
    /// Panels that begin `stride` lines apart.
    pub(crate) fn new(lines: &'a [Line], stride: usize) -> Self {
        Self { lines, stride }
    }

    /// From panel `panel` and line `line` on.
    pub(crate) fn from(self, panel: usize, line: usize) -> Self {
        Self { lines: &self.lines[panel * self.stride + line..], ..self }
    }
}

/// A block of an output matrix, whose elements are this value's alone.
pub(crate) struct Out<'a, T = f32> {
    ptr: *mut T,
    stride: usize,
    /// The block's rows of the matrix.
    pub(crate) rows: Range<usize>,
    /// The block's columns of the matrix.
    pub(crate) columns: Range<usize>,
    matrix: PhantomData<&'a mut [T]>,
}

// SAFETY: it is a `&mut` to its elements.
unsafe impl<T: Send> Send for Out<'_, T> {}

impl<'a> Out<'a> {
    /// The first `columns` columns of rows that are `stride` elements apart.
    pub(crate) fn new(matrix: &'a mut [f32], rows: usize, columns: usize, stride: usize) -> Self {
        assert!(columns <= stride && (rows == 0 || (rows - 1) * stride + columns <= matrix.len()));
        Self { ptr: matrix.as_mut_ptr(), stride, rows: 0..rows, columns: 0..columns, matrix: PhantomData }
    }

    /// The same, by address.
    ///
    /// # Safety
    /// The elements lie in live memory, and for as long as the value lives nobody else reads or writes them.
    pub(crate) unsafe fn at(ptr: *mut f32, rows: usize, columns: usize, stride: usize) -> Self {
        Self { ptr, stride, rows: 0..rows, columns: 0..columns, matrix: PhantomData }
    }
}

impl<'a, T: Send> Out<'a, T> {
    /// Cuts a matrix of whole rows of `width` elements into blocks of at most `rows` by `columns`, those of the
    /// same rows one after another.
    pub(crate) fn blocks(
        matrix: &'a mut [T],
        width: usize,
        rows: usize,
        columns: usize,
    ) -> impl IndexedParallelIterator<Item = Self> {
        let height = matrix.len() / width.max(1);
        let (down, across) = (height.div_ceil(rows), width.div_ceil(columns));
        let start = Start(matrix.as_mut_ptr());
        (0..down * across).into_par_iter().map(move |i| {
            let (row, column) = (i / across * rows, i % across * columns);
            let Start(start) = &start;
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
    pub(crate) fn split(&mut self, columns: usize) -> impl Iterator<Item = Out<'_, T>> {
        let (ptr, stride) = (self.ptr, self.stride);
        let (rows, all) = (self.rows.clone(), self.columns.clone());
        all.clone().step_by(columns).map(move |start| Out {
            // SAFETY: the column is inside the block.
            ptr: unsafe { ptr.add(start - all.start) },
            stride,
            rows: rows.clone(),
            columns: start..(start + columns).min(all.end),
            matrix: PhantomData,
        })
    }

    /// The block's row `i`.
    #[inline(always)]
    fn row(&mut self, i: usize) -> &mut [T] {
        assert!(i < self.rows.len());
        // SAFETY: the row is inside the block, whose elements are this value's alone.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(i * self.stride), self.columns.len()) }
    }
}

/// How an output is stored.
pub(crate) trait Element: Stored<f32> + Send {
    /// Runs `f` on `out` in f32, which holds what `out` holds where `load` is set, and anything otherwise.
    fn in_f32(out: Out<Self>, load: bool, f: impl FnOnce(Out));

    /// Writes 32 sums as `then` says, those of the columns that `mask` names.
    ///
    /// # Safety
    /// The CPU has `avx512f`, `avx512bw` and `avx512bf16`; `sums` are 32 values at a multiple of 64 bytes; the elements at
    /// `to` that are named are the caller's.
    #[cfg(target_arch = "x86_64")]
    unsafe fn store_row(sums: *const f32, to: *mut Self, mask: u32, then: Then);
}

impl Element for f32 {
    fn in_f32(out: Out<Self>, _: bool, f: impl FnOnce(Out)) {
        f(out)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn store_row(sums: *const Self, to: *mut Self, mask: u32, then: Then) {
        // SAFETY: the caller's promise.
        unsafe { element::store_f32(sums, to, mask, then) };
    }
}

impl Element for bf16 {
    /// In memory of the thread, of the block's size.
    fn in_f32(mut out: Out<Self>, load: bool, f: impl FnOnce(Out)) {
        thread_local! {
            static SUMS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
        }
        let (rows, columns) = (out.rows.len(), out.columns.len());
        SUMS.with_borrow_mut(|sums| {
            sums.resize(sums.len().max(rows * columns), 0.0);
            if load {
                for (i, sums) in sums.chunks_exact_mut(columns.max(1)).take(rows).enumerate() {
                    sums.iter_mut().zip(out.row(i)).for_each(|(y, x)| *y = x.loaded());
                }
            }
            let mut wide = Out::new(sums, rows, columns, columns);
            (wide.rows, wide.columns) = (out.rows.clone(), out.columns.clone());
            f(wide);
            cpu::simd(
                #[inline(always)]
                |_| {
                    let rows = Rows { from: &sums[..rows * columns], columns };
                    // SAFETY: the rows are the block's own.
                    unsafe { rows.round(out.ptr, out.stride) };
                },
            );
        });
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn store_row(sums: *const f32, to: *mut Self, mask: u32, then: Then) {
        // SAFETY: the caller's promise.
        unsafe { element::store_bf16(sums, to, mask, then) };
    }
}

struct Start<T>(*mut T);
// SAFETY: tasks make disjoint blocks of what it points to.
unsafe impl<T: Send> Send for Start<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Start<T> {}

/// What becomes of a product.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Then {
    /// Multiplies it.
    pub(crate) scale: f32,
    /// Whether it is added to what the output holds.
    pub(crate) add: bool,
}

impl Then {
    /// The product itself, in place of what the output holds.
    pub(crate) const WRITE: Self = Self { scale: 1.0, add: false };
}

/// `out = scale * left right`, sums over `depth` values of each row of `left`.
///
/// # Panics
/// Operands that are shorter than the shape.
pub(crate) fn block(isa: Isa, left: Left, right: Panels, depth: usize, out: &mut Out, then: Then) {
    let (rows, columns) = (out.rows.len(), out.columns.len());
    if rows == 0 || columns == 0 {
        return;
    }
    let lines = depth.next_multiple_of(STEP) / 2;
    assert!(left.extent(rows, depth) <= left.values.len(), "{rows} rows of {depth} values on the left");
    let panels = columns.div_ceil(PANEL);
    assert!((panels - 1) * right.stride + lines <= right.lines.len(), "{panels} panels of {lines} lines");
    // SAFETY: `isa` is proof of the instructions; all extents were checked, the output's as it was made.
    match isa.kind() {
        #[cfg(target_arch = "x86_64")]
        Kind::Fma => unsafe { fma::block(left, depth, right, out, then) },
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => unsafe { avx512::block(left, depth, right, out, then) },
        #[cfg(target_arch = "x86_64")]
        Kind::Amx => amx::block::<amx::Hardware>(isa, left, depth, right, out, then),
    }
}

/// Packs up to 16 rows of `depth` values, `stride` values apart: line `p` of `panel` gets pair `p` of every row, and
/// zeros where there is none, for a whole number of [`STEP`]s.
///
/// # Panics
/// Slices that are shorter than the shape.
pub(crate) fn pack_rows(
    isa: Isa,
    from: &[bf16],
    stride: usize,
    rows: usize,
    depth: usize,
    panel: &mut [Line],
) {
    assert!(rows <= PANEL && depth.next_multiple_of(STEP) / 2 <= panel.len());
    assert!(rows == 0 || depth == 0 || (rows - 1) * stride + depth <= from.len());
    // SAFETY: `isa` is proof of the instructions; the extents were checked.
    match isa.kind() {
        #[cfg(target_arch = "x86_64")]
        Kind::Fma | Kind::Avx512 | Kind::Amx => unsafe {
            avx512::pack_rows(from.as_ptr(), stride, rows, depth, panel.as_mut_ptr())
        },
    }
}

/// Packs up to 16 rows of `columns` values, `stride` values apart, for a product that sums over rows: panel
/// `c / 16`, `panel_stride` lines behind the one before, gets in its first 8 lines the pairs of rows (0, 1), (2, 3)
/// ... of column `c`, and zeros where there is none, for a whole number of [`STEP`]s.
///
/// # Panics
/// Slices that are shorter than the shape.
pub(crate) fn pack_columns(
    isa: Isa,
    from: &[bf16],
    stride: usize,
    rows: usize,
    columns: usize,
    panels: &mut [Line],
    panel_stride: usize,
) {
    assert!(rows <= PANEL && (rows == 0 || columns == 0 || (rows - 1) * stride + columns <= from.len()));
    check_turned(columns, panels, panel_stride);
    // SAFETY: `isa` is proof of the instructions; the extents were checked.
    match isa.kind() {
        #[cfg(target_arch = "x86_64")]
        Kind::Fma | Kind::Avx512 | Kind::Amx => unsafe {
            avx512::pack_columns(from.as_ptr(), stride, rows, columns, panels.as_mut_ptr(), panel_stride)
        },
    }
}

/// As [`pack_columns`], of 16 rows that are packed as [`pack_rows`] does: the first `columns` columns of `panel`. The
/// next panel begins `panel_lines` behind it, if there is one.
///
/// # Panics
/// Slices that are shorter than the shape.
pub(crate) fn turn(
    isa: Isa,
    panel: &[Line],
    panel_lines: usize,
    columns: usize,
    panels: &mut [Line],
    panel_stride: usize,
) {
    assert!(columns.next_multiple_of(STEP) / 2 <= panel.len());
    check_turned(columns, panels, panel_stride);
    // SAFETY: `isa` is proof of the instructions; the extents were checked.
    match isa.kind() {
        #[cfg(target_arch = "x86_64")]
        Kind::Fma | Kind::Avx512 | Kind::Amx => unsafe {
            avx512::turn(panel.as_ptr(), panel_lines, columns, panels.as_mut_ptr(), panel_stride)
        },
    }
}

fn check_turned(columns: usize, panels: &[Line], panel_stride: usize) {
    let count = columns.next_multiple_of(STEP) / PANEL;
    assert!(
        count == 0 || (count - 1) * panel_stride + PANEL / 2 <= panels.len(),
        "{count} panels of 8 lines"
    );
}
