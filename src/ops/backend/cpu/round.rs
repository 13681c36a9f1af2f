//! Rounding of f32 to bf16: by the CPU's instruction (`vcvtne2ps2bf16`, AVX512-BF16) if it has one, in integers otherwise.
//! Both take the nearest value, ties to even; the instruction makes zero of a number that is subnormal in f32.

use super::StorageFloat;
use half::bf16;
use std::mem::MaybeUninit;

/// The lowest `n` bits, all 32 if there are more: a mask of the first `n` values.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(crate) fn low_mask(n: usize) -> u32 {
    if n >= 32 { u32::MAX } else { (1 << n) - 1 }
}

/// Rounds `from` into `to`, which has its length.
#[inline(always)]
pub(crate) fn round_slice(from: &[f32], to: &mut [bf16]) {
    // SAFETY: `MaybeUninit<bf16>` has the layout of `bf16`, and `round_into` writes nothing but values.
    round_into(from, unsafe { &mut *(std::ptr::from_mut(to) as *mut [MaybeUninit<bf16>]) });
}

/// As [`round_slice`], into elements that need not be initialised; every one is written.
#[inline(always)]
pub(super) fn round_into(from: &[f32], to: &mut [MaybeUninit<bf16>]) {
    assert_eq!(from.len(), to.len(), "values to round, and room for them");
    #[cfg(target_arch = "x86_64")]
    if x86::has_instruction() {
        // SAFETY: the CPU has the instruction.
        return unsafe { x86::round(from, to.as_mut_ptr().cast()) };
    }
    to.iter_mut().zip(from).for_each(|(y, &x)| _ = y.write(bf16::store(x)));
}

/// Rows of `columns` values, one after another.
pub(crate) struct F32Rows<'a> {
    pub(crate) from: &'a [f32],
    pub(crate) columns: usize,
}

impl F32Rows<'_> {
    /// Rounds them to rows at `to` that begin `stride` elements apart.
    ///
    /// # Safety
    /// Nothing else uses the elements of those rows, which lie in live memory.
    #[inline(always)]
    pub(crate) unsafe fn round(&self, to: *mut bf16, stride: usize) {
        #[cfg(target_arch = "x86_64")]
        if x86::has_instruction() {
            // SAFETY: the CPU has the instruction; the rest is the caller's promise.
            return unsafe { x86::round_rows(self, to, stride) };
        }
        for (i, row) in self.from.chunks_exact(self.columns.max(1)).enumerate() {
            // SAFETY: the caller's promise.
            let to = unsafe { std::slice::from_raw_parts_mut(to.add(i * stride).cast(), self.columns) };
            round_into(row, to);
        }
    }
}

/// Rounds two rows of one length into `to`, each element of the first beside that of the second; without a second row, beside
/// a zero.
#[inline(always)]
pub(crate) fn round_pairs(first: &[f32], second: Option<&[f32]>, to: &mut [[bf16; 2]]) {
    assert!(first.len() == to.len() && second.is_none_or(|row| row.len() == to.len()), "rows of one length");
    #[cfg(target_arch = "x86_64")]
    if x86::has_instruction() {
        // SAFETY: the CPU has the instruction.
        return unsafe { x86::round_pairs(first, second, to) };
    }
    match second {
        Some(second) => {
            for ((y, &a), &b) in to.iter_mut().zip(first).zip(second) {
                *y = [bf16::store(a), bf16::store(b)];
            }
        }
        None => to.iter_mut().zip(first).for_each(|(y, &a)| *y = [bf16::store(a), bf16::ZERO]),
    }
}

/// By the instruction. Functions need `avx512f`, `avx512bw` and `avx512bf16`.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::low_mask;
    use half::bf16;
    use std::arch::x86_64::*;

    /// Values of a vector of f32.
    const LANES: usize = 16;

    pub(super) fn has_instruction() -> bool {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512bf16")
    }

    /// A mask of the first `n` of a vector's f32.
    fn lanes(n: usize) -> __mmask16 {
        low_mask(n) as __mmask16
    }

    /// # Safety
    /// As for [`super::F32Rows::round`]; the CPU has the instructions.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) unsafe fn round_rows(rows: &super::F32Rows, to: *mut bf16, stride: usize) {
        for (i, row) in rows.from.chunks_exact(rows.columns.max(1)).enumerate() {
            // SAFETY: the caller's promise.
            unsafe { round_to(row, to.add(i * stride)) };
        }
    }

    /// # Safety
    /// The CPU has the instructions; nothing else uses the elements at `to`, as many as `from` has.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) unsafe fn round(from: &[f32], to: *mut bf16) {
        // SAFETY: the caller's promise.
        unsafe { round_to(from, to) };
    }

    /// # Safety
    /// As for [`round`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn round_to(from: &[f32], to: *mut bf16) {
        let tail = from.len() % (2 * LANES);
        let full = from.len() - tail;
        let from = from.as_ptr();
        // SAFETY: full vectors end before the slices do; masks leave out the elements beyond their ends.
        unsafe {
            for start in (0..full).step_by(2 * LANES) {
                let both = [_mm512_loadu_ps(from.add(start)), _mm512_loadu_ps(from.add(start + LANES))];
                let rounded = bits(_mm512_cvtne2ps_pbh(both[1], both[0]));
                _mm512_storeu_si512(to.add(start).cast(), rounded);
            }
            if tail > 0 {
                let masks = [lanes(tail), lanes(tail.saturating_sub(LANES))];
                let first = _mm512_maskz_loadu_ps(masks[0], from.add(full));
                let second = _mm512_maskz_loadu_ps(masks[1], from.wrapping_add(full + LANES));
                let rounded = bits(_mm512_cvtne2ps_pbh(second, first));
                _mm512_mask_storeu_epi16(to.add(full).cast(), low_mask(tail), rounded);
            }
        }
    }

    /// # Safety
    /// The CPU has the instructions; both rows have the length of `to`.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) unsafe fn round_pairs(first: &[f32], second: Option<&[f32]>, to: &mut [[bf16; 2]]) {
        // Value i of the first row is word i of the rounded vector, that of the second word 16 + i.
        let order: [u16; 2 * LANES] = std::array::from_fn(|i| (i / 2 + i % 2 * LANES) as u16);
        let n = first.len();
        // SAFETY: the array is 512 bits; masks leave out the elements beyond the slices' ends.
        unsafe {
            let order = _mm512_loadu_si512(order.as_ptr().cast());
            let load = |row: &[f32], start, mask| _mm512_maskz_loadu_ps(mask, row.as_ptr().add(start));
            for start in (0..n).step_by(LANES) {
                let mask = lanes(n - start);
                let a = load(first, start, mask);
                let b = second.map_or(_mm512_setzero_ps(), |row| load(row, start, mask));
                let pairs = _mm512_permutexvar_epi16(order, bits(_mm512_cvtne2ps_pbh(b, a)));
                _mm512_mask_storeu_epi32(to.as_mut_ptr().add(start).cast(), mask, pairs);
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn bits(x: __m512bh) -> __m512i {
        // SAFETY: both are 512 bits without invalid patterns.
        unsafe { std::mem::transmute(x) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every exponent and sign, and mantissas around the ties; no number that is subnormal in f32.
    fn values() -> Vec<f32> {
        let mantissas = [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff, 0x1_8000, 0x7f_7fff, 0x7f_8000, 0x7f_ffff];
        let all = (0..512u32).flat_map(|high| mantissas.map(|low| f32::from_bits(high << 23 | low)));
        all.filter(|x| !x.is_subnormal()).collect()
    }

    fn is_rounded(found: bf16, x: f32) -> bool {
        let expected = bf16::from_f32(x);
        found.to_bits() == expected.to_bits() || (found.is_nan() && x.is_nan())
    }

    #[test]
    fn round_slice_returns_the_nearest_values() {
        let values = values();
        for n in [0, 1, 15, 16, 17, 31, 32, 33, values.len()] {
            let mut found = vec![bf16::ONE; n + 1];
            round_slice(&values[..n], &mut found[..n]);
            assert!(found.iter().zip(&values[..n]).all(|(y, &x)| is_rounded(*y, x)), "{n} values");
            assert_eq!(found[n], bf16::ONE, "nothing is written beyond {n} values");
        }
    }

    #[test]
    fn round_pairs_puts_both_rows_side_by_side() {
        let first = values();
        let second: Vec<f32> = first.iter().rev().copied().collect();
        for n in [0, 1, 15, 16, 17, 40, first.len()] {
            for row in [Some(&second[..n]), None] {
                let mut found = vec![[bf16::ONE; 2]; n + 1];
                round_pairs(&first[..n], row, &mut found[..n]);
                for (i, [a, b]) in found[..n].iter().enumerate() {
                    assert!(
                        is_rounded(*a, first[i]) && is_rounded(*b, row.map_or(0.0, |row| row[i])),
                        "pair {i} of {n}"
                    );
                }
                assert_eq!(found[n], [bf16::ONE; 2], "nothing is written beyond {n} pairs");
            }
        }
    }
}
