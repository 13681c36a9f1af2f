//! `y = x Wᵀ` in f32 for up to a few hundred rows of x, on CPUs with AVX-512: the weight W [N, K] is read as it lies in memory.
//!
//! `gemm` copies both operands of every product into the order in which it reads them. For the 90 rows of an expert this takes as
//! long as the product itself. Here only x is copied, into panels of [`PANEL`] rows [K, 48]. A tile of 8 features by 48 rows
//! keeps its 24 sums in registers: for each k it loads 48 values of the panel, and multiplies them by one value of each
//! of 8 rows of W. The sums are transposed when they are written. Of a last panel only the vectors that have rows are multiplied.

use super::cpu::{Disjoint, UninitBuffer};
use rayon::prelude::*;
use std::mem::MaybeUninit;
use std::ops::RangeInclusive;

/// Values of a vector.
const VECTOR: usize = 16;
/// Rows of x in a panel: three vectors.
const PANEL: usize = 3 * VECTOR;
/// Output features of a tile.
const TILE: usize = 8;
/// Values of a row that are multiplied before the next ones: a panel of them is 192 kB, and stays in the second-level cache.
const DEPTH: usize = 1024;
/// Output features that are computed for all panels before the next ones: 128 rows of [`DEPTH`] values are 512 kB.
const BLOCK: usize = 128;
/// With fewer rows most of a panel would be empty, and with more `gemm` is as fast.
const ROWS: RangeInclusive<usize> = 24..=256;

/// A product of x [M, K] with the transpose of a weight [N, K].
#[derive(Clone, Copy)]
pub(crate) struct FewRows<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    /// M, N, K.
    size: (usize, usize, usize),
}

impl<'a> FewRows<'a> {
    /// `None` if another algorithm is better for these sizes, or the CPU has no AVX-512.
    pub(crate) fn new(x: &'a [f32], weight: &'a [f32], size: (usize, usize, usize)) -> Option<Self> {
        let (m, n, k) = size;
        let is_better = ROWS.contains(&m) && n >= TILE && n.is_multiple_of(TILE) && k > 0;
        let is_complete = x.len() == m * k && weight.len() == n * k;
        (is_better && is_complete && has_instructions()).then_some(Self { x, weight, size })
    }

    /// `out[M, N] = x Wᵀ (+ out if accumulate)`.
    ///
    /// # Panics
    /// Panics if `out` has another number of elements.
    ///
    /// # Safety
    /// The elements of `out` are initialised if the product accumulates.
    pub(crate) unsafe fn write(self, out: &mut [MaybeUninit<f32>], accumulate: bool) {
        let (m, n, k) = self.size;
        assert_eq!(out.len(), m * n, "elements of the output");
        let out = Disjoint::new(out);
        for start in (0..k).step_by(DEPTH) {
            let depth = DEPTH.min(k - start);
            let mut panels = UninitBuffer::<f32>::new(m.div_ceil(PANEL) * PANEL * depth);
            panels.as_slice().par_chunks_mut(PANEL * depth).enumerate().for_each(|(i, panel)| {
                let rows = self.x[i * PANEL * k..].chunks(k).take(PANEL);
                pack(rows.map(|row| &row[start..start + depth]), panel);
            });
            // SAFETY: `pack` writes all of a panel.
            let panels = unsafe { panels.into_vec() };
            (0..n.div_ceil(BLOCK)).into_par_iter().for_each(|block| {
                let features = block * BLOCK..((block + 1) * BLOCK).min(n);
                for (i, panel) in panels.chunks_exact(PANEL * depth).enumerate() {
                    for feature in features.clone().step_by(TILE) {
                        let weight =
                            &self.weight[feature * k + start..(feature + TILE - 1) * k + start + depth];
                        let rows = (m - i * PANEL).min(PANEL);
                        // SAFETY: `new` found the instructions. The tile's features are its task's alone, and these rows of
                        // `out` have them; from the second depth on they were written, and before it as the caller promises.
                        unsafe {
                            let out = out.element(i * PANEL * n + feature);
                            let accumulate = accumulate || start > 0;
                            let to = Corner { out, stride: n, rows, accumulate };
                            match rows.div_ceil(VECTOR) {
                                1 => multiply::<1>(panel, (weight, k), to),
                                2 => multiply::<2>(panel, (weight, k), to),
                                _ => multiply::<3>(panel, (weight, k), to),
                            }
                        }
                    }
                }
            });
        }
    }
}

/// Where a tile is written.
#[derive(Clone, Copy)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
struct Corner {
    /// The first of [`TILE`] elements of the first row.
    out: *mut f32,
    /// Elements from a row to the next one.
    stride: usize,
    /// Rows, up to [`PANEL`].
    rows: usize,
    accumulate: bool,
}

/// Writes the rows, up to [`PANEL`] of one length, into a panel, with zeros for those that are missing.
fn pack<'a>(rows: impl Iterator<Item = &'a [f32]>, panel: &mut [MaybeUninit<f32>]) {
    let rows: Vec<&[f32]> = rows.collect();
    // 16 values of each row are a line of the cache.
    for (i, lines) in panel.chunks_mut(16 * PANEL).enumerate() {
        let values = i * 16..i * 16 + lines.len() / PANEL;
        for (j, row) in rows.iter().enumerate() {
            let lines = lines.chunks_exact_mut(PANEL);
            lines.zip(&row[values.clone()]).for_each(|(line, &value)| _ = line[j].write(value));
        }
        for line in lines.chunks_exact_mut(PANEL) {
            line[rows.len()..].fill(MaybeUninit::new(0.0));
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn has_instructions() -> bool {
    false
}

/// # Safety
/// Never called: [`has_instructions`] is false.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn multiply<const VECTORS: usize>(_: &[f32], _: (&[f32], usize), _: Corner) {}

#[cfg(target_arch = "x86_64")]
use x86::{has_instructions, multiply};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Corner, PANEL, TILE};
    use std::arch::x86_64::*;

    pub(super) fn has_instructions() -> bool {
        is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl")
    }

    /// A tile: the rows of a panel's first vectors times 8 rows of the weight, which begin `stride` elements apart.
    ///
    /// # Safety
    /// The CPU has AVX-512, with VL; `weight` has the values of its rows that the panel has; `to` has its rows, of 8 elements, which
    /// nothing else uses and which are initialised if they are added to.
    #[target_feature(enable = "avx512f,avx512vl")]
    #[expect(
        clippy::needless_range_loop,
        reason = "with iterators the compiler keeps the sums in memory, at a third of the speed"
    )]
    pub(super) unsafe fn multiply<const VECTORS: usize>(
        panel: &[f32],
        (weight, stride): (&[f32], usize),
        to: Corner,
    ) {
        let mut sums = [[_mm512_setzero_ps(); VECTORS]; TILE];
        for (k, line) in panel.chunks_exact(PANEL).enumerate() {
            let load = |i: usize| {
                // SAFETY: a line has three vectors.
                unsafe { _mm512_loadu_ps(line.as_ptr().add(16 * i)) }
            };
            let mut x = [_mm512_setzero_ps(); VECTORS];
            for j in 0..VECTORS {
                x[j] = load(j);
            }
            for i in 0..TILE {
                // SAFETY: the caller's promise.
                let w = _mm512_set1_ps(unsafe { *weight.get_unchecked(i * stride + k) });
                for j in 0..VECTORS {
                    sums[i][j] = _mm512_fmadd_ps(x[j], w, sums[i][j]);
                }
            }
        }
        for j in 0..VECTORS {
            let (mut low, mut high) = ([_mm256_setzero_ps(); TILE], [_mm256_setzero_ps(); TILE]);
            for i in 0..TILE {
                low[i] = _mm512_castps512_ps256(sums[i][j]);
                high[i] = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(sums[i][j])));
            }
            // SAFETY: the caller's promise.
            unsafe {
                store(transposed(low), 16 * j, to);
                store(transposed(high), 16 * j + 8, to);
            }
        }
    }

    /// Writes eight rows of a tile from row `first` on, as far as the output has them.
    ///
    /// # Safety
    /// As for [`multiply`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl")]
    unsafe fn store(values: [__m256; 8], first: usize, to: Corner) {
        for (i, values) in values.into_iter().enumerate() {
            if first + i < to.rows {
                // SAFETY: the caller's promise.
                unsafe {
                    let out = to.out.add((first + i) * to.stride);
                    let old = if to.accumulate { _mm256_loadu_ps(out) } else { _mm256_setzero_ps() };
                    _mm256_storeu_ps(out, _mm256_add_ps(old, values));
                }
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512vl")]
    fn transposed(r: [__m256; 8]) -> [__m256; 8] {
        let (upper, lower) = (quarters([r[0], r[1], r[2], r[3]]), quarters([r[4], r[5], r[6], r[7]]));
        let mut out = r;
        for i in 0..4 {
            out[i] = _mm256_permute2f128_ps::<0x20>(upper[i], lower[i]);
            out[i + 4] = _mm256_permute2f128_ps::<0x31>(upper[i], lower[i]);
        }
        out
    }

    /// Transposes both 4 by 4 halves.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl")]
    fn quarters(r: [__m256; 4]) -> [__m256; 4] {
        let (a, b) = (_mm256_unpacklo_ps(r[0], r[1]), _mm256_unpackhi_ps(r[0], r[1]));
        let (c, d) = (_mm256_unpacklo_ps(r[2], r[3]), _mm256_unpackhi_ps(r[2], r[3]));
        [
            _mm256_shuffle_ps::<0x44>(a, c),
            _mm256_shuffle_ps::<0xee>(a, c),
            _mm256_shuffle_ps::<0x44>(b, d),
            _mm256_shuffle_ps::<0xee>(b, d),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..n).map(|_| next()).collect()
    }

    #[test]
    fn products_are_those_in_f64() {
        for (m, n, k) in
            [(24, 8, 1), (25, 16, 63), (48, 136, 17), (49, 128, 1024), (97, 264, 1500), (256, 8, 3000)]
        {
            let (x, w, old) = (numbers(m * k, 1), numbers(n * k, 2), numbers(m * n, 3));
            let Some(product) = FewRows::new(&x, &w, (m, n, k)) else {
                assert!(!has_instructions());
                return;
            };
            for accumulate in [false, true] {
                let fill =
                    |&old: &f32| if accumulate { MaybeUninit::new(old) } else { MaybeUninit::uninit() };
                let mut out: Vec<MaybeUninit<f32>> = old.iter().map(fill).collect();
                // SAFETY: `out` is initialised if the product is added to it.
                unsafe { product.write(&mut out, accumulate) };
                for (i, (y, old)) in out.iter().zip(&old).enumerate() {
                    let rows = x[i / n * k..].iter().zip(&w[i % n * k..]).take(k);
                    let exact: f64 = rows.map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
                    let exact = if accumulate { exact + f64::from(*old) } else { exact };
                    // SAFETY: every element was written.
                    let y = f64::from(unsafe { y.assume_init() });
                    let limit = 1e-6 * (k as f64).sqrt().max(1.0);
                    assert!((y - exact).abs() < limit, "{m} x {n} x {k}, element {i}: {y}, not {exact}");
                }
            }
        }
    }

    #[test]
    fn other_sizes_are_left_to_gemm() {
        let (x, w) = (numbers(300 * 8, 1), numbers(20 * 8, 2));
        for (m, n) in [(23, 16), (257, 16), (24, 20), (24, 0)] {
            assert!(FewRows::new(&x[..m * 8], &w[..n * 8], (m, n, 8)).is_none(), "{m} x {n}");
        }
        assert!(FewRows::new(&x[..24 * 8], &w[..16 * 7], (24, 16, 8)).is_none());
    }
}
