//! The right operand of a product, 32 columns at a time.

use super::super::kernel::amx::prefetch;
use super::super::kernel::{self, Bf16Matrix, PanelColumns, PanelRow, Panels, PanelsMut};
use super::super::{Isa, PANEL, PackedWeight, STEP};
use half::bf16;
use std::ops::Range;

/// Some columns of the right operand, and the values of them that are summed over.
#[derive(Clone, Copy)]
pub(super) struct Region<'a> {
    pub(super) isa: Isa,
    pub(super) columns: &'a Range<usize>,
    pub(super) cut: &'a Range<usize>,
}

/// The source of the panels of some columns.
#[derive(Clone, Copy)]
pub(super) enum RightColumns<'a> {
    /// Packed as they are read.
    Panels(Panels<'a>),
    /// Columns of packed rows: transposed into a strip.
    TransposedPanels(&'a PackedWeight),
    /// Rows of `k` values: packed into a strip.
    Rows { values: &'a [bf16], k: usize },
    /// Columns of rows of `k` values: packed into a strip.
    TransposedRows { values: &'a [bf16], k: usize },
}

impl<'a> RightColumns<'a> {
    /// Whether the panels are packed already, so that none are packed during the product.
    pub(super) fn is_packed(&self) -> bool {
        matches!(self, Self::Panels(_))
    }

    /// The panels of `columns` for sums over the values `cut`: the packed ones, or those in `strip`.
    pub(super) fn panels<'s>(
        &self,
        columns: &Range<usize>,
        cut: &Range<usize>,
        strip: &'s [PanelRow],
    ) -> Panels<'s>
    where
        'a: 's,
    {
        match self {
            Self::Panels(panels) => panels.from(columns.start / PANEL, cut.start / 2),
            _ => Panels::new(strip, stride(cut)),
        }
    }

    /// Does a share of the preparation of the next columns: prefetches their panels, or packs them into `strip`.
    pub(super) fn prepare(&self, region: Region, strip: &mut Vec<PanelRow>, (share, shares): (usize, usize)) {
        let Region { columns, cut, .. } = region;
        match self {
            Self::Panels(panels) => {
                prefetch(panels.from(0, cut.start / 2), columns.start / PANEL, cut.len(), share, shares);
            }
            _ => self.pack(region, strip, (share, shares)),
        }
    }

    /// Packs a share of the two panels of `columns` into `strip`.
    pub(super) fn pack(&self, region: Region, strip: &mut Vec<PanelRow>, (share, shares): (usize, usize)) {
        let stride = stride(region.cut);
        if strip.len() < 2 * stride {
            strip.resize(2 * stride, PanelRow::ZERO);
        }
        let pieces = 2 * region.cut.len().div_ceil(STEP);
        for piece in share * pieces / shares..(share + 1) * pieces / shares {
            self.pack_piece(region, &mut strip[..2 * stride], piece);
        }
    }

    /// Packs half of a step: the panel rows of 16 values of both panels, or those of 32 values of one panel.
    fn pack_piece(&self, region: Region, strip: &mut [PanelRow], piece: usize) {
        let Region { isa, columns, cut } = region;
        let (width, stride) = (columns.len(), stride(cut));
        let value = cut.start + piece * PANEL;
        // The panel rows of 16 missing values complete a step.
        let values = cut.end.saturating_sub(value).min(PANEL);
        let to = piece * PANEL / 2;
        match self {
            Self::Panels(_) => unreachable!("they are packed"),
            Self::Rows { values, k } => {
                let (panel, value) = (piece % 2, cut.start + piece / 2 * STEP);
                let row = columns.start + panel * PANEL;
                let rows = columns.end.saturating_sub(row).min(PANEL);
                let values = if rows == 0 { &[] } else { &values[row * k + value..] };
                let from = Bf16Matrix { values, stride: *k, rows, columns: (cut.end - value).min(STEP) };
                kernel::pack_rows(isa, from, &mut strip[panel * stride + piece / 2 * STEP / 2..]);
            }
            _ if values == 0 => (0..2).for_each(|panel| {
                let to = panel * stride + to;
                strip[to..to + PANEL / 2].fill(PanelRow::ZERO);
            }),
            Self::TransposedPanels(weight) => {
                let lines = &weight.panel(value / PANEL)[columns.start / 2..];
                let from = PanelColumns { lines, stride: weight.stride(), columns: width };
                kernel::transpose_panel(isa, from, &mut PanelsMut { lines: &mut strip[to..], stride });
                for panel in [0, stride] {
                    clear_after(values, &mut strip[panel + to..][..PANEL / 2]);
                }
            }
            Self::TransposedRows { values: all, k } => {
                let all = &all[value * k + columns.start..];
                let from = Bf16Matrix { values: all, stride: *k, rows: values, columns: width };
                kernel::pack_columns(isa, from, &mut PanelsMut { lines: &mut strip[to..], stride });
            }
        }
    }
}

/// Clears all but the first `values` of the 16 values of 8 lines: those of rows that are not of this part of the weight.
fn clear_after(values: usize, lines: &mut [PanelRow]) {
    if values % 2 == 1 {
        lines[values / 2].clear_second();
    }
    lines[values.div_ceil(2)..].fill(PanelRow::ZERO);
}

/// Lines of a panel of a strip.
fn stride(cut: &Range<usize>) -> usize {
    cut.len().next_multiple_of(STEP) / 2 + 1
}
