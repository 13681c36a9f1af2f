//! Products of bf16 matrices with sums in f32, on CPUs with AVX-512 or AMX: `y = x Wᵀ` and `dx = dy W` for a frozen
//! weight `W` [n, k] that is packed once, as it is loaded, and serves both directions.
//!
//! A *panel* holds 16 rows of `W`, a *line* (64 bytes) one pair of columns of each of them:
//!
//! ```text
//! panel j, line p:   W[16j, 2p] W[16j, 2p+1]   W[16j+1, 2p] W[16j+1, 2p+1]   ...   W[16j+15, 2p] W[16j+15, 2p+1]
//! ```
//!
//! That is the order in which `vdpbf16ps` (16 lanes, a pair each) and AMX's `tdpbf16ps` (tiles of 16 lines) take
//! their right operand, and from which `vfmadd231ps` gets it by a shift and a mask ([`Isa`] says which is taken); the left
//! operand is read where it lies, row by row, but for AMX, which packs it into tiles. `dx = dy W` sums over rows of `W`, so
//! its panels hold pairs of rows: each task transposes the blocks that it needs, 16 by 32 values at a time in registers,
//! which costs about 5 cycles a line that is then used once a row of `dy`. For AMX the transpose of `W` may be packed too.
//!
//! `amx` has the products on AMX, this file those of the other instructions.

#[cfg(target_arch = "x86_64")]
mod amx;
mod detect;
mod isa;
pub(crate) mod kernel;
mod panels;
#[cfg(test)]
mod tests;

pub(crate) use isa::Isa;
pub(crate) use kernel::{Element, Then};
pub(crate) use panels::Panels;

use half::bf16;
use isa::Costs;
use kernel::{Left, Line, Out};
use rayon::prelude::*;
use std::cell::RefCell;
use std::ops::Range;

/// Rows of `W` in a panel.
pub(crate) const PANEL: usize = 16;

/// Columns that packing takes at a time: panels have lines for a multiple of it.
pub(crate) const STEP: usize = 32;

/// The most rows of a task.
const MAX_ROWS: usize = 512;

/// The fewest rows that are worth a task of their own: turning a panel costs as much as five of them.
const MIN_ROWS: usize = 48;

/// A frozen matrix [n, k] on the right of a product.
#[derive(Clone, Copy)]
pub(crate) enum Right<'a> {
    /// Packed.
    Panels(&'a Panels),
    /// Rows of `k` values, one after another: packed block by block as the product goes.
    Rows(&'a [bf16], usize),
}

impl Right<'_> {
    fn dims(&self) -> (usize, usize) {
        match self {
            Self::Panels(panels) => panels.dims(),
            Self::Rows(values, k) => (values.len() / (*k).max(1), *k),
        }
    }
}

/// `out [m, n] = x [m, k] Wᵀ`, in f32 or rounded to bf16.
///
/// # Panics
/// Slices whose lengths are not those of the shapes.
pub(crate) fn forward<O: Element>(isa: Isa, x: &[bf16], w: Right, out: &mut [O], then: Then) {
    let (n, k) = w.dims();
    if out.is_empty() {
        return;
    }
    let m = out.len() / n.max(1);
    assert_eq!((x.len(), out.len()), (m * k, m * n), "x and out of a product of {m} rows with [{n}, {k}]");
    let Some(costs) = isa.costs() else {
        #[cfg(target_arch = "x86_64")]
        amx::forward::<kernel::amx::Hardware, O>(isa, x, w, out, then);
        return;
    };
    tasks(costs, out, n, then.add, |mut out, scratch| {
        let left = Left::rows(x, k).from(out.rows.start, 0);
        for depth in blocks(costs, k) {
            let right = match w {
                Right::Panels(panels) => panels.operand(out.columns.start / PANEL).from(0, depth.start / 2),
                Right::Rows(values, _) => {
                    let stride = depth.len().next_multiple_of(STEP) / 2 + 1;
                    let scratch = first(scratch, out.columns.len().next_multiple_of(STEP) / PANEL * stride);
                    for (row, panel) in out.columns.clone().step_by(PANEL).zip(scratch.chunks_mut(stride)) {
                        let (from, rows) = (&values[row * k + depth.start..], PANEL.min(n - row));
                        kernel::pack_rows(isa, from, k, rows, depth.len(), panel);
                    }
                    kernel::Panels::new(scratch, stride)
                }
            };
            let then = Then { add: then.add || depth.start > 0, ..then };
            kernel::block(isa, left.from(0, depth.start / 2), right, depth.len(), &mut out, then);
        }
    });
}

/// `out [m, k] = dy [m, n] W`, in f32 or rounded to bf16.
///
/// # Panics
/// Slices whose lengths are not those of the shapes.
pub(crate) fn backward<O: Element>(isa: Isa, dy: &[bf16], w: Right, out: &mut [O], then: Then) {
    let (n, k) = w.dims();
    if out.is_empty() {
        return;
    }
    let m = out.len() / k.max(1);
    assert_eq!((dy.len(), out.len()), (m * n, m * k), "dy and out of a product of {m} rows with [{n}, {k}]");
    let Some(costs) = isa.costs() else {
        #[cfg(target_arch = "x86_64")]
        amx::backward::<kernel::amx::Hardware, O>(isa, dy, w, out, then);
        return;
    };
    // Panels are turned a step of columns, which are two panels, at a time.
    tasks(costs, out, k, then.add, |mut out, scratch| {
        let left = Left::rows(dy, n).from(out.rows.start, 0);
        let columns = out.columns.clone();
        for depth in blocks(costs, n) {
            let stride = depth.len().next_multiple_of(STEP) / 2 + 1;
            let scratch = first(scratch, out.columns.len().next_multiple_of(STEP) / PANEL * stride);
            match w {
                Right::Panels(panels) => {
                    for (i, row) in depth.clone().step_by(PANEL).enumerate() {
                        let from = &panels.lines(row / PANEL)[columns.start / 2..];
                        kernel::turn(
                            isa,
                            from,
                            panels.stride(),
                            columns.len(),
                            &mut scratch[i * PANEL / 2..],
                            stride,
                        );
                    }
                    clear_half_step(depth.len(), scratch, stride);
                }
                Right::Rows(values, _) => {
                    let from = &values[depth.start * k + columns.start..];
                    pack_sums(isa, from, (depth.len(), columns.len()), k, scratch, stride);
                }
            }
            let then = Then { add: then.add || depth.start > 0, ..then };
            let right = kernel::Panels::new(scratch, stride);
            kernel::block(isa, left.from(0, depth.start / 2), right, depth.len(), &mut out, then);
        }
    });
}

/// Packs a matrix [rows, columns], whose rows are `stride` values apart, for a product that sums over its rows: a panel
/// for each 16 columns, `panel_stride` lines apart.
pub(crate) fn pack_sums(
    isa: Isa,
    from: &[bf16],
    (rows, columns): (usize, usize),
    stride: usize,
    panels: &mut [Line],
    panel_stride: usize,
) {
    for (i, row) in (0..rows).step_by(PANEL).enumerate() {
        let to = &mut panels[i * PANEL / 2..];
        kernel::pack_columns(
            isa,
            &from[row * stride..],
            stride,
            PANEL.min(rows - row),
            columns,
            to,
            panel_stride,
        );
    }
    clear_half_step(rows, panels, panel_stride);
}

/// Panels that are packed 16 values of their sums at a time have to hold whole steps of 32.
fn clear_half_step(depth: usize, panels: &mut [Line], panel_stride: usize) {
    if depth.div_ceil(PANEL) % 2 == 1 {
        let end = depth.next_multiple_of(STEP) / 2;
        panels.chunks_mut(panel_stride).for_each(|panel| panel[end - PANEL / 2..end].fill(Line::ZERO));
    }
}

/// Cuts `out`, rows of `width` elements, into blocks for the threads that there are, and runs `f` on each, in f32 and with
/// what it holds where `load` is set, with lines that belong to its thread.
fn tasks<O: Element>(
    costs: Costs,
    out: &mut [O],
    width: usize,
    load: bool,
    f: impl Fn(Out, &mut Vec<Line>) + Sync,
) {
    thread_local! {
        static SCRATCH: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
    }
    let (rows, columns) = task(out.len() / width, width.div_ceil(PANEL), costs, rayon::current_num_threads());
    Out::blocks(out, width, rows, columns * PANEL).for_each(|block| {
        O::in_f32(block, load, |block| SCRATCH.with_borrow_mut(|scratch| f(block, scratch)))
    });
}

/// Rows and panels of a task of `m` rows and `panels` panels: those with which `threads` threads are done first.
fn task(m: usize, panels: usize, costs: Costs, threads: usize) -> (usize, usize) {
    let fewest = m.div_ceil(MAX_ROWS);
    let most = (m / MIN_ROWS).max(fewest);
    let (mut least, mut best) = (f64::INFINITY, (m, costs.panels));
    for cuts in fewest..=most {
        let rows = m.div_ceil(cuts);
        for pairs in (1..=costs.panels / 2).rev() {
            let columns = 2 * pairs;
            let rounds = (cuts * panels.div_ceil(columns)).div_ceil(threads);
            let columns = columns.min(panels.next_multiple_of(2));
            let cost = rounds as f64 * (rows as f64 + costs.turn) * (columns as f64 + costs.copy);
            if cost < least {
                (least, best) = (cost, (rows, columns));
            }
        }
    }
    best
}

/// Cuts the values that a product sums over such that the widest task's panels of them fill half of the second-level
/// cache. The cuts are the same for every task, so that sums do not depend on how many threads there are.
fn blocks(costs: Costs, depth: usize) -> impl Iterator<Item = Range<usize>> {
    let cache = gemm_common::cache::CACHE_INFO[1].cache_bytes;
    let most = (cache / 2 / (costs.panels * PANEL * size_of::<bf16>()) / STEP * STEP).max(STEP);
    cuts(depth, most)
}

/// Ranges of `depth` values that a product sums over, about equally long: of at most `most` values, a multiple of [`STEP`], and
/// of whole steps, but for the last.
fn cuts(depth: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let size = depth.div_ceil(depth.div_ceil(most).max(1)).next_multiple_of(STEP).max(STEP);
    // A product over nothing is zero, which has to be written.
    (0..depth.max(1)).step_by(size).map(move |start| start..(start + size).min(depth))
}

/// The first `n` lines, which are made where there are fewer.
fn first(lines: &mut Vec<Line>, n: usize) -> &mut [Line] {
    if lines.len() < n {
        lines.resize(n, Line::ZERO);
    }
    &mut lines[..n]
}
