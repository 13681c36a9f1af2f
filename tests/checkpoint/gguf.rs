//! GGUF files: configuration, names, order of rows, quantisation types, and broken files.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Content, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use gneiss::checkpoint::{Checkpoint, GgufFile, ModelConfig, ModelType, Weights};
use gneiss::ops::rope::{Llama3Scaling, Rope, RopeScaling};
use tempfile::TempDir;

use super::{assert_says, fixture, read, smollm2, values};

/// A copy of a fixture with other metadata or tensors.
pub struct Altered {
    metadata: HashMap<String, Value>,
    tensors: BTreeMap<String, QTensor>,
    dir: TempDir,
}

impl Altered {
    pub fn of(name: &str) -> Self {
        Self::at(&fixture(name))
    }

    pub fn at(path: &Path) -> Self {
        let mut file = File::open(path).unwrap();
        let content = Content::read(&mut file).unwrap();
        let names: Vec<String> = content.tensor_infos.keys().cloned().collect();
        let tensors = names.into_iter().map(|name| {
            let tensor = content.tensor(&mut file, &name, &Device::Cpu).unwrap();
            (name, tensor)
        });
        let tensors = tensors.collect();
        Self { metadata: content.metadata, tensors, dir: tempfile::tempdir().unwrap() }
    }

    pub fn set(mut self, key: &str, value: Value) -> Self {
        self.metadata.insert(key.to_string(), value);
        self
    }

    pub fn without(mut self, name: &str) -> Self {
        assert!(self.metadata.remove(name).is_some() || self.tensors.remove(name).is_some(), "{name}");
        self
    }

    pub fn tensor(mut self, name: &str, data: &[f32]) -> Self {
        let tensor = Tensor::new(data, &Device::Cpu).unwrap();
        self.tensors.insert(name.to_string(), QTensor::quantize(&tensor, GgmlDType::F32).unwrap());
        self
    }

    pub fn path(&self) -> PathBuf {
        let path = self.dir.path().join("copy.gguf");
        let metadata: Vec<_> = self.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
        let tensors: Vec<_> = self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        gguf_file::write(&mut File::create(&path).unwrap(), &metadata, &tensors).unwrap();
        path
    }

    pub fn open(&self) -> gneiss::Result<GgufFile> {
        GgufFile::open(&self.path())
    }
}

pub fn text(value: &str) -> Value {
    Value::String(value.to_string())
}

#[test]
fn reads_the_configuration_of_granite() {
    let file = GgufFile::open(&fixture("granite.gguf")).unwrap();
    let expected = ModelConfig {
        model_type: ModelType::Granite,
        vocab_size: 39,
        hidden_size: 32,
        intermediate_size: 32,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        max_position_embeddings: 512,
        rms_norm_eps: 1e-5,
        rope: Some(Rope::new(1e7)),
        tie_word_embeddings: true,
        attention_bias: false,
        mlp_bias: false,
        embedding_multiplier: 12.0,
        residual_multiplier: 0.22,
        attention_multiplier: 0.015625,
        logits_scaling: 8.0,
        mamba: None,
        experts: None,
    };
    assert_eq!(file.config(), &expected);
}

#[test]
fn reads_the_configuration_of_llama() {
    let file = GgufFile::open(&fixture("llama.gguf")).unwrap();
    let llama3 = Llama3Scaling {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    let expected = ModelConfig {
        model_type: ModelType::Llama,
        vocab_size: 8,
        hidden_size: 24,
        intermediate_size: 20,
        num_hidden_layers: 1,
        num_attention_heads: 3,
        num_key_value_heads: 1,
        head_dim: 16,
        max_position_embeddings: 512,
        rms_norm_eps: 1e-5,
        rope: Some(Rope { theta: 500_000.0, scaling: RopeScaling::Llama3(llama3) }),
        tie_word_embeddings: false,
        attention_bias: true,
        mlp_bias: true,
        embedding_multiplier: 1.0,
        residual_multiplier: 1.0,
        attention_multiplier: 0.25,
        logits_scaling: 1.0,
        mamba: None,
        experts: None,
    };
    assert_eq!(file.config(), &expected);
}

#[test]
fn reads_the_configuration_of_dense_granitemoehybrid() {
    let file = GgufFile::open(&fixture("k_quants.gguf")).unwrap();
    let config = file.config();
    assert_eq!((config.num_attention_heads, config.num_key_value_heads, config.head_dim), (1, 1, 4));
    assert_eq!((config.attention_multiplier, config.logits_scaling), (0.5, 4.0));
    assert!(config.rope.is_some());
    let switched_off = Altered::of("k_quants.gguf").set("granite.rope.scaling.finetuned", Value::Bool(false));
    assert_eq!(switched_off.open().unwrap().config().rope, None);
}

/// Every tensor, under its Hugging Face name and in Hugging Face's row order, is what the `gguf` package
/// makes of it.
#[test]
fn tensors_are_those_of_the_hugging_face_side() {
    for name in ["granite", "llama", "k_quants"] {
        let weights = Weights::open_gguf(&fixture(&format!("{name}.gguf"))).unwrap();
        let expected = candle_core::safetensors::load(fixture(&format!("{name}.safetensors")), &Device::Cpu);
        let expected = expected.unwrap();
        let mut names: Vec<_> = expected.keys().cloned().collect();
        names.sort();
        assert_eq!(weights.names(), names);
        for (tensor, expected) in &expected {
            let found = read(&weights, tensor, expected.dims());
            for (i, (found, expected)) in found.iter().zip(values(expected)).enumerate() {
                let close = (found - expected).abs() <= 1e-6 * expected.abs().max(1e-3);
                assert!(close, "{name}: {tensor}[{i}]: expected {expected}, found {found}");
            }
        }
    }
}

/// The fixture would not notice a missing un-permutation if permuting changed nothing.
#[test]
fn the_file_has_q_and_k_permuted() {
    let mut file = File::open(fixture("llama.gguf")).unwrap();
    let content = Content::read(&mut file).unwrap();
    let weights = Weights::open_gguf(&fixture("llama.gguf")).unwrap();
    for (module, hf, permuted) in
        [("attn_q", "q_proj", true), ("attn_k", "k_proj", true), ("attn_v", "v_proj", false)]
    {
        for kind in ["weight", "bias"] {
            let stored = content.tensor(&mut file, &format!("blk.0.{module}.{kind}"), &Device::Cpu).unwrap();
            let stored = stored.dequantize(&Device::Cpu).unwrap();
            let found = read(&weights, &format!("model.layers.0.self_attn.{hf}.{kind}"), stored.dims());
            assert_eq!(found != values(&stored), permuted, "{module}.{kind}");
        }
    }
}

#[test]
fn tensors_have_the_type_asked_for() {
    let weights = Weights::open_gguf(&fixture("granite.gguf")).unwrap();
    let name = "model.layers.1.self_attn.k_proj.weight";
    let full = read(&weights, name, &[16, 32]);
    for dtype in [DType::BF16, DType::F16] {
        let tensor = weights.tensor(name, &[16, 32], dtype, &Device::Cpu).unwrap();
        assert_eq!(tensor.dtype(), dtype);
        for (half, full) in values(&tensor).into_iter().zip(&full) {
            assert!((half - full).abs() <= full.abs() / 128.0, "{half} {full}");
        }
    }
}

#[test]
fn format_and_size() {
    let path = fixture("k_quants.gguf");
    let weights = Weights::open_gguf(&path).unwrap();
    assert_eq!(weights.format(), "gguf F32, Q6K, Q2K, Q3K, Q4K, Q5K");
    assert_eq!(weights.bytes_on_disk(), path.metadata().unwrap().len());
    assert!(!weights.contains("lm_head.weight"));
}

#[test]
fn names_missing_tensors_and_wrong_shapes() {
    let weights = Weights::open_gguf(&fixture("granite.gguf")).unwrap();
    let get = |name: &str, shape: &[usize]| weights.tensor(name, shape, DType::F32, &Device::Cpu);
    let found = get("model.layers.2.mlp.up_proj.weight", &[32, 32]);
    assert_says(found, &["granite.gguf", "tensor `model.layers.2.mlp.up_proj.weight`", "nearest of the 20"]);
    let found = get("model.embed_tokens.weight", &[37, 32]);
    assert_says(found, &["model.embed_tokens.weight", "expected shape [37, 32], found [39, 32]"]);
}

#[test]
fn names_what_is_not_supported() {
    let granite = || Altered::of("granite.gguf");
    let cases = [
        (granite().set("general.architecture", text("qwen2")), "GGUF architecture `qwen2`"),
        (granite().set("granite.expert_count", Value::U32(40)), "a mixture of 40 experts"),
        (granite().set("granite.rope.scaling.type", text("mrope")), "rotary scaling `mrope`"),
        (granite().set("granite.rope.dimension_count", Value::U32(4)), "`granite.rope.dimension_count` 4"),
        (granite().set("split.count", Value::U16(3)), "a GGUF file split into 3 parts"),
        (granite().tensor("blk.0.attn_q_norm.weight", &[1.0]), "tensor `blk.0.attn_q_norm.weight`"),
        (granite().tensor("blk.2.attn_norm.weight", &[1.0]), "tensor `blk.2.attn_norm.weight`"),
        (granite().tensor("blk.0.attn_q.bias", &[0.0; 32]), "a bias on 1 of [\"attn_q\""),
        (
            granite().tensor("rope_freqs.weight", &[1.0, 1.0, 2.0, 9.0]),
            "`rope_freqs.weight` that is no Llama 3",
        ),
        (
            granite()
                .set("granite.attention.head_count_kv", Value::Array(vec![Value::U32(2), Value::U32(0)])),
            "`granite.attention.head_count_kv` that differs between layers",
        ),
    ];
    for (copy, what) in cases {
        let error = copy.open().expect_err(what);
        assert!(matches!(error, gneiss::Error::Unsupported { .. }), "{error}");
        assert_says::<()>(Err(error), &["copy.gguf", what, "is not supported"]);
    }
}

#[test]
fn names_key_expected_and_found() {
    let granite = || Altered::of("granite.gguf");
    let cases = [
        (
            granite().without("general.architecture"),
            "`general.architecture`: expected `granite`, `granitemoe`",
        ),
        (granite().without("granite.block_count"), "`granite.block_count`: expected a whole number over 0"),
        (
            granite().set("granite.embedding_length", text("x")),
            "expected a whole number over 0, found String",
        ),
        (granite().set("granite.attention.head_count_kv", Value::U32(0)), "over 0, found 0"),
        (
            granite().set("granite.attention.head_count_kv", Value::U32(3)),
            "`num_attention_heads`: expected a",
        ),
        (
            granite().without("token_embd.weight"),
            "`token_embd.weight`: expected shape [vocabulary, 32], found no",
        ),
        (
            granite().without("granite.attention.layer_norm_rms_epsilon"),
            "expected a number over 0, found no such",
        ),
    ];
    for (copy, says) in cases {
        let error = copy.open().expect_err(says);
        assert!(matches!(error, gneiss::Error::Checkpoint { .. }), "{error}");
        assert_says::<()>(Err(error), &["copy.gguf: ", says]);
    }
}

#[test]
fn rotary_settings_that_change_nothing_are_read() {
    let copy = Altered::of("granite.gguf")
        .set("granite.rope.scaling.type", text("linear"))
        .set("granite.rope.scaling.factor", Value::F32(1.0))
        .tensor("rope_freqs.weight", &[1.0; 4]);
    assert_eq!(copy.open().unwrap().config().rope, Some(Rope::new(1e7)));
}

#[test]
fn truncated_files_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cut.gguf");
    let whole = std::fs::read(fixture("granite.gguf")).unwrap();
    // Up to the padding after the last tensor.
    for length in (0..whole.len() - 32).step_by(61) {
        std::fs::write(&path, &whole[..length]).unwrap();
        assert_says(GgufFile::open(&path), &["cut.gguf: "]);
    }
    std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    assert_says(GgufFile::open(&path), &["expected its data up to byte", "download it again"]);
}

/// granite.gguf with another number of a type for its embedding.
fn with_embedding_of(dir: &Path, quantisation_type: u8) -> PathBuf {
    let mut bytes = std::fs::read(fixture("granite.gguf")).unwrap();
    // Name, dimensions (2, then two of 8 bytes), type.
    let name = b"token_embd.weight";
    let at = bytes.windows(name.len()).position(|window| window == name).unwrap() + name.len() + 4 + 16;
    assert_eq!(bytes[at..at + 4], [8, 0, 0, 0]);
    bytes[at] = quantisation_type;
    let path = dir.join("other.gguf");
    std::fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn unknown_quantisation_types_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = with_embedding_of(dir.path(), 23);
    assert_says(GgufFile::open(&path), &["quantisation type 23 (IQ4_XS) is not supported", "Q4K"]);
}

/// Rows of 32 values are no whole blocks of 256.
#[test]
fn blocks_that_end_in_the_middle_of_a_row_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let weights = Weights::open_gguf(&with_embedding_of(dir.path(), 12)).unwrap();
    let name = "model.embed_tokens.weight";
    let found = weights.matrix(name, &[39, 32], DType::BF16, &Device::Cpu);
    assert_says(
        found,
        &["other.gguf", name, "(Q4K): expected whole blocks of 256 values, found rows of 32 values"],
    );
    let found = weights.tensor(name, &[39, 32], DType::BF16, &Device::Cpu);
    assert_says(
        found,
        &["other.gguf", name, "(Q4K): expected whole blocks of 256 values, found 1248 values"],
    );
}

#[test]
fn opens_a_real_model() {
    let path: &Path = &smollm2();
    let checkpoint = Checkpoint::open(path).unwrap();
    let config = &checkpoint.config;
    assert_eq!(checkpoint.format, "gguf Q4_1, F32, Q8_0");
    assert_eq!(
        (config.model_type, config.vocab_size, config.num_hidden_layers),
        (ModelType::Llama, 49152, 30)
    );
    assert_eq!((config.hidden_size, config.intermediate_size, config.head_dim), (576, 1536, 64));
    assert_eq!(config.rope, Some(Rope::new(100_000.0)));
    assert!(config.tie_word_embeddings && !config.attention_bias);
    assert_eq!(checkpoint.weights.names().len(), 272);
    let q = read(&checkpoint.weights, "model.layers.29.self_attn.q_proj.weight", &[576, 576]);
    let mean_square = q.iter().map(|x| x * x).sum::<f32>() / q.len() as f32;
    assert!(mean_square.is_finite() && mean_square > 1e-4, "{mean_square}");
}
