//! The same code at a fraction of the sizes on the emulator and on the CPU.

use super::attention::Expected;
use super::*;
use crate::check::packed;
use crate::checkpoint::ModelConfig;
use crate::ops::attention::{AttentionShape, GradTargets, Inputs, Qkv, Segment};
use crate::ops::gpu::emulated::emulate;
use crate::ops::testing::{Tolerance, assert_close, randn};
use candle_core::Device;

/// What the sizes are divided by.
const SCALE: usize = 32;

fn check_in(op: &str, dtype: DType, order: u32) {
    // The emulator has a fiber for each value of a Mamba2 layer.
    let scale = match op {
        STEP => 2 * SCALE,
        "conv" | "ssd" | "gated_norm" => 4 * SCALE,
        _ => SCALE,
    };
    let target = CheckTarget { device: &Device::Cpu, dtype, run: &|f: &mut dyn FnMut()| emulate(order, f) };
    let found = large(&target, op, scale).unwrap_or_else(|e| panic!("{op}, {dtype:?}: {e}"));
    assert!(found.comparisons.len() >= 6, "{op}: {} comparisons", found.comparisons.len());
    let wrong: Vec<_> = found.comparisons.iter().filter(|c| !c.holds()).collect();
    assert!(wrong.is_empty(), "{dtype:?}, order {order}: {wrong:#?}");
    assert_eq!(found.not_run, []);
}

fn check(op: &str) {
    for (dtype, order) in [(DType::F32, 0), (DType::BF16, 1), (DType::F16, 7)] {
        check_in(op, dtype, order);
    }
}

#[test]
fn embed_at_a_fraction_of_the_size() {
    check("embed");
}

#[test]
fn linear_at_a_fraction_of_the_size() {
    check("linear");
}

#[test]
fn rms_norm_at_a_fraction_of_the_size() {
    check("rms_norm");
}

#[test]
fn rope_at_a_fraction_of_the_size() {
    check("rope");
}

#[test]
fn attention_at_a_fraction_of_the_size() {
    check("attention");
}

#[test]
fn swiglu_at_a_fraction_of_the_size() {
    check("swiglu");
}

#[test]
fn experts_at_a_fraction_of_the_size() {
    check("experts");
}

#[test]
fn conv_at_a_fraction_of_the_size() {
    check("conv");
}

#[test]
fn ssd_at_a_fraction_of_the_size() {
    check("ssd");
}

#[test]
fn gated_norm_at_a_fraction_of_the_size() {
    check("gated_norm");
}

#[test]
fn cross_entropy_at_a_fraction_of_the_size() {
    check("cross_entropy");
}

#[test]
fn distillation_at_a_fraction_of_the_size() {
    check("distillation");
}

#[test]
fn adamw_at_a_fraction_of_the_size() {
    check("adamw");
}

#[test]
fn step_at_a_fraction_of_the_size() {
    check(STEP);
}

#[test]
fn shapes_are_those_of_the_models() {
    for shape in SHAPES {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/models");
        let config = ModelConfig::from_json(&folder.join(format!("{}.json", shape.name))).unwrap();
        let ours = shape.config(config.num_hidden_layers);
        let expected = ModelConfig {
            max_position_embeddings: ours.max_position_embeddings,
            rope: ours.rope.clone(),
            ..config
        };
        assert_eq!(ours, expected);
        assert_eq!(shape.scaled(1), shape);
        assert_eq!(Batch::new(&shape, 1).rows(), 8166);
        let scaled = shape.scaled(SCALE);
        assert_eq!(
            (scaled.vocab % 8, scaled.heads / scaled.kv_heads, scaled.head_dim),
            (shape.vocab % 8, shape.heads / shape.kv_heads, shape.head_dim)
        );
    }
}

#[test]
fn shapes_of_mamba2_layers_are_those_of_the_models() {
    for shape in MAMBA2_SHAPES {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/models");
        let config = ModelConfig::from_json(&folder.join(format!("{}.json", shape.name))).unwrap();
        let mamba = config.mamba.unwrap();
        assert_eq!((mamba.heads, mamba.head_dim), (shape.heads, shape.head_dim));
        assert_eq!((mamba.state, mamba.groups, mamba.taps), (mamba2::STATE, 1, mamba2::TAPS));
    }
}

/// Checks of swiglu at a model's sizes, with no results yet.
fn large_of<'a>(target: &'a CheckTarget<'a>) -> Large<'a> {
    Large { target, op: "swiglu", model: "m", seed: 0, unit: 1e-3, found: LargeResults::default() }
}

#[test]
fn a_case_beyond_the_memory_is_named() {
    let target = CheckTarget { device: &Device::Cpu, dtype: DType::F32, run: &|f: &mut dyn FnMut()| f() };
    let mut large = large_of(&target);
    large.case("[9, 9]", usize::MAX, |_, _| panic!("was run")).unwrap();
    let out_of_memory =
        || Error::from(candle_core::Error::Msg("CUDA_ERROR_OUT_OF_MEMORY: out of memory".into()));
    large.case("[8, 8]", 1, |_, _| Err(out_of_memory())).unwrap();
    let other = large.case("[7, 7]", 1, |_, _| Err(Error::Invalid("another".into())));
    assert_eq!(other.unwrap_err().to_string(), "another");
    let cases: Vec<_> = large.found.not_run.iter().map(|n| (n.op, &n.case[..])).collect();
    assert_eq!(cases, [("swiglu", "m: [9, 9]"), ("swiglu", "m: [8, 8]")]);
    assert!(large.found.not_run[0].why.contains("GiB of free memory, found"), "{:?}", large.found.not_run);
    assert!(large.found.not_run[1].why.contains("CUDA_ERROR_OUT_OF_MEMORY"));
}

#[test]
fn a_wrong_value_in_any_chunk_does_not_hold() {
    let target = CheckTarget { device: &Device::Cpu, dtype: DType::BF16, run: &|f: &mut dyn FnMut()| f() };
    let rows = CHUNK + 5;
    for (row, wrong) in [(3, 1.5f32), (CHUNK + 4, 1.5), (3, f32::NAN), (CHUNK + 4, f32::INFINITY), (0, 0.5)] {
        let mut large = large_of(&target);
        let exact = large.random_in((rows, 3), 0.3, DType::F32).unwrap();
        let mut values = exact.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let about = ("case", "a", ResultKind::Gradient);
        let of = |values: &[f32]| Tensor::from_slice(values, (rows, 3), &Device::Cpu).unwrap();
        let rounded = of(&values).to_dtype(DType::BF16).unwrap();
        large.compare(about, &rounded, &exact).unwrap();
        assert!(large.found.comparisons[0].holds(), "{:?}", large.found);
        values[3 * row] += wrong;
        large.compare(about, &of(&values).to_dtype(DType::BF16).unwrap(), &exact).unwrap();
        assert!(!large.found.comparisons[1].holds(), "{row}, {wrong}: {:?}", large.found);
    }
}

#[test]
fn random_values_fill_a_buffer_of_their_own_size() {
    let target = CheckTarget { device: &Device::Cpu, dtype: DType::F32, run: &|f: &mut dyn FnMut()| f() };
    let mut large = Large {
        target: &target,
        op: "embed",
        model: "m",
        seed: 0,
        unit: 1.0,
        found: LargeResults::default(),
    };
    let of = |t: Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let long = of(large.random((2, PERIOD - 100), 2.0).unwrap());
    assert_eq!(long.len(), 2 * PERIOD - 200);
    assert_eq!(long[..PERIOD - 200], long[PERIOD..]);
    let variance = long.iter().map(|x| f64::from(x * x)).sum::<f64>() / long.len() as f64;
    assert!((variance - 4.0).abs() < 0.02, "{variance}");
    assert!(of(large.random(10, 2.0).unwrap())[..] != long[..10], "another tensor, other values");
}

/// The expected values of attention against candle's autograd of its reference, in f64.
#[test]
fn expected_attention_agrees_with_autograd() -> Result<()> {
    let shape = AttentionShape { heads: 6, kv_heads: 2, head_dim: 10, scale: 0.3 };
    let (q, kv) = (shape.q_width(), shape.kv_width());
    let all: Vec<Segment> = packed(&[9, 5], &[(0, 6), (0, 3), (1, 15)]);
    let rows = 38;
    let moved = |s: &Segment| Segment {
        queries: s.queries.start - 14..s.queries.end - 14,
        keys: s.keys.start - 14..s.keys.end - 14,
        ..s.clone()
    };
    let mut next = 0;
    let of_targets = |(s, n): (&Segment, usize)| {
        next += n;
        Segment { queries: next - n..next, first: s.keys.len() - n, ..s.clone() }
    };
    let targets: Vec<Segment> = all.iter().zip([0, 0, 2, 3, 4]).map(of_targets).collect();
    let behind: Vec<Segment> = all[2..].iter().map(moved).collect();
    let fused = |rows| -> Result<Qkv> { Ok(Qkv::Fused(randn(1, (rows, q + kv), DType::F64)?)) };
    let split = Qkv::Split { q: randn(2, (9, q), DType::F64)?, kv: randn(3, (rows, kv), DType::F64)? };
    let prefix = randn(4, (14, kv), DType::F64)?;
    for (segments, qkv, prefix) in
        [(all, fused(rows)?, None), (targets, split, None), (behind, fused(rows - 14)?, Some(&prefix))]
    {
        let inputs = Inputs { segments: &segments.into(), qkv: &qkv, prefix };
        let dout = randn(5, (qkv.queries().dims()[0], q), DType::F64)?;
        let found = Expected::compute(&shape, inputs, &dout, None)?;
        let forward = shape.reference(inputs)?;
        let expected = shape.reference_backward(inputs, &dout, GradTargets::All)?;
        assert_close("out", &found.out, &forward.out, Tolerance::F64);
        assert_close("lse", &found.lse, &forward.lse, Tolerance::F64);
        let gradient = expected.qkv.unwrap();
        let keys = gradient.keys_values();
        let close = |what, a: &Tensor, b: &Tensor| {
            assert_close(what, a, b, Tolerance { absolute: 1e-10, relative: 1e-9 })
        };
        close("dq", &found.dq, &gradient.queries().narrow(1, 0, q)?);
        close("dkv", &found.dkv, &keys.narrow(1, keys.dims()[1] - kv, kv)?);
        assert_eq!(found.dprefix.is_some(), expected.prefix.is_some());
        if let (Some(a), Some(b)) = (&found.dprefix, &expected.prefix) {
            close("dprefix", a, b);
        }
    }
    Ok(())
}
