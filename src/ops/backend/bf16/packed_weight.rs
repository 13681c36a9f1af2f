//! A frozen weight, packed.

use super::kernel::{self, Bf16Matrix, PanelColumns, PanelRow, Panels, PanelsMut};
use super::{Isa, PANEL, STEP};
use half::bf16;
use rayon::prelude::*;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

/// A matrix [n, k] of bf16 in panels of 16 rows; clones share them.
#[derive(Clone)]
pub(crate) struct PackedWeight {
    matrix: Arc<Matrix>,
    /// The first panel.
    first: usize,
    n: usize,
}

/// The packed matrix that all clones and parts share.
struct Matrix {
    isa: Isa,
    n: usize,
    k: usize,
    lines: Vec<PanelRow>,
    /// Panel rows from a panel to the next one.
    stride: usize,
    /// The transpose [k, n], a panel for each 16 columns of the matrix; see [`PackedWeight::pack_transpose`].
    transpose: OnceLock<Vec<PanelRow>>,
}

impl PackedWeight {
    /// Packs a matrix [n, k]; `read` writes the rows of a range, up to 16, one after another.
    pub(crate) fn pack<E: Send>(
        isa: Isa,
        (n, k): (usize, usize),
        read: impl Fn(Range<usize>, &mut [bf16]) -> Result<(), E> + Sync,
    ) -> Result<Self, E> {
        let stride = stride(k);
        let mut lines = vec![PanelRow::ZERO; n.div_ceil(PANEL) * stride];
        lines.par_chunks_mut(stride).enumerate().try_for_each_init(Vec::new, |rows, (panel, lines)| {
            let range = panel * PANEL..((panel + 1) * PANEL).min(n);
            rows.resize(range.len() * k, bf16::ZERO);
            read(range.clone(), rows)?;
            kernel::pack_rows(
                isa,
                Bf16Matrix { values: rows, stride: k, rows: range.len(), columns: k },
                lines,
            );
            Ok(())
        })?;
        let matrix = Matrix { isa, n, k, lines, stride, transpose: OnceLock::new() };
        Ok(Self { matrix: Arc::new(matrix), first: 0, n })
    }

    /// Rows and columns.
    pub(crate) fn dims(&self) -> (usize, usize) {
        (self.n, self.matrix.k)
    }

    /// The instruction set for which it is packed.
    pub(crate) fn isa(&self) -> Isa {
        self.matrix.isa
    }

    /// Packs the transpose too, for all clones and parts: with it [`super::backward`] on AMX is as fast as [`super::forward`].
    pub(crate) fn pack_transpose(&self) {
        self.matrix.transpose.get_or_init(|| self.matrix.transposed());
    }

    /// Whether the transpose is packed.
    pub(crate) fn has_transpose(&self) -> bool {
        self.matrix.transpose.get().is_some()
    }

    /// Bytes of its rows, and of their part of the transpose if that is packed.
    pub(crate) fn bytes(&self) -> usize {
        let k = self.matrix.k;
        let transpose = self.matrix.transpose.get().map_or(0, |_| Self::transpose_bytes_of(self.n, k));
        Self::bytes_of(self.n, k) + transpose
    }

    /// Bytes of a packed matrix [n, k].
    pub(crate) fn bytes_of(n: usize, k: usize) -> usize {
        n.div_ceil(PANEL) * stride(k) * size_of::<PanelRow>()
    }

    /// Bytes of the packed transpose of a matrix [n, k].
    pub(crate) fn transpose_bytes_of(n: usize, k: usize) -> usize {
        transpose_panels(k) * stride(n) * size_of::<PanelRow>()
    }

    /// The rows of `range` without a copy; `None` if they do not begin with a panel.
    pub(crate) fn rows(&self, range: Range<usize>) -> Option<Self> {
        assert!(range.start <= range.end && range.end <= self.n, "{range:?} of {} rows", self.n);
        let first = self.first + range.start / PANEL;
        range.start.is_multiple_of(PANEL).then(|| Self { first, n: range.len(), ..self.clone() })
    }

    /// The values, row by row.
    pub(crate) fn unpack(&self) -> Vec<bf16> {
        let k = self.matrix.k;
        let mut rows = vec![bf16::ZERO; self.n * k];
        rows.par_chunks_mut((PANEL * k).max(1)).enumerate().for_each(|(panel, rows)| {
            let lines = self.panel(panel);
            for (row, values) in rows.chunks_mut(k).enumerate() {
                values
                    .chunks_mut(2)
                    .zip(lines)
                    .for_each(|(y, line)| y.copy_from_slice(&line.pair(row)[..y.len()]));
            }
        });
        rows
    }

    /// Panel rows from a panel to the next one.
    pub(super) fn stride(&self) -> usize {
        self.matrix.stride
    }

    /// The panel `panel`.
    pub(super) fn panel(&self, panel: usize) -> &[PanelRow] {
        &self.matrix.lines[(self.first + panel) * self.matrix.stride..][..self.matrix.stride]
    }

    /// All panels from `panel` on.
    pub(super) fn panels(&self, panel: usize) -> Panels<'_> {
        let stride = self.matrix.stride;
        Panels::new(&self.matrix.lines[(self.first + panel) * stride..], stride)
    }

    /// All panels of the transpose; `None` if it is not packed, or if its last step would hold values of rows that are not part
    /// of this weight.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn transpose(&self) -> Option<Panels<'_>> {
        let lines = self.matrix.transpose.get()?;
        let ends_with_matrix =
            self.first * PANEL + self.n == self.matrix.n && (self.first * PANEL).is_multiple_of(STEP);
        (self.n.is_multiple_of(STEP) || ends_with_matrix)
            .then(|| Panels::new(lines.get(self.first * PANEL / 2..).unwrap_or(&[]), stride(self.matrix.n)))
    }
}

impl Matrix {
    fn transposed(&self) -> Vec<PanelRow> {
        let Self { isa, n, k, lines, stride: from_stride, .. } = self;
        let stride = stride(*n);
        let mut transpose = vec![PanelRow::ZERO; transpose_panels(*k) * stride];
        transpose.par_chunks_mut(2 * stride).enumerate().for_each(|(step, to)| {
            let columns = STEP.min(k - step * STEP);
            for panel in 0..n.div_ceil(PANEL) {
                let lines = &lines[panel * from_stride + step * STEP / 2..];
                let from = PanelColumns { lines, stride: *from_stride, columns };
                let mut to = PanelsMut { lines: &mut to[panel * PANEL / 2..], stride };
                kernel::transpose_panel(*isa, from, &mut to);
            }
        });
        transpose
    }
}

/// Panels of the transpose of a matrix of `k` columns: an even number.
fn transpose_panels(k: usize) -> usize {
    k.next_multiple_of(STEP) / PANEL
}

/// Panel rows from a panel of `k` columns to the next one. One more than the columns need: panels whose distance is a power
/// of two would share a few sets of the first-level cache.
fn stride(k: usize) -> usize {
    k.next_multiple_of(STEP) / 2 + 1
}

impl fmt::Debug for PackedWeight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Matrix { isa, k, .. } = &*self.matrix;
        write!(f, "PackedWeight([{}, {k}], {})", self.n, isa.name())
    }
}
