use super::*;
use crate::ops::{autograd, testing::*};

#[test]
fn forward_and_backward_agree_with_the_reference() -> Result<()> {
    for (t, c) in [(1, 1), (5, 123), (123, 40), (64, 576)] {
        for dtype in [DType::F32, DType::F64] {
            let norm = RmsNorm { weight: randn(1, c, dtype)?, eps: 1e-5 };
            let (x, delta) = (randn(2, (t, c), dtype)?, randn(3, (t, c), dtype)?);
            for add in [None, Some(ResidualAdd { delta: &delta, multiplier: 0.22 })] {
                let (ours, expected) = (norm.forward(&x, add, dtype)?, norm.reference(&x, add)?);
                let tolerance = Tolerance::for_dtype(dtype);
                assert_close("residual", &ours.residual, &expected.residual, tolerance);
                assert_close("normed", &ours.normed, &expected.normed, tolerance);
                assert_close("rstd", &ours.rstd, &expected.rstd, tolerance);
                let (dy, dresidual) = (randn(4, (t, c), dtype)?, randn(5, (t, c), dtype)?);
                let through =
                    autograd(&[&ours.residual], &dy, |v| Ok(norm.reference(v[0].as_tensor(), None)?.normed))?;
                let dr = norm.backward(&dy, &ours.residual, &ours.rstd, None)?;
                assert_close("backward", &dr, &through[0], tolerance);
                let dr = norm.backward(&dy, &ours.residual, &ours.rstd, Some(&dresidual))?;
                assert_close("backward with the residual's", &dr, &(&through[0] + &dresidual)?, tolerance);
                assert!(max_abs(&dr)? > 0.0);
            }
        }
    }
    Ok(())
}

#[test]
fn forward_to_bf16_is_forward_to_f32_rounded() -> Result<()> {
    let norm = RmsNorm { weight: randn(1, 45, DType::F32)?, eps: 1e-5 };
    let x = randn(2, (7, 45), DType::F32)?;
    let add = Some(ResidualAdd { delta: &x, multiplier: 0.22 });
    let (f32s, bf16s) = (norm.forward(&x, add, DType::F32)?, norm.forward(&x, add, DType::BF16)?);
    assert_close("residual", &bf16s.residual, &f32s.residual, Tolerance::F32);
    let rounded = f32s.normed.to_dtype(DType::BF16)?.to_vec2::<half::bf16>()?;
    assert_eq!(bf16s.normed.to_vec2::<half::bf16>()?, rounded);
    assert!(norm.forward(&x, add, DType::F64).is_err());
    Ok(())
}

#[test]
fn forward_refuses_a_gain_of_another_width() -> Result<()> {
    let norm = RmsNorm { weight: randn(1, 5, DType::F32)?, eps: 1e-5 };
    assert!(norm.forward(&randn(2, (3, 4), DType::F32)?, None, DType::F32).is_err());
    Ok(())
}
