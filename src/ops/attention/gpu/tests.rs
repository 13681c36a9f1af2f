use super::*;
use crate::ops::attention::Segments;
use crate::ops::gpu::emulated::emulate;
use crate::ops::testing::*;
use candle_core::Device;

fn shape((heads, kv_heads, head_dim): (usize, usize, usize)) -> AttentionShape {
    AttentionShape { heads, kv_heads, head_dim, scale: 1.0 / (head_dim as f64).sqrt() }
}

fn file_of(head_dim: usize, dtype: DType, scale: f64, aligned: bool) -> Result<(&'static str, &'static str)> {
    let q = Tensor::zeros((1, 1), dtype, &Device::Cpu)?;
    let shape = AttentionShape { heads: 1, kv_heads: 1, head_dim, scale };
    let form = emulate(0, || form(&shape, aligned, &q));
    Ok((form.file, form.forward.0))
}

#[test]
fn form_takes_tensor_cores_for_every_head_that_fits() -> Result<()> {
    for head_dim in 1..=256 {
        let size = if head_dim <= 64 { 64 } else { 128 };
        for dtype in [DType::BF16, DType::F16] {
            let (file, name) = file_of(head_dim, dtype, 0.1, true)?;
            let on_cores = head_dim <= 128 && head_dim % 8 == 0;
            assert_eq!(file, if on_cores { "attention_mma" } else { "attention" }, "{head_dim}");
            assert!(!on_cores || name == format!("attention_mma_forward_{size}"), "{head_dim}: {name}");
            assert_eq!(file_of(head_dim, dtype, 0.1, false)?.0, "attention");
            assert_eq!(file_of(head_dim, dtype, 0.0, true)?.0, "attention");
        }
        assert_eq!(file_of(head_dim, DType::F32, 0.1, true)?.0, "attention");
    }
    Ok(())
}

/// The same values, from the fourth element of a buffer on: 8 bytes beyond a multiple of 16.
fn misaligned(t: &Tensor) -> Result<Tensor> {
    let padding = Tensor::zeros(4, t.dtype(), t.device())?;
    let flat = Tensor::cat(&[&padding, &t.flatten_all()?], 0)?;
    Ok(flat.narrow(0, 4, t.elem_count())?.reshape(t.dims())?)
}

/// Gradients on the emulator against the reference in f32.
fn check_gradient(shape: &AttentionShape, inputs: Inputs, dout: &Tensor) -> Result<()> {
    let wide = |t: &Tensor| t.to_dtype(DType::F32);
    let gradients = emulate(1, || {
        let kept = shape.forward(inputs)?.kept();
        shape.backward(inputs, &kept, dout, Needs::All)
    })?;
    let qkv = Qkv::Fused(wide(inputs.qkv.queries())?);
    let inputs = Inputs { qkv: &qkv, ..inputs };
    let expected = shape.reference_backward(inputs, &wide(dout)?, Needs::All)?;
    let (Some(ours), Some(expected)) = (gradients.qkv, expected.qkv) else { panic!("all are needed") };
    let absolute = 0.01 * max_abs(expected.queries())?;
    let tolerance = Tolerance { absolute, relative: 0.01 };
    assert_close("dqkv", &wide(ours.queries())?, expected.queries(), tolerance);
    Ok(())
}

#[test]
fn backward_takes_gradients_at_any_address() -> Result<()> {
    let segments = Segments::from(crate::check::packed(&[20], &[(0, 9), (0, 30)]));
    for (of, dtype) in [((2, 1, 64), DType::BF16), ((1, 1, 40), DType::F16)] {
        let shape = shape(of);
        let qkv = Qkv::Fused(randn(1, (59, shape.q_width() + shape.kv_width()), dtype)?);
        let inputs = Inputs { segments: &segments, qkv: &qkv, prefix: None };
        let dout = randn(2, (59, shape.q_width()), dtype)?;
        let moved = misaligned(&dout)?;
        assert_eq!((gpu::aligned(&[8], &[&dout]), gpu::aligned(&[8], &[&moved])), (1, 0));
        check_gradient(&shape, inputs, &moved)?;
    }
    Ok(())
}
