use super::*;
use crate::ops::attention::{Segment, Segments};
use crate::ops::gpu::emulated::emulate;
use crate::ops::rope::Rope;
use crate::ops::{IndexView, Indices, RopeTable, testing::*};
use candle_core::Device;

fn shape((heads, kv_heads, head_dim): (usize, usize, usize)) -> AttentionShape {
    AttentionShape { heads, kv_heads, head_dim, scale: 1.0 / (head_dim as f64).sqrt() }
}

fn file_of(head_dim: usize, dtype: DType, scale: f64, aligned: bool) -> Result<(&'static str, &'static str)> {
    let q = Tensor::zeros((1, 1), dtype, &Device::Cpu)?;
    let shape = AttentionShape { heads: 1, kv_heads: 1, head_dim, scale };
    let form = emulate(0, || form(&shape, aligned, &q));
    Ok((form.file, form.forward.name))
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

/// Queries and keys of rows, and where they stand.
struct Case {
    segments: Segments,
    qkv: Qkv,
    prefix: Option<Tensor>,
    queries: Indices,
    keys: Indices,
}

impl Case {
    fn one_pass(shape: &AttentionShape, dtype: DType) -> Result<Self> {
        let segments = Segments::from(crate::check::packed(&[70], &[(0, 9), (0, 60)]));
        let positions = || Indices::from((0..139).map(|i| i * 29 % 100).collect::<Vec<u32>>());
        let qkv = Qkv::Fused(randn(1, (139, shape.q_width() + shape.kv_width()), dtype)?);
        Ok(Self { segments, qkv, prefix: None, queries: positions(), keys: positions() })
    }

    /// The last rows of each sequence alone are queries, as in a model's last block.
    fn some_queries(shape: &AttentionShape, dtype: DType) -> Result<Self> {
        let mut segments = crate::check::packed(&[70], &[(0, 9), (0, 60)]);
        let mut next = 0;
        for (segment, queries) in segments.iter_mut().zip([0, 3, 20]) {
            segment.first = segment.keys.len() - queries;
            segment.queries = next..next + queries;
            next += queries;
        }
        let keys = Indices::from((0..139).map(|i| i * 29 % 100).collect::<Vec<u32>>());
        let queries = Indices::from((0..23).map(|i| i * 31 % 100).collect::<Vec<u32>>());
        let q = randn(1, (next, shape.q_width()), dtype)?;
        let qkv = Qkv::Split { q, kv: randn(2, (139, shape.kv_width()), dtype)? };
        Ok(Self { segments: segments.into(), qkv, prefix: None, queries, keys })
    }

    /// The prefix is in another pass.
    fn another_pass(shape: &AttentionShape, dtype: DType) -> Result<Self> {
        let own = |rows: std::ops::Range<usize>| rows.start - 70..rows.end - 70;
        let all = crate::check::packed(&[70], &[(0, 9), (0, 60)]);
        let moved = |s: Segment| Segment { queries: own(s.queries), keys: own(s.keys), ..s };
        let segments = all.into_iter().skip(1).map(moved).collect();
        let positions = || Indices::from((0..69).map(|i| i * 29 % 100).collect::<Vec<u32>>());
        let qkv = Qkv::Fused(randn(1, (69, shape.q_width() + shape.kv_width()), dtype)?);
        let prefix = Some(randn(3, (70, shape.kv_width()), dtype)?);
        Ok(Self { segments, qkv, prefix, queries: positions(), keys: positions() })
    }

    fn wide(&self) -> Result<(Qkv, Option<Tensor>)> {
        let wide = |t: &Tensor| t.to_dtype(DType::F32);
        let qkv = match &self.qkv {
            Qkv::Fused(t) => Qkv::Fused(wide(t)?),
            Qkv::Split { q, kv } => Qkv::Split { q: wide(q)?, kv: wide(kv)? },
        };
        Ok((qkv, self.prefix.as_ref().map(wide).transpose()?))
    }
}

/// The reference's gradient of q, k and v before their rotation.
fn turned_back(shape: &AttentionShape, case: &Case, table: &RopeTable, qkv: &Qkv) -> Result<Qkv> {
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

fn check_rotated(shape: &AttentionShape, case: &Case, fused: bool) -> Result<()> {
    let inputs = Inputs { segments: &case.segments, qkv: &case.qkv, prefix: case.prefix.as_ref() };
    let dtype = case.qkv.queries().dtype();
    let table = RopeTable::new(&Rope::new(1e4), shape.head_dim, 100, DType::F32, &Device::Cpu)?;
    let rotation = Rotation { table: &table, queries: (&case.queries).into(), keys: (&case.keys).into() };
    let dout = randn(2, (case.qkv.queries().dims()[0], shape.q_width()), dtype)?;
    let (qkv, prefix) = case.wide()?;
    let wide = Inputs { qkv: &qkv, prefix: prefix.as_ref(), ..inputs };
    for needs in [Needs::All, Needs::Prefixes] {
        let ours = emulate(1, || {
            let kept = shape.forward(inputs)?.kept();
            shape.backward_rotated(inputs, &kept, (&dout, Some(rotation)), needs)
        })?;
        assert_eq!(ours.rotated_back, fused, "{shape:?} {dtype:?}");
        let expected = shape.reference_backward(wide, &dout.to_dtype(DType::F32)?, needs)?;
        assert_eq!(ours.qkv.is_some(), expected.qkv.is_some());
        if let (Some(ours), Some(expected)) = (&ours.qkv, expected.qkv) {
            let expected = if fused { turned_back(shape, case, &table, &expected)? } else { expected };
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
    for (of, dtype) in [((4, 2, 64), DType::BF16), ((1, 1, 128), DType::F16)] {
        let shape = shape(of);
        check_rotated(&shape, &Case::one_pass(&shape, dtype)?, true)?;
    }
    let shape_of_queries = shape((2, 1, 128));
    check_rotated(&shape_of_queries, &Case::some_queries(&shape_of_queries, DType::BF16)?, true)?;
    let shape_of_passes = shape((2, 1, 64));
    check_rotated(&shape_of_passes, &Case::another_pass(&shape_of_passes, DType::F16)?, true)
}

#[test]
fn backward_leaves_the_rotation_of_other_heads() -> Result<()> {
    for (of, dtype) in [((2, 1, 80), DType::BF16), ((1, 1, 64), DType::F32)] {
        let shape = shape(of);
        check_rotated(&shape, &Case::one_pass(&shape, dtype)?, false)?;
    }
    Ok(())
}

#[test]
fn backward_refuses_positions_that_do_not_fit() -> Result<()> {
    let shape = shape((1, 1, 64));
    let case = Case::one_pass(&shape, DType::BF16)?;
    let inputs = Inputs { segments: &case.segments, qkv: &case.qkv, prefix: None };
    let dout = randn(2, (139, 64), DType::BF16)?;
    let kept = emulate(0, || shape.forward(inputs))?.kept();
    let few = Indices::from(vec![0; 138]);
    for (positions, queries, expected) in [
        (100, &few, "139 positions under 100, found 138"),
        (99, &case.keys, "139 positions under 99, found 139, positions under 100"),
    ] {
        let table = RopeTable::new(&Rope::new(1e4), 64, positions, DType::F32, &Device::Cpu)?;
        let rotation = Rotation { table: &table, queries: queries.into(), keys: (&case.keys).into() };
        let found = emulate(0, || shape.backward_rotated(inputs, &kept, (&dout, Some(rotation)), Needs::All));
        let error = found.err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains(expected), "{error}");
    }
    Ok(())
}
