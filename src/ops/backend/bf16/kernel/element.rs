//! Storing sums as elements of an output.

use super::fma::widen_half;
use super::{Epilogue, PANEL, avx512};
use half::bf16;
use std::arch::x86_64::*;

/// Writes 32 sums in f32.
///
/// # Safety
/// The CPU has `avx512f`; `sums` are 32 values at a multiple of 64 bytes; nothing else uses the elements at `to`
/// whose bit in `mask` is set, and they are initialised if the epilogue accumulates.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn store_f32(sums: *const f32, to: *mut f32, mask: u32, epilogue: Epilogue) {
    for half in 0..2 {
        // SAFETY: the caller's promise; the mask leaves out all other elements.
        unsafe {
            let mask = (mask >> (half * PANEL)) as __mmask16;
            avx512::store_masked(
                _mm512_load_ps(sums.add(half * PANEL)),
                to.wrapping_add(half * PANEL),
                mask,
                epilogue,
            );
        }
    }
}

/// Writes 32 sums rounded to bf16, ties to even. `vcvtne2ps2bf16` rounds as [`bf16::from_f32`] does, but makes zeros of
/// numbers below the normal ones, 1.2e-38.
///
/// # Safety
/// As for [`store_f32`]; the CPU has `avx512bw` and `avx512bf16` too.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) unsafe fn store_bf16(sums: *const f32, to: *mut bf16, mask: u32, epilogue: Epilogue) {
    // SAFETY: the caller's promise; the mask leaves out all other elements. Both types are 512 bits without invalid
    // patterns.
    unsafe {
        let mut old = [_mm512_setzero_ps(); 2];
        if epilogue.accumulate {
            let both = _mm512_maskz_loadu_epi16(mask, to.cast());
            old = [_mm512_castsi512_si256(both), _mm512_extracti64x4_epi64::<1>(both)].map(|x| widen_half(x));
        }
        let scale = _mm512_set1_ps(epilogue.alpha);
        let low = _mm512_fmadd_ps(_mm512_load_ps(sums), scale, old[0]);
        let high = _mm512_fmadd_ps(_mm512_load_ps(sums.add(PANEL)), scale, old[1]);
        let rounded: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
        _mm512_mask_storeu_epi16(to.cast(), mask, rounded);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{OutputElement, PanelRow, low_mask};
    use super::*;

    #[repr(C, align(64))]
    struct AlignedSums([f32; 32]);

    #[test]
    fn store_row_rounds_to_even_and_leaves_other_elements() {
        assert_eq!(align_of::<AlignedSums>(), align_of::<PanelRow>());
        if !is_x86_feature_detected!("avx512bf16") {
            return;
        }
        let mut sums = AlignedSums([0.0; 32]);
        // Halves of a unit in the last place of 1.0 in bf16, which is 2^-7: down to even, up to even.
        let special =
            [1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, f32::INFINITY, f32::NAN, f32::MAX, -0.5, 1e-30, 3.0];
        for (i, sum) in sums.0.iter_mut().enumerate() {
            *sum = special[i % 8] * if i % 8 < 2 || i < 8 { 1.0 } else { -1.0 };
        }
        for count in [1, 15, 16, 17, 31, 32] {
            let mask = low_mask(count);
            for epilogue in [Epilogue::WRITE, Epilogue { alpha: 0.5, accumulate: true }] {
                let (mut f32s, mut bf16s) = ([7.0f32; 33], [bf16::from_f32(7.0); 33]);
                // SAFETY: the CPU has the features, and both have room for 32 elements.
                unsafe {
                    f32::store_row(sums.0.as_ptr(), f32s.as_mut_ptr(), mask, epilogue);
                    bf16::store_row(sums.0.as_ptr(), bf16s.as_mut_ptr(), mask, epilogue);
                }
                for i in 0..33 {
                    let expected = match (i < count, epilogue.accumulate) {
                        (false, _) => 7.0,
                        (true, false) => sums.0[i],
                        (true, true) => sums.0[i].mul_add(0.5, 7.0),
                    };
                    let rounded = bf16::from_f32(expected);
                    assert!(f32s[i] == expected || expected.is_nan() && f32s[i].is_nan(), "{i} of {count}");
                    assert!(bf16s[i] == rounded || expected.is_nan() && bf16s[i].is_nan(), "{i} of {count}");
                }
            }
        }
        assert_eq!(bf16::from_f32(sums.0[0]).to_f32(), 1.0, "ties go to even");
    }
}
