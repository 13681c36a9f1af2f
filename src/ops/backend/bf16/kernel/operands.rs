//! The operands of a product and of packing.

use crate::ops::bf16::{PANEL, STEP};
use half::bf16;
use std::ops::Range;

/// A row of a panel: a pair of columns of the 16 rows of the matrix that the panel holds.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct PanelRow([bf16; STEP]);

impl PanelRow {
    pub(crate) const ZERO: Self = Self([bf16::ZERO; STEP]);

    /// Sets the second value of each pair to zero.
    pub(in crate::ops::backend::bf16) fn clear_second(&mut self) {
        self.0.iter_mut().skip(1).step_by(2).for_each(|x| *x = bf16::ZERO);
    }

    /// The pair of row `row` of the matrix.
    pub(in crate::ops::backend::bf16) fn pair(&self, row: usize) -> [bf16; 2] {
        [self.0[2 * row], self.0[2 * row + 1]]
    }
}

/// The left operand: rows of values, of which two neighbours (a pair) are adjacent in memory.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    pub(super) values: &'a [bf16],
    /// Values from a row to the next one.
    pub(super) row: usize,
    /// Values from a pair to the next one.
    pub(super) pair: usize,
}

impl<'a> Left<'a> {
    /// Rows of neighbouring values, `stride` values apart.
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
    pub(super) fn extent(&self, rows: usize, depth: usize) -> usize {
        match (rows, depth) {
            (0, _) | (_, 0) => 0,
            _ => (rows - 1) * self.row + (depth - 1) / 2 * self.pair + (depth - 1) % 2 + 1,
        }
    }
}

/// Panels, one after another.
#[derive(Clone, Copy)]
pub(crate) struct Panels<'a> {
    pub(super) lines: &'a [PanelRow],
    pub(super) stride: usize,
}

impl<'a> Panels<'a> {
    /// Panels that begin `stride` panel rows apart.
    pub(crate) fn new(lines: &'a [PanelRow], stride: usize) -> Self {
        Self { lines, stride }
    }

    /// From panel `panel` and panel row `line` on.
    pub(crate) fn from(self, panel: usize, line: usize) -> Self {
        Self { lines: &self.lines[panel * self.stride + line..], ..self }
    }
}

/// A matrix of bf16 that is packed: rows of neighbouring values.
#[derive(Clone, Copy)]
pub(crate) struct Bf16Matrix<'a> {
    pub(crate) values: &'a [bf16],
    /// Values from a row to the next one.
    pub(crate) stride: usize,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
}

impl Bf16Matrix<'_> {
    /// The rows of `range`, which has at least one.
    pub(crate) fn rows(self, range: Range<usize>) -> Self {
        Self { values: &self.values[range.start * self.stride..], rows: range.len(), ..self }
    }

    /// Whether the values are those of the shape.
    pub(super) fn is_complete(&self) -> bool {
        let Self { values, stride, rows, columns } = *self;
        rows == 0 || columns == 0 || (rows - 1) * stride + columns <= values.len()
    }
}

/// The first columns of a panel; the next panel begins `stride` panel rows after it, if there is one.
#[derive(Clone, Copy)]
pub(crate) struct PanelColumns<'a> {
    pub(crate) lines: &'a [PanelRow],
    pub(crate) stride: usize,
    pub(crate) columns: usize,
}

/// Panels that are written, `stride` panel rows apart.
pub(crate) struct PanelsMut<'a> {
    pub(crate) lines: &'a mut [PanelRow],
    pub(crate) stride: usize,
}

impl<'a> PanelsMut<'a> {
    /// The panels without their first `lines` panel rows.
    pub(crate) fn skip_lines(&mut self, lines: usize) -> PanelsMut<'_> {
        PanelsMut { lines: &mut self.lines[lines..], stride: self.stride }
    }

    /// The panel `panel`.
    pub(crate) fn panel(&mut self, panel: usize) -> &mut [PanelRow] {
        &mut self.lines[panel * self.stride..][..self.stride]
    }

    /// The panels, to be read.
    pub(crate) fn into_panels(self) -> Panels<'a> {
        Panels { lines: self.lines, stride: self.stride }
    }

    /// Asserts that there is room for 8 panel rows in each panel of `columns` columns.
    pub(super) fn assert_room(&self, columns: usize) {
        let count = columns.next_multiple_of(STEP) / PANEL;
        assert!(
            count == 0 || (count - 1) * self.stride + PANEL / 2 <= self.lines.len(),
            "{count} panels of 8 panel rows"
        );
    }
}
