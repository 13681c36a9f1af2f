use super::*;
use crate::ops::gpu::emulated::emulate;
use crate::ops::testing::*;

const ADAMW: AdamW = AdamW { beta1: 0.9, beta2: 0.98, eps: 1e-7, weight_decay: 0.03 };

#[test]
fn forward_agrees_with_the_reference() -> Result<()> {
    for dtype in [DType::F32, DType::F64] {
        let mut ours = Parameter::new(&randn(1, (5, 123), dtype)?)?;
        let mut expected = ours.clone();
        for step in 1..=5 {
            let gradient = randn(step as u64 + 7, (5, 123), dtype)?;
            let step = AdamWStep { step, learning_rate: 0.01, max_grad_norm: 0.5 };
            let updated = ADAMW.forward(&ours, &gradient, step)?;
            assert!((updated.grad_norm.value()? - norm(&gradient)?).abs() < 1e-4);
            ours = updated.parameter;
            assert!((updated.value_norm.value()? - norm(&ours.value)?).abs() < 1e-4);
            expected = ADAMW.reference(&expected, &gradient, step)?;
        }
        assert_close("value", &ours.value, &expected.value, Tolerance::for_dtype(dtype));
        assert_close("m", &ours.m, &expected.m, Tolerance::for_dtype(dtype));
        assert_close("v", &ours.v, &expected.v, Tolerance::for_dtype(dtype));
    }
    Ok(())
}

#[test]
fn forward_moves_by_the_learning_rate_in_the_first_step() -> Result<()> {
    let parameter = Parameter::new(&Tensor::new(&[1f64, -2.0], &candle_core::Device::Cpu)?)?;
    let gradient = Tensor::new(&[3f64, -4.0], &candle_core::Device::Cpu)?;
    let adamw = AdamW { weight_decay: 0.0, eps: 0.0, ..ADAMW };
    let step = AdamWStep { step: 1, learning_rate: 0.1, max_grad_norm: 0.0 };
    let after = adamw.forward(&parameter, &gradient, step)?;
    assert_close(
        "moved",
        &after.parameter.value,
        &Tensor::new(&[0.9f64, -1.9], &candle_core::Device::Cpu)?,
        Tolerance::F64,
    );
    assert_eq!(after.grad_norm.value()?, 5.0);
    Ok(())
}

#[test]
fn forward_refuses_f64_on_a_gpu() -> Result<()> {
    let parameter = Parameter::new(&randn(1, (2, 3), DType::F64)?)?;
    let step = AdamWStep { step: 1, learning_rate: 0.1, max_grad_norm: 1.0 };
    let gradient = randn(2, (2, 3), DType::F64)?;
    let error = emulate(0, || ADAMW.forward(&parameter, &gradient, step)).unwrap_err();
    assert_eq!(error.to_string(), "adamw: expected f32 parameters on a GPU, found F64");
    Ok(())
}

#[test]
fn forward_refuses_a_gradient_of_another_shape() -> Result<()> {
    let parameter = Parameter::new(&randn(1, (2, 3), DType::F32)?)?;
    let step = AdamWStep { step: 1, learning_rate: 0.1, max_grad_norm: 1.0 };
    assert!(ADAMW.forward(&parameter, &randn(2, (3, 2), DType::F32)?, step).is_err());
    Ok(())
}
