//! The kernel in AMX: a tile register holds 16 rows of 64 bytes, and `tdpbf16ps` multiplies 16 rows of 32 bf16 by a tile of
//! 16 lines, which are 32 values of 16 columns each, and adds to a tile of 16 by 16 f32. A block of the output of 32
//! rows by 32 columns keeps its sums in four registers and reads two tiles of each side a step.
//!
//! * `program`: the tile instructions as lists, which become `asm!` or, for tests, calls of a model of the registers. So all
//!   but the instructions themselves is tested on every CPU with AVX-512; they, and the system's leave, are tested in an
//!   emulator of the whole machine (tests/amx).
//! * `tiles`: the left operand, packed once for all columns.
//! * `product`: the loops. Sums are written, and the next operands packed or fetched, while tiles multiply.
//!
//! # Safety
//! Functions here need AMX's tiles and bf16, granted by the operating system ([`is_granted`]), and pointers to live memory
//! of the extents that they name. Whole tiles are loaded and stored: rows, columns or values that are missing at an edge
//! are made up in scratch memory, never read or written beyond the operands.

#[cfg(test)]
mod model;
mod product;
mod program;
mod tiles;

#[cfg(test)]
pub(in crate::ops::backend::bf16) use model::Model;
pub(in crate::ops::backend::bf16) use product::{OutputColumns, RowsProduct, prefetch};
#[cfg(test)]
pub(in crate::ops::backend::bf16) use program::TileProgram;
pub(in crate::ops::backend::bf16) use program::{Hardware, Registers};

use super::{BlockProduct, OutputBlock, PANEL, Panels};
use crate::ops::bf16::Isa;
use std::arch::x86_64::*;

/// Rows of a tile register.
const TILE: usize = 16;

/// Rows and columns of a block of the output.
pub(in crate::ops::backend::bf16) const SIDE: usize = 2 * TILE;

/// Sums over more values are cut: the tiles of some hundred rows then stay in a second-level cache of 2 MB.
pub(in crate::ops::backend::bf16) const MOST_DEPTH: usize = 2048;

/// Whether the CPU has AMX with bf16, and the operating system lets this process use it.
///
/// Linux gives a process the tiles' state if it asks for it (`arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)`,
/// Documentation/arch/x86/xstate.rst); all its threads have it then. A refusal is an answer, not an error.
pub(crate) fn is_granted() -> bool {
    has_amx() && request_tiles()
}

/// Intel's Software Developer's Manual, volume 1, 13.3 and 18.3: leaf 7 names AMX-BF16 (EDX bit 22) and AMX-TILE (bit 24);
/// the operating system has enabled both parts of the state if XCR0 has bits 17 and 18.
fn has_amx() -> bool {
    if __cpuid(0).eax < 7 || __cpuid(1).ecx & (1 << 27) == 0 {
        return false;
    }
    let wanted: u32 = (1 << 22) | (1 << 24);
    // SAFETY: CPUID says that XGETBV is there (OSXSAVE).
    __cpuid_count(7, 0).edx & wanted == wanted && unsafe { read_xcr0() } & (3 << 17) == 3 << 17
}

/// # Safety
/// The CPU has XGETBV.
#[target_feature(enable = "xsave")]
unsafe fn read_xcr0() -> u64 {
    // SAFETY: the caller's promise; register 0 is always there.
    unsafe { _xgetbv(0) }
}

#[cfg(target_os = "linux")]
fn request_tiles() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_ulong = 18;
    // SAFETY: the call takes two numbers and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

/// Other systems are not known to grant it this way.
#[cfg(not(target_os = "linux"))]
fn request_tiles() -> bool {
    false
}

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    /// Bytes of a row of each register.
    row_bytes: [u16; 16],
    /// Rows of each register.
    rows: [u8; 16],
}

/// All eight registers at their full size.
const CONFIG: TileConfig = {
    let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
    let mut i = 0;
    while i < 8 {
        (row_bytes[i], rows[i]) = (64, TILE as u8);
        i += 1;
    }
    TileConfig { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows }
};

/// See [`super::multiply`]. Sums over more than [`MOST_DEPTH`] values are cut.
pub(in crate::ops::backend::bf16) fn multiply<R: Registers>(
    isa: Isa,
    product: BlockProduct,
    out: &mut OutputBlock,
) {
    let BlockProduct { left, right, depth, epilogue } = product;
    for cut in cuts(depth) {
        let epilogue = epilogue.for_cut(cut.start);
        let (left, right) = (left.from(0, cut.start / 2), right.from(0, cut.start / 2));
        let rows = out.rows.len();
        let mut columns = BlockColumns {
            first: out.columns.start,
            depth: cut.len(),
            right,
            panel: 0,
            out: out.split(SIDE),
        };
        RowsProduct { left, rows, depth: cut.len(), epilogue }.run::<R, f32>(isa, &mut columns);
    }
}

/// Ranges of a product's sums, of at most [`MOST_DEPTH`] values. They depend on nothing else, so that sums do not depend on the
/// machine or the number of threads.
pub(in crate::ops::backend::bf16) fn cuts(depth: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    crate::ops::bf16::cuts(depth, MOST_DEPTH)
}

/// The columns of one block, whose panels are there.
struct BlockColumns<'a, I> {
    /// The block's first column.
    first: usize,
    depth: usize,
    right: Panels<'a>,
    /// The first panel of the columns that are being multiplied.
    panel: usize,
    out: I,
}

impl<'o, I: Iterator<Item = OutputBlock<'o>>> OutputColumns<'o, f32> for BlockColumns<'_, I> {
    fn next(&mut self) -> Option<OutputBlock<'o>> {
        let out = self.out.next()?;
        self.panel = (out.columns.start - self.first) / PANEL;
        Some(out)
    }

    fn operands(&mut self) -> (Panels<'_>, impl FnMut(usize, usize)) {
        let (right, panel, depth) = (self.right, self.panel, self.depth);
        // Panels that do not exist are prefetched from addresses that are never read.
        (right.from(panel, 0), move |share, shares| prefetch(right, panel + 2, depth, share, shares))
    }
}

#[cfg(test)]
mod tests {
    use super::super::STEP;
    use super::*;

    #[test]
    fn configuration_is_64_bytes_of_eight_full_tiles() {
        assert_eq!((size_of::<TileConfig>(), align_of::<TileConfig>()), (64, 64));
        assert_eq!((CONFIG.palette, CONFIG.start_row, CONFIG.reserved), (1, 0, [0; 14]));
        assert_eq!((CONFIG.row_bytes[7], CONFIG.rows[7], CONFIG.row_bytes[8]), (64, 16, 0));
    }

    #[test]
    fn has_amx_agrees_with_the_system() {
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        if let Some(flags) = info.lines().find(|line| line.starts_with("flags")) {
            let said = flags.split(' ').any(|flag| flag == "amx_bf16");
            assert_eq!(has_amx(), said, "{flags}");
        }
    }

    #[test]
    fn cuts_are_whole_steps_of_at_most_2048_values() {
        for depth in [0, 1, 31, 2048, 2049, 3072, 4096, 49_152, 100_001] {
            let cuts: Vec<_> = cuts(depth).collect();
            assert_eq!((cuts[0].start, cuts.last().map(|c| c.end)), (0, Some(depth)), "{depth}");
            assert!(cuts.windows(2).all(|w| w[0].end == w[1].start && w[0].len().is_multiple_of(STEP)));
            assert!(
                cuts.iter().all(|cut| cut.len() <= MOST_DEPTH) && cuts.len() == depth.div_ceil(2048).max(1)
            );
        }
    }
}
