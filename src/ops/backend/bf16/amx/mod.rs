//! Products on AMX: how they are cut for threads, and where the right operand comes from.
//!
//! A thread packs its rows to tiles once and multiplies them by one pair of panels (32 columns) after another, which it
//! claims one ahead, so that it can prefetch or pack it meanwhile (`kernel/amx`). Sums over more than
//! [`MOST_DEPTH`] values are cut: a thread then claims up to [`CLAIMED`] columns, and adds the cuts' sums in f32.
//!
//! Sums depend on nothing but the operands: neither on the cut among threads nor on which copy of the weight is read.

mod right;
mod split;
#[cfg(test)]
mod tests;

use super::kernel::amx::{Columns, MOST_DEPTH, Product, Registers, SIDE, cuts};
use super::kernel::{self, Claims, Element, Left, Line, Out, Then};
use super::{Isa, Right};
use half::bf16;
use rayon::prelude::*;
use right::{Region, RightColumns};
use split::Split;
use std::cell::RefCell;
use std::ops::Range;

/// Columns that a thread claims at a time if sums are cut: their rows are packed again for each cut and claim, which costs
/// a few per cent of so many columns' products.
const CLAIMED: usize = 16 * SIDE;

/// Panels of the next columns and of those that are being multiplied, if they are packed on the way.
type Strips = [Vec<Line>; 2];

/// See [`super::forward`].
pub(super) fn forward<R: Registers, O: Element>(isa: Isa, x: &[bf16], w: Right, out: &mut [O], then: Then) {
    let (n, k) = w.dims();
    let right = match w {
        Right::Panels(panels) => RightColumns::Panels(panels.operand(0)),
        Right::Rows(values, k) => RightColumns::Rows { values, k },
    };
    multiply::<R, O>(isa, (x, k), right, (out, n), then);
}

/// See [`super::backward`].
pub(super) fn backward<R: Registers, O: Element>(isa: Isa, dy: &[bf16], w: Right, out: &mut [O], then: Then) {
    let (n, k) = w.dims();
    let right = match w {
        Right::Panels(panels) => match panels.transpose() {
            Some(transpose) => RightColumns::Panels(transpose),
            None => RightColumns::TransposedPanels(panels),
        },
        Right::Rows(values, k) => RightColumns::TransposedRows { values, k },
    };
    multiply::<R, O>(isa, (dy, n), right, (out, k), then);
}

/// `out [m, width] = left [m, depth] right [depth, width]`.
fn multiply<R: Registers, O: Element>(
    isa: Isa,
    (left, depth): (&[bf16], usize),
    right: RightColumns,
    (out, width): (&mut [O], usize),
    then: Then,
) {
    let cut = cuts(depth).next().map_or(0, |cut| cut.len());
    let split = Split::new(out.len() / width, width, cut, rayon::current_num_threads());
    let claimed = if depth <= MOST_DEPTH { SIDE } else { split.columns.min(CLAIMED) };
    let claims = Claims::new(out, width, split.rows, claimed);
    (0..claims.len() * split.across).into_par_iter().with_max_len(1).for_each(|task| {
        let task = Task { isa, left, depth, right, claims: &claims[task / split.across], then };
        match depth <= MOST_DEPTH {
            true => task.run::<R>(),
            false => task.run_cut::<R>(),
        }
    });
}

/// What a thread does: some rows, and the columns that it claims.
struct Task<'a, 'o, O> {
    isa: Isa,
    left: &'a [bf16],
    depth: usize,
    right: RightColumns<'a>,
    claims: &'a Claims<'o, O>,
    then: Then,
}

impl<O: Element> Task<'_, '_, O> {
    /// All sums at once.
    fn run<R: Registers>(&self) {
        self.multiply::<R, O>(0..self.depth, self.then, || self.claims.claim());
    }

    /// Cut by cut, in f32.
    fn run_cut<R: Registers>(&self) {
        while let Some(out) = self.claims.claim() {
            O::in_f32(out, self.then.add, |mut out| {
                for cut in cuts(self.depth) {
                    let then = Then { add: self.then.add || cut.start > 0, ..self.then };
                    let mut columns = out.split(SIDE);
                    self.multiply::<R, f32>(cut, then, || columns.next());
                }
            });
        }
    }

    /// Sums over the values of `cut`, of the columns that `claim` gives.
    fn multiply<'c, R: Registers, T: Element>(
        &self,
        cut: Range<usize>,
        then: Then,
        mut claim: impl FnMut() -> Option<Out<'c, T>>,
    ) {
        thread_local! {
            static STRIPS: RefCell<Strips> = const { RefCell::new([Vec::new(), Vec::new()]) };
        }
        let Some(first) = claim() else { return };
        let left = Left::rows(self.left, self.depth).from(first.rows.start, cut.start / 2);
        let product = Product { left, rows: first.rows.len(), depth: cut.len(), then };
        STRIPS.with_borrow_mut(|strips| {
            let (isa, right) = (self.isa, self.right);
            let mut columns = Ahead { isa, right, cut, columns: 0..0, next: Some(first), claim, strips };
            columns.prepare(0, 1);
            product.run::<R, T>(isa, &mut columns);
        });
    }
}

/// Columns that are claimed one ahead.
struct Ahead<'a, 'o, T, C> {
    isa: Isa,
    right: RightColumns<'a>,
    /// Values that are summed over.
    cut: Range<usize>,
    /// Columns that are being multiplied.
    columns: Range<usize>,
    next: Option<Out<'o, T>>,
    claim: C,
    /// Panels of these columns, and of the next ones.
    strips: &'a mut Strips,
}

impl<'o, T: Send, C: FnMut() -> Option<Out<'o, T>>> Ahead<'_, 'o, T, C> {
    /// Packs a share of the next columns' panels, if they are packed.
    fn prepare(&mut self, share: usize, shares: usize) {
        if let (Some(next), false) = (&self.next, self.right.is_packed()) {
            let region = Region { isa: self.isa, columns: &next.columns, cut: &self.cut };
            self.right.pack(region, &mut self.strips[1], (share, shares));
        }
    }
}

impl<'o, T: Send, C: FnMut() -> Option<Out<'o, T>>> Columns<'o, T> for Ahead<'_, 'o, T, C> {
    fn next(&mut self) -> Option<Out<'o, T>> {
        let out = self.next.take()?;
        self.next = (self.claim)();
        self.columns = out.columns.clone();
        self.strips.swap(0, 1);
        Some(out)
    }

    fn operands(&mut self) -> (kernel::Panels<'_>, impl FnMut(usize, usize)) {
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
