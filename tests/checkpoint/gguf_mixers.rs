//! GGUF files with experts and Mamba2 layers (`make_gguf_mixers.py`).

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::Value;
use candle_core::{DType, Device, Tensor};
use gneiss::checkpoint::{ExpertsConfig, GgufFile, MambaConfig, ModelConfig, ModelType, Weights};
use gneiss::ops::rope::Rope;

use super::gguf::{Altered, text};
use super::{assert_says, fixture, values};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

#[test]
fn reads_the_configuration_of_a_hybrid() {
    let file = GgufFile::open(&fixture("hybrid.gguf")).unwrap();
    let expected = ModelConfig {
        model_type: ModelType::GraniteMoeHybrid,
        vocab_size: 37,
        hidden_size: 32,
        intermediate_size: 64,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        max_position_embeddings: 512,
        rms_norm_eps: 1e-5,
        rope: None,
        tie_word_embeddings: true,
        attention_bias: false,
        mlp_bias: false,
        embedding_multiplier: 12.0,
        residual_multiplier: 0.22,
        attention_multiplier: 0.125,
        logits_scaling: 6.0,
        mamba: Some(MambaConfig {
            attention_layers: vec![1],
            heads: 6,
            head_dim: 16,
            state: 8,
            groups: 2,
            taps: 4,
            conv_bias: true,
            dt_limit: (0.0, f64::INFINITY),
        }),
        experts: Some(ExpertsConfig { count: 3, per_token: 2, size: 32 }),
    };
    assert_eq!(file.config(), &expected);
}

/// The configuration of a golden checkpoint is that of its folder, but for what GGUF has no place for.
#[test]
fn configurations_are_those_of_the_folders() {
    for name in ["experts", "mamba_experts"] {
        let file = GgufFile::open(&fixture(&format!("{name}.gguf"))).unwrap();
        let folder = ModelConfig::from_json(&golden(name).join("config.json")).unwrap();
        let max_position_embeddings = file.config().max_position_embeddings;
        assert_eq!(max_position_embeddings, if folder.rope.is_some() { 256 } else { 1 << 20 });
        assert_eq!(file.config(), &ModelConfig { max_position_embeddings, ..folder });
    }
}

#[test]
fn a_shared_mlp_and_no_experts_are_other_model_types() {
    let experts = || Altered::of("experts.gguf");
    let config = |copy: &Altered| copy.open().unwrap().config().clone();
    let mut shared = experts().set("granitemoe.expert_shared_feed_forward_length", Value::U32(5));
    for name in ["gate", "up", "down"] {
        for layer in 0..3 {
            shared = shared.tensor(&format!("blk.{layer}.ffn_{name}_shexp.weight"), &[0.0; 5 * 32]);
        }
    }
    let shared = config(&shared);
    assert_eq!((shared.model_type, shared.intermediate_size), (ModelType::GraniteMoeShared, 5));
    let mut dense = experts().set("granitemoe.expert_count", Value::U32(0));
    for layer in 0..3 {
        for name in ["gate_inp", "gate_exps", "up_exps", "down_exps"] {
            dense = dense.without(&format!("blk.{layer}.ffn_{name}.weight"));
        }
    }
    let dense = config(&dense);
    assert_eq!((dense.model_type, dense.intermediate_size, dense.experts), (ModelType::Granite, 16, None));
}

/// Hugging Face's tensors under the names that a GGUF file has for them: gate and up of the shared MLP are two.
fn expected(path: &Path) -> HashMap<String, Tensor> {
    let mut expected = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let shared: Vec<String> = expected.keys().filter(|name| name.contains(".shared_mlp.")).cloned().collect();
    for name in shared {
        let tensor = expected.remove(&name).unwrap();
        match name.split_once(".shared_mlp.").unwrap() {
            (layer, "input_linear.weight") => {
                for (name, half) in ["gate_proj", "up_proj"].iter().zip(tensor.chunk(2, 0).unwrap()) {
                    expected.insert(format!("{layer}.mlp.{name}.weight"), half);
                }
            }
            (layer, _) => {
                expected.insert(format!("{layer}.mlp.down_proj.weight"), tensor);
            }
        }
    }
    expected
}

#[test]
fn tensors_are_those_of_the_hugging_face_side() {
    let files = ["experts", "mamba_experts"].map(|name| (name, golden(name).join("model.safetensors")));
    for (name, path) in files.into_iter().chain([("hybrid", fixture("hybrid.safetensors"))]) {
        let weights = Weights::open_gguf(&fixture(&format!("{name}.gguf"))).unwrap();
        let expected = expected(&path);
        let mut names: Vec<_> = expected.keys().cloned().collect();
        names.sort();
        assert_eq!(weights.names(), names);
        for (tensor, expected) in &expected {
            let found = weights.tensor(tensor, expected.dims(), DType::F32, &Device::Cpu).unwrap();
            assert_eq!(found.dims(), expected.dims(), "{tensor}");
            let found = values(&found);
            for (i, (found, expected)) in found.iter().zip(values(expected)).enumerate() {
                let close = (found - expected).abs() <= 1e-6 * expected.abs().max(1.0);
                assert!(close, "{name}: {tensor}[{i}]: expected {expected}, found {found}");
            }
            // The other way to read a matrix, some rows at a time.
            if expected.rank() > 1 && !tensor.contains("conv1d") {
                let matrix = weights.matrix(tensor, expected.dims(), DType::F32, &Device::Cpu).unwrap();
                assert_eq!(matrix.rank(), 2);
                assert_eq!(values(&matrix), found, "{tensor}");
            }
        }
    }
}

/// A reader that took `ssm_a` for `A_log` by its name would find other values.
#[test]
fn the_file_has_a_and_not_its_logarithm() {
    let mut file = std::fs::File::open(fixture("mamba_experts.gguf")).unwrap();
    let content = candle_core::quantized::gguf_file::Content::read(&mut file).unwrap();
    let stored = content.tensor(&mut file, "blk.0.ssm_a", &Device::Cpu).unwrap();
    assert_eq!(stored.shape().dims(), [4, 1]);
    assert!(values(&stored.dequantize(&Device::Cpu).unwrap()).iter().all(|a| *a < 0.0));
}

#[test]
fn names_what_does_not_fit() {
    let hybrid = || Altered::of("hybrid.gguf");
    let counts = |counts: &[u32]| Value::Array(counts.iter().map(|n| Value::U32(*n)).collect());
    let kv_heads = "granitehybrid.attention.head_count_kv";
    let unsupported = [
        (hybrid().set(kv_heads, counts(&[0, 0])), "tensor `blk.1.attn_"),
        (hybrid().set(kv_heads, counts(&[2, 2])), "tensor `blk.0.ssm_"),
        (
            hybrid().set(kv_heads, counts(&[1, 2])),
            "`granitehybrid.attention.head_count_kv` that differs between",
        ),
        (
            hybrid().without("blk.1.ffn_up_exps.weight"),
            "`blk.1.ffn_gate_exps.weight` without `blk.1.ffn_up_exps.weight`",
        ),
        (hybrid().without("blk.1.ffn_gate_exps.weight"), "tensor `blk.1.ffn_up_exps.weight`"),
        (hybrid().tensor("blk.1.ffn_gate.weight", &[0.0; 4]), "tensor `blk.1.ffn_gate"),
        (Altered::of("granite.gguf").tensor("blk.0.ssm_d", &[1.0]), "tensor `blk.0.ssm_d`"),
    ];
    for (copy, what) in unsupported {
        let error = copy.open().expect_err(what);
        assert!(matches!(error, gneiss::Error::Unsupported { .. }), "{error}");
        assert_says::<()>(Err(error), &["copy.gguf", what]);
    }
    let inconsistent = [
        (hybrid().set(kv_heads, counts(&[0, 2, 2])), "expected a list of 2, found a list of 3"),
        (
            hybrid().set("granitehybrid.ssm.time_step_rank", Value::U32(7)),
            "`granitehybrid.ssm.time_step_rank`: expected a number that divides `granitehybrid.ssm.inner_size` (96)",
        ),
        (
            hybrid().without("granitehybrid.ssm.state_size"),
            "`granitehybrid.ssm.state_size`: expected a whole number",
        ),
        (
            hybrid().without("granitehybrid.expert_used_count"),
            "`granitehybrid.expert_used_count`: expected a whole number over 0, found no such key",
        ),
        (hybrid().set("granitehybrid.expert_used_count", Value::U32(4)), "`num_experts_per_tok`"),
        (
            hybrid().tensor("blk.1.ffn_up_exps.weight", &[0.0; 4]),
            "tensor `blk.1.ffn_up_exps.weight`: expected shape [3, 32, 32], found [4]",
        ),
        (hybrid().tensor("blk.0.ssm_conv1d.weight", &[0.0; 4]), "expected shape [channels, taps], found [4]"),
    ];
    for (copy, says) in inconsistent {
        let error = copy.open().expect_err(says);
        assert!(matches!(error, gneiss::Error::Checkpoint { .. }), "{error}");
        assert_says::<()>(Err(error), &["copy.gguf: ", says]);
    }
}

/// A is negative; a file with its logarithm is refused and not read as other decays.
#[test]
fn a_logarithm_in_place_of_a_is_an_error() {
    let copy = Altered::of("hybrid.gguf").tensor("blk.0.ssm_a", &[0.5, -1.0, 0.0, 1.0, 2.0, -2.0]);
    let weights = Weights::open_gguf(&copy.path()).unwrap();
    let found = weights.tensor("model.layers.0.mamba.A_log", &[6], DType::F32, &Device::Cpu);
    assert_says(found, &["tensor `model.layers.0.mamba.A_log`", "NaN"]);
}

#[test]
fn the_rotary_switch_is_that_of_all_granite_architectures() {
    let switched_off =
        Altered::of("experts.gguf").set("granitemoe.rope.scaling.finetuned", Value::Bool(false));
    assert_eq!(switched_off.open().unwrap().config().rope, None);
    let switched_on =
        Altered::of("hybrid.gguf").set("granitehybrid.rope.scaling.finetuned", Value::Bool(true));
    assert_eq!(switched_on.open().unwrap().config().rope, Some(Rope::new(10_000.0)));
    let other = Altered::of("hybrid.gguf").set("general.architecture", text("mamba2"));
    assert_says(other.open(), &["GGUF architecture `mamba2`"]);
}
