use super::*;
use crate::ops::bf16::Isa;
use crate::ops::{autograd, testing::*};
use candle_core::DType;
use proptest::prelude::*;

const SHAPES: [(usize, usize, usize); 4] = [(1, 1, 2), (3, 1, 10), (6, 3, 16), (9, 3, 64)];

fn shape((heads, kv_heads, head_dim): (usize, usize, usize)) -> AttentionShape {
    AttentionShape { heads, kv_heads, head_dim, scale: 0.37 / (head_dim as f64).sqrt() }
}

/// Prefixes of these lengths, then sequences (prefix, length), packed in one matrix.
fn packed(prefixes: &[usize], sequences: &[(usize, usize)]) -> Segments {
    crate::check::packed(prefixes, sequences).into()
}

/// The segments with queries of their last rows only, as in a model's last layer.
pub(super) fn of_last_rows(mut segments: Vec<Segment>, queries: &[usize]) -> Segments {
    let mut next = 0;
    for (segment, queries) in segments.iter_mut().zip(queries) {
        segment.first = segment.keys.len() - queries;
        segment.queries = next..next + queries;
        next += queries;
    }
    segments.into()
}

/// The segments after the first `rows` rows, which are in another pass.
pub(super) fn after(rows: usize, segments: &[Segment]) -> Segments {
    let own = |range: &Range<usize>| range.start - rows..range.end - rows;
    let later = segments.iter().filter(|s| s.keys.start >= rows);
    later.map(|s| Segment { queries: own(&s.queries), keys: own(&s.keys), ..s.clone() }).collect()
}

fn fused(shape: &AttentionShape, rows: usize, dtype: DType) -> Result<Qkv> {
    Ok(Qkv::Fused(randn(7, (rows, shape.q_width() + shape.kv_width()), dtype)?))
}

fn make_inputs<'a>(segments: &'a Segments, qkv: &'a Qkv, prefix: Option<&'a Tensor>) -> Inputs<'a> {
    Inputs { segments, qkv, prefix }
}

fn check(shape: &AttentionShape, inputs: Inputs, dtype: DType) -> Result<()> {
    let tolerance = Tolerance::for_dtype(dtype);
    let (ours, expected) = (shape.forward(inputs)?, shape.reference(inputs)?);
    assert_close("out", &ours.out, &expected.out, tolerance);
    assert_close("lse", &ours.lse, &expected.lse, tolerance);
    let dout = randn(8, ours.out.dims2()?, dtype)?;
    let ours = ours.saved();
    let gradients = shape.backward(inputs, &ours, &dout, GradTargets::All)?;
    let expected = shape.reference_backward(inputs, &dout, GradTargets::All)?;
    compare(&gradients, &expected, tolerance)?;
    let few = shape.backward(inputs, &ours, &dout, GradTargets::Prefixes)?;
    let expected = shape.reference_backward(inputs, &dout, GradTargets::Prefixes)?;
    compare(&few, &expected, tolerance)?;
    if Isa::best().is_some() { check_bf16(shape, inputs) } else { Ok(()) }
}

/// The gradients of all inputs, after a forward pass.
fn gradients(shape: &AttentionShape, inputs: Inputs, dout: &Tensor) -> Result<Gradients> {
    shape.backward(inputs, &shape.forward(inputs)?.saved(), dout, GradTargets::All)
}

/// The matrices of `inputs` in another dtype.
fn cast(inputs: Inputs, dtype: DType) -> Result<(Qkv, Option<Tensor>)> {
    let cast = |t: &Tensor| t.to_dtype(dtype);
    let qkv = match inputs.qkv {
        Qkv::Fused(t) => Qkv::Fused(cast(t)?),
        Qkv::Split { q, kv } => Qkv::Split { q: cast(q)?, kv: cast(kv)? },
    };
    Ok((qkv, inputs.prefix.map(cast).transpose()?))
}

/// In bf16 probabilities and gradients are off by up to 0.4 %, so a sum is by a part of the largest, and what cancels to
/// nothing in f32 does not quite. Queries, keys and values are the reference's own.
fn check_bf16(shape: &AttentionShape, inputs: Inputs) -> Result<()> {
    let near = |what: &str, ours: &Tensor, expected: &Tensor| -> Result<()> {
        if expected.elem_count() == 0 {
            return Ok(());
        }
        let absolute = 0.01 * max_abs(expected)? + 5e-3;
        assert_close(what, ours, expected, Tolerance { absolute, relative: 0.0 });
        Ok(())
    };
    let (qkv, prefix) = cast(inputs, DType::BF16)?;
    let inputs = Inputs { qkv: &qkv, prefix: prefix.as_ref(), ..inputs };
    let (qkv, prefix) = cast(inputs, DType::F32)?;
    let inputs_f32 = Inputs { qkv: &qkv, prefix: prefix.as_ref(), ..inputs };
    let (ours, expected) = (shape.forward(inputs)?, shape.reference(inputs_f32)?);
    assert_eq!((ours.out.dtype(), ours.lse.dtype()), (DType::BF16, DType::F32));
    near("out", &ours.out.to_dtype(DType::F32)?, &expected.out)?;
    near("lse", &ours.lse, &expected.lse)?;
    let dout = randn(8, ours.out.dims2()?, DType::F32)?;
    let ours = ours.saved();
    for targets in [GradTargets::All, GradTargets::Prefixes] {
        let gradients = shape.backward(inputs, &ours, &dout, targets)?;
        let expected = shape.reference_backward(inputs_f32, &dout, targets)?;
        if let (Some(a), Some(b)) = (&gradients.qkv, &expected.qkv) {
            let q = |t: &Tensor| t.narrow(1, 0, shape.q_width());
            let kv = |t: &Tensor| t.narrow(1, t.dims()[1] - shape.kv_width(), shape.kv_width());
            near("dq", &q(a.queries())?, &q(b.queries())?)?;
            near("dkv", &kv(a.keys_values())?, &kv(b.keys_values())?)?;
        }
        if let (Some(a), Some(b)) = (&gradients.prefix, &expected.prefix) {
            near("dprefix", a, b)?;
        }
    }
    Ok(())
}

fn compare(ours: &Gradients, expected: &Gradients, tolerance: Tolerance) -> Result<()> {
    assert_eq!(ours.qkv.is_some(), expected.qkv.is_some());
    if let (Some(a), Some(b)) = (&ours.qkv, &expected.qkv) {
        assert_close("dq", a.queries(), b.queries(), tolerance);
        assert_close("dkv", a.keys_values(), b.keys_values(), tolerance);
        assert!(a.queries().dims()[0] == 0 || max_abs(a.queries())? > 0.0);
    }
    assert_eq!(ours.prefix.is_some(), expected.prefix.is_some());
    if let (Some(a), Some(b)) = (&ours.prefix, &expected.prefix) {
        assert_close("dprefix", a, b, tolerance);
        assert!(max_abs(a)? > 0.0);
    }
    Ok(())
}

#[test]
fn passes_of_one_batch_agree_with_the_reference() -> Result<()> {
    for (prefixes, sequences) in [
        (vec![1], vec![(0, 1)]),
        (vec![5], vec![(0, 3), (0, 1), (0, 123)]),
        (vec![123, 4], vec![(0, 40), (0, 60), (0, 70), (1, 2), (1, 300)]),
        (vec![7], vec![]),
    ] {
        let segments = packed(&prefixes, &sequences);
        let rows = segments.last().map_or(0, |s| s.keys.end);
        for sizes in SHAPES {
            for dtype in [DType::F32, DType::F64] {
                let shape = shape(sizes);
                let qkv = fused(&shape, rows, dtype)?;
                check(&shape, make_inputs(&segments, &qkv, None), dtype)?;
            }
        }
    }
    Ok(())
}

#[test]
fn queries_of_some_rows_agree_with_the_reference() -> Result<()> {
    let all = crate::check::packed(&[9, 5], &[(0, 6), (0, 3), (1, 150)]);
    let segments = of_last_rows(all, &[0, 0, 2, 3, 140]);
    for sizes in SHAPES {
        let shape = shape(sizes);
        let q = randn(1, (145, shape.q_width()), DType::F64)?;
        let kv = randn(2, (173, shape.kv_width()), DType::F64)?;
        let qkv = Qkv::Split { q, kv };
        check(&shape, make_inputs(&segments, &qkv, None), DType::F64)?;
    }
    Ok(())
}

/// Without its second segment the batch has rows of keys that belong to no segment, whose gradient is zero.
#[test]
fn keys_of_no_segment_agree_with_the_reference() -> Result<()> {
    let mut segments = packed(&[7], &[(0, 5), (0, 40)]).to_vec();
    segments.remove(1);
    segments[1].queries = 7..47;
    let segments = Segments::from(segments);
    for sizes in SHAPES {
        let shape = shape(sizes);
        let q = randn(1, (47, shape.q_width()), DType::F64)?;
        let kv = randn(2, (52, shape.kv_width()), DType::F64)?;
        let qkv = Qkv::Split { q, kv };
        check(&shape, make_inputs(&segments, &qkv, None), DType::F64)?;
    }
    Ok(())
}

#[test]
fn prefixes_of_another_pass_agree_with_the_reference() -> Result<()> {
    let segments = after(14, &packed(&[9, 5], &[(0, 6), (0, 3), (1, 15)]));
    for sizes in SHAPES {
        let shape = shape(sizes);
        let qkv = fused(&shape, 24, DType::F64)?;
        for extra in [0, shape.q_width()] {
            let prefix = randn(3, (14, shape.kv_width() + extra), DType::F64)?;
            check(&shape, make_inputs(&segments, &qkv, Some(&prefix)), DType::F64)?;
        }
    }
    Ok(())
}

#[test]
fn two_passes_have_the_gradient_of_one() -> Result<()> {
    let shape = shape((6, 3, 16));
    let segments = packed(&[11], &[(0, 6), (0, 9)]);
    let Qkv::Fused(all) = fused(&shape, 26, DType::F64)? else { unreachable!("it is fused") };
    let dout = randn(8, (26, shape.q_width()), DType::F64)?;
    let batch = Qkv::Fused(all.clone());
    let inputs = make_inputs(&segments, &batch, None);
    let one = gradients(&shape, inputs, &dout)?;
    let (prefix, sequences) = (all.narrow(0, 0, 11)?, Qkv::Fused(all.narrow(0, 11, 15)?));
    let moved = after(11, &segments);
    let inputs = make_inputs(&moved, &sequences, Some(&prefix));
    let two = gradients(&shape, inputs, &dout.narrow(0, 11, 15)?)?;
    let prefix_qkv = Qkv::Fused(prefix);
    let prefix_segment = Segments::from(segments[..1].to_vec());
    let inputs = make_inputs(&prefix_segment, &prefix_qkv, None);
    let own = gradients(&shape, inputs, &dout.narrow(0, 0, 11)?)?;
    let (Some(Qkv::Fused(one)), Some(Qkv::Fused(own)), Some(prefix_kv)) = (one.qkv, own.qkv, two.prefix)
    else {
        panic!("both are fused")
    };
    let zeros = Tensor::zeros((11, shape.q_width()), DType::F64, one.device())?;
    let sum = (own + Tensor::cat(&[&zeros, &prefix_kv], 1)?)?;
    assert_close("prefix rows", &sum, &one.narrow(0, 0, 11)?, Tolerance::F64);
    Ok(())
}

#[test]
fn backward_agrees_with_finite_differences() -> Result<()> {
    let shape = shape((2, 1, 4));
    let segments = packed(&[3], &[(0, 2), (0, 4)]);
    let Qkv::Fused(x) = fused(&shape, 9, DType::F64)? else { unreachable!("it is fused") };
    let dout = randn(8, (9, shape.q_width()), DType::F64)?;
    let loss = |x: &Tensor| -> Result<f64> {
        let qkv = Qkv::Fused(x.clone());
        let out = shape.forward(make_inputs(&segments, &qkv, None))?.out;
        Ok((out * &dout)?.sum_all()?.to_scalar()?)
    };
    let qkv = Qkv::Fused(x.clone());
    let gradient = gradients(&shape, make_inputs(&segments, &qkv, None), &dout)?.qkv;
    let gradient = gradient.expect("all are needed").queries().flatten_all()?.to_vec1::<f64>()?;
    let values = x.flatten_all()?.to_vec1::<f64>()?;
    for i in (0..values.len()).step_by(7) {
        let moved = |by: f64| -> Result<f64> {
            let mut values = values.clone();
            values[i] += by;
            loss(&Tensor::from_vec(values, x.shape(), x.device())?)
        };
        let difference = (moved(1e-5)? - moved(-1e-5)?) / 2e-5;
        assert!((difference - gradient[i]).abs() < 1e-7, "element {i}: {} against {difference}", gradient[i]);
    }
    Ok(())
}

#[test]
fn forward_refuses_segments_that_do_not_match() -> Result<()> {
    let shape = shape((3, 1, 10));
    let qkv = fused(&shape, 8, DType::F32)?;
    for segments in [packed(&[5], &[(0, 4)]), packed(&[5], &[(0, 2)])] {
        assert!(shape.forward(make_inputs(&segments, &qkv, None)).is_err());
    }
    Ok(())
}

#[test]
fn backward_refuses_segments_that_share_keys() -> Result<()> {
    let shape = shape((1, 1, 4));
    let segment = |queries, keys| Segment { queries, keys, first: 0, prefix: None };
    let segments = Segments::from(vec![segment(0..2, 0..3), segment(2..4, 2..4)]);
    let qkv = fused(&shape, 4, DType::F32)?;
    let inputs = make_inputs(&segments, &qkv, None);
    let saved = shape.forward(inputs)?.saved();
    let dout = randn(8, (4, 4), DType::F32)?;
    let error = shape.backward(inputs, &saved, &dout, GradTargets::All).err().map(|e| e.to_string());
    let expected = "attention backward: expected segments with keys of their own, found [(0, 3), (2, 4)]";
    assert_eq!(error.as_deref(), Some(expected));
    Ok(())
}

#[test]
fn forward_refuses_heads_that_do_not_share_keys_evenly() -> Result<()> {
    let shape = AttentionShape { heads: 3, kv_heads: 2, head_dim: 4, scale: 1.0 };
    let segments = packed(&[4], &[]);
    let qkv = fused(&shape, 4, DType::F32)?;
    let error = shape.forward(make_inputs(&segments, &qkv, None)).unwrap_err().to_string();
    assert!(error.contains("a multiple of the key and value heads, found 3 and 2"), "{error}");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// Changing any row changes no output but those of rows that see it.
    #[test]
    fn forward_attends_to_visible_rows_only(
        prefixes in prop::collection::vec(1usize..9, 1..3),
        lengths in prop::collection::vec(1usize..9, 0..5),
        changed in any::<prop::sample::Index>(),
    ) {
        let sequences: Vec<_> = lengths.iter().enumerate().map(|(i, n)| (i * prefixes.len() / lengths.len(), *n)).collect();
        let segments = packed(&prefixes, &sequences);
        let rows = segments.last().map_or(0, |s| s.keys.end);
        let shape = shape((2, 1, 4));
        let changed = changed.index(rows);
        let outs = |by: f64| -> Result<Vec<Vec<f64>>> {
            let Qkv::Fused(x) = fused(&shape, rows, DType::F64)? else { unreachable!("it is fused") };
            let mut bump = vec![0.0; rows];
            bump[changed] = by;
            let qkv = Qkv::Fused(x.broadcast_add(&Tensor::from_vec(bump, (rows, 1), x.device())?)?);
            let out = shape.forward(make_inputs(&segments, &qkv, None))?.out;
            Ok(out.to_vec2()?)
        };
        let (before, after) = (outs(0.0).unwrap(), outs(1.0).unwrap());
        for segment in segments.iter() {
            for (i, row) in segment.queries.clone().enumerate() {
                let sees = (segment.keys.start..=segment.keys.start + i).contains(&changed)
                    || segment.prefix.as_ref().is_some_and(|p| p.contains(&changed));
                prop_assert_eq!(before[row] != after[row], sees, "row {} and row {}", row, changed);
            }
        }
    }
}

#[test]
fn reference_is_differentiable() -> Result<()> {
    let shape = shape((2, 1, 4));
    let segments = packed(&[2], &[(0, 2)]);
    let Qkv::Fused(x) = fused(&shape, 4, DType::F64)? else { unreachable!("it is fused") };
    let gradient = autograd(&[&x], &randn(8, (4, 8), DType::F64)?, |v| {
        let qkv = Qkv::Fused(v[0].as_tensor().clone());
        Ok(shape.reference(make_inputs(&segments, &qkv, None))?.out)
    })?;
    assert!(max_abs(&gradient[0])? > 0.0);
    Ok(())
}
