//! The left operand in tiles: packed once, then read for all columns.
//!
//! ```text
//! row block of 32, step of 32 values:   16 lines of rows 0 to 15 | 16 lines of rows 16 to 31        2,048 bytes
//! tiles of an operand:                  [row block][step][32 lines], zeros for rows and values that do not exist
//! ```

use super::super::{Left, PANEL, PanelRow, STEP, avx512, low_mask};
use super::product::PARTS;
use super::program::LEFT_LINES;
use super::{SIDE, TILE};
use std::arch::x86_64::*;

/// Rows of a block's part.
pub(super) const PART_ROWS: usize = SIDE / PARTS;

/// Up to 32 rows of the left operand.
#[derive(Clone, Copy)]
pub(super) struct RowBlock<'a> {
    /// From the first row on.
    pub(super) left: Left<'a>,
    /// Rows that exist.
    pub(super) rows: usize,
    pub(super) depth: usize,
}

impl RowBlock<'_> {
    /// Writes part `part` of [`PARTS`] of its tiles. `tiles` are those of the block.
    ///
    /// # Safety
    /// `left` has the rows, `tiles` 32 lines a step; the CPU has `avx512f` and `avx512bw`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) unsafe fn pack(&self, part: usize, tiles: *mut PanelRow) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.left.pair {
                2 => self.pack_rows(part, tiles),
                _ => self.pack_interleaved(part, tiles),
            }
        }
    }

    /// Some of the rows, whose values lie side by side, in all steps.
    ///
    /// # Safety
    /// As for [`RowBlock::pack`].
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn pack_rows(&self, part: usize, tiles: *mut PanelRow) {
        let Self { left, rows, depth } = *self;
        for row in part * PART_ROWS..(part + 1) * PART_ROWS {
            let from = left.values.as_ptr().wrapping_add(row * left.row);
            for step in 0..depth.div_ceil(STEP) {
                let mask = if row < rows { low_mask(depth - step * STEP) } else { 0 };
                // SAFETY: the mask leaves out all but the operand's values; the line is inside the tiles.
                unsafe {
                    let values = _mm512_maskz_loadu_epi16(mask, from.wrapping_add(step * STEP).cast());
                    _mm512_store_si512(tiles.add(step * LEFT_LINES + row).cast(), values);
                }
            }
        }
    }

    /// Some of the steps, whose pairs of all rows lie side by side: 16 by 16 pairs are transposed.
    ///
    /// # Safety
    /// As for [`RowBlock::pack`].
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn pack_interleaved(&self, part: usize, tiles: *mut PanelRow) {
        let Self { left, rows, depth } = *self;
        let steps = depth.div_ceil(STEP);
        for step in part * steps / PARTS..(part + 1) * steps / PARTS {
            for first in [0, TILE] {
                let values = low_mask(2 * rows.saturating_sub(first).min(TILE));
                let mut lines = [_mm512_setzero_si512(); PANEL];
                for (i, line) in lines.iter_mut().enumerate() {
                    let value = step * STEP + 2 * i;
                    // The last pair of an odd depth has no second value.
                    let mask = match depth.saturating_sub(value) {
                        0 => 0,
                        1 => values & 0x5555_5555,
                        _ => values,
                    };
                    let from = left.values.as_ptr().wrapping_add(first * left.row + value / 2 * left.pair);
                    // SAFETY: the mask leaves out all but the operand's values.
                    *line = unsafe { _mm512_maskz_loadu_epi16(mask, from.cast()) };
                }
                // SAFETY: the 16 lines are inside the tiles.
                unsafe { avx512::store(avx512::transpose(lines), tiles.add(step * LEFT_LINES + first)) };
            }
        }
    }
}
