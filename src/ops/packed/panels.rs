//! A frozen weight, packed.

use super::kernel::{self, Line};
use super::{Isa, PANEL, STEP};
use half::bf16;
use rayon::prelude::*;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// A matrix [n, k] of bf16 in panels of 16 rows; clones share them.
#[derive(Clone)]
pub(crate) struct Panels {
    isa: Isa,
    lines: Arc<Vec<Line>>,
    /// Lines of a panel.
    stride: usize,
    first: usize,
    n: usize,
    k: usize,
}

impl Panels {
    /// Packs a matrix of `n` rows; `read` writes those of a range, up to 16, one after another.
    ///
    /// # Errors
    /// Those of `read`.
    pub(crate) fn pack<E: Send>(
        isa: Isa,
        (n, k): (usize, usize),
        read: impl Fn(Range<usize>, &mut [bf16]) -> Result<(), E> + Sync,
    ) -> Result<Self, E> {
        let stride = stride(k);
        let mut lines = vec![Line::ZERO; n.div_ceil(PANEL) * stride];
        lines.par_chunks_mut(stride).enumerate().try_for_each_init(Vec::new, |rows, (panel, lines)| {
            let range = panel * PANEL..((panel + 1) * PANEL).min(n);
            rows.resize(range.len() * k, bf16::ZERO);
            read(range.clone(), rows)?;
            kernel::pack_rows(isa, rows, k, range.len(), k, lines);
            Ok(())
        })?;
        Ok(Self { isa, lines: Arc::new(lines), stride, first: 0, n, k })
    }

    /// Rows and columns.
    pub(crate) fn dims(&self) -> (usize, usize) {
        (self.n, self.k)
    }

    /// The instructions that it is packed for.
    pub(crate) fn isa(&self) -> Isa {
        self.isa
    }

    /// Bytes that its rows take.
    pub(crate) fn bytes(&self) -> usize {
        Self::bytes_of(self.n, self.k)
    }

    /// Bytes that a matrix [n, k] takes.
    pub(crate) fn bytes_of(n: usize, k: usize) -> usize {
        n.div_ceil(PANEL) * stride(k) * size_of::<Line>()
    }

    /// The rows of `range` without a copy; `None` where they do not begin with a panel.
    pub(crate) fn rows(&self, range: Range<usize>) -> Option<Self> {
        assert!(range.start <= range.end && range.end <= self.n, "{range:?} of {} rows", self.n);
        let first = self.first + range.start / PANEL;
        range.start.is_multiple_of(PANEL).then(|| Self { first, n: range.len(), ..self.clone() })
    }

    /// Row by row.
    pub(crate) fn unpack(&self) -> Vec<bf16> {
        let mut rows = vec![bf16::ZERO; self.n * self.k];
        rows.par_chunks_mut((PANEL * self.k).max(1)).enumerate().for_each(|(panel, rows)| {
            let lines = self.lines(panel);
            for (row, values) in rows.chunks_mut(self.k).enumerate() {
                values
                    .chunks_mut(2)
                    .zip(lines)
                    .for_each(|(y, line)| y.copy_from_slice(&line.pair(row)[..y.len()]));
            }
        });
        rows
    }

    /// Lines from a panel to the next one.
    pub(super) fn stride(&self) -> usize {
        self.stride
    }

    /// The panel `panel`.
    pub(super) fn lines(&self, panel: usize) -> &[Line] {
        &self.lines[(self.first + panel) * self.stride..][..self.stride]
    }

    /// All panels from `panel` on, as the kernels read them.
    pub(super) fn operand(&self, panel: usize) -> kernel::Panels<'_> {
        kernel::Panels::new(&self.lines[(self.first + panel) * self.stride..], self.stride)
    }
}

/// Lines of a panel of `k` columns. One more than there are steps for: panels whose distance is a power of two would
/// share a few sets of the first-level cache.
fn stride(k: usize) -> usize {
    k.next_multiple_of(STEP) / 2 + 1
}

impl fmt::Debug for Panels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Panels([{}, {}], {})", self.n, self.k, self.isa.name())
    }
}
