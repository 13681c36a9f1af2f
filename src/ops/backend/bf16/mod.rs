//! Products of bf16 matrices with sums in f32, on CPUs with AVX-512 or AMX: `y = x Wᵀ` and `dx = dy W` for a frozen
//! weight `W` [n, k] that is packed once, as it is loaded, and serves both directions.
//!
//! A *panel* holds 16 rows of `W`. A *panel row* (64 bytes, a line of the cache) holds one pair of columns of each of them:
//!
//! ```text
//! panel j, panel row p:   W[16j, 2p] W[16j, 2p+1]   W[16j+1, 2p] W[16j+1, 2p+1]   ...   W[16j+15, 2p] W[16j+15, 2p+1]
//! ```
//!
//! This is the order in which `vdpbf16ps` (16 lanes, a pair each) and AMX's `tdpbf16ps` (tiles of 16 panel rows) read
//! their right operand, and from which `vfmadd231ps` gets its operand by a shift and a mask ([`Isa`] says which instruction is
//! used). The left operand is read in place, row by row, except by AMX, which packs it into tiles. `dx = dy W` sums over rows
//! of `W`, so its panels hold pairs of rows: each task transposes the blocks that it needs, 16 by 32 values at a time in
//! registers. That costs about 5 cycles for a panel row, which is then used once for each row of `dy`. For AMX the transpose of
//! `W` may be packed too.
//!
//! `amx` has the products on AMX, `tasks` those of the other instructions.

#[cfg(target_arch = "x86_64")]
mod amx;
mod detect;
mod isa;
pub(crate) mod kernel;
mod packed_weight;
mod tasks;
#[cfg(test)]
mod tests;

pub(crate) use isa::Isa;
pub(crate) use kernel::{Epilogue, OutputElement};
pub(crate) use packed_weight::PackedWeight;

use half::bf16;
use kernel::{Bf16Matrix, PanelRow, PanelsMut};
use std::mem::MaybeUninit;
use std::ops::Range;

/// Rows of `W` in a panel.
pub(crate) const PANEL: usize = 16;

/// Columns that are packed at a time: panels have panel rows for a multiple of it.
pub(crate) const STEP: usize = 32;

/// A frozen matrix [n, k] on the right of a product.
#[derive(Clone, Copy)]
pub(crate) enum Right<'a> {
    /// Packed.
    Packed(&'a PackedWeight),
    /// Rows of `k` values, one after another: packed block by block during the product.
    Rows(&'a [bf16], usize),
}

impl Right<'_> {
    fn dims(&self) -> (usize, usize) {
        match self {
            Self::Packed(weight) => weight.dims(),
            Self::Rows(values, k) => (values.len() / (*k).max(1), *k),
        }
    }
}

/// The matrix that a product writes.
pub(crate) enum ProductOutput<'a, O> {
    /// The product is written; the elements need not be initialised before, and all are after.
    Write(&'a mut [MaybeUninit<O>]),
    /// The product is added to the elements.
    Accumulate(&'a mut [O]),
}

impl<'a, O> ProductOutput<'a, O> {
    /// The elements, and whether the product is added to them.
    fn into_elements(self) -> (&'a mut [MaybeUninit<O>], bool) {
        match self {
            Self::Write(elements) => (elements, false),
            // SAFETY: `MaybeUninit<O>` has the layout of `O`; a product writes nothing but values.
            Self::Accumulate(elements) => {
                (unsafe { &mut *(std::ptr::from_mut(elements) as *mut [MaybeUninit<O>]) }, true)
            }
        }
    }
}

/// `out [m, n] = alpha * x [m, k] Wᵀ (+ out)`, in f32 or rounded to bf16.
///
/// # Panics
/// Panics if the slices' lengths are not those of the shapes.
pub(crate) fn forward<O: OutputElement>(isa: Isa, x: &[bf16], w: Right, alpha: f32, out: ProductOutput<O>) {
    let (n, k) = w.dims();
    let Some((out, epilogue)) = checked(x, (k, n), alpha, out) else { return };
    // SAFETY: the output is initialised if the product is added to it.
    match isa.costs() {
        Some(costs) => unsafe { tasks::forward(isa, costs, (x, w), out, epilogue) },
        #[cfg(target_arch = "x86_64")]
        None => unsafe { amx::forward::<kernel::amx::Hardware, O>(isa, x, w, out, epilogue) },
        #[cfg(not(target_arch = "x86_64"))]
        None => unreachable!("there are no instructions"),
    }
}

/// `out [m, k] = alpha * dy [m, n] W (+ out)`, in f32 or rounded to bf16.
///
/// # Panics
/// Panics if the slices' lengths are not those of the shapes.
pub(crate) fn backward<O: OutputElement>(isa: Isa, dy: &[bf16], w: Right, alpha: f32, out: ProductOutput<O>) {
    let (n, k) = w.dims();
    let Some((out, epilogue)) = checked(dy, (n, k), alpha, out) else { return };
    // SAFETY: the output is initialised if the product is added to it.
    match isa.costs() {
        Some(costs) => unsafe { tasks::backward(isa, costs, (dy, w), out, epilogue) },
        #[cfg(target_arch = "x86_64")]
        None => unsafe { amx::backward::<kernel::amx::Hardware, O>(isa, dy, w, out, epilogue) },
        #[cfg(not(target_arch = "x86_64"))]
        None => unreachable!("there are no instructions"),
    }
}

/// The output of a product of `left` [m, depth] with a matrix [depth, width], and its epilogue; `None` if it has no elements.
fn checked<'a, O>(
    left: &[bf16],
    (depth, width): (usize, usize),
    alpha: f32,
    out: ProductOutput<'a, O>,
) -> Option<(&'a mut [MaybeUninit<O>], Epilogue)> {
    let (out, accumulate) = out.into_elements();
    if out.is_empty() {
        return None;
    }
    let m = out.len() / width.max(1);
    assert_eq!(
        (left.len(), out.len()),
        (m * depth, m * width),
        "operands of [{m}, {depth}] x [{depth}, {width}]"
    );
    Some((out, Epilogue { alpha, accumulate }))
}

/// Packs a matrix for a product that sums over its rows: a panel for each 16 columns.
pub(crate) fn pack_sums(isa: Isa, from: Bf16Matrix, to: &mut PanelsMut) {
    for (i, row) in (0..from.rows).step_by(PANEL).enumerate() {
        let rows = from.rows(row..(row + PANEL).min(from.rows));
        kernel::pack_columns(isa, rows, &mut to.skip_lines(i * PANEL / 2));
    }
    clear_half_step(from.rows, to);
}

/// Sets the second half of the last step to zero if the sums of `depth` values end in its first half: panels that are packed
/// 16 values at a time must hold full steps of 32.
fn clear_half_step(depth: usize, to: &mut PanelsMut) {
    if depth.div_ceil(PANEL) % 2 == 1 {
        let end = depth.next_multiple_of(STEP) / 2;
        let stride = to.stride;
        to.lines.chunks_mut(stride).for_each(|panel| panel[end - PANEL / 2..end].fill(PanelRow::ZERO));
    }
}

/// Ranges of the `depth` values over which a product sums, about equally long: of at most `most` values, which is a multiple
/// of [`STEP`], and, except for the last, of full steps.
fn cuts(depth: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let size = depth.div_ceil(depth.div_ceil(most).max(1)).next_multiple_of(STEP).max(STEP);
    // A product over no values is zero, and the zeros have to be written.
    (0..depth.max(1)).step_by(size).map(move |start| start..(start + size).min(depth))
}
