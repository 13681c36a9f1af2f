use super::*;
use crate::ops::attention::tests::{after, of_last_rows};
use crate::ops::attention::{Segment, Segments};
use crate::ops::gpu::emulated::emulate;
use crate::ops::rope::Rope;
use crate::ops::{IndexView, Indices, RopeTable, testing::*};
use candle_core::Device;
use std::ops::Range;

fn shape((heads, kv_heads, head_dim): (usize, usize, usize)) -> AttentionShape {
    AttentionShape { heads, kv_heads, head_dim, scale: 1.0 / (head_dim as f64).sqrt() }
}

fn kernel_names(
    head_dim: usize,
    dtype: DType,
    scale: f64,
    aligned: bool,
) -> Result<(&'static str, &'static str)> {
    let q = Tensor::zeros((1, 1), dtype, &Device::Cpu)?;
    let shape = AttentionShape { heads: 1, kv_heads: 1, head_dim, scale };
    let kernels = emulate(0, || kernel_set(&shape, aligned, &q));
    Ok((kernels.file, kernels.forward.name))
}

#[test]
fn kernel_set_uses_tensor_cores_for_every_head_that_fits() -> Result<()> {
    for head_dim in 1..=256 {
        let size = if head_dim <= 64 { 64 } else { 128 };
        for dtype in [DType::BF16, DType::F16] {
            let (file, name) = kernel_names(head_dim, dtype, 0.1, true)?;
            let on_cores = head_dim <= 128 && head_dim % 8 == 0;
            assert_eq!(file, if on_cores { "attention_mma" } else { "attention" }, "{head_dim}");
            assert!(!on_cores || name == format!("attention_mma_forward_{size}"), "{head_dim}: {name}");
            assert_eq!(kernel_names(head_dim, dtype, 0.1, false)?.0, "attention");
            assert_eq!(kernel_names(head_dim, dtype, 0.0, true)?.0, "attention");
        }
        assert_eq!(kernel_names(head_dim, DType::F32, 0.1, true)?.0, "attention");
    }
    Ok(())
}

/// The same values, from the fourth element of a buffer on: 8 bytes beyond a multiple of 16.
fn misaligned(t: &Tensor) -> Result<Tensor> {
    let padding = Tensor::zeros(4, t.dtype(), t.device())?;
    let flat = Tensor::cat(&[&padding, &t.flatten_all()?], 0)?;
    Ok(flat.narrow(0, 4, t.elem_count())?.reshape(t.dims())?)
}

/// Plans of as many tiles as queries: tiles without queries change nothing and read nothing beyond the buffers.
#[test]
fn tiles_without_queries_leave_the_output_as_it_is() -> Result<()> {
    let kernels = [
        ((2, 1, 64), DType::F32),
        ((1, 1, 64), DType::BF16),
        ((2, 1, 64), DType::F16),
        ((1, 1, 128), DType::F16),
        ((4, 2, 80), DType::BF16),
    ];
    for (sizes, dtype) in kernels {
        let shape = shape(sizes);
        // Queries of one row each: three after a prefix, two after none, one far from the others.
        let row = |query: usize, keys: Range<usize>, prefix: Option<Range<usize>>| Segment {
            queries: query..query + 1,
            first: keys.len() - 1,
            keys,
            prefix,
        };
        let list = vec![
            row(0, 70..71, Some(0..70)),
            row(1, 71..80, Some(0..70)),
            row(2, 90..160, Some(0..70)),
            row(3, 160..165, None),
            row(4, 165..166, None),
            row(5, 599..600, None),
        ];
        let qkv = Qkv::Split {
            q: randn(1, (6, shape.q_width()), dtype)?,
            kv: randn(2, (600, shape.kv_width()), dtype)?,
        };
        let forward = |segments: &Segments| {
            emulate(1, || shape.forward(Inputs { segments, qkv: &qkv, prefix: None }))
                .map(|output| (output.out, output.lse))
        };
        let (expected, expected_lse) = forward(&list.clone().into())?;
        let fixed = Segments::from(list).with_a_tile_per_query();
        let (out, lse) = forward(&fixed)?;
        let values = |t: &Tensor| t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
        assert!(values(&out)? == values(&expected)? && values(&lse)? == values(&expected_lse)?, "{sizes:?}");
        let tiling = emulate(0, || tiling(&shape, &expected));
        assert_eq!(fixed.query_plan(&tiling, 6).len(), 6 * 6);
    }
    Ok(())
}

/// Gradients on the emulator against the reference in f32.
fn check_gradient(shape: &AttentionShape, inputs: Inputs, dout: &Tensor) -> Result<()> {
    let to_f32 = |t: &Tensor| t.to_dtype(DType::F32);
    let gradients = emulate(1, || {
        let saved = shape.forward(inputs)?.saved();
        shape.backward(inputs, &saved, dout, GradTargets::All)
    })?;
    let qkv = Qkv::Fused(to_f32(inputs.qkv.queries())?);
    let inputs = Inputs { qkv: &qkv, ..inputs };
    let expected = shape.reference_backward(inputs, &to_f32(dout)?, GradTargets::All)?;
    let (Some(ours), Some(expected)) = (gradients.qkv, expected.qkv) else { panic!("all are needed") };
    let absolute = 0.01 * max_abs(expected.queries())?;
    let tolerance = Tolerance { absolute, relative: 0.01 };
    assert_close("dqkv", &to_f32(ours.queries())?, expected.queries(), tolerance);
    Ok(())
}

#[test]
fn backward_takes_gradients_at_any_address() -> Result<()> {
    let segments = Segments::from(crate::check::packed(&[20], &[(0, 9), (0, 30)]));
    for (sizes, dtype) in [((2, 1, 64), DType::BF16), ((1, 1, 40), DType::F16)] {
        let shape = shape(sizes);
        let qkv = Qkv::Fused(randn(1, (59, shape.q_width() + shape.kv_width()), dtype)?);
        let inputs = Inputs { segments: &segments, qkv: &qkv, prefix: None };
        let dout = randn(2, (59, shape.q_width()), dtype)?;
        let moved = misaligned(&dout)?;
        assert_eq!((gpu::aligned(&[8], &[&dout]), gpu::aligned(&[8], &[&moved])), (1, 0));
        check_gradient(&shape, inputs, &moved)?;
    }
    Ok(())
}

/// Queries and keys with their positions.
struct RotatedCase {
    segments: Segments,
    qkv: Qkv,
    prefix: Option<Tensor>,
    queries: Indices,
    keys: Indices,
}

impl RotatedCase {
    fn one_pass(shape: &AttentionShape, dtype: DType) -> Result<Self> {
        let segments = Segments::from(crate::check::packed(&[70], &[(0, 9), (0, 60)]));
        let positions = || Indices::from((0..139).map(|i| i * 29 % 100).collect::<Vec<u32>>());
        let qkv = Qkv::Fused(randn(1, (139, shape.q_width() + shape.kv_width()), dtype)?);
        Ok(Self { segments, qkv, prefix: None, queries: positions(), keys: positions() })
    }

    /// Only the last rows of each sequence are queries, as in a model's last layer.
    fn some_queries(shape: &AttentionShape, dtype: DType) -> Result<Self> {
        let segments = of_last_rows(crate::check::packed(&[70], &[(0, 9), (0, 60)]), &[0, 3, 20]);
        let keys = Indices::from((0..139).map(|i| i * 29 % 100).collect::<Vec<u32>>());
        let queries = Indices::from((0..23).map(|i| i * 31 % 100).collect::<Vec<u32>>());
        let q = randn(1, (23, shape.q_width()), dtype)?;
        let qkv = Qkv::Split { q, kv: randn(2, (139, shape.kv_width()), dtype)? };
        Ok(Self { segments, qkv, prefix: None, queries, keys })
    }

    /// The prefix is in another pass.
    fn another_pass(shape: &AttentionShape, dtype: DType) -> Result<Self> {
        let segments = after(70, &crate::check::packed(&[70], &[(0, 9), (0, 60)]));
        let positions = || Indices::from((0..69).map(|i| i * 29 % 100).collect::<Vec<u32>>());
        let qkv = Qkv::Fused(randn(1, (69, shape.q_width() + shape.kv_width()), dtype)?);
        let prefix = Some(randn(3, (70, shape.kv_width()), dtype)?);
        Ok(Self { segments, qkv, prefix, queries: positions(), keys: positions() })
    }

    fn in_f32(&self) -> Result<(Qkv, Option<Tensor>)> {
        let to_f32 = |t: &Tensor| t.to_dtype(DType::F32);
        let qkv = match &self.qkv {
            Qkv::Fused(t) => Qkv::Fused(to_f32(t)?),
            Qkv::Split { q, kv } => Qkv::Split { q: to_f32(q)?, kv: to_f32(kv)? },
        };
        Ok((qkv, self.prefix.as_ref().map(to_f32).transpose()?))
    }
}

/// The reference's gradient of q, k and v before their rotation.
fn rotated_back(shape: &AttentionShape, case: &RotatedCase, table: &RopeTable, qkv: &Qkv) -> Result<Qkv> {
    let back = |t: &Tensor, heads, positions: &Indices| {
        let all = IndexView::from(positions).host()[..t.dims()[0]].to_vec();
        table.reference(t, heads, (&Indices::from(all)).into(), -1.0)
    };
    Ok(match qkv {
        Qkv::Fused(t) => Qkv::Fused(back(t, shape.heads + shape.kv_heads, &case.keys)?),
        Qkv::Split { q, kv } => {
            Qkv::Split { q: back(q, shape.heads, &case.queries)?, kv: back(kv, shape.kv_heads, &case.keys)? }
        }
    })
}

fn near(what: &str, ours: &Tensor, expected: &Tensor) -> Result<()> {
    if expected.elem_count() == 0 {
        return Ok(());
    }
    let tolerance = Tolerance { absolute: 0.01 * max_abs(expected)?, relative: 0.01 };
    assert_close(what, &ours.to_dtype(DType::F32)?, expected, tolerance);
    Ok(())
}

fn check_rotated(shape: &AttentionShape, case: &RotatedCase, fused: bool) -> Result<()> {
    let inputs = Inputs { segments: &case.segments, qkv: &case.qkv, prefix: case.prefix.as_ref() };
    let dtype = case.qkv.queries().dtype();
    let table = RopeTable::new(&Rope::new(1e4), shape.head_dim, 100, DType::F32, &Device::Cpu)?;
    let rotation = Rotation { table: &table, queries: (&case.queries).into(), keys: (&case.keys).into() };
    let dout = randn(2, (case.qkv.queries().dims()[0], shape.q_width()), dtype)?;
    let (qkv, prefix) = case.in_f32()?;
    let inputs_f32 = Inputs { qkv: &qkv, prefix: prefix.as_ref(), ..inputs };
    for targets in [GradTargets::All, GradTargets::Prefixes] {
        let ours = emulate(1, || {
            let saved = shape.forward(inputs)?.saved();
            shape.backward_rotated(inputs, &saved, (&dout, Some(rotation)), targets)
        })?;
        assert_eq!(ours.rotated_back, fused, "{shape:?} {dtype:?}");
        let expected = shape.reference_backward(inputs_f32, &dout.to_dtype(DType::F32)?, targets)?;
        assert_eq!(ours.qkv.is_some(), expected.qkv.is_some());
        if let (Some(ours), Some(expected)) = (&ours.qkv, expected.qkv) {
            let expected = if fused { rotated_back(shape, case, &table, &expected)? } else { expected };
            near("dq", ours.queries(), expected.queries())?;
            near("dkv", ours.keys_values(), expected.keys_values())?;
        }
        if let (Some(ours), Some(expected)) = (&ours.prefix, &expected.prefix) {
            near("dprefix", ours, expected)?;
        }
    }
    Ok(())
}

#[test]
fn backward_rotates_back_heads_of_64_and_128() -> Result<()> {
    for (sizes, dtype) in [((4, 2, 64), DType::BF16), ((1, 1, 128), DType::F16)] {
        let shape = shape(sizes);
        check_rotated(&shape, &RotatedCase::one_pass(&shape, dtype)?, true)?;
    }
    let shape_of_queries = shape((2, 1, 128));
    check_rotated(&shape_of_queries, &RotatedCase::some_queries(&shape_of_queries, DType::BF16)?, true)?;
    let shape_of_passes = shape((2, 1, 64));
    check_rotated(&shape_of_passes, &RotatedCase::another_pass(&shape_of_passes, DType::F16)?, true)
}

#[test]
fn backward_leaves_the_rotation_of_other_heads() -> Result<()> {
    for (sizes, dtype) in [((2, 1, 80), DType::BF16), ((1, 1, 64), DType::F32)] {
        let shape = shape(sizes);
        check_rotated(&shape, &RotatedCase::one_pass(&shape, dtype)?, false)?;
    }
    Ok(())
}

#[test]
fn backward_refuses_positions_that_do_not_fit() -> Result<()> {
    let shape = shape((1, 1, 64));
    let case = RotatedCase::one_pass(&shape, DType::BF16)?;
    let inputs = Inputs { segments: &case.segments, qkv: &case.qkv, prefix: None };
    let dout = randn(2, (139, 64), DType::BF16)?;
    let saved = emulate(0, || shape.forward(inputs))?.saved();
    let few = Indices::from(vec![0; 138]);
    for (positions, queries, expected) in [
        (100, &few, "139 positions under 100, found 138"),
        (99, &case.keys, "139 positions under 99, found 139, positions under 100"),
    ] {
        let table = RopeTable::new(&Rope::new(1e4), 64, positions, DType::F32, &Device::Cpu)?;
        let rotation = Rotation { table: &table, queries: queries.into(), keys: (&case.keys).into() };
        let found =
            emulate(0, || shape.backward_rotated(inputs, &saved, (&dout, Some(rotation)), GradTargets::All));
        let error = found.err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains(expected), "{error}");
    }
    Ok(())
}

#[test]
fn heads_over_256_run_as_candle_ops() -> Result<()> {
    let shape = shape((2, 1, 264));
    let segments = Segments::from(crate::check::packed(&[5], &[(0, 3), (0, 9)]));
    let qkv = Qkv::Fused(randn(1, (17, shape.q_width() + shape.kv_width()), DType::F32)?);
    let inputs = Inputs { segments: &segments, qkv: &qkv, prefix: None };
    let dout = randn(2, (17, shape.q_width()), DType::F32)?;
    let run = || -> Result<_> {
        let output = shape.forward(inputs)?;
        let out = output.out.clone();
        Ok((out, shape.backward(inputs, &output.saved(), &dout, GradTargets::All)?))
    };
    let ((ours, gradients), (expected, expected_gradients)) = (emulate(0, run)?, run()?);
    near("out", &ours, &expected)?;
    let (Some(ours), Some(expected)) = (gradients.qkv, expected_gradients.qkv) else {
        panic!("all are asked for")
    };
    near("dqkv", ours.queries(), expected.queries())
}
