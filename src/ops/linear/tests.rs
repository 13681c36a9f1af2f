use super::*;
use crate::ops::bf16::Isa;
use crate::ops::gpu::emulated::{emulate, emulate_cuda};
use crate::ops::{autograd, testing::*};

#[test]
fn forward_and_backward_agree_with_the_reference() -> Result<()> {
    for (t, n, k) in [(1, 1, 1), (5, 123, 31), (123, 300, 64), (7, 1, 129)] {
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            let act = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
            for bias in [None, Some(randn(3, n, act)?)] {
                let layer = Linear::new(randn(1, (n, k), act)?.to_dtype(dtype)?, bias)?;
                // If the CPU has products of bf16, inputs are rounded to it.
                let inputs = layer.gemm_dtype(act);
                let rounded = |x: Tensor| x.to_dtype(inputs)?.to_dtype(act);
                let (x, dy) = (rounded(randn(2, (t, k), act)?)?, rounded(randn(4, (t, n), act)?)?);
                let expected = autograd(&[&x], &dy, |v| layer.reference(v[0].as_tensor()))?;
                for layer in [layer.clone(), layer.clone().pack(act)?] {
                    for as_read in [false, true] {
                        let converted = |x: &Tensor| if as_read { x.to_dtype(inputs) } else { Ok(x.clone()) };
                        let y = layer.forward(&converted(&x)?)?;
                        assert_eq!((y.dtype(), layer.gemm_dtype(act)), (act, inputs));
                        assert_close("linear", &y, &layer.reference(&x)?, Tolerance::for_dtype(act));
                        let dx = (layer.backward(&converted(&dy)?, 0.5)? * 2.0)?;
                        assert_close("linear backward", &dx, &expected[0], Tolerance::for_dtype(act));
                        assert!(max_abs(&dx)? > 0.0);
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn forward_refuses_f64_with_a_packed_weight() -> Result<()> {
    let layer = Linear::new(randn(1, (10, 6), DType::BF16)?, None)?.pack(DType::F32)?;
    let x = randn(2, (4, 6), DType::F64)?;
    assert_eq!(layer.forward(&x).is_err(), Isa::best().is_some());
    Ok(())
}

/// As a head of 49,155 tokens is padded, at sizes that multiply fast; on the emulator's route, where layers are padded.
#[test]
fn padded_adds_outputs_of_zero_and_leaves_the_others() -> Result<()> {
    for (n, k, padded) in [(1, 3, 64), (123, 31, 128), (128, 8, 128)] {
        for dtype in [DType::F32, DType::BF16] {
            for bias in [None, Some(randn(3, n, dtype)?)] {
                let layer = Linear::new(randn(1, (n, k), dtype)?, bias)?;
                assert_eq!(layer.clone().padded(64)?.dims()?, (n, k), "the CPU pads nothing");
                let padded_layer = emulate(0, || layer.clone().padded(64))?;
                assert_eq!(padded_layer.dims()?, (padded, k));
                assert_eq!(padded_layer.bytes() - layer.bytes(), {
                    (padded - n) * dtype.size_in_bytes() * (k + usize::from(layer.bias.is_some()))
                });
                // The CPU's products in f32 of the same values.
                let (layer, padded_layer) = (
                    layer.converted(DType::F32, DType::F32, &Device::Cpu)?,
                    padded_layer.converted(DType::F32, DType::F32, &Device::Cpu)?,
                );
                let (x, dy) = (randn(2, (5, k), DType::F32)?, randn(4, (5, n), DType::F32)?);
                let y = padded_layer.forward(&x)?;
                assert_close("padded", &y.narrow(1, 0, n)?, &layer.reference(&x)?, Tolerance::F32);
                if padded > n {
                    assert_eq!(max_abs(&y.narrow(1, n, padded - n)?)?, 0.0);
                }
                // Columns of zeros in the gradient of the logits, as the cross-entropy leaves them.
                let dx = padded_layer.backward(&dy.pad_with_zeros(1, 0, padded - n)?, 0.5)?;
                let expected = (dy.matmul(&layer.weight()?)? * 0.5)?;
                assert_close("padded backward", &dx, &expected, Tolerance::F32);
            }
        }
    }
    Ok(())
}

#[test]
fn forward_add_is_the_residual_stream_with_the_scaled_layer() -> Result<()> {
    let (x, r) = (randn(2, (4, 6), DType::F32)?, randn(5, (4, 20), DType::F32)?);
    for (bias, multiplier) in [(false, 0.22), (false, 1.0), (true, 1.0)] {
        let bias = if bias { Some(randn(3, 20, DType::F32)?) } else { None };
        let layer = Linear::new(randn(1, (20, 6), DType::F32)?, bias)?;
        let expected = (&r + (layer.reference(&x)? * multiplier)?)?;
        let ours = emulate_cuda(0, || layer.forward_add(&x, &r, multiplier))?.expect("it adds");
        assert_close("added", &ours, &expected, Tolerance::F32);
        assert!(layer.forward_add(&x, &r, multiplier)?.is_none(), "the CPU's products add nothing");
        assert!(emulate(0, || layer.forward_add(&x, &r, multiplier))?.is_none());
        let error = emulate_cuda(0, || layer.forward_add(&x, &r.narrow(0, 0, 3).unwrap(), multiplier));
        let error = error.unwrap_err().to_string();
        assert_eq!(error, "linear: expected a residual stream of [4, 20], found [3, 20]");
    }
    // The bias would have to be scaled too.
    let biased = Linear::new(randn(1, (20, 6), DType::F32)?, Some(randn(3, 20, DType::F32)?))?;
    assert!(emulate_cuda(0, || biased.forward_add(&x, &r, 0.22))?.is_none());
    Ok(())
}

#[test]
fn forward_divided_is_the_product_divided() -> Result<()> {
    for bias in [None, Some(randn(3, 20, DType::F32)?)] {
        let layer = Linear::new(randn(1, (20, 6), DType::F32)?, bias)?;
        let x = randn(2, (4, 6), DType::F32)?;
        let expected = (layer.reference(&x)? / 7.0)?;
        assert_close("divided", &layer.forward_divided(&x, 7.0)?, &expected, Tolerance::F32);
        let ours = emulate(0, || layer.forward_divided(&x, 7.0))?;
        assert_close("divided in the product", &ours, &expected, Tolerance::F32);
    }
    Ok(())
}

#[test]
fn rows_returns_a_layer_of_a_part_of_the_output() -> Result<()> {
    for dtype in [DType::F32, DType::BF16] {
        let bias = Some(randn(2, 40, DType::F32)?);
        let layer = Linear::new(randn(1, (40, 6), dtype)?, bias)?.pack(DType::F32)?;
        let x = randn(3, (4, 6), DType::F32)?;
        for rows in [3..8, 16..40] {
            let part = layer.forward(&x)?.narrow(1, rows.start, rows.len())?;
            assert_close("rows", &layer.rows(rows)?.forward(&x)?, &part, Tolerance::F32);
        }
    }
    Ok(())
}

#[test]
fn forward_of_no_rows_returns_no_rows() -> Result<()> {
    let layer = Linear::new(randn(1, (10, 6), DType::F32)?, None)?;
    assert_eq!(layer.forward(&Tensor::zeros((0, 6), DType::F32, &Device::Cpu)?)?.dims(), [0, 10]);
    Ok(())
}

#[test]
fn forward_refuses_another_width() -> Result<()> {
    let layer = Linear::new(randn(1, (10, 6), DType::F32)?, None)?;
    let error = layer.forward(&randn(1, (2, 5), DType::F32)?).unwrap_err();
    assert_eq!(error.to_string(), "linear: expected [T, 6], found [2, 5]");
    Ok(())
}
