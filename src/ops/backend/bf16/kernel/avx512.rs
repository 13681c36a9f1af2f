//! The kernels in AVX-512 with BF16: `vdpbf16ps` multiplies 16 pairs of bf16 and adds both products of a pair to
//! one f32. A tile of 6 rows by 64 columns keeps its 24 sums in registers.
//!
//! # Safety
//! Every function here needs the features that it enables ([`super::Isa`] is proof of them: any of `avx512f` and
//! `avx512bw`, which packing needs, one that comes here for a product of `avx512bf16` too) and pointers to live memory of
//! the extents that it names. Nothing is read or written beyond them: partial rows, columns and pairs are masked.

use super::{Left, Line, Out, PANEL, Panels, STEP, Then, low};
use half::bf16;
use std::arch::x86_64::*;

/// The most rows of a tile of `V` panels: 24 sums leave registers for a line of each panel and a pair of the left.
const fn rows<const V: usize>() -> usize {
    if V == 4 { 6 } else { 8 }
}

/// `out = scale * left right`; see [`super::block`].
///
/// # Safety
/// See the module; `left` has the rows of `out` of `depth` values, `right` its panels of `depth.div_ceil(2)` lines.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) unsafe fn block(left: Left, depth: usize, right: Panels, out: &mut Out, then: Then) {
    for start in (0..out.columns.len()).step_by(4 * PANEL) {
        let width = (out.columns.len() - start).min(4 * PANEL);
        let right = right.from(start / PANEL, 0);
        // SAFETY: the columns from `start` on are inside `out`; the rest is the caller's promise.
        unsafe {
            let to = Target { ptr: out.ptr.add(start), stride: out.stride, mask: 0, then };
            match width.div_ceil(PANEL) {
                1 => strips::<1>(left, out.rows.len(), depth, right, width, to),
                2 => strips::<2>(left, out.rows.len(), depth, right, width, to),
                3 => strips::<3>(left, out.rows.len(), depth, right, width, to),
                _ => strips::<4>(left, out.rows.len(), depth, right, width, to),
            }
        }
    }
}

/// Where a tile goes.
#[derive(Clone, Copy)]
struct Target {
    ptr: *mut f32,
    stride: usize,
    /// Columns of the last panel that exist.
    mask: __mmask16,
    then: Then,
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn strips<const V: usize>(
    left: Left,
    height: usize,
    depth: usize,
    right: Panels,
    width: usize,
    to: Target,
) {
    let mask = 0xffff >> (V * PANEL - width);
    for (strip, row) in (0..height).step_by(rows::<V>()).enumerate() {
        // The first strips fetch the panels behind these: a task's next ones, more often than not. Later ones fetch
        // what is there.
        let panel = if strip < V { V + strip } else { 0 };
        let ahead = right.lines.as_ptr().wrapping_add(panel * right.stride);
        // SAFETY: rows from `row` on are inside both matrices; the rest is the caller's promise.
        unsafe {
            let left = left.from(row, 0);
            let to = Target { ptr: to.ptr.add(row * to.stride), mask, ..to };
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

/// `R` rows by `V` panels; the panel at `ahead`, which need not exist, is fetched on the way.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn tile<const R: usize, const V: usize>(
    left: Left,
    depth: usize,
    right: Panels,
    to: Target,
    ahead: *const Line,
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
                put(*sum, to.ptr.add(r * to.stride + v * PANEL), mask, to.then);
            }
        }
    }
}

/// Writes the sums that `mask` names as `then` says.
///
/// # Safety
/// The CPU has `avx512f`; those elements at `to` are the caller's.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn put(sums: __m512, to: *mut f32, mask: __mmask16, then: Then) {
    // SAFETY: the mask leaves out all other elements.
    unsafe {
        let old = if then.add { _mm512_maskz_loadu_ps(mask, to) } else { _mm512_setzero_ps() };
        _mm512_mask_storeu_ps(to, mask, _mm512_fmadd_ps(sums, _mm512_set1_ps(then.scale), old));
    }
}

/// Twelve sums of registers alone, `times` times: how fast the instruction is.
///
/// # Safety
/// See the module.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(in crate::ops::backend::bf16) unsafe fn of_registers(times: usize) -> f32 {
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

/// Up to 32 values of each of up to 16 rows, zeros where there is none. What lies `ahead` values behind each, which need
/// not exist, is fetched for a later call.
///
/// # Safety
/// See the module; `rows` rows of `width` values, `stride` values apart, are at `from`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn load(
    from: *const bf16,
    stride: usize,
    rows: usize,
    width: usize,
    ahead: usize,
) -> [__m512i; PANEL] {
    let mut lines = [_mm512_setzero_si512(); PANEL];
    for (row, line) in lines.iter_mut().take(rows).enumerate() {
        // SAFETY: the mask leaves out what lies behind the row's end.
        unsafe {
            let at = from.add(row * stride);
            _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(ahead).cast());
            *line = _mm512_maskz_loadu_epi16(low(width), at.cast());
        }
    }
    lines
}

/// Steps that are fetched ahead of those that are packed.
const AHEAD: usize = 8;

/// Packs up to 16 rows of `depth` values, `stride` values apart: line `p` of `panel` holds pair `p` of every row,
/// zeros where there is none, up to a whole number of [`STEP`] values.
///
/// # Safety
/// See the module; `panel` has `depth.next_multiple_of(STEP) / 2` lines.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn pack_rows(
    from: *const bf16,
    stride: usize,
    rows: usize,
    depth: usize,
    panel: *mut Line,
) {
    for start in (0..depth).step_by(STEP) {
        // SAFETY: `depth - start` values of each row are left.
        unsafe {
            let lines = load(from.add(start), stride, rows, depth - start, AHEAD * STEP);
            store(transpose(lines), panel.add(start / 2));
        }
    }
}

/// Packs columns of up to 16 rows, the way to the transposed product: of `columns` columns from the front of
/// `from`, panel `c / 16` (`panel_stride` lines behind the one before) gets in its lines 0 to 7 the pairs of
/// rows (0, 1), (2, 3) ... of column `c`; zeros where there is none, up to a whole number of [`STEP`] columns.
///
/// # Safety
/// See the module; there are `columns.next_multiple_of(STEP) / 16` panels of 8 lines.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn pack_columns(
    from: *const bf16,
    stride: usize,
    rows: usize,
    columns: usize,
    panels: *mut Line,
    panel_stride: usize,
) {
    for start in (0..columns).step_by(STEP) {
        // SAFETY: `columns - start` values of each row are left.
        unsafe {
            let lines = load(from.add(start), stride, rows, columns - start, PANEL * stride);
            interleave(lines, panels.add(start / PANEL * panel_stride), panel_stride);
        }
    }
}

/// As [`pack_columns`], of 16 rows that are packed: `columns` columns from the front of `panel`. The next panel, which
/// need not exist, is `panel_lines` behind it.
///
/// # Safety
/// See the module; `panel` has `columns.next_multiple_of(STEP) / 2` lines, and there are twice as many panels of 8
/// lines as steps.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn turn(
    panel: *const Line,
    panel_lines: usize,
    columns: usize,
    panels: *mut Line,
    panel_stride: usize,
) {
    for start in (0..columns).step_by(STEP) {
        let mut lines = [_mm512_setzero_si512(); PANEL];
        // SAFETY: the caller's promise.
        unsafe {
            for (pair, line) in lines.iter_mut().enumerate() {
                let at = panel.add(start / 2 + pair);
                _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(panel_lines).cast());
                *line = _mm512_load_si512(at.cast());
            }
            interleave(transpose(lines), panels.add(start / PANEL * panel_stride), panel_stride);
        }
    }
}

/// Of 16 rows of 32 values, the pairs of rows: columns 0 to 15 to lines 0 to 7 of the first panel, the others to
/// the next one's.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn interleave(rows: [__m512i; PANEL], panels: *mut Line, panel_stride: usize) {
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
pub(super) unsafe fn store(lines: [__m512i; PANEL], to: *mut Line) {
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
