//! The eight tile registers in software, and the programs run on them.

use super::super::PanelRow;
use super::TILE;
use super::program::{LEFT_LINES, RIGHT_LINES, Registers, SUMS_ROW, TileOperands, TileProgram, program};
use crate::ops::bf16::Isa;
use std::cell::RefCell;

/// A tile register: 16 rows of 64 bytes, as f32 or pairs of bf16.
type TileRegister = [[u32; TILE]; TILE];

/// Registers that hold NaN when they are configured.
pub(in crate::ops::backend::bf16) struct Model([TileRegister; 8]);

thread_local! {
    /// The programs whose steps ran on this thread.
    static RAN: RefCell<Vec<TileProgram>> = const { RefCell::new(Vec::new()) };
}

impl Model {
    /// Runs `f` on this thread, and says which programs' steps it ran.
    pub(in crate::ops::backend::bf16) fn programs(f: impl FnOnce()) -> Vec<TileProgram> {
        RAN.with_borrow_mut(Vec::clear);
        f();
        RAN.take()
    }

    fn zero(&mut self, tile: usize) {
        self.0[tile] = [[0; TILE]; TILE];
    }

    /// `tileloadd`, or `tileloaddt1`, from rows of 64 bytes, one after another.
    unsafe fn load(&mut self, tile: usize, from: *const u8) {
        assert!(from.cast::<PanelRow>().is_aligned(), "a tile's rows are lines of the cache");
        // SAFETY: the caller has a tile there.
        self.0[tile] = unsafe { from.cast::<TileRegister>().read() };
    }

    unsafe fn store(&self, tile: usize, to: *mut u8) {
        for (i, row) in self.0[tile].iter().enumerate() {
            // SAFETY: the caller has 16 rows of 64 bytes, `SUMS_ROW` apart.
            unsafe { to.add(i * SUMS_ROW).cast::<[u32; TILE]>().write(*row) };
        }
    }

    /// `tdpbf16ps`: of each row of `a` and column of `b`, the products of 16 pairs.
    fn multiply(&mut self, sum: usize, a: usize, b: usize) {
        let values = |word: u32| [f32::from_bits(word << 16), f32::from_bits(word & 0xffff_0000)];
        let b = self.0[b].map(|line| line.map(values));
        for row in 0..TILE {
            let a = self.0[a][row].map(values);
            for column in 0..TILE {
                let mut total = f32::from_bits(self.0[sum][row][column]);
                for pair in 0..TILE {
                    let b = b[pair][column];
                    total += a[pair][0] * b[0];
                    total += a[pair][1] * b[1];
                }
                self.0[sum][row][column] = total.to_bits();
            }
        }
    }
}

macro_rules! instruction {
    ($model:ident, $place:ident, zero $t:literal) => {
        Model::zero($model, $t)
    };
    ($model:ident, $place:ident, load $t:literal left $offset:literal) => {
        $model.load($t, $place.left.cast::<u8>().add($offset))
    };
    ($model:ident, $place:ident, load $t:literal right0 $offset:literal) => {
        $model.load($t, $place.right[0].cast::<u8>().add($offset))
    };
    ($model:ident, $place:ident, load $t:literal right1 $offset:literal) => {
        $model.load($t, $place.right[1].cast::<u8>().add($offset))
    };
    ($model:ident, $place:ident, stream $($load:tt)*) => {
        instruction!($model, $place, load $($load)*)
    };
    ($model:ident, $place:ident, multiply $sum:literal $a:literal $b:literal) => {
        $model.multiply($sum, $a, $b)
    };
    ($model:ident, $place:ident, store $t:literal $offset:literal) => {
        Model::store($model, $t, $place.cast::<u8>().add($offset))
    };
}

macro_rules! simulate {
    (($model:ident, $place:ident) $([$($i:tt)*])*) => {{ $(instruction!($model, $place, $($i)*);)* }};
}

impl Registers for Model {
    /// On any CPU on which the code around the registers runs.
    fn configure(_: Isa) -> Option<Self> {
        let sums_are_written = is_x86_feature_detected!("avx512bf16");
        sums_are_written.then_some(Self([[[u32::MAX; TILE]; TILE]; 8]))
    }

    fn zero(&mut self, program: TileProgram) {
        let (model, _place) = (self, ());
        match program {
            TileProgram::PanelsStay | TileProgram::BothStream => program!(zero full, simulate(model, _place)),
            TileProgram::HalfHeight => program!(zero half, simulate(model, _place)),
        }
    }

    unsafe fn steps(&mut self, program: TileProgram, operands: TileOperands, steps: usize) {
        let (model, mut place) = (self, operands);
        RAN.with_borrow_mut(|ran| {
            if !ran.contains(&program) {
                ran.push(program)
            }
        });
        for _ in 0..steps {
            // SAFETY: the caller's promise.
            unsafe {
                match program {
                    TileProgram::PanelsStay => program!(step panels_stay, simulate(model, place)),
                    TileProgram::BothStream => program!(step both_stream, simulate(model, place)),
                    TileProgram::HalfHeight => program!(step half_height, simulate(model, place)),
                }
            }
            place.left = place.left.wrapping_add(LEFT_LINES);
            place.right = place.right.map(|right| right.wrapping_add(RIGHT_LINES));
        }
    }

    unsafe fn store(&self, program: TileProgram, sums: *mut f32) {
        let (model, place) = (self, sums);
        // SAFETY: the caller's promise.
        unsafe {
            match program {
                TileProgram::PanelsStay | TileProgram::BothStream => {
                    program!(store full, simulate(model, place))
                }
                TileProgram::HalfHeight => program!(store half, simulate(model, place)),
            }
        }
    }
}
