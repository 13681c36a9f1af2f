//! The loops in AVX-512 with BF16: `vdpbf16ps` multiplies 16 pairs of bf16 and adds both products of a pair to
//! one f32. A tile of 6 rows by 64 columns keeps its 24 sums in registers.
//!
//! # Safety
//! Every function here needs the features that it enables, and pointers to live memory of the extents that it names. An
//! [`super::Isa`] is proof of the features: every one of `avx512f` and `avx512bw`, which packing needs, and the one that
//! multiplies here of `avx512bf16` too. Nothing is read or written beyond them: partial rows, columns and pairs are masked.

use super::{
    Bf16Matrix, BlockProduct, Epilogue, Left, OutputBlock, PANEL, PanelColumns, PanelRow, Panels, STEP,
    low_mask,
};
use std::arch::x86_64::*;

/// The most rows of a tile of `V` panels: 24 sums leave registers for a line of each panel and a pair of the left.
const fn rows<const V: usize>() -> usize {
    if V == 4 { 6 } else { 8 }
}

/// See [`super::multiply`].
///
/// # Safety
/// See the module; `left` has the rows of `out` of `depth` values, `right` its panels of `depth.div_ceil(2)` panel rows.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) unsafe fn multiply(product: BlockProduct, out: &mut OutputBlock) {
    let BlockProduct { right, epilogue, .. } = product;
    for start in (0..out.columns.len()).step_by(4 * PANEL) {
        let width = (out.columns.len() - start).min(4 * PANEL);
        let product = BlockProduct { right: right.from(start / PANEL, 0), ..product };
        let mask = 0xffff >> (width.next_multiple_of(PANEL) - width);
        // SAFETY: the columns from `start` on are inside `out`; the rest is the caller's promise.
        unsafe {
            let to = TileOutput { ptr: out.ptr.add(start), stride: out.stride, mask, epilogue };
            match width.div_ceil(PANEL) {
                1 => strips::<1>(product, out.rows.len(), to),
                2 => strips::<2>(product, out.rows.len(), to),
                3 => strips::<3>(product, out.rows.len(), to),
                _ => strips::<4>(product, out.rows.len(), to),
            }
        }
    }
}

/// The output of a tile.
#[derive(Clone, Copy)]
struct TileOutput {
    ptr: *mut f32,
    stride: usize,
    /// Columns of the last panel that exist.
    mask: __mmask16,
    epilogue: Epilogue,
}

/// All rows by `V` panels.
///
/// # Safety
/// As for [`multiply`], of `height` rows.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn strips<const V: usize>(product: BlockProduct, height: usize, to: TileOutput) {
    let BlockProduct { left, right, depth, .. } = product;
    for (strip, row) in (0..height).step_by(rows::<V>()).enumerate() {
        // The first strips prefetch the panels after these, which usually are the task's next ones. Later strips prefetch
        // panels that are already in the cache.
        let panel = if strip < V { V + strip } else { 0 };
        let ahead = right.lines.as_ptr().wrapping_add(panel * right.stride);
        // SAFETY: rows from `row` on are inside both matrices; the rest is the caller's promise.
        unsafe {
            let left = left.from(row, 0);
            let to = TileOutput { ptr: to.ptr.add(row * to.stride), ..to };
            match (height - row).min(rows::<V>()) {
                1 => tile::<1, V>(left, depth, right, to, ahead),
                2 => tile::<2, V>(left, depth, right, to, ahead),
                3 => tile::<3, V>(left, depth, right, to, ahead),
                4 => tile::<4, V>(left, depth, right, to, ahead),
                5 => tile::<5, V>(left, depth, right, to, ahead),
                6 => tile::<6, V>(left, depth, right, to, ahead),
                7 => tile::<7, V>(left, depth, right, to, ahead),
                _ => tile::<8, V>(left, depth, right, to, ahead),
            }
        }
    }
}

/// `R` rows by `V` panels; the panel at `ahead`, which need not exist, is prefetched meanwhile.
///
/// # Safety
/// As for [`multiply`], of `R` rows and `V` panels.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn tile<const R: usize, const V: usize>(
    left: Left,
    depth: usize,
    right: Panels,
    to: TileOutput,
    ahead: *const PanelRow,
) {
    let values = left.values.as_ptr();
    let lines = right.lines.as_ptr();
    // SAFETY: a pair of `left` below `depth / 2` is two values; the last of an odd depth is read alone. Lines and
    // elements of `to` are inside by the caller's promise.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); V]; R];
        for pair in 0..depth / 2 {
            _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(pair).cast());
            let mut weights = [_mm512_setzero_si512(); V];
            for (v, w) in weights.iter_mut().enumerate() {
                *w = _mm512_load_si512(lines.add(v * right.stride + pair).cast());
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = values.add(r * left.row + pair * left.pair).cast::<i32>().read_unaligned();
                let x = _mm512_set1_epi32(x);
                for (sum, w) in sums.iter_mut().zip(weights) {
                    *sum = _mm512_dpbf16_ps(*sum, pairs(x), pairs(w));
                }
            }
        }
        if depth % 2 == 1 {
            let pair = depth / 2;
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = values.add(r * left.row + pair * left.pair).cast::<u16>().read();
                let x = _mm512_set1_epi32(i32::from(x));
                for (v, sum) in sums.iter_mut().enumerate() {
                    let w = _mm512_load_si512(lines.add(v * right.stride + pair).cast());
                    *sum = _mm512_dpbf16_ps(*sum, pairs(x), pairs(w));
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                let mask = if v + 1 == V { to.mask } else { 0xffff };
                store_masked(*sum, to.ptr.add(r * to.stride + v * PANEL), mask, to.epilogue);
            }
        }
    }
}

/// Writes the sums whose bit in `mask` is set.
///
/// # Safety
/// The CPU has `avx512f`; nothing else uses those elements at `to`, which are initialised if the epilogue accumulates.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn store_masked(sums: __m512, to: *mut f32, mask: __mmask16, epilogue: Epilogue) {
    // SAFETY: the mask leaves out all other elements.
    unsafe {
        let old = if epilogue.accumulate { _mm512_maskz_loadu_ps(mask, to) } else { _mm512_setzero_ps() };
        _mm512_mask_storeu_ps(to, mask, _mm512_fmadd_ps(sums, _mm512_set1_ps(epilogue.alpha), old));
    }
}

/// Twelve independent sums in registers, `times` times: for measuring the speed of `vdpbf16ps`.
///
/// # Safety
/// See the module.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(in crate::ops::backend::bf16) unsafe fn repeat_dpbf16(times: usize) -> f32 {
    let mut sums = [_mm512_setzero_ps(); 12];
    // Opaque, so that the sums are not known beforehand.
    let (a, b) = std::hint::black_box((_mm512_set1_epi32(0x3f80_3f80), _mm512_set1_epi32(0x3f80_3f80)));
    for _ in 0..times {
        for sum in &mut sums {
            *sum = _mm512_dpbf16_ps(*sum, pairs(a), pairs(b));
        }
    }
    sums.into_iter().map(|sum| _mm512_reduce_add_ps(sum)).sum()
}

#[inline]
#[target_feature(enable = "avx512f")]
fn pairs(x: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits without invalid patterns.
    unsafe { std::mem::transmute(x) }
}

/// Up to 32 values of each of up to 16 rows, from column `start` on, and zeros for missing values. The values `ahead` elements
/// after them, which need not exist, are prefetched for a later call.
///
/// # Safety
/// See the module; `start` is under the number of columns.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn load(from: Bf16Matrix, start: usize, ahead: usize) -> [__m512i; PANEL] {
    let mut lines = [_mm512_setzero_si512(); PANEL];
    let values = from.values.as_ptr();
    for (row, line) in lines.iter_mut().take(from.rows).enumerate() {
        // SAFETY: the mask leaves out the elements after the row's end.
        unsafe {
            let address = values.add(row * from.stride + start);
            _mm_prefetch::<_MM_HINT_T0>(address.wrapping_add(ahead).cast());
            *line = _mm512_maskz_loadu_epi16(low_mask(from.columns - start), address.cast());
        }
    }
    lines
}

/// Steps that are fetched ahead of those that are packed.
const AHEAD: usize = 8;

/// See [`super::pack_rows`].
///
/// # Safety
/// See the module; `panel` has `columns.next_multiple_of(STEP) / 2` panel rows.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn pack_rows(from: Bf16Matrix, panel: *mut PanelRow) {
    for start in (0..from.columns).step_by(STEP) {
        // SAFETY: `columns - start` values of each row are left.
        unsafe {
            let lines = load(from, start, AHEAD * STEP);
            store(transpose(lines), panel.add(start / 2));
        }
    }
}

/// See [`super::pack_columns`].
///
/// # Safety
/// See the module; there are `columns.next_multiple_of(STEP) / 16` panels of 8 panel rows, `panel_stride` apart.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn pack_columns(from: Bf16Matrix, panels: *mut PanelRow, panel_stride: usize) {
    for start in (0..from.columns).step_by(STEP) {
        // SAFETY: `columns - start` values of each row are left.
        unsafe {
            let lines = load(from, start, PANEL * from.stride);
            interleave(lines, panels.add(start / PANEL * panel_stride), panel_stride);
        }
    }
}

/// See [`super::transpose_panel`].
///
/// # Safety
/// See the module; the panel has `columns.next_multiple_of(STEP) / 2` panel rows, and there are twice as many panels of 8 panel
/// rows as steps, `panel_stride` apart.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn transpose_panel(from: PanelColumns, panels: *mut PanelRow, panel_stride: usize) {
    let PanelColumns { lines: panel, stride, columns } = from;
    for start in (0..columns).step_by(STEP) {
        let mut lines = [_mm512_setzero_si512(); PANEL];
        // SAFETY: the caller's promise; the next panel, which need not exist, is only prefetched.
        unsafe {
            for (pair, line) in lines.iter_mut().enumerate() {
                let address = panel.as_ptr().add(start / 2 + pair);
                _mm_prefetch::<_MM_HINT_T0>(address.wrapping_add(stride).cast());
                *line = _mm512_load_si512(address.cast());
            }
            interleave(transpose(lines), panels.add(start / PANEL * panel_stride), panel_stride);
        }
    }
}

/// Of 16 rows of 32 values, the pairs of rows: columns 0 to 15 to lines 0 to 7 of the first panel, the others to
/// the next one's.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn interleave(rows: [__m512i; PANEL], panels: *mut PanelRow, panel_stride: usize) {
    let first: [u16; 32] = std::array::from_fn(|i| (i / 2 + i % 2 * 32) as u16);
    // SAFETY: the array is 512 bits; the lines are the caller's promise.
    unsafe {
        let first = _mm512_loadu_si512(first.as_ptr().cast());
        let second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
        for pair in 0..PANEL / 2 {
            let (a, b) = (rows[2 * pair], rows[2 * pair + 1]);
            _mm512_store_si512(panels.add(pair).cast(), _mm512_permutex2var_epi16(a, first, b));
            let next = panels.add(panel_stride + pair);
            _mm512_store_si512(next.cast(), _mm512_permutex2var_epi16(a, second, b));
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn store(lines: [__m512i; PANEL], to: *mut PanelRow) {
    for (i, line) in lines.into_iter().enumerate() {
        // SAFETY: the caller has 16 lines there.
        unsafe { _mm512_store_si512(to.add(i).cast(), line) };
    }
}

/// Transposes 16 rows of 16 pairs.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn transpose(rows: [__m512i; PANEL]) -> [__m512i; PANEL] {
    let mut a = rows;
    for i in (0..16).step_by(2) {
        a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    let mut b = a;
    for i in (0..16).step_by(4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    // Now b[4 q + c] holds, in its quarter s, pair 4 s + c of rows 4 q to 4 q + 3.
    let mut out = b;
    for c in 0..4 {
        let low = _mm512_shuffle_i32x4::<0x88>(b[c], b[4 + c]);
        let high = _mm512_shuffle_i32x4::<0xdd>(b[c], b[4 + c]);
        let low_next = _mm512_shuffle_i32x4::<0x88>(b[8 + c], b[12 + c]);
        let high_next = _mm512_shuffle_i32x4::<0xdd>(b[8 + c], b[12 + c]);
        out[c] = _mm512_shuffle_i32x4::<0x88>(low, low_next);
        out[8 + c] = _mm512_shuffle_i32x4::<0xdd>(low, low_next);
        out[4 + c] = _mm512_shuffle_i32x4::<0x88>(high, high_next);
        out[12 + c] = _mm512_shuffle_i32x4::<0xdd>(high, high_next);
    }
    out
}
