//! The loops of a product.
//!
//! ```text
//! pack the tiles of row block 0
//! for each 32 columns, two panels:                 the panels stay in the first-level cache, or stream with the rows
//!   for each row block of 32:                      its tiles stream from the second-level cache
//!     zero the sums
//!     for each eighth of the steps:
//!       multiply
//!       an eighth of: pack the next row block's tiles (first columns only); prefetch this block's output, to write it;
//!                     prefetch the next columns' panels, or pack them; write the block before
//!     store the sums to one of two buffers
//! write the last block
//! ```
//!
//! The lines after `multiply` run while the tile unit works. On 2 cores of a Sapphire Rapids class CPU, products
//! [367, 576] x [576, 3072] in GFLOP/s of both: 1,501 with every block written at once, 1,255 / 1,453 / 1,539 / 1,569 with
//! the block before written in 1 / 2 / 4 / 8 parts (a load does not wait then for sums that are still on their way to the
//! cache). `prefetchw` of the output added 7 %, `prefetcht1` of the panels 9 %, and writing the sums to the output
//! without a buffer made one core 16 % slower. These are figures of a prototype of these loops, before they were part of gneiss.

use super::super::{Epilogue, Left, OutputBlock, OutputElement, PANEL, PanelRow, Panels, STEP};
use super::SIDE;
use super::program::{LEFT_LINES, Registers, TileOperands, TileProgram};
use super::tiles::{PART_ROWS, RowBlock};
use crate::ops::bf16::Isa;
use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::RefCell;

/// Parts of a block's steps, and of its rows.
pub(super) const PARTS: usize = 8;

/// Lines of a block's sums.
const SUMS_LINES: usize = SIDE * SIDE * size_of::<f32>() / size_of::<PanelRow>();

/// Columns of a product, at most 32 at a time, with the right operand that belongs to them.
pub(in crate::ops::backend::bf16) trait OutputColumns<'o, T> {
    /// Goes on to the next columns and returns their output.
    fn next(&mut self) -> Option<OutputBlock<'o, T>>;

    /// The panels of these columns, and a function that prepares the next ones: it does one of `shares` shares of the work.
    fn operands(&mut self) -> (Panels<'_>, impl FnMut(usize, usize));
}

/// Prefetches a share of the first `depth` values of two panels, which need not exist, to the second-level cache.
#[inline(always)]
pub(in crate::ops::backend::bf16) fn prefetch(
    panels: Panels,
    first: usize,
    depth: usize,
    share: usize,
    shares: usize,
) {
    let lines = depth.next_multiple_of(STEP) / 2;
    let size = (2 * lines).div_ceil(shares);
    for i in share * size..((share + 1) * size).min(2 * lines) {
        let (panel, line) = if i < lines { (first, i) } else { (first + 1, i - lines) };
        let line = panels.lines.as_ptr().wrapping_add(panel * panels.stride + line);
        // SAFETY: a prefetch reads nothing and raises nothing, whatever the address; every x86-64 has it.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.cast()) };
    }
}

/// A thread's memory, which it keeps from product to product.
struct AmxScratch {
    /// Tiles of the left operand.
    tiles: Vec<PanelRow>,
    /// Sums of two blocks.
    sums: Box<[[PanelRow; SUMS_LINES]; 2]>,
}

/// A product of some rows, which are packed once, with any number of columns.
#[derive(Clone, Copy)]
pub(in crate::ops::backend::bf16) struct RowsProduct<'a> {
    pub(in crate::ops::backend::bf16) left: Left<'a>,
    pub(in crate::ops::backend::bf16) rows: usize,
    pub(in crate::ops::backend::bf16) depth: usize,
    pub(in crate::ops::backend::bf16) epilogue: Epilogue,
}

impl RowsProduct<'_> {
    /// Multiplies and writes all columns.
    ///
    /// # Panics
    /// Panics if an operand is shorter than the shape, an output has other rows or more than 32 columns, or `isa` has no tile
    /// registers.
    pub(in crate::ops::backend::bf16) fn run<'o, R: Registers, T: OutputElement>(
        self,
        isa: Isa,
        columns: &mut impl OutputColumns<'o, T>,
    ) {
        thread_local! {
            static SCRATCH: RefCell<AmxScratch> = RefCell::new(AmxScratch {
                tiles: Vec::new(),
                sums: Box::new([[PanelRow::ZERO; SUMS_LINES]; 2]),
            });
        }
        let Self { left, rows, depth, .. } = self;
        assert!(left.extent(rows, depth) <= left.values.len(), "{rows} rows of {depth} values on the left");
        SCRATCH.with_borrow_mut(|scratch| {
            let lines = rows.div_ceil(SIDE) * depth.div_ceil(STEP) * LEFT_LINES;
            if scratch.tiles.len() < lines {
                scratch.tiles.resize(lines, PanelRow::ZERO);
            }
            let Some(registers) = R::configure(isa) else { unreachable!("{isa:?} has no tile registers") };
            // SAFETY: the registers are proof of the instructions; the extent of the left operand was checked.
            unsafe { self.multiply(registers, scratch, columns) };
        });
    }

    /// # Safety
    /// The CPU has the features; `left` has the rows, and the tiles of `scratch` have room for them.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn multiply<'o, R: Registers, T: OutputElement>(
        self,
        mut registers: R,
        scratch: &mut AmxScratch,
        columns: &mut impl OutputColumns<'o, T>,
    ) {
        let (tiles, steps) = (scratch.tiles.as_mut_ptr(), self.depth.div_ceil(STEP));
        let blocks = self.rows.div_ceil(SIDE);
        let sums: [*mut f32; 2] = scratch.sums.each_mut().map(|sums| sums.as_mut_ptr().cast());
        let (mut written, mut is_packed) = (Unwritten::<T>::nothing(self.epilogue), false);
        let mut count = 0;
        while let Some(out) = columns.next() {
            let (right, mut prepare) = columns.operands();
            let panels = self.panels(&out, right);
            for block in 0..blocks {
                let program = TileProgram::new(self.rows - block * SIDE, steps);
                // SAFETY: the block's tiles are inside the scratch memory, its rows inside the output.
                let (unwritten, operands) = unsafe {
                    let left = tiles.add(block * steps * LEFT_LINES);
                    if !is_packed && block == 0 {
                        (0..PARTS).for_each(|part| self.row_block(0).pack(part, left));
                    }
                    (
                        Unwritten::new(&out, block * SIDE, sums[count % 2], self.epilogue),
                        TileOperands { left, right: panels },
                    )
                };
                count += 1;
                registers.zero(program);
                for part in 0..PARTS {
                    let [start, end] = [part, part + 1].map(|part| part * steps / PARTS);
                    // SAFETY: the tiles of all steps are packed, and the panels have the lines, which was checked. The
                    // next block's tiles are not read before they are all packed. `written` and `unwritten` lie in the
                    // outputs of their columns, which are ours, and their sums in different buffers.
                    unsafe {
                        registers.steps(program, operands.after(start), end - start);
                        if !is_packed && block + 1 < blocks {
                            let next = tiles.add((block + 1) * steps * LEFT_LINES);
                            self.row_block(block + 1).pack(part, next);
                        }
                        unwritten.prefetch(part);
                        prepare(block * PARTS + part, blocks * PARTS);
                        written.write(part);
                    }
                }
                // SAFETY: the buffer has the room; what it held is written.
                unsafe { registers.store(program, sums[(count - 1) % 2]) };
                written = unwritten;
            }
            is_packed = true;
        }
        // SAFETY: as above.
        (0..PARTS).for_each(|part| unsafe { written.write(part) });
    }

    /// The rows of a block.
    fn row_block(&self, block: usize) -> RowBlock<'_> {
        let row = block * SIDE;
        // Rows of no values need not be there.
        let left = if self.depth == 0 { self.left } else { self.left.from(row, 0) };
        RowBlock { left, rows: (self.rows - row).min(SIDE), depth: self.depth }
    }

    /// Addresses of the two panels of `out`'s columns, after a check of all extents.
    fn panels<T>(&self, out: &OutputBlock<T>, right: Panels) -> [*const PanelRow; 2] {
        let (width, lines) = (out.columns.len(), self.depth.next_multiple_of(STEP) / 2);
        assert!(out.rows.len() == self.rows && (1..=SIDE).contains(&width), "a block of {:?}", out.columns);
        // Without a second panel the first is multiplied in its place, and those sums are not used.
        let second = if width > PANEL { right.stride } else { 0 };
        assert!(second + lines <= right.lines.len(), "panels of {lines} lines for {width} columns");
        [right.lines.as_ptr(), right.lines.as_ptr().wrapping_add(second)]
    }
}

/// A block of sums that is to be written to its place.
struct Unwritten<T> {
    sums: *const f32,
    out: *mut T,
    /// Elements from a row of the output to the next one.
    stride: usize,
    rows: usize,
    /// Columns that exist.
    mask: u32,
    epilogue: Epilogue,
}

impl<T: OutputElement> Unwritten<T> {
    fn nothing(epilogue: Epilogue) -> Self {
        Self { sums: std::ptr::null(), out: std::ptr::null_mut(), stride: 0, rows: 0, mask: 0, epilogue }
    }

    /// The block of `out` from row `row` on, whose sums are to be in `sums`.
    fn new(out: &OutputBlock<T>, row: usize, sums: *const f32, epilogue: Epilogue) -> Self {
        Self {
            sums,
            out: out.ptr.wrapping_add(row * out.stride),
            stride: out.stride,
            rows: (out.rows.len() - row).min(SIDE),
            mask: super::super::low_mask(out.columns.len()),
            epilogue,
        }
    }

    fn part(&self, part: usize) -> std::ops::Range<usize> {
        part * PART_ROWS..((part + 1) * PART_ROWS).min(self.rows)
    }

    /// Brings the lines of a part's rows into the first-level cache to be written.
    #[inline(always)]
    fn prefetch(&self, part: usize) {
        for row in self.part(part) {
            for offset in (0..SIDE * size_of::<T>()).step_by(size_of::<PanelRow>()) {
                let line = self.out.wrapping_add(row * self.stride).wrapping_byte_add(offset);
                // SAFETY: a prefetch reads and writes nothing and raises nothing, whatever the address. Without the
                // instruction (CPUs before AMX) it is a `nop`.
                unsafe { asm!("prefetchw [{}]", in(reg) line, options(nostack, readonly, preserves_flags)) };
            }
        }
    }

    /// Writes the rows of a part.
    ///
    /// # Safety
    /// The CPU has the features; the sums are there; the elements are the caller's.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn write(&self, part: usize) {
        for row in self.part(part) {
            // SAFETY: the row is inside the block, and so are its sums.
            unsafe {
                T::store_row(
                    self.sums.add(row * SIDE),
                    self.out.add(row * self.stride),
                    self.mask,
                    self.epilogue,
                );
            }
        }
    }
}
