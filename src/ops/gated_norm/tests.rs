use super::*;
use crate::ops::{autograd, testing::*};

fn norm(width: usize, groups: usize, dtype: DType) -> Result<GatedNorm> {
    Ok(GatedNorm { weight: (randn(1, width, dtype)? + 1.0)?, groups, eps: 1e-5 })
}

#[test]
fn forward_and_backward_agree_with_the_reference() -> Result<()> {
    for (t, groups, width) in [(1, 1, 1), (5, 1, 123), (7, 2, 80), (3, 4, 4 * 600), (40, 1, 1030)] {
        for dtype in [DType::F32, DType::F64] {
            let (norm, tolerance) = (norm(width, groups, dtype)?, Tolerance::for_dtype(dtype));
            let (y, z) = (randn(2, (t, width), dtype)?, (randn(3, (t, width), dtype)? * 2.0)?);
            let (ours, expected) = (norm.forward(&y, &z, dtype)?, norm.reference(&y, &z)?);
            assert_close("normed", &ours.normed, &expected.normed, tolerance);
            assert_close("rstd", &ours.rstd, &expected.rstd, tolerance);
            let dn = randn(4, (t, width), dtype)?;
            let expected =
                autograd(&[&y, &z], &dn, |v| Ok(norm.reference(v[0].as_tensor(), v[1].as_tensor())?.normed))?;
            let ours = norm.backward(&dn, &y, &z, &ours.rstd)?;
            assert_close("dy", &ours.y, &expected[0], tolerance);
            assert_close("dz", &ours.z, &expected[1], tolerance);
            assert!(width == 1 || (max_abs(&ours.y)? > 0.0 && max_abs(&ours.z)? > 0.0));
        }
    }
    Ok(())
}

#[test]
fn inputs_in_bf16_are_computed_in_f32_and_the_output_is_rounded() -> Result<()> {
    for (t, groups, width) in [(7, 1, 45), (3, 2, 1200), (0, 1, 5)] {
        let norm = norm(width, groups, DType::F32)?;
        let bf16s = [randn(2, (t, width), DType::BF16)?, randn(3, (t, width), DType::BF16)?];
        let f32s = [bf16s[0].to_dtype(DType::F32)?, bf16s[1].to_dtype(DType::F32)?];
        let expected = norm.forward(&f32s[0], &f32s[1], DType::F32)?;
        for (y, z) in [(&bf16s[0], &bf16s[1]), (&f32s[0], &bf16s[1]), (&bf16s[0], &f32s[1])] {
            let ours = norm.forward(y, z, DType::BF16)?;
            let rounded = expected.normed.to_dtype(DType::BF16)?.to_vec2::<half::bf16>()?;
            assert_eq!(ours.normed.to_vec2::<half::bf16>()?, rounded);
            let dn = randn(4, (t, width), DType::F32)?;
            let (ours, expected) = (
                norm.backward(&dn, y, z, &expected.rstd)?,
                norm.backward(&dn, &f32s[0], &f32s[1], &expected.rstd)?,
            );
            assert_eq!(ours.y.to_vec2::<f32>()?, expected.y.to_vec2::<f32>()?);
            assert_eq!(ours.z.to_vec2::<f32>()?, expected.z.to_vec2::<f32>()?);
        }
    }
    Ok(())
}

#[test]
fn forward_refuses_other_widths_and_groups() -> Result<()> {
    let x = randn(2, (3, 10), DType::F32)?;
    assert!(norm(5, 1, DType::F32)?.forward(&x, &x, DType::F32).is_err());
    assert!(norm(10, 3, DType::F32)?.forward(&x, &x, DType::F32).is_err());
    assert!(norm(10, 2, DType::F32)?.forward(&x, &x, DType::F64).is_err());
    Ok(())
}
