//! Columns that threads claim one after another.

use super::OutputBlock;
use super::output::MatrixStart;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Some rows of an output matrix, whose columns are claimed block by block: a slow thread claims fewer.
pub(crate) struct ColumnClaims<'a, T> {
    /// The matrix.
    start: MatrixStart<T>,
    /// Elements of a row.
    width: usize,
    rows: Range<usize>,
    /// The most columns of a claim.
    columns: usize,
    /// Number of claims that were made.
    made: AtomicUsize,
    matrix: PhantomData<&'a mut [T]>,
}

// SAFETY: each element is handed out once, in a block that borrows it mutably.
unsafe impl<T: Send> Sync for ColumnClaims<'_, T> {}

impl<'a, T: Send> ColumnClaims<'a, T> {
    /// Cuts a matrix of rows of `width` elements into groups of at most `rows` rows, whose columns are claimed `columns` at a
    /// time.
    ///
    /// # Safety
    /// The elements are initialised if a claimed block's elements are read.
    pub(crate) unsafe fn new(
        matrix: &'a mut [MaybeUninit<T>],
        width: usize,
        rows: usize,
        columns: usize,
    ) -> Vec<Self> {
        assert!(width > 0 && columns > 0, "columns to claim");
        let height = matrix.len() / width;
        let start = matrix.as_mut_ptr().cast();
        let groups = (0..height).step_by(rows).map(|row| Self {
            start: MatrixStart(start),
            width,
            rows: row..(row + rows).min(height),
            columns,
            made: AtomicUsize::new(0),
            matrix: PhantomData,
        });
        groups.collect()
    }

    /// The rows.
    pub(crate) fn rows(&self) -> Range<usize> {
        self.rows.clone()
    }

    /// The next columns that were not claimed; `None` if all were.
    pub(crate) fn claim(&self) -> Option<OutputBlock<'a, T>> {
        // Threads pass nothing but the number to each other.
        let column = self.made.fetch_add(1, Ordering::Relaxed).checked_mul(self.columns)?;
        (column < self.width).then(|| OutputBlock {
            // SAFETY: the element is inside the matrix, and no other claim has its columns of these rows.
            ptr: unsafe { self.start.0.add(self.rows.start * self.width + column) },
            stride: self.width,
            rows: self.rows(),
            columns: column..(column + self.columns).min(self.width),
            matrix: PhantomData,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rayon::prelude::*;

    #[test]
    fn claims_are_disjoint_and_cover_the_matrix() {
        for (height, width, rows, columns) in
            [(1, 1, 32, 32), (33, 70, 32, 32), (64, 64, 64, 16), (5, 100, 2, 7)]
        {
            let mut matrix = vec![MaybeUninit::new(0); height * width];
            // SAFETY: the elements are initialised.
            let claims = unsafe { ColumnClaims::new(&mut matrix, width, rows, columns) };
            // Four threads compete for the columns of each group.
            (0..4 * claims.len()).into_par_iter().for_each(|i| {
                while let Some(mut out) = claims[i / 4].claim() {
                    assert!(out.columns.len() <= columns && out.rows.len() <= rows);
                    for row in 0..out.rows.len() {
                        let (first, columns) = (out.rows.start + row, out.columns.clone());
                        // SAFETY: the elements are initialised.
                        for (y, column) in unsafe { out.row(row) }.iter_mut().zip(columns) {
                            *y += 1 + first * width + column;
                        }
                    }
                }
            });
            assert!(claims.iter().all(|claims| claims.claim().is_none()));
            drop(claims);
            // SAFETY: as above.
            let matrix = unsafe { crate::ops::cpu::assume_init(&mut matrix) };
            assert!(matrix.iter().enumerate().all(|(i, &y)| y == 1 + i), "{height} {width} {rows} {columns}");
        }
    }
}
