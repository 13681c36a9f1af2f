//! Helpers of the ops' tests: random tensors and `assert_close`.

use crate::Result;
use candle_core::shape::ShapeWithOneHole;
use candle_core::{DType, Device, Tensor};
use rand::SeedableRng;
use rand_distr::{Distribution, StandardNormal};

/// `|a - b| <= absolute + relative * |b|`.
#[derive(Debug, Clone, Copy)]
pub struct Tolerance {
    pub absolute: f64,
    pub relative: f64,
}

impl Tolerance {
    pub const F32: Self = Self { absolute: 2e-5, relative: 2e-5 };
    pub const F64: Self = Self { absolute: 1e-12, relative: 1e-11 };

    pub fn for_dtype(dtype: DType) -> Self {
        if dtype == DType::F64 { Self::F64 } else { Self::F32 }
    }
}

/// Standard normal values from a seed.
pub fn randn(
    seed: u64,
    shape: impl ShapeWithOneHole + Into<candle_core::Shape>,
    dtype: DType,
) -> Result<Tensor> {
    let shape: candle_core::Shape = shape.into();
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f64> = (0..shape.elem_count()).map(|_| StandardNormal.sample(&mut rng)).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?)
}

/// Fails with the worst element if `ours` is not within `tolerance` of `expected`, or is not finite.
#[track_caller]
pub fn assert_close(what: &str, ours: &Tensor, expected: &Tensor, tolerance: Tolerance) {
    assert_eq!(ours.dims(), expected.dims(), "{what}: shapes");
    let values = |t: &Tensor| -> Vec<f64> {
        let flat = t.flatten_all().and_then(|t| t.to_dtype(DType::F64)).and_then(|t| t.to_vec1());
        flat.expect("a tensor on the CPU")
    };
    let (ours, expected) = (values(ours), values(expected));
    let excess = |(a, b): (&f64, &f64)| {
        let excess = (a - b).abs() - tolerance.absolute - tolerance.relative * b.abs();
        if excess.is_nan() { f64::INFINITY } else { excess }
    };
    let worst = ours.iter().zip(&expected).map(excess).enumerate().max_by(|a, b| a.1.total_cmp(&b.1));
    if let Some((i, excess)) = worst {
        assert!(
            excess <= 0.0,
            "{what}: element {i} is {}, expected {} ({tolerance:?})",
            ours[i],
            expected[i]
        );
    }
}

/// Largest magnitude; NaN if an element is NaN.
pub fn max_abs(t: &Tensor) -> Result<f64> {
    Ok(t.abs()?.flatten_all()?.to_dtype(DType::F64)?.max(0)?.to_scalar()?)
}
