//! Products on AMX: how they are cut for threads, and the source of the right operand.
//!
//! A thread packs its rows to tiles once and multiplies them by one pair of panels (32 columns) after another. It claims each
//! pair one product ahead, so that it can prefetch or pack the pair meanwhile (`kernel/amx`). Sums over more than
//! [`MOST_DEPTH`] values are cut: a thread then claims up to [`CLAIMED`] columns, and adds the cuts' sums in f32.
//!
//! Sums depend on the operands only: neither on the cut among threads nor on which copy of the weight is read.

mod right;
mod split;
#[cfg(test)]
mod tests;

use super::kernel::amx::{MOST_DEPTH, OutputColumns, Registers, RowsProduct, SIDE, cuts};
use super::kernel::{ColumnClaims, Epilogue, Left, OutputBlock, OutputElement, PanelRow, Panels};
use super::{Isa, Right};
use half::bf16;
use rayon::prelude::*;
use right::{Region, RightColumns};
use split::TaskSplit;
use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Columns that a thread claims at a time if sums are cut: their rows are packed again for each cut and claim, which costs
/// a few per cent of so many columns' products.
const CLAIMED: usize = 16 * SIDE;

/// Panels of the columns that are being multiplied and of the next ones, if they are packed during the product.
type Strips = [Vec<PanelRow>; 2];

/// See [`super::forward`].
pub(super) fn forward<R: Registers, O: OutputElement>(
    isa: Isa,
    x: &[bf16],
    w: Right,
    out: &mut [MaybeUninit<O>],
    epilogue: Epilogue,
) {
    let (n, k) = w.dims();
    let right = match w {
        Right::Packed(weight) => RightColumns::Panels(weight.panels(0)),
        Right::Rows(values, k) => RightColumns::Rows { values, k },
    };
    multiply::<R, O>(isa, (x, k), right, (out, n), epilogue);
}

/// See [`super::backward`].
pub(super) fn backward<R: Registers, O: OutputElement>(
    isa: Isa,
    dy: &[bf16],
    w: Right,
    out: &mut [MaybeUninit<O>],
    epilogue: Epilogue,
) {
    let (n, k) = w.dims();
    let right = match w {
        Right::Packed(weight) => match weight.transpose() {
            Some(transpose) => RightColumns::Panels(transpose),
            None => RightColumns::TransposedPanels(weight),
        },
        Right::Rows(values, k) => RightColumns::TransposedRows { values, k },
    };
    multiply::<R, O>(isa, (dy, n), right, (out, k), epilogue);
}

/// `out [m, width] = left [m, depth] right [depth, width]`.
fn multiply<R: Registers, O: OutputElement>(
    isa: Isa,
    (left, depth): (&[bf16], usize),
    right: RightColumns,
    (out, width): (&mut [MaybeUninit<O>], usize),
    epilogue: Epilogue,
) {
    let cut = cuts(depth).next().map_or(0, |cut| cut.len());
    let split = TaskSplit::new(out.len() / width, width, cut, rayon::current_num_threads());
    let claimed = if depth <= MOST_DEPTH { SIDE } else { split.columns.min(CLAIMED) };
    // SAFETY: the elements are read only if the epilogue accumulates; then the caller's output is initialised.
    let claims = unsafe { ColumnClaims::new(out, width, split.rows, claimed) };
    (0..claims.len() * split.across).into_par_iter().with_max_len(1).for_each(|task| {
        let task = AmxTask { isa, left, depth, right, claims: &claims[task / split.across], epilogue };
        match depth <= MOST_DEPTH {
            true => task.run::<R>(),
            false => task.run_cut::<R>(),
        }
    });
}

/// The work of a thread: some rows, and the columns that it claims.
struct AmxTask<'a, 'o, O> {
    isa: Isa,
    left: &'a [bf16],
    depth: usize,
    right: RightColumns<'a>,
    claims: &'a ColumnClaims<'o, O>,
    epilogue: Epilogue,
}

impl<O: OutputElement> AmxTask<'_, '_, O> {
    /// All sums at once.
    fn run<R: Registers>(&self) {
        self.multiply::<R, O>(0..self.depth, self.epilogue, || self.claims.claim());
    }

    /// Cut by cut, in f32.
    fn run_cut<R: Registers>(&self) {
        while let Some(out) = self.claims.claim() {
            O::with_f32_block(out, self.epilogue.accumulate, |mut out| {
                for cut in cuts(self.depth) {
                    let epilogue = self.epilogue.for_cut(cut.start);
                    let mut columns = out.split(SIDE);
                    self.multiply::<R, f32>(cut, epilogue, || columns.next());
                }
            });
        }
    }

    /// Sums over the values of `cut`, for the columns that `claim` returns.
    fn multiply<'c, R: Registers, T: OutputElement>(
        &self,
        cut: Range<usize>,
        epilogue: Epilogue,
        mut claim: impl FnMut() -> Option<OutputBlock<'c, T>>,
    ) {
        thread_local! {
            static STRIPS: RefCell<Strips> = const { RefCell::new([Vec::new(), Vec::new()]) };
        }
        let Some(first) = claim() else { return };
        let left = Left::rows(self.left, self.depth).from(first.rows.start, cut.start / 2);
        let product = RowsProduct { left, rows: first.rows.len(), depth: cut.len(), epilogue };
        STRIPS.with_borrow_mut(|strips| {
            let (isa, right) = (self.isa, self.right);
            let mut columns =
                ColumnsAhead { isa, right, cut, columns: 0..0, next: Some(first), claim, strips };
            columns.prepare(0, 1);
            product.run::<R, T>(isa, &mut columns);
        });
    }
}

/// Columns that are claimed one ahead.
struct ColumnsAhead<'a, 'o, T, C> {
    isa: Isa,
    right: RightColumns<'a>,
    /// Values that are summed over.
    cut: Range<usize>,
    /// Columns that are being multiplied.
    columns: Range<usize>,
    next: Option<OutputBlock<'o, T>>,
    claim: C,
    /// Panels of these columns, and of the next ones.
    strips: &'a mut Strips,
}

impl<'o, T: Send, C: FnMut() -> Option<OutputBlock<'o, T>>> ColumnsAhead<'_, 'o, T, C> {
    /// Packs a share of the next columns' panels, if they are packed.
    fn prepare(&mut self, share: usize, shares: usize) {
        if let (Some(next), false) = (&self.next, self.right.is_packed()) {
            let region = Region { isa: self.isa, columns: &next.columns, cut: &self.cut };
            self.right.pack(region, &mut self.strips[1], (share, shares));
        }
    }
}

impl<'o, T: Send, C: FnMut() -> Option<OutputBlock<'o, T>>> OutputColumns<'o, T>
    for ColumnsAhead<'_, 'o, T, C>
{
    fn next(&mut self) -> Option<OutputBlock<'o, T>> {
        let out = self.next.take()?;
        self.next = (self.claim)();
        self.columns = out.columns.clone();
        self.strips.swap(0, 1);
        Some(out)
    }

    fn operands(&mut self) -> (Panels<'_>, impl FnMut(usize, usize)) {
        let Self { isa, right, cut, columns, next, strips, .. } = self;
        let (isa, right) = (*isa, *right);
        let [strip, next_strip] = &mut **strips;
        let next = next.as_ref().map(|next| next.columns.clone());
        let cut = &*cut;
        let panels = right.panels(columns, cut, strip);
        (panels, move |share, shares| {
            if let Some(next) = &next {
                right.prepare(Region { isa, columns: next, cut }, next_strip, (share, shares));
            }
        })
    }
}
