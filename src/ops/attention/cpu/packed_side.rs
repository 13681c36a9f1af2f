//! Keys, values and other matrices of a task, packed for products of bf16.

use super::query_blocks::QueryBlock;
use crate::ops::bf16::kernel::{self, Bf16Matrix, PanelRow, Panels, PanelsMut};
use crate::ops::bf16::{Isa, PANEL, STEP, pack_sums};
use crate::ops::cpu::Mat;
use half::bf16;

/// A matrix [n, D], packed for one or both of the products that read it.
#[derive(Default)]
pub(super) struct PackedSide {
    pub(super) n: usize,
    d: usize,
    /// For `x · matrixᵀ`, which sums over the D columns.
    by_rows: Vec<PanelRow>,
    /// For `p · matrix`, which sums over the rows.
    by_columns: Vec<PanelRow>,
}

/// How a matrix is packed.
#[derive(Clone, Copy)]
pub(super) struct PackingOrders {
    /// For products that sum over D.
    pub(super) by_rows: bool,
    /// For products that sum over its rows.
    pub(super) by_columns: bool,
}

/// Panel rows for sums over `depth` values.
fn lines(depth: usize) -> usize {
    depth.next_multiple_of(STEP) / 2
}

impl PackedSide {
    /// Packs the rows of `matrix` [n, D].
    ///
    /// # Safety
    /// The rows are inside of the matrix.
    pub(super) unsafe fn fill(
        &mut self,
        isa: Isa,
        matrix: Mat<bf16>,
        (n, d): (usize, usize),
        orders: PackingOrders,
    ) {
        (self.n, self.d) = (n, d);
        // SAFETY: the caller's promise.
        let from = unsafe { bf16_matrix(matrix, (n, d)) };
        if orders.by_rows {
            self.by_rows.resize(n.div_ceil(PANEL) * lines(d), PanelRow::ZERO);
            for (i, panel) in self.by_rows.chunks_mut(lines(d)).enumerate() {
                kernel::pack_rows(isa, from.rows(i * PANEL..(i * PANEL + PANEL).min(n)), panel);
            }
        }
        if orders.by_columns {
            self.by_columns.resize(d.next_multiple_of(STEP) / PANEL * lines(n), PanelRow::ZERO);
            pack_sums(isa, from, &mut PanelsMut { lines: &mut self.by_columns, stride: lines(n) });
        }
    }

    /// Packs the rows of `matrix` [rows, D] for sums over them, pair by pair in the order of [`first_pairs`]. After the last
    /// pair come zeros, as many panel rows as a full step reads beyond it.
    ///
    /// # Safety
    /// The block's rows are inside of the matrix.
    pub(super) unsafe fn fill_pairs(&mut self, isa: Isa, matrix: Mat<bf16>, block: &QueryBlock, d: usize) {
        let pairs = pairs(block);
        (self.n, self.d) = (2 * pairs, d);
        let stride = pair_lines(pairs);
        self.by_columns.resize(d.next_multiple_of(STEP) / PANEL * stride, PanelRow::ZERO);
        // SAFETY: the caller's promise.
        let from = unsafe { bf16_matrix(matrix, (block.rows, d)) };
        let mut panels = PanelsMut { lines: &mut self.by_columns, stride };
        for (piece, first) in block.pieces.iter().zip(first_pairs(block)) {
            pack_sums(isa, from.rows(piece.rows.clone()), &mut panels.skip_lines(first));
        }
        self.by_columns.chunks_mut(stride).for_each(|panel| panel[pairs..].fill(PanelRow::ZERO));
    }

    /// The panels for `x · matrixᵀ`.
    pub(super) fn by_rows(&self) -> Panels<'_> {
        Panels::new(&self.by_rows, lines(self.d))
    }

    /// The panels for `p · matrix`.
    pub(super) fn by_columns(&self) -> Panels<'_> {
        Panels::new(&self.by_columns, lines(self.n))
    }

    /// The panels of [`PackedSide::fill_pairs`] from pair `pair` on.
    pub(super) fn pairs_from(&self, pair: usize) -> Panels<'_> {
        Panels::new(&self.by_columns[pair..], pair_lines(self.n / 2))
    }
}

/// Pairs of neighbouring rows of each piece; the last row of an odd piece makes a pair with a row of zeros. So a sum over the
/// rows of a piece is one over full pairs, and so is that over all rows of the block.
pub(super) fn pairs(block: &QueryBlock) -> usize {
    block.pieces.iter().map(|piece| piece.rows.len().div_ceil(2)).sum()
}

/// The first pair of each piece.
pub(super) fn first_pairs(block: &QueryBlock) -> impl Iterator<Item = usize> {
    block.pieces.iter().scan(0, |next, piece| {
        let first = *next;
        *next += piece.rows.len().div_ceil(2);
        Some(first)
    })
}

/// Panel rows of a panel of `pairs` pairs, with those that packing writes after them, half a panel at a time, and those that a
/// full step reads. An odd number, so that panels do not share a few sets of the first-level cache.
fn pair_lines(pairs: usize) -> usize {
    (pairs + STEP / 2) | 1
}

/// The values of a matrix from its first to its last.
///
/// # Safety
/// The rows and columns are inside of the matrix.
pub(super) unsafe fn values<'a>(matrix: Mat<'a, bf16>, (rows, columns): (usize, usize)) -> &'a [bf16] {
    match (rows, columns) {
        (0, _) | (_, 0) => &[],
        // SAFETY: the caller's promise; the matrix borrows its elements for `'a`.
        _ => unsafe {
            std::slice::from_raw_parts(matrix.ptr, (rows - 1) * matrix.row_stride as usize + columns)
        },
    }
}

/// As [`values`], with the shape.
///
/// # Safety
/// As for [`values`].
unsafe fn bf16_matrix<'a>(matrix: Mat<'a, bf16>, (rows, columns): (usize, usize)) -> Bf16Matrix<'a> {
    // SAFETY: the caller's promise.
    let values = unsafe { values(matrix, (rows, columns)) };
    Bf16Matrix { values, stride: matrix.row_stride as usize, rows, columns }
}
