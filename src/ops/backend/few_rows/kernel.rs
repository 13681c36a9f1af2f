//! What a task does, with AVX-512.

use super::blocks::{WeightBlock, WeightPart};
use super::{COLUMNS, DEPTH, FewRows, Output, PANELS, WeightRows};
use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Values of a vector, and of a line of the cache.
const VECTOR: usize = 16;
/// Vectors of a row of a panel.
const VECTORS: usize = COLUMNS / VECTOR;
/// Rows of a tile, at most.
const ROWS: usize = 6;
/// Terms from one fetch to the next.
const FETCH: usize = 4;

/// The panels of a block.
#[repr(align(64))]
struct PanelMemory(MaybeUninit<[f32; PANELS * DEPTH * COLUMNS]>);

pub(super) fn has_instructions() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl")
}

/// Writes these columns, as many as a block has, of all rows of the output. Not inlined: the panels would lie in every frame of
/// rayon's recursion.
///
/// # Safety
/// The CPU has AVX-512, with VL. x, the weight and the output have the elements of the product's size. Nothing else uses these
/// columns of the output, which are initialised if they are added to.
#[inline(never)]
pub(super) unsafe fn write_columns(product: FewRows, columns: Range<usize>, out: Output) {
    let (m, _, depth) = product.size;
    let mut panels = PanelMemory(MaybeUninit::uninit());
    let panels: *mut f32 = panels.0.as_mut_ptr().cast();
    let panel = |i: usize| panels.wrapping_add(i * DEPTH * COLUMNS);
    let mut block = WeightBlock::first(product, columns.clone());
    loop {
        let parts = block.panels().enumerate();
        for (i, part) in parts.clone() {
            // SAFETY: a block has at most `PANELS` panels, and the weight has their values.
            unsafe { pack(product, &part, panel(i)) };
        }
        let next = block.next(product);
        let mut ahead = Ahead::new(next.source(product), parts.clone().count() * m.div_ceil(ROWS));
        for (i, part) in parts {
            // SAFETY: packed above; the rest is the caller's promise.
            unsafe { multiply_panel(product, &part, panel(i), out, &mut ahead) };
        }
        if block.depth.end == depth {
            return;
        }
        block = next;
    }
}

/// Writes a panel of the weight to `to`, [terms of the sums, [`COLUMNS`]], with zeros for columns that it has not.
///
/// # Safety
/// The CPU has AVX-512; the weight has the panel's values; `to` has room for them, and begins a line of the cache.
#[target_feature(enable = "avx512f,avx512vl")]
unsafe fn pack(product: FewRows, part: &WeightBlock, to: *mut f32) {
    let from = part.source(product);
    // SAFETY: the caller's promise.
    unsafe {
        match product.weight_rows {
            WeightRows::Terms => copy_rows(from, to),
            WeightRows::Columns => transpose_rows(from, to),
        }
    }
}

/// # Safety
/// As for [`pack`].
#[target_feature(enable = "avx512f,avx512vl")]
unsafe fn copy_rows(from: WeightPart, to: *mut f32) {
    for row in 0..from.rows {
        for j in 0..VECTORS {
            // SAFETY: values that the mask leaves out are not read, and the row has the others.
            unsafe {
                let first = from.first.wrapping_add(row * from.stride + j * VECTOR);
                let values = _mm512_maskz_loadu_ps(mask(from.values, j), first);
                _mm512_store_ps(to.add(row * COLUMNS + j * VECTOR), values);
            }
        }
    }
}

/// # Safety
/// As for [`pack`]; the rows are columns of the panel.
#[target_feature(enable = "avx512f,avx512vl")]
unsafe fn transpose_rows(from: WeightPart, to: *mut f32) {
    let WeightPart { first, stride, rows, values } = from;
    let (whole_rows, whole) = (rows / VECTOR * VECTOR, values / VECTOR * VECTOR);
    for row in (0..whole_rows).step_by(VECTOR) {
        for i in (0..whole).step_by(VECTOR) {
            // SAFETY: 16 rows have 16 values from here.
            unsafe { transpose((first.add(row * stride + i), stride), to.add(i * COLUMNS + row)) };
        }
    }
    for i in 0..values {
        for row in if i < whole { whole_rows } else { 0 }..COLUMNS {
            // SAFETY: the value exists if the row does; the panel has the place.
            unsafe {
                let value = if row < rows { *first.add(row * stride + i) } else { 0.0 };
                *to.add(i * COLUMNS + row) = value;
            }
        }
    }
}

/// 16 values of each of 16 rows, as 16 rows of a panel.
///
/// # Safety
/// As for [`transpose_rows`].
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
unsafe fn transpose((from, stride): (*const f32, usize), to: *mut f32) {
    // quarters[q][i] has the values 4 q to 4 q + 3 of the rows i, 4 + i, 8 + i and 12 + i.
    let mut quarters = [[_mm512_setzero_ps(); 4]; 4];
    for (q, rows) in quarters.iter_mut().enumerate() {
        for (i, rows) in rows.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            let load = |j: usize| unsafe { _mm_loadu_ps(from.add((4 * j + i) * stride + 4 * q)) };
            let vector = _mm512_castps128_ps512(load(0));
            let vector = _mm512_mask_broadcast_f32x4(vector, 0x00f0, load(1));
            let vector = _mm512_mask_broadcast_f32x4(vector, 0x0f00, load(2));
            *rows = _mm512_mask_broadcast_f32x4(vector, 0xf000, load(3));
        }
    }
    for (q, rows) in quarters.into_iter().enumerate() {
        let low = |i: usize| _mm512_castps_pd(_mm512_unpacklo_ps(rows[i], rows[i + 1]));
        let high = |i: usize| _mm512_castps_pd(_mm512_unpackhi_ps(rows[i], rows[i + 1]));
        let (first, second) = ((low(0), low(2)), (high(0), high(2)));
        let columns = [
            _mm512_unpacklo_pd(first.0, first.1),
            _mm512_unpackhi_pd(first.0, first.1),
            _mm512_unpacklo_pd(second.0, second.1),
            _mm512_unpackhi_pd(second.0, second.1),
        ];
        for (i, values) in columns.into_iter().enumerate() {
            // SAFETY: the panel has the rows.
            unsafe { _mm512_store_ps(to.add((4 * q + i) * COLUMNS), _mm512_castpd_ps(values)) };
        }
    }
}

/// Multiplies all rows by a panel.
///
/// # Safety
/// As for [`write_columns`]; `values` is the panel.
unsafe fn multiply_panel(
    product: FewRows,
    part: &WeightBlock,
    values: *const f32,
    out: Output,
    ahead: &mut Ahead,
) {
    let (m, columns, depth) = product.size;
    let tiles = m.div_ceil(ROWS);
    for tile in 0..tiles {
        let rows = tile * m / tiles..(tile + 1) * m / tiles;
        let tile = Tile {
            x: product.x[rows.start * depth + part.depth.start..].as_ptr(),
            x_stride: depth,
            values,
            terms: part.depth.len(),
            // SAFETY: this task alone uses the columns; the output has the row.
            out: unsafe { out.elements.element(rows.start * columns + part.columns.start) },
            out_stride: columns,
            columns: part.columns.len(),
            scale: out.scale,
            accumulate: out.accumulate || part.depth.start > 0,
        };
        // SAFETY: the caller's promise; elements that are added to were written with the block before, or by the caller.
        unsafe {
            match rows.len() {
                2 => tile.multiply::<2>(ahead),
                3 => tile.multiply::<3>(ahead),
                4 => tile.multiply::<4>(ahead),
                5 => tile.multiply::<5>(ahead),
                ROWS => tile.multiply::<ROWS>(ahead),
                n => unreachable!("a tile of {n} rows of {m}"),
            }
        }
    }
}

/// Some rows of x times a panel.
struct Tile {
    /// The first term of the first row, and elements from a row to the next one.
    x: *const f32,
    x_stride: usize,
    /// The panel.
    values: *const f32,
    /// Terms of a sum.
    terms: usize,
    /// The first element of the first row, and elements from a row to the next one.
    out: *mut f32,
    out_stride: usize,
    /// Columns that the output has, at most [`COLUMNS`].
    columns: usize,
    scale: f32,
    accumulate: bool,
}

impl Tile {
    /// # Safety
    /// The CPU has AVX-512, with VL; x and the output have R rows, the panel its terms. The output is initialised if it is added to.
    #[target_feature(enable = "avx512f,avx512vl")]
    #[expect(clippy::needless_range_loop, reason = "with iterators the compiler keeps the sums in memory")]
    unsafe fn multiply<const R: usize>(&self, ahead: &mut Ahead) {
        let mut sums = [[_mm512_setzero_ps(); VECTORS]; R];
        let mut fetch = *ahead;
        for k in 0..self.terms {
            if k % FETCH == 0 {
                fetch.fetch();
            }
            let mut panel = [_mm512_setzero_ps(); VECTORS];
            for j in 0..VECTORS {
                // SAFETY: the panel has the term.
                panel[j] = unsafe { _mm512_load_ps(self.values.add(k * COLUMNS + j * VECTOR)) };
            }
            for i in 0..R {
                // SAFETY: x has the row and the term.
                let x = _mm512_set1_ps(unsafe { *self.x.add(i * self.x_stride + k) });
                for j in 0..VECTORS {
                    sums[i][j] = _mm512_fmadd_ps(panel[j], x, sums[i][j]);
                }
            }
        }
        *ahead = fetch;
        let scale = _mm512_set1_ps(self.scale);
        for i in 0..R {
            for j in 0..VECTORS {
                let (mask, out) =
                    (mask(self.columns, j), self.out.wrapping_add(i * self.out_stride + j * VECTOR));
                // SAFETY: elements that the mask leaves out are neither read nor written, and the output has the others.
                unsafe {
                    let mut y = _mm512_mul_ps(scale, sums[i][j]);
                    if self.accumulate {
                        y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, out));
                    }
                    _mm512_mask_storeu_ps(out, mask, y);
                }
            }
        }
    }
}

/// The values of vector `j` that exist if there are `n` in all.
fn mask(n: usize, j: usize) -> __mmask16 {
    let values = n.saturating_sub(j * VECTOR).min(VECTOR);
    ((1u32 << values) - 1) as __mmask16
}

/// The lines of a block that is to be multiplied next, as far as they are not fetched yet.
#[derive(Clone, Copy)]
struct Ahead {
    /// The first value of a row of the block; elements from a row of the weight to the next one; lines of a row.
    row: *const f32,
    stride: usize,
    lines: usize,
    /// The next line of the row, and how many are left in all.
    next: usize,
    left: usize,
    /// How many are fetched at a time.
    at_a_time: usize,
}

impl Ahead {
    /// Of a block that is to be fetched during `tiles` tiles.
    fn new(block: WeightPart, tiles: usize) -> Self {
        let lines = block.values.div_ceil(VECTOR);
        let left = block.rows * lines;
        let at_a_time = left.div_ceil(tiles * DEPTH / FETCH);
        Self { row: block.first, stride: block.stride, lines, next: 0, left, at_a_time }
    }

    /// Fetches some lines into the second-level cache.
    #[inline(always)]
    fn fetch(&mut self) {
        for _ in 0..self.at_a_time.min(self.left) {
            // SAFETY: a fetch reads nothing that the program sees, and does not fault.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(self.row.wrapping_add(self.next * VECTOR).cast()) };
            self.left -= 1;
            self.next += 1;
            if self.next == self.lines {
                (self.next, self.row) = (0, self.row.wrapping_add(self.stride));
            }
        }
    }
}
