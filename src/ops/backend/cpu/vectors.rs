//! Loops compiled for the vectors that this CPU has, and functions that vectorise in them: exponentials, maxima and sums.

use super::Real;

/// Whether the surrounding code has an instruction for `a * b + c`. This is known when that code is compiled: [`simd`] inlines
/// a closure once for each kind of vectors, so that no branch is left.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fma(bool);

impl Fma {
    /// `a * b + c`, rounded once if the CPU has the instruction. Without it, `mul_add` would be a call of a function.
    #[inline(always)]
    pub(crate) fn mul_add<T: Real>(self, a: T, b: T, c: T) -> T {
        if self.0 { a.mul_add(b, c) } else { a * b + c }
    }
}

/// Runs `f` compiled for the widest vectors that this CPU has. `f` is compiled so only if it is inlined: mark closures
/// `#[inline(always)]`, here and in [`super::par_rows`]; otherwise a long closure is compiled for baseline SSE2.
#[inline(always)]
pub(crate) fn simd<R>(f: impl FnOnce(Fma) -> R) -> R {
    struct Closure<F>(F);
    impl<R, F: FnOnce(Fma) -> R> pulp::WithSimd for Closure<F> {
        type Output = R;
        #[inline(always)]
        fn with_simd<S: pulp::Simd>(self, _: S) -> R {
            // Every kind of vectors that pulp knows comes with the instruction.
            (self.0)(Fma(!S::IS_SCALAR))
        }
    }
    pulp::Arch::new().dispatch(Closure(f))
}

/// e^x of f32, within 2 units in the last place: range reduction by powers of two and the polynomial of Cephes' `expf.c`.
/// Inputs are clamped to the range in which the result is a normal number; NaN stays NaN.
#[inline(always)]
pub(super) fn exp_f32(x: f32, fma: Fma) -> f32 {
    // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let shifted = fma.mul_add(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = fma.mul_add(n, 2.121_944_4e-4, fma.mul_add(n, -0.693_359_4, x));
    let p = fma.mul_add(1.987_569_1e-4, r, 1.398_2e-3);
    let p = fma.mul_add(p, r, 8.333_452e-3);
    let p = fma.mul_add(p, r, 4.166_579_6e-2);
    let p = fma.mul_add(p, r, 1.666_666_5e-1);
    let p = fma.mul_add(p, r, 0.5);
    let e = fma.mul_add(p * r, r, r) + 1.0;
    e * f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000))
}

/// ln(1 + e^x) of f32, x itself above 20: the polynomial of Cephes' `logf.c`, and what the rounding of 1 + e^x left out.
#[inline(always)]
pub(super) fn softplus_f32(x: f32, fma: Fma) -> f32 {
    const SQRT_HALF: u32 = 0x3f35_04f3;
    let e = exp_f32(if x > 20.0 { 20.0 } else { x }, fma);
    let u = 1.0 + e;
    // u = 2^n m with m from sqrt(1/2) to sqrt(2).
    let bits = u.to_bits().wrapping_sub(SQRT_HALF);
    let n = ((bits as i32) >> 23) as f32;
    let f = f32::from_bits((bits & 0x7f_ffff) + SQRT_HALF) - 1.0;
    let p = fma.mul_add(7.037_683_6e-2, f, -1.151_461e-1);
    let p = fma.mul_add(p, f, 1.167_699_9e-1);
    let p = fma.mul_add(p, f, -1.242_014_1e-1);
    let p = fma.mul_add(p, f, 1.424_932_3e-1);
    let p = fma.mul_add(p, f, -1.666_805_8e-1);
    let p = fma.mul_add(p, f, 2.000_071_4e-1);
    let p = fma.mul_add(p, f, -2.499_999_4e-1);
    let p = fma.mul_add(p, f, 0.333_333_3);
    let square = f * f;
    let low = fma.mul_add(n, -2.121_944_4e-4, fma.mul_add(p, f, -0.5) * square);
    let log = fma.mul_add(n, 0.693_359_4, f + low);
    let softplus = log + (e - (u - 1.0)) / u;
    if x > 20.0 { x } else { softplus }
}

/// The largest of `values` in 16 lanes, so that it vectorises; negative infinity if there is none.
#[inline(always)]
pub(crate) fn largest<T: Real>(values: &[T]) -> T {
    let larger = |a: T, b: T| if b > a { b } else { a };
    let mut lanes = [T::neg_infinity(); 16];
    let mut parts = values.chunks_exact(16);
    for part in &mut parts {
        lanes.iter_mut().zip(part).for_each(|(lane, &x)| *lane = larger(*lane, x));
    }
    lanes.iter().chain(parts.remainder()).copied().fold(T::neg_infinity(), larger)
}

/// Partial sums of [`sum`] and [`dot`], so that they vectorise and do not depend on the vector length.
const LANES: usize = 32;

/// Sum of `values`.
#[inline(always)]
pub(crate) fn sum<T: Real>(values: &[T]) -> T {
    let mut lanes = [T::zero(); LANES];
    let mut parts = values.chunks_exact(LANES);
    for part in &mut parts {
        lanes.iter_mut().zip(part).for_each(|(lane, &x)| *lane += x);
    }
    lanes.into_iter().sum::<T>() + parts.remainder().iter().copied().sum()
}

/// Sum of the products of `a` and `b`, which have one length.
#[inline(always)]
pub(crate) fn dot<T: Real>(a: &[T], b: &[T], fma: Fma) -> T {
    let mut lanes = [T::zero(); LANES];
    let (mut a, mut b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    for (a, b) in (&mut a).zip(&mut b) {
        lanes.iter_mut().zip(a.iter().zip(b)).for_each(|(lane, (&a, &b))| *lane = fma.mul_add(a, b, *lane));
    }
    let tail: T = a.remainder().iter().zip(b.remainder()).map(|(&a, &b)| a * b).sum();
    lanes.into_iter().sum::<T>() + tail
}

/// `y += factor * x`, both of one length.
#[inline(always)]
pub(crate) fn add_scaled<T: Real>(y: &mut [T], factor: T, x: &[T], fma: Fma) {
    y.iter_mut().zip(x).for_each(|(y, &x)| *y = fma.mul_add(factor, x, *y));
}

/// The logistic function, `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid<T: Real>(x: T, fma: Fma) -> T {
    T::one() / (T::one() + (-x).fast_exp(fma))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        for fma in [Fma(false), Fma(true)] {
            for i in -870_000..880_000 {
                let x = i as f32 * 1e-4;
                let (ours, exact) = (x.fast_exp(fma), f64::from(x).exp());
                let error = ((f64::from(ours) - exact) / exact).abs();
                assert!(error < 2.4e-7, "exp({x}) = {ours}, not {exact}, {fma:?}");
            }
            assert!(f32::NAN.fast_exp(fma).is_nan());
            assert_eq!(0f32.fast_exp(fma), 1.0);
        }
    }

    #[test]
    fn softplus_is_within_a_few_units_in_the_last_place() {
        for fma in [Fma(false), Fma(true)] {
            for i in -800_000..400_000 {
                let x = i as f32 * 1e-4;
                let (ours, exact) = (softplus_f32(x, fma), f64::from(x).exp().ln_1p());
                let error = ((f64::from(ours) - exact) / exact).abs();
                assert!(error < 4e-7, "softplus({x}) = {ours}, not {exact}, {fma:?}");
            }
            assert!(softplus_f32(f32::NAN, fma).is_nan());
        }
    }

    #[test]
    fn sum_and_dot_take_every_element_once() {
        for n in [0, 1, 31, 32, 33, 100] {
            let (a, b): (Vec<f64>, Vec<f64>) = (0..n).map(|i| (f64::from(i), f64::from(2 - i))).unzip();
            assert_eq!(sum(&a), a.iter().sum::<f64>(), "{n} elements");
            let expected: f64 = a.iter().zip(&b).map(|(a, b)| a * b).sum();
            for fma in [Fma(false), Fma(true)] {
                assert_eq!(dot(&a, &b, fma), expected, "{n} elements");
            }
        }
    }
}
