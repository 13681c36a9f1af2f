//! The inner loops, and all unsafe code of the products. The public functions are safe: operands are slices with their
//! strides, checked against each other before a pointer is taken, and no two blocks of an output share an element.

// On other architectures there is no `Isa` with which these functions could be called, and their bodies are empty.
#![cfg_attr(not(target_arch = "x86_64"), allow(unused, unreachable_code))]

#[cfg(target_arch = "x86_64")]
pub(super) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod claims;
#[cfg(target_arch = "x86_64")]
mod element;
#[cfg(target_arch = "x86_64")]
mod fma;
mod operands;
mod output;

use super::isa::{InstructionSet, Isa};
use super::{PANEL, STEP};

#[cfg(target_arch = "x86_64")]
use crate::ops::cpu::low_mask;
#[cfg(target_arch = "x86_64")]
pub(super) use amx::is_granted as amx_is_granted;
#[cfg(target_arch = "x86_64")]
pub(super) use claims::ColumnClaims;
pub(crate) use operands::{Bf16Matrix, Left, PanelColumns, PanelRow, Panels, PanelsMut};
pub(crate) use output::{OutputBlock, OutputElement};
#[cfg(target_arch = "x86_64")]
pub(super) use {avx512::repeat_dpbf16, fma::repeat_fma};

/// How the sums of a product become its output.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Epilogue {
    /// Multiplies the sums.
    pub(crate) alpha: f32,
    /// Whether the product is added to the output; it replaces the output otherwise.
    pub(crate) accumulate: bool,
}

impl Epilogue {
    /// The sums are the output.
    pub(crate) const WRITE: Self = Self { alpha: 1.0, accumulate: false };

    /// The sums are added to the output.
    pub(crate) const ADD: Self = Self { alpha: 1.0, accumulate: true };

    /// The epilogue of the part of a product's sums that begins with value `start`: every part but the first accumulates.
    pub(super) fn for_cut(self, start: usize) -> Self {
        Self { accumulate: self.accumulate || start > 0, ..self }
    }
}

/// A product with sums over `depth` values of each row of `left`.
#[derive(Clone, Copy)]
pub(crate) struct BlockProduct<'a> {
    pub(crate) left: Left<'a>,
    pub(crate) right: Panels<'a>,
    pub(crate) depth: usize,
    pub(crate) epilogue: Epilogue,
}

/// `out = alpha * left right (+ out)`, on this thread.
///
/// # Panics
/// Panics if an operand is shorter than the shape.
pub(crate) fn multiply(isa: Isa, product: BlockProduct, out: &mut OutputBlock) {
    let BlockProduct { left, right, depth, .. } = product;
    let (rows, columns) = (out.rows.len(), out.columns.len());
    if rows == 0 || columns == 0 {
        return;
    }
    let lines = depth.next_multiple_of(STEP) / 2;
    assert!(left.extent(rows, depth) <= left.values.len(), "{rows} rows of {depth} values on the left");
    let panels = columns.div_ceil(PANEL);
    assert!(
        (panels - 1) * right.stride + lines <= right.lines.len(),
        "{panels} panels of {lines} panel rows"
    );
    // SAFETY: `isa` is proof of the instructions; all extents were checked, the output's as it was made.
    match isa.kind() {
        #[cfg(target_arch = "x86_64")]
        InstructionSet::Fma => unsafe { fma::multiply(product, out) },
        #[cfg(target_arch = "x86_64")]
        InstructionSet::Avx512 => unsafe { avx512::multiply(product, out) },
        #[cfg(target_arch = "x86_64")]
        InstructionSet::Amx => amx::multiply::<amx::Hardware>(isa, product, out),
    }
}

/// Packs up to 16 rows: panel row `p` of `panel` gets pair `p` of every row, and zeros for missing values, up to a whole
/// number of [`STEP`]s.
///
/// # Panics
/// Panics if a slice is shorter than the shape.
pub(crate) fn pack_rows(isa: Isa, from: Bf16Matrix, panel: &mut [PanelRow]) {
    assert!(from.rows <= PANEL && from.columns.next_multiple_of(STEP) / 2 <= panel.len());
    assert!(from.is_complete(), "{} rows of {} values", from.rows, from.columns);
    // SAFETY: `isa` is proof of the instructions; the extents were checked.
    match isa.kind() {
        #[cfg(target_arch = "x86_64")]
        InstructionSet::Fma | InstructionSet::Avx512 | InstructionSet::Amx => unsafe {
            avx512::pack_rows(from, panel.as_mut_ptr())
        },
    }
}

/// Packs up to 16 rows for a product that sums over rows: panel `c / 16` gets in its first 8 panel rows the pairs of rows
/// (0, 1), (2, 3) ... of column `c`, and zeros for missing values, up to a whole number of [`STEP`]s.
///
/// # Panics
/// Panics if a slice is shorter than the shape.
pub(crate) fn pack_columns(isa: Isa, from: Bf16Matrix, to: &mut PanelsMut) {
    assert!(from.rows <= PANEL && from.is_complete(), "{} rows of {} values", from.rows, from.columns);
    to.assert_room(from.columns);
    // SAFETY: `isa` is proof of the instructions; the extents were checked.
    match isa.kind() {
        #[cfg(target_arch = "x86_64")]
        InstructionSet::Fma | InstructionSet::Avx512 | InstructionSet::Amx => unsafe {
            avx512::pack_columns(from, to.lines.as_mut_ptr(), to.stride)
        },
    }
}

/// As [`pack_columns`], of 16 rows that [`pack_rows`] packed.
///
/// # Panics
/// Panics if a slice is shorter than the shape.
pub(crate) fn transpose_panel(isa: Isa, from: PanelColumns, to: &mut PanelsMut) {
    assert!(from.columns.next_multiple_of(STEP) / 2 <= from.lines.len());
    to.assert_room(from.columns);
    // SAFETY: `isa` is proof of the instructions; the extents were checked.
    match isa.kind() {
        #[cfg(target_arch = "x86_64")]
        InstructionSet::Fma | InstructionSet::Avx512 | InstructionSet::Amx => unsafe {
            avx512::transpose_panel(from, to.lines.as_mut_ptr(), to.stride)
        },
    }
}
