//! What is done with the tile registers, as lists of instructions: zeros, steps, stores.
//!
//! ```text
//! tmm0 tmm1     sums of rows  0 to 15 by columns 0 to 15, 16 to 31       tmm4     rows  0 to 15 of a step
//! tmm2 tmm3             rows 16 to 31                                    tmm5     rows 16 to 31
//!                                                                        tmm6, 7  columns 0 to 15, 16 to 31
//! ```

use super::super::PanelRow;
use super::{CONFIG, SIDE, TILE};
use crate::ops::bf16::Isa;
use crate::ops::bf16::isa::InstructionSet;
use std::arch::asm;
use std::marker::PhantomData;

/// Lines of a step of the left operand: two tiles.
pub(super) const LEFT_LINES: usize = 2 * TILE;

/// Lines of a step of a panel: one tile.
pub(super) const RIGHT_LINES: usize = TILE;

/// Bytes of a row of the sums.
pub(super) const SUMS_ROW: usize = SIDE * size_of::<f32>();

/// Steps up to which two panels (2 KB a step) stay in a first-level cache of 48 KB while rows stream past them. On 2 cores
/// of a Sapphire Rapids class CPU: 18 steps make 2,090 GFLOP/s a core with the panels loaded by `tileloadd` and 1,910 by
/// `tileloaddt1`, 24 steps 1,680 and 1,905; with the rows loaded by `tileloadd` too 1,480 and 1,530.
const MOST_STEPS_IN_CACHE: usize = 20;

/// Which of the lists a block takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::ops::backend::bf16) enum TileProgram {
    /// The panels stay in the first-level cache, the rows stream through it.
    PanelsStay,
    /// Both stream from the second-level cache.
    BothStream,
    /// A block of at most 16 rows, half of the registers. It is the last one of its columns, which are not read again.
    HalfHeight,
}

impl TileProgram {
    /// For a block of `rows` rows and sums of `steps` steps.
    pub(super) fn new(rows: usize, steps: usize) -> Self {
        match (rows, steps) {
            (..=TILE, _) => Self::HalfHeight,
            (_, ..=MOST_STEPS_IN_CACHE) => Self::PanelsStay,
            _ => Self::BothStream,
        }
    }
}

/// Addresses of the first step of both sides.
#[derive(Clone, Copy)]
pub(in crate::ops::backend::bf16) struct TileOperands {
    /// Both tiles of a step, those of the steps one after another.
    pub(super) left: *const PanelRow,
    /// Two panels.
    pub(super) right: [*const PanelRow; 2],
}

impl TileOperands {
    /// Those `steps` steps further.
    pub(super) fn after(self, steps: usize) -> Self {
        Self {
            left: self.left.wrapping_add(steps * LEFT_LINES),
            right: self.right.map(|right| right.wrapping_add(steps * RIGHT_LINES)),
        }
    }
}

/// The eight tile registers of a thread.
pub(in crate::ops::backend::bf16) trait Registers: Sized {
    /// Configured, until the value is dropped; `None` if the CPU of `isa` has none.
    fn configure(isa: Isa) -> Option<Self>;

    /// Sets the sums to zero.
    fn zero(&mut self, program: TileProgram);

    /// Adds `steps` steps to the sums.
    ///
    /// # Safety
    /// Both operands have as many steps in live memory.
    unsafe fn steps(&mut self, program: TileProgram, operands: TileOperands, steps: usize);

    /// Writes the sums to rows of 32 f32; those of 16 rows for [`TileProgram::HalfHeight`].
    ///
    /// # Safety
    /// There is room for 32 rows.
    unsafe fn store(&self, program: TileProgram, sums: *mut f32);
}

/// Hands a list of instructions to `$run`, after `$with`.
macro_rules! program {
    (zero full, $run:ident $with:tt) => { $run!($with [zero 0] [zero 1] [zero 2] [zero 3]) };
    (zero half, $run:ident $with:tt) => { $run!($with [zero 0] [zero 1]) };
    (step panels_stay, $run:ident $with:tt) => {
        $run!($with [stream 4 left 0] [load 6 right0 0] [load 7 right1 0] [multiply 0 4 6]
            [stream 5 left 1024] [multiply 1 4 7] [multiply 2 5 6] [multiply 3 5 7])
    };
    (step both_stream, $run:ident $with:tt) => {
        $run!($with [stream 4 left 0] [stream 6 right0 0] [stream 7 right1 0] [multiply 0 4 6]
            [stream 5 left 1024] [multiply 1 4 7] [multiply 2 5 6] [multiply 3 5 7])
    };
    (step half_height, $run:ident $with:tt) => {
        $run!($with [stream 4 left 0] [stream 6 right0 0] [stream 7 right1 0] [multiply 0 4 6] [multiply 1 4 7])
    };
    (store full, $run:ident $with:tt) => { $run!($with [store 0 0] [store 1 64] [store 2 2048] [store 3 2112]) };
    (store half, $run:ident $with:tt) => { $run!($with [store 0 0] [store 1 64]) };
}
#[cfg(test)]
pub(super) use program;

/// One instruction in assembler.
macro_rules! instruction {
    (zero $t:literal) => {
        concat!("tilezero tmm", $t)
    };
    (load $t:literal $side:ident $offset:literal) => {
        concat!("tileloadd tmm", $t, ", [{", stringify!($side), "} + {row}*1 + ", $offset, "]")
    };
    (stream $t:literal $side:ident $offset:literal) => {
        concat!("tileloaddt1 tmm", $t, ", [{", stringify!($side), "} + {row}*1 + ", $offset, "]")
    };
    (multiply $sum:literal $a:literal $b:literal) => {
        concat!("tdpbf16ps tmm", $sum, ", tmm", $a, ", tmm", $b)
    };
    (store $t:literal $offset:literal) => {
        concat!("tilestored [{sums} + {row}*1 + ", $offset, "], tmm", $t)
    };
}

macro_rules! assemble_zero {
    (() $([$($i:tt)*])*) => {
        asm!(
            $(instruction!($($i)*),)*
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            options(nostack, nomem, preserves_flags),
        )
    };
}

macro_rules! assemble_steps {
    (($operands:ident, $steps:ident) $([$($i:tt)*])*) => {
        asm!(
            "2:",
            $(instruction!($($i)*),)*
            "add {left}, 2048",
            "add {right0}, 1024",
            "add {right1}, 1024",
            "dec {steps}",
            "jnz 2b",
            left = inout(reg) $operands.left => _,
            right0 = inout(reg) $operands.right[0] => _,
            right1 = inout(reg) $operands.right[1] => _,
            steps = inout(reg) $steps => _,
            row = in(reg) 64usize,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, readonly),
        )
    };
}

macro_rules! assemble_store {
    (($sums:ident) $([$($i:tt)*])*) => {
        asm!(
            $(instruction!($($i)*),)*
            sums = in(reg) $sums,
            row = in(reg) SUMS_ROW,
            options(nostack, preserves_flags),
        )
    };
}

/// The CPU's own registers.
///
/// The sums stay in tmm0 to tmm3 from `zero` to `store`, across several pieces of assembler and the code between them.
/// That code does not touch them: no function of this program is compiled for `amx-tile`, without which the compiler has no
/// instruction that could, and these pieces of assembler are the only ones in the program. The system saves and restores the
/// registers when it takes the CPU from the thread, or interrupts it. A thread makes one product at a time, as the scratch
/// memory of a product, which is the thread's, is borrowed for so long.
pub(in crate::ops::backend::bf16) struct Hardware {
    /// They belong to the thread.
    not_send: PhantomData<*const ()>,
}

impl Registers for Hardware {
    fn configure(isa: Isa) -> Option<Self> {
        if isa.kind() != InstructionSet::Amx {
            return None;
        }
        // SAFETY: `isa` is proof of AMX; the configuration lives.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &CONFIG, options(nostack, readonly, preserves_flags)) };
        Some(Self { not_send: PhantomData })
    }

    #[inline(always)]
    fn zero(&mut self, program: TileProgram) {
        // SAFETY: the registers are configured as long as the value lives; see there for what is between.
        unsafe {
            match program {
                TileProgram::PanelsStay | TileProgram::BothStream => program!(zero full, assemble_zero()),
                TileProgram::HalfHeight => program!(zero half, assemble_zero()),
            }
        }
    }

    #[inline(always)]
    unsafe fn steps(&mut self, program: TileProgram, operands: TileOperands, steps: usize) {
        if steps == 0 {
            return;
        }
        // SAFETY: as for `zero`; the operands are the caller's promise.
        unsafe {
            match program {
                TileProgram::PanelsStay => program!(step panels_stay, assemble_steps(operands, steps)),
                TileProgram::BothStream => program!(step both_stream, assemble_steps(operands, steps)),
                TileProgram::HalfHeight => program!(step half_height, assemble_steps(operands, steps)),
            }
        }
    }

    #[inline(always)]
    unsafe fn store(&self, program: TileProgram, sums: *mut f32) {
        // SAFETY: as for `zero`; the room is the caller's promise.
        unsafe {
            match program {
                TileProgram::PanelsStay | TileProgram::BothStream => {
                    program!(store full, assemble_store(sums))
                }
                TileProgram::HalfHeight => program!(store half, assemble_store(sums)),
            }
        }
    }
}

impl Drop for Hardware {
    fn drop(&mut self) {
        // SAFETY: the registers were configured, which only a CPU with AMX does.
        unsafe {
            asm!(
                "tilerelease",
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, nomem, preserves_flags),
            );
        }
    }
}
