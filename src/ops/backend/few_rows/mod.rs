//! Products of up to a few hundred rows with a weight W [N, K] in f32, `y = x Wᵀ` and `dx = dy W`, on CPUs with AVX-512.
//!
//! `gemm` first copies both operands of a product into the order in which it reads them. For the 90 rows of an expert this
//! takes as long as the product itself. Here the rows stay where they are, and a task, which computes some columns of the output
//! for all rows, packs a block of the weight just before it is used:
//!
//! ```text
//! a block of the weight              panels [128, 64]                 tiles of 6 rows by 64 columns
//! y = x Wᵀ: 64 rows, 512 values  ->  up to 4, 32 kB each          ->  24 sums in registers: four vectors of a panel
//! dx = dy W: 128 rows, 256 values    (the first-level cache)          times one value of each row, 128 times
//! ```
//!
//! While a block is multiplied the next one is fetched into the second-level cache, line by line, so that memory's latency is
//! hidden. A sum has the same bits whatever the number of rows.

#[cfg(target_arch = "x86_64")]
mod blocks;
#[cfg(target_arch = "x86_64")]
mod kernel;
#[cfg(test)]
mod tests;

use super::cpu::Disjoint;
#[cfg(target_arch = "x86_64")]
use kernel::{has_instructions, write_columns};
use rayon::prelude::*;
use std::mem::MaybeUninit;
#[cfg(not(target_arch = "x86_64"))]
use std::ops::Range;
use std::ops::RangeInclusive;

/// Columns of the output in a panel: four vectors.
const COLUMNS: usize = 64;
/// Terms of a sum in a panel: 128 times 64 values are 32 kB.
const DEPTH: usize = 128;
/// Panels of a block.
const PANELS: usize = 4;

/// What the rows of the weight are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum WeightRows {
    /// Columns of the output: `y = x Wᵀ`.
    Columns,
    /// Terms of the sums: `dx = dy W`.
    Terms,
}

impl WeightRows {
    /// Rows of x with which `gemm` is slower. With fewer a panel is used too seldom to be worth its packing.
    fn few(self) -> RangeInclusive<usize> {
        match self {
            Self::Columns => 2..=300,
            Self::Terms => 8..=200,
        }
    }

    /// The most columns and terms of a block.
    fn block(self) -> (usize, usize) {
        match self {
            Self::Columns => (COLUMNS, PANELS * DEPTH),
            Self::Terms => (PANELS * COLUMNS, DEPTH),
        }
    }
}

/// A product of rows x [M, depth] with a weight: [M, columns].
#[derive(Clone, Copy)]
pub(crate) struct FewRows<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    /// M, columns, depth.
    size: (usize, usize, usize),
    weight_rows: WeightRows,
}

impl<'a> FewRows<'a> {
    /// `x Wᵀ` of `x` [M, K] and the weight [N, K]; `size` are M, N and K. `None` if another algorithm is better for these sizes, or
    /// the CPU has no AVX-512.
    pub(crate) fn forward(x: &'a [f32], weight: &'a [f32], size: (usize, usize, usize)) -> Option<Self> {
        Self { x, weight, size, weight_rows: WeightRows::Columns }.checked()
    }

    /// `dy W` of `dy` [M, N] and the weight [N, K]; `size` are M, N and K. `None` as in [`FewRows::forward`].
    pub(crate) fn backward(
        dy: &'a [f32],
        weight: &'a [f32],
        (m, n, k): (usize, usize, usize),
    ) -> Option<Self> {
        Self { x: dy, weight, size: (m, k, n), weight_rows: WeightRows::Terms }.checked()
    }

    fn checked(self) -> Option<Self> {
        let (m, columns, depth) = self.size;
        // With fewer than half of its columns a panel would be mostly zeros.
        let is_better = self.weight_rows.few().contains(&m) && columns >= COLUMNS / 2 && depth > 0;
        let is_complete = self.x.len() == m * depth && self.weight.len() == columns * depth;
        (is_better && is_complete && has_instructions()).then_some(self)
    }

    /// `out[M, columns] = scale * product (+ out if accumulate)`.
    ///
    /// # Panics
    /// Panics if `out` has another number of elements.
    ///
    /// # Safety
    /// The elements of `out` are initialised if the product accumulates.
    pub(crate) unsafe fn write(self, scale: f32, out: &mut [MaybeUninit<f32>], accumulate: bool) {
        let (m, columns, _) = self.size;
        assert_eq!(out.len(), m * columns, "elements of the output");
        let out = Output { elements: Disjoint::new(out), scale, accumulate };
        let width = self.task_columns();
        (0..columns.div_ceil(width)).into_par_iter().with_max_len(1).for_each(|task| {
            let columns = task * width..((task + 1) * width).min(columns);
            // SAFETY: `checked` found the instructions and all elements; the columns are this task's alone, and initialised if they
            // are added to, as the caller promises.
            unsafe { write_columns(self, columns, out) };
        });
    }

    /// Columns of a task: those of a block, or fewer if there were too few tasks for all threads.
    fn task_columns(self) -> usize {
        let a_thread = self.size.1 / rayon::current_num_threads() / COLUMNS * COLUMNS;
        self.weight_rows.block().0.min(a_thread.max(COLUMNS))
    }
}

/// Where a product goes, and what is done with its sums.
#[derive(Clone, Copy)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
struct Output<'a> {
    elements: Disjoint<'a, f32>,
    scale: f32,
    accumulate: bool,
}

#[cfg(not(target_arch = "x86_64"))]
fn has_instructions() -> bool {
    false
}

/// # Safety
/// Never called: [`has_instructions`] is false.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn write_columns(_: FewRows, _: Range<usize>, _: Output) {}
