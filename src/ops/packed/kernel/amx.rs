//! The kernel in AMX: a tile register holds 16 rows of 64 bytes, and `tdpbf16ps` multiplies 16 rows of 32 bf16 by a tile of
//! 16 lines, which are 32 values of 16 columns each, and adds to a tile of 16 by 16 f32. A block of the output of 32
//! rows by 32 columns keeps its sums in four tiles and reads two tiles of each side a step.
//!
//! The loop over the steps is written once, as a list of tile instructions, and becomes `asm!` or, for tests on machines
//! without AMX, calls of a model of the eight registers ([`Tiles`]): so packing, addresses, strides and edges are tested
//! everywhere. The instructions themselves, and the system's leave, ran in an emulator of the whole machine (tests/amx).
//!
//! # Safety
//! Functions here need AMX's tiles and bf16, granted by the operating system ([`is_granted`]), and pointers to live memory
//! of the extents that they name. Whole tiles are loaded and stored: rows, columns or values that are missing at an edge
//! are made up in scratch memory, never read or written beyond the operands.

use super::{Left, Line, Out, PANEL, Panels, STEP, Then, avx512, low};
use half::bf16;
use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

/// Rows of a tile register.
const TILE: usize = 16;

/// Rows and columns of a block of the output.
const SIDE: usize = 2 * TILE;

/// Values of a tile of the left operand.
const LEFT_TILE: usize = TILE * STEP;

/// Whether the CPU has AMX with bf16, and the operating system lets this process use it.
///
/// Linux gives a process the tiles' state where it asks for it (`arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)`,
/// Documentation/arch/x86/xstate.rst); all its threads have it then. A refusal is an answer, not an error.
pub(crate) fn is_granted() -> bool {
    has_amx() && request_tiles()
}

/// Intel's Software Developer's Manual, volume 1, 13.3 and 18.3: leaf 7 names AMX-BF16 (EDX bit 22) and AMX-TILE (bit 24);
/// the operating system has enabled both parts of the state where XCR0 has bits 17 and 18.
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

/// Where the loop over the steps reads and writes.
#[derive(Clone, Copy)]
struct Addresses {
    /// Tiles of the upper and the lower 16 rows, those of the steps one after another.
    left: [*const bf16; 2],
    /// Lines of two panels.
    right: [*const Line; 2],
    steps: usize,
    /// 32 by 32 sums.
    sums: *mut f32,
}

/// Bytes of a row of the sums.
const SUMS_ROW: usize = SIDE * size_of::<f32>();

/// Hands the program of a block to `$run`: what is done first, what with each step, and what last.
macro_rules! program {
    ($run:ident, $addresses:expr, $($with:tt)*) => {
        $run!(
            $addresses, $($with)*;
            first: [zero 0] [zero 1] [zero 2] [zero 3];
            step: [load 4 left0] [load 6 right0] [load 7 right1] [multiply 0 4 6]
                  [load 5 left1] [multiply 1 4 7] [multiply 2 5 6] [multiply 3 5 7];
            last: [store 0 0] [store 1 64] [store 2 2048] [store 3 2112]
        )
    };
}

/// One instruction in assembler.
macro_rules! instruction {
    (zero $t:literal) => {
        concat!("tilezero tmm", $t)
    };
    (load $t:literal $side:ident) => {
        concat!("tileloadd tmm", $t, ", [{", stringify!($side), "} + {row}*1]")
    };
    (multiply $sum:literal $a:literal $b:literal) => {
        concat!("tdpbf16ps tmm", $sum, ", tmm", $a, ", tmm", $b)
    };
    (store $t:literal $offset:literal) => {
        concat!("tilestored [{sums} + {sums_row}*1 + ", $offset, "], tmm", $t)
    };
}

macro_rules! assemble {
    ($addresses:expr, ; first: $([$($first:tt)*])*; step: $([$($step:tt)*])*; last: $([$($last:tt)*])*) => {
        asm!(
            $(instruction!($($first)*),)*
            "test {steps}, {steps}",
            "jz 3f",
            "2:",
            $(instruction!($($step)*),)*
            "add {left0}, 1024",
            "add {left1}, 1024",
            "add {right0}, 1024",
            "add {right1}, 1024",
            "dec {steps}",
            "jnz 2b",
            "3:",
            $(instruction!($($last)*),)*
            left0 = inout(reg) $addresses.left[0] => _,
            left1 = inout(reg) $addresses.left[1] => _,
            right0 = inout(reg) $addresses.right[0] => _,
            right1 = inout(reg) $addresses.right[1] => _,
            steps = inout(reg) $addresses.steps => _,
            row = in(reg) 64usize,
            sums = in(reg) $addresses.sums,
            sums_row = in(reg) SUMS_ROW,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

/// Runs the program on the CPU.
///
/// # Safety
/// See the module; the tiles are configured, `left` and `right` hold `steps` tiles each, `sums` 32 by 32 values.
unsafe fn run(addresses: Addresses) {
    // SAFETY: the caller's promise.
    unsafe { program!(assemble, addresses,) };
}

/// `out = scale * left right`; see [`super::block`].
///
/// # Safety
/// See the module; `left` has the rows of `out` of `depth` values, `right` its panels of `depth.next_multiple_of(STEP) / 2`
/// lines, zero behind `depth`.
pub(super) unsafe fn block(left: Left, depth: usize, right: Panels, out: &mut Out, then: Then) {
    // SAFETY: the configuration lives; the tiles belong to this thread until they are released.
    unsafe {
        asm!("ldtilecfg [{}]", in(reg) &CONFIG, options(nostack, readonly));
        blocks(left, depth, right, out, then, |addresses| run(addresses));
        asm!("tilerelease", options(nostack, nomem));
    }
}

/// Cuts a product into blocks of 32 by 32 sums over whole steps, for `run`.
///
/// # Safety
/// As for [`block`], but for the tiles; the CPU has `avx512f` and `avx512bw`.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn blocks(
    left: Left,
    depth: usize,
    right: Panels,
    out: &mut Out,
    then: Then,
    mut run: impl FnMut(Addresses),
) {
    let (rows, columns, steps) = (out.rows.len(), out.columns.len(), depth.div_ceil(STEP));
    // Tiles of 32 rows: copied from the left operand once for all columns.
    let mut tiles = vec![Line::ZERO; SIDE * steps];
    let mut sums = [Line::ZERO; SIDE * SIDE * size_of::<f32>() / size_of::<Line>()];
    let sums: *mut f32 = sums.as_mut_ptr().cast();
    for row in (0..rows).step_by(SIDE) {
        // SAFETY: the rows from `row` on are inside the left operand; `tiles` has the room.
        unsafe { copy_tiles(left, row..(row + SIDE).min(rows), depth, &mut tiles) };
        for column in (0..columns).step_by(SIDE) {
            // Without a second panel the first stands in for it, and its sums are not taken.
            let panel = column / PANEL;
            let second = if column + PANEL < columns { panel + 1 } else { panel };
            let tile = tiles.as_ptr().cast::<bf16>();
            let lines = right.lines.as_ptr();
            // SAFETY: there are two halves of `steps` tiles, and the panels are inside by the caller's promise.
            let addresses = unsafe {
                Addresses {
                    left: [tile, tile.add(steps * LEFT_TILE)],
                    right: [lines.add(panel * right.stride), lines.add(second * right.stride)],
                    steps,
                    sums,
                }
            };
            run(addresses);
            for r in 0..SIDE.min(rows - row) {
                for half in (0..SIDE.min(columns - column)).step_by(PANEL) {
                    let mask = (low(columns - column - half) & 0xffff) as __mmask16;
                    // SAFETY: the masked elements are inside the block of the output, and the sums inside theirs.
                    unsafe {
                        let to = out.ptr.add((row + r) * out.stride + column + half);
                        avx512::put(_mm512_load_ps(sums.add(r * SIDE + half)), to, mask, then);
                    }
                }
            }
        }
    }
}

/// Copies up to 32 rows of `depth` values to tiles: those of the first 16 rows, a tile a step, then those of the others;
/// zeros where there is no value.
///
/// # Safety
/// `left` has the rows, `tiles` 32 lines a step; the CPU has `avx512f` and `avx512bw`.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn copy_tiles(left: Left, rows: Range<usize>, depth: usize, tiles: &mut [Line]) {
    let steps = depth.div_ceil(STEP);
    for r in 0..SIDE {
        for step in 0..steps {
            let line = &mut tiles[(r / TILE * steps + step) * TILE + r % TILE];
            let n = (depth - step * STEP).min(STEP);
            if r >= rows.len() {
                *line = Line::ZERO;
            } else if left.pair == 2 {
                // SAFETY: `n` values from the step's first on are inside the row.
                unsafe {
                    let from = left.values.as_ptr().add((rows.start + r) * left.row + step * STEP);
                    let values = _mm512_maskz_loadu_epi16(low(n), from.cast());
                    _mm512_store_si512(std::ptr::from_mut(line).cast(), values);
                }
            } else {
                *line = Line::ZERO;
                let at = (rows.start + r) * left.row + step * STEP / 2 * left.pair;
                for (i, y) in line.0[..n].iter_mut().enumerate() {
                    *y = left.values[at + i / 2 * left.pair + i % 2];
                }
            }
        }
    }
}

/// The eight tile registers in software, and the program run on them.
#[cfg(test)]
pub(in crate::ops::packed) mod model {
    use super::*;

    struct Tiles([[u8; TILE * 64]; 8]);

    impl Tiles {
        fn f32(&self, tile: usize, row: usize, column: usize) -> f32 {
            let at = row * 64 + 4 * column;
            f32::from_ne_bytes(self.0[tile][at..at + 4].try_into().expect("four bytes"))
        }

        fn bf16(&self, tile: usize, row: usize, i: usize) -> f32 {
            let at = row * 64 + 2 * i;
            bf16::from_ne_bytes(self.0[tile][at..at + 2].try_into().expect("two bytes")).to_f32()
        }

        fn zero(&mut self, tile: usize) {
            self.0[tile].fill(0);
        }

        /// `tileloadd` from rows of 64 bytes, one after another.
        unsafe fn load(&mut self, tile: usize, from: *const u8) {
            // SAFETY: the caller has a tile there.
            self.0[tile].copy_from_slice(unsafe { std::slice::from_raw_parts(from, TILE * 64) });
        }

        unsafe fn store(&self, tile: usize, to: *mut u8) {
            for (i, row) in self.0[tile].chunks_exact(64).enumerate() {
                // SAFETY: the caller has 16 rows of 64 bytes, `SUMS_ROW` apart.
                unsafe { std::slice::from_raw_parts_mut(to.add(i * SUMS_ROW), 64) }.copy_from_slice(row);
            }
        }

        /// `tdpbf16ps`: of each row of `a` and column of `b`, the products of 16 pairs.
        fn multiply(&mut self, sum: usize, a: usize, b: usize) {
            for row in 0..TILE {
                for column in 0..TILE {
                    let mut total = self.f32(sum, row, column);
                    for pair in 0..TILE {
                        total += self.bf16(a, row, 2 * pair) * self.bf16(b, pair, 2 * column);
                        total += self.bf16(a, row, 2 * pair + 1) * self.bf16(b, pair, 2 * column + 1);
                    }
                    let at = row * 64 + 4 * column;
                    self.0[sum][at..at + 4].copy_from_slice(&total.to_ne_bytes());
                }
            }
        }
    }

    macro_rules! step {
        ($tiles:ident, $at:ident, zero $t:literal) => {
            $tiles.zero($t)
        };
        ($tiles:ident, $at:ident, load $t:literal left0) => {
            $tiles.load($t, $at.left[0].cast())
        };
        ($tiles:ident, $at:ident, load $t:literal left1) => {
            $tiles.load($t, $at.left[1].cast())
        };
        ($tiles:ident, $at:ident, load $t:literal right0) => {
            $tiles.load($t, $at.right[0].cast())
        };
        ($tiles:ident, $at:ident, load $t:literal right1) => {
            $tiles.load($t, $at.right[1].cast())
        };
        ($tiles:ident, $at:ident, multiply $sum:literal $a:literal $b:literal) => {
            $tiles.multiply($sum, $a, $b)
        };
        ($tiles:ident, $at:ident, store $t:literal $offset:literal) => {
            $tiles.store($t, $at.sums.cast::<u8>().add($offset))
        };
    }

    macro_rules! simulate {
        ($addresses:expr, $tiles:ident $at:ident; first: $([$($first:tt)*])*; step: $([$($step:tt)*])*; last: $([$($last:tt)*])*) => {{
            let mut $at: Addresses = $addresses;
            $(step!($tiles, $at, $($first)*);)*
            for _ in 0..$at.steps {
                $(step!($tiles, $at, $($step)*);)*
                $at.left = $at.left.map(|p| p.byte_add(1024));
                $at.right = $at.right.map(|p| p.byte_add(1024));
            }
            $(step!($tiles, $at, $($last)*);)*
        }};
    }

    /// As [`super::super::block`] on AMX, by the model of its registers.
    pub(in crate::ops::packed) fn block(left: Left, right: Panels, depth: usize, out: &mut Out, then: Then) {
        let run = |addresses: Addresses| {
            let mut tiles = Tiles([[0xff; TILE * 64]; 8]);
            // SAFETY: `blocks` gives addresses of whole tiles.
            unsafe { program!(simulate, addresses, tiles at) };
        };
        // SAFETY: tests pass operands of the extents that they name.
        unsafe { blocks(left, depth, right, out, then, run) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_is_64_bytes_of_eight_full_tiles() {
        assert_eq!((size_of::<TileConfig>(), align_of::<TileConfig>()), (64, 64));
        assert_eq!((CONFIG.palette, CONFIG.start_row, CONFIG.reserved), (1, 0, [0; 14]));
        assert_eq!((CONFIG.row_bytes[7], CONFIG.rows[7], CONFIG.row_bytes[8]), (64, 16, 0));
    }

    #[test]
    fn what_the_system_says_of_amx_is_what_the_cpu_says() {
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        if let Some(flags) = info.lines().find(|line| line.starts_with("flags")) {
            let said = flags.split(' ').any(|flag| flag == "amx_bf16");
            assert_eq!(has_amx(), said, "{flags}");
        }
    }
}
