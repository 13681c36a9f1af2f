//! Products on AVX-512: how they are cut into tasks.

use super::isa::Costs;
use super::kernel::{self, Bf16Matrix, BlockProduct, Left, OutputBlock, PanelColumns, PanelRow, PanelsMut};
use super::{Epilogue, Isa, OutputElement, PANEL, Right, STEP, clear_half_step, cuts, pack_sums};
use half::bf16;
use rayon::prelude::*;
use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::ops::Range;

/// The most rows of a task.
const MAX_ROWS: usize = 512;

/// The fewest rows that are worth a task of their own: transposing a panel costs as much as five of them.
const MIN_ROWS: usize = 48;

/// See [`super::forward`].
pub(super) fn forward<O: OutputElement>(
    isa: Isa,
    costs: Costs,
    (x, w): (&[bf16], Right),
    out: &mut [MaybeUninit<O>],
    epilogue: Epilogue,
) {
    let (n, k) = w.dims();
    run(costs, (out, n), epilogue.accumulate, |mut out, scratch| {
        let left = Left::rows(x, k).from(out.rows.start, 0);
        for depth in blocks(costs, k) {
            let right = match w {
                Right::Packed(weight) => weight.panels(out.columns.start / PANEL).from(0, depth.start / 2),
                Right::Rows(values, _) => {
                    let mut panels = scratch_panels(scratch, depth.len(), out.columns.len());
                    for (i, row) in out.columns.clone().step_by(PANEL).enumerate() {
                        let rows = PANEL.min(n - row);
                        let from = Bf16Matrix {
                            values: &values[row * k + depth.start..],
                            stride: k,
                            rows,
                            columns: depth.len(),
                        };
                        kernel::pack_rows(isa, from, panels.panel(i));
                    }
                    panels.into_panels()
                }
            };
            let epilogue = epilogue.for_cut(depth.start);
            let left = left.from(0, depth.start / 2);
            kernel::multiply(isa, BlockProduct { left, right, depth: depth.len(), epilogue }, &mut out);
        }
    });
}

/// See [`super::backward`]. Panels are transposed a step of columns, which are two panels, at a time.
pub(super) fn backward<O: OutputElement>(
    isa: Isa,
    costs: Costs,
    (dy, w): (&[bf16], Right),
    out: &mut [MaybeUninit<O>],
    epilogue: Epilogue,
) {
    let (n, k) = w.dims();
    run(costs, (out, k), epilogue.accumulate, |mut out, scratch| {
        let left = Left::rows(dy, n).from(out.rows.start, 0);
        let columns = out.columns.clone();
        for depth in blocks(costs, n) {
            let mut panels = scratch_panels(scratch, depth.len(), columns.len());
            match w {
                Right::Packed(weight) => {
                    for (i, row) in depth.clone().step_by(PANEL).enumerate() {
                        let from = PanelColumns {
                            lines: &weight.panel(row / PANEL)[columns.start / 2..],
                            stride: weight.stride(),
                            columns: columns.len(),
                        };
                        kernel::transpose_panel(isa, from, &mut panels.skip_lines(i * PANEL / 2));
                    }
                    clear_half_step(depth.len(), &mut panels);
                }
                Right::Rows(values, _) => {
                    let values = &values[depth.start * k + columns.start..];
                    let from = Bf16Matrix { values, stride: k, rows: depth.len(), columns: columns.len() };
                    pack_sums(isa, from, &mut panels);
                }
            }
            let (right, epilogue) = (panels.into_panels(), epilogue.for_cut(depth.start));
            let left = left.from(0, depth.start / 2);
            kernel::multiply(isa, BlockProduct { left, right, depth: depth.len(), epilogue }, &mut out);
        }
    });
}

/// Cuts `out`, rows of `width` elements, into blocks for the threads of the pool, and runs `f` on each block in f32 with the
/// scratch memory of its thread. The block holds the elements of `out` if `load` is set, and unspecified values otherwise.
fn run<O: OutputElement>(
    costs: Costs,
    (out, width): (&mut [MaybeUninit<O>], usize),
    load: bool,
    f: impl Fn(OutputBlock, &mut Vec<PanelRow>) + Sync,
) {
    thread_local! {
        static SCRATCH: RefCell<Vec<PanelRow>> = const { RefCell::new(Vec::new()) };
    }
    let (rows, columns) =
        task_size(out.len() / width, width.div_ceil(PANEL), costs, rayon::current_num_threads());
    // SAFETY: the blocks' elements are read only if `load` is set; then the caller's output is initialised.
    let blocks = unsafe { OutputBlock::blocks(out, width, rows, columns * PANEL) };
    blocks.for_each(|block| {
        O::with_f32_block(block, load, |block| SCRATCH.with_borrow_mut(|scratch| f(block, scratch)))
    });
}

/// Rows and panels of a task of a product of `m` rows and `panels` panels: those with which `threads` threads end first.
pub(super) fn task_size(m: usize, panels: usize, costs: Costs, threads: usize) -> (usize, usize) {
    let fewest = m.div_ceil(MAX_ROWS);
    let most = (m / MIN_ROWS).max(fewest);
    let (mut least, mut best) = (f64::INFINITY, (m, costs.panels));
    for cuts in fewest..=most {
        let rows = m.div_ceil(cuts);
        for pairs in (1..=costs.panels / 2).rev() {
            let columns = 2 * pairs;
            let rounds = (cuts * panels.div_ceil(columns)).div_ceil(threads);
            let columns = columns.min(panels.next_multiple_of(2));
            let cost = rounds as f64 * (rows as f64 + costs.transpose) * (columns as f64 + costs.copy);
            if cost < least {
                (least, best) = (cost, (rows, columns));
            }
        }
    }
    best
}

/// Cuts the values over which a product sums such that the widest task's panels of them fill half of the second-level
/// cache. The cuts are the same for every task, so that sums do not depend on the number of threads.
pub(super) fn blocks(costs: Costs, depth: usize) -> impl Iterator<Item = Range<usize>> {
    let cache = gemm_common::cache::CACHE_INFO[1].cache_bytes;
    let most = (cache / 2 / (costs.panels * PANEL * size_of::<bf16>()) / STEP * STEP).max(STEP);
    cuts(depth, most)
}

/// Panels in `scratch` for `columns` columns with sums of `depth` values; the memory grows if it is too small.
fn scratch_panels(scratch: &mut Vec<PanelRow>, depth: usize, columns: usize) -> PanelsMut<'_> {
    let stride = depth.next_multiple_of(STEP) / 2 + 1;
    let lines = columns.next_multiple_of(STEP) / PANEL * stride;
    if scratch.len() < lines {
        scratch.resize(lines, PanelRow::ZERO);
    }
    PanelsMut { lines: &mut scratch[..lines], stride }
}
