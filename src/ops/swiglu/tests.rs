use super::*;
use crate::ops::{autograd, testing::*};
use candle_core::DType;

#[test]
fn forward_and_backward_agree_with_the_reference() -> Result<()> {
    for (t, f) in [(1, 1), (5, 123), (123, 56)] {
        for dtype in [DType::F32, DType::F64] {
            let x = (randn(1, (t, 2 * f), dtype)? * 4.0)?;
            let da = randn(2, (t, f), dtype)?;
            assert_close("swiglu", &forward(&x)?, &reference(&x)?, Tolerance::for_dtype(dtype));
            let dx = autograd(&[&x], &da, |v| reference(v[0].as_tensor()))?;
            let ours = backward(&da, &x)?;
            assert_close("swiglu backward", &ours, &dx[0], Tolerance::for_dtype(dtype));
            assert!(max_abs(&ours)? > 0.0);
        }
    }
    Ok(())
}

#[test]
fn forward_and_backward_in_bf16_are_those_in_f32_rounded() -> Result<()> {
    let values = |t: &Tensor| t.to_dtype(DType::BF16)?.flatten_all()?.to_vec1::<half::bf16>();
    for (t, f) in [(7, 45), (300, 100), (0, 5)] {
        let narrow = randn(1, (t, 2 * f), DType::F32)?.to_dtype(DType::BF16)?;
        let (wide, da) = (narrow.to_dtype(DType::F32)?, randn(2, (t, f), DType::F32)?);
        for (wide, narrow) in
            [(forward(&wide)?, forward(&narrow)?), (backward(&da, &wide)?, backward(&da, &narrow)?)]
        {
            assert_eq!((values(&narrow)?, narrow.dtype()), (values(&wide)?, DType::BF16));
        }
    }
    Ok(())
}

#[test]
fn forward_stays_finite_for_large_gates() -> Result<()> {
    let x = Tensor::new(&[[-1e4f32, 1e4, 2.0, 3.0]], &candle_core::Device::Cpu)?;
    let expected = Tensor::new(&[[0f32, 3e4]], &candle_core::Device::Cpu)?;
    assert_close("far gates", &forward(&x)?, &expected, Tolerance::F32);
    Ok(())
}
