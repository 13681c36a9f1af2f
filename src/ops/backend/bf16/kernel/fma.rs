//! The loops in AVX-512's f32, `vfmadd231ps`, for a CPU on which that is faster than its instructions for bf16: values are
//! widened to f32, which is exact. A task widens 128 values of its left operand and of 64 columns of its right one at a
//! time, and uses each for all of the other, so that the inner loop is one of f32 alone. A tile of 6 rows by 64 columns
//! keeps its 24 sums in registers.
//!
//! # Safety
//! Every function here needs `avx512f` and `avx512bw` ([`super::Isa`] is proof of them) and pointers to live memory of
//! the extents that it names. Nothing is read or written beyond them: partial rows, columns and pairs are masked.

use super::{BlockProduct, Epilogue, Left, OutputBlock, PANEL, PanelRow, avx512, low_mask};
use std::arch::x86_64::*;
use std::cell::RefCell;

/// Panels of a tile.
const WIDTH: usize = 4;

/// Values that a tile sums over at a time: its panels of them take 32 kB, which stay in a first-level cache of 48 and
/// stream from the second-level cache if it has 32.
const DEPTH: usize = 128;

/// The most rows of a tile of `V` panels: up to 24 sums leave registers for a line of each panel and a value of the left.
const fn rows<const V: usize>() -> usize {
    match V {
        4 => 6,
        3 => 8,
        _ => 12,
    }
}

/// One column of a panel in f32: a value of each of the 16 rows of the matrix.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct WidenedRow([f32; PANEL]);

/// A thread's memory for widened values.
struct FmaScratch {
    left: Vec<f32>,
    /// The panels of a tile, value by value: those of one value are neighbours.
    right: Vec<WidenedRow>,
}

/// The left operand in f32.
#[derive(Clone, Copy)]
struct WidenedLeft {
    values: *const f32,
    /// Values from a row to the next one.
    row: usize,
    /// Values from one of a row to the next of it.
    value: usize,
}

/// See [`super::multiply`].
///
/// # Safety
/// See the module; `left` has the rows of `out` of `depth` values, `right` its panels of `depth.div_ceil(2)` panel rows.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn multiply(product: BlockProduct, out: &mut OutputBlock) {
    let BlockProduct { left, right, depth, epilogue } = product;
    thread_local! {
        static SCRATCH: RefCell<FmaScratch> = const { RefCell::new(FmaScratch { left: Vec::new(), right: Vec::new() }) };
    }
    SCRATCH.with_borrow_mut(|scratch| {
        scratch.right.resize(WIDTH * DEPTH, WidenedRow([0.0; PANEL]));
        // A product over no values is zero, and the zeros have to be written.
        for start in (0..depth.max(1)).step_by(DEPTH) {
            let depth = (depth - start).min(DEPTH);
            let (left, right) = (left.from(0, start / 2), right.from(0, start / 2));
            let part = BlockProduct { left, right, depth, epilogue: epilogue.for_cut(start) };
            // SAFETY: the values from `start` on are inside both operands; the rest is the caller's promise.
            unsafe {
                let left = widen_left(left, out.rows.len(), depth, &mut scratch.left);
                columns(left, part, &mut scratch.right, out);
            }
        }
    });
}

/// A product with sums over up to [`DEPTH`] values; `left` is its left operand, and the right one is widened to `lines`.
///
/// # Safety
/// As for [`multiply`]; `lines` has room for the panels of a tile.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn columns(left: WidenedLeft, product: BlockProduct, lines: &mut [WidenedRow], out: &mut OutputBlock) {
    let BlockProduct { right, depth, epilogue, .. } = product;
    for column in (0..out.columns.len()).step_by(WIDTH * PANEL) {
        let width = (out.columns.len() - column).min(WIDTH * PANEL);
        let (panel, panels) = (column / PANEL, width.div_ceil(PANEL));
        let panel_start = |panel: usize| right.lines.as_ptr().wrapping_add(panel * right.stride);
        for i in 0..panels {
            // SAFETY: the panel exists by the caller's promise.
            unsafe { widen_panel(panel_start(panel + i), &mut lines[i..depth * panels], panels) };
        }
        // The panels that are widened next: those after these, or the next values of the first ones.
        let ahead = match column + WIDTH * PANEL < out.columns.len() {
            true => panel_start(panel + WIDTH),
            false => panel_start(0).wrapping_add(DEPTH / 2),
        };
        let strips = TileStrips {
            left,
            height: out.rows.len(),
            depth,
            right: lines.as_ptr(),
            ahead: Panel { lines: ahead, stride: right.stride },
            to: out.ptr.wrapping_add(column),
            stride: out.stride,
            mask: 0xffff >> (width.next_multiple_of(PANEL) - width),
            epilogue,
        };
        // SAFETY: the columns are inside the output; the lines were written.
        unsafe {
            match panels {
                1 => strips.run::<1>(),
                2 => strips.run::<2>(),
                3 => strips.run::<3>(),
                _ => strips.run::<4>(),
            }
        }
    }
}

/// Panels that are prefetched meanwhile; they need not exist.
struct Panel {
    lines: *const PanelRow,
    stride: usize,
}

/// All rows by the panels of a tile.
struct TileStrips {
    left: WidenedLeft,
    height: usize,
    depth: usize,
    right: *const WidenedRow,
    ahead: Panel,
    /// The first column of the output, and its elements from a row to the next.
    to: *mut f32,
    stride: usize,
    /// Columns of the last panel that exist.
    mask: __mmask16,
    epilogue: Epilogue,
}

impl TileStrips {
    /// All rows by `V` panels.
    ///
    /// # Safety
    /// See the module; the operands and the output have the extents.
    #[target_feature(enable = "avx512f")]
    unsafe fn run<const V: usize>(&self) {
        const LINES: usize = WIDTH * DEPTH / 2;
        let fetched = LINES.div_ceil(self.height.div_ceil(rows::<V>()));
        for (strip, row) in (0..self.height).step_by(rows::<V>()).enumerate() {
            for i in strip * fetched..((strip + 1) * fetched).min(LINES) {
                let line = i / WIDTH + i % WIDTH * self.ahead.stride;
                _mm_prefetch::<_MM_HINT_T1>(self.ahead.lines.wrapping_add(line).cast());
            }
            // SAFETY: rows from `row` on are inside both matrices.
            unsafe {
                match (self.height - row).min(rows::<V>()) {
                    1 => self.tile::<1, V>(row),
                    2 => self.tile::<2, V>(row),
                    3 => self.tile::<3, V>(row),
                    4 => self.tile::<4, V>(row),
                    5 => self.tile::<5, V>(row),
                    6 => self.tile::<6, V>(row),
                    7 => self.tile::<7, V>(row),
                    8 => self.tile::<8, V>(row),
                    9 => self.tile::<9, V>(row),
                    10 => self.tile::<10, V>(row),
                    11 => self.tile::<11, V>(row),
                    _ => self.tile::<12, V>(row),
                }
            }
        }
    }

    /// `R` rows from `row` on by `V` panels.
    ///
    /// # Safety
    /// As for [`TileStrips::run`].
    // Loops over indices: with iterators over the sums the compiler leaves them in memory.
    #[allow(clippy::needless_range_loop)]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn tile<const R: usize, const V: usize>(&self, row: usize) {
        let mut x = self.left.values.wrapping_add(row * self.left.row);
        let mut line = self.right;
        let mut sums = [[_mm512_setzero_ps(); V]; R];
        // SAFETY: lines and values below `depth` and the output's elements are inside by the caller's promise.
        unsafe {
            for _ in 0..self.depth {
                let mut weights = [_mm512_setzero_ps(); V];
                for v in 0..V {
                    weights[v] = _mm512_load_ps(line.add(v).cast());
                }
                for r in 0..R {
                    let x = _mm512_set1_ps(*x.add(r * self.left.row));
                    for v in 0..V {
                        sums[r][v] = _mm512_fmadd_ps(x, weights[v], sums[r][v]);
                    }
                }
                x = x.wrapping_add(self.left.value);
                line = line.wrapping_add(V);
            }
            for r in 0..R {
                for v in 0..V {
                    let mask = if v + 1 == V { self.mask } else { 0xffff };
                    let to = self.to.add((row + r) * self.stride + v * PANEL);
                    avx512::store_masked(sums[r][v], to, mask, self.epilogue);
                }
            }
        }
    }
}

/// The values of `rows` rows, up to [`DEPTH`] each, in f32.
///
/// # Safety
/// See the module; `left` has the rows.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn widen_left(left: Left, rows: usize, depth: usize, to: &mut Vec<f32>) -> WidenedLeft {
    to.resize(to.len().max(rows * DEPTH), 0.0);
    let from = left.values.as_ptr();
    if left.pair == 2 {
        let full = depth - depth % PANEL;
        for (row, to) in to.chunks_exact_mut(DEPTH).take(rows).enumerate() {
            // SAFETY: a row has room for [`DEPTH`] values; the mask leaves out the values after the operand's row.
            unsafe {
                let (from, to) = (from.add(row * left.row), to.as_mut_ptr());
                for start in (0..full).step_by(PANEL) {
                    _mm512_storeu_ps(to.add(start), widen_half(_mm256_loadu_si256(from.add(start).cast())));
                }
                if full < depth {
                    let half = _mm512_maskz_loadu_epi16(low_mask(depth - full), from.add(full).cast());
                    _mm512_storeu_ps(to.add(full), widen_half(_mm512_castsi512_si256(half)));
                }
            }
        }
        return WidenedLeft { values: to.as_ptr(), row: DEPTH, value: 1 };
    }
    // Interleaved: the pairs of all rows lie side by side, and become two rows of the transpose.
    for value in (0..depth).step_by(2) {
        for row in (0..rows).step_by(PANEL) {
            let both = value + 1 < depth;
            // SAFETY: the masks leave out rows that do not exist, and the last pair's second value if it has none.
            unsafe {
                let mask = (low_mask(rows - row) & 0xffff) as __mmask16;
                let halves = low_mask(2 * (rows - row) - usize::from(!both));
                let from = from.add(value / 2 * left.pair + 2 * row);
                let [first, second] = widen(_mm512_maskz_loadu_epi16(halves, from.cast()));
                let to = to.as_mut_ptr().add(value * rows + row);
                _mm512_mask_storeu_ps(to, mask, first);
                if both {
                    _mm512_mask_storeu_ps(to.add(rows), mask, second);
                }
            }
        }
    }
    WidenedLeft { values: to.as_ptr(), row: 1, value: rows }
}

/// Widens the first values of a panel to every `step`-th row of `to`.
///
/// # Safety
/// See the module; `panel` has the values.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn widen_panel(panel: *const PanelRow, to: &mut [WidenedRow], step: usize) {
    for (pair, to) in to.chunks_mut(2 * step).enumerate() {
        // SAFETY: the caller's promise; a widened row is 16 values.
        unsafe {
            let [first, second] = widen(_mm512_load_si512(panel.add(pair).cast()));
            _mm512_store_ps(to[0].0.as_mut_ptr(), first);
            if let Some(to) = to.get_mut(step) {
                _mm512_store_ps(to.0.as_mut_ptr(), second);
            }
        }
    }
}

/// 16 values of bf16 in f32.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn widen_half(half: __m256i) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)))
}

/// The first and the second of each of 16 pairs of bf16, in f32.
#[inline]
#[target_feature(enable = "avx512f")]
fn widen(pairs: __m512i) -> [__m512; 2] {
    let high = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32));
    [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)), _mm512_castsi512_ps(high)]
}

/// Twelve independent sums in registers, `times` times: for measuring the speed of `vfmadd231ps`.
///
/// # Safety
/// See the module.
#[target_feature(enable = "avx512f")]
pub(in crate::ops::backend::bf16) unsafe fn repeat_fma(times: usize) -> f32 {
    let mut sums = [_mm512_setzero_ps(); 12];
    // Opaque, so that the sums are not known beforehand.
    let (a, b) = std::hint::black_box((_mm512_set1_ps(1.0), _mm512_set1_ps(1.0)));
    for _ in 0..times {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(a, b, *sum);
        }
    }
    sums.into_iter().map(|sum| _mm512_reduce_add_ps(sum)).sum()
}
