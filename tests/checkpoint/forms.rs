//! Checkpoints as people have them: other names of tensors, indices that say less than the files hold, more tensors than the
//! model has, values that are not finite, and files that are something else.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use gneiss::checkpoint::{BareCheckpoint, Checkpoint, Weights};
use gneiss::model::{Decoder, Dtypes};
use serde_json::{Value, json};

use super::{assert_says, values};

const HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";
const NORM: &str = "model.norm.weight";

fn golden() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/checkpoints")
}

type Tensors = HashMap<String, Tensor>;

fn tensors() -> Tensors {
    candle_core::safetensors::load(golden().join("model.safetensors"), &Device::Cpu).unwrap()
}

/// The tiny checkpoint with other tensors and keys.
fn folder(tensors: &Tensors, changes: &Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut config: Value =
        serde_json::from_slice(&std::fs::read(golden().join("config.json")).unwrap()).unwrap();
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    candle_core::safetensors::save(tensors, dir.path().join("model.safetensors")).unwrap();
    dir
}

fn open(dir: &Path) -> BareCheckpoint {
    Checkpoint::open_without_tokenizer(dir).unwrap()
}

fn load(dir: &Path, dtype: DType) -> gneiss::Result<Decoder> {
    let BareCheckpoint { config, weights, .. } = Checkpoint::open_without_tokenizer(dir)?;
    Decoder::load(&config, &weights, Dtypes::for_weights(dtype, &Device::Cpu)?, &Device::Cpu, &mut |_| ())
}

#[track_caller]
fn assert_same(weights: &Weights, expected: &Tensors) {
    for (name, tensor) in expected {
        let found = weights.tensor(name, tensor.dims(), DType::F32, &Device::Cpu).unwrap();
        assert_eq!(values(&found), values(tensor), "{name}");
    }
}

#[test]
fn tensors_are_found_under_the_names_of_wrappers() {
    let plain = tensors();
    let renamed = |rename: &dyn Fn(&str) -> String| -> Tensors {
        plain.iter().map(|(name, tensor)| (rename(name), tensor.clone())).collect()
    };
    for all in [
        renamed(&|name| format!("_orig_mod.{name}")),
        renamed(&|name| format!("module.{name}")),
        renamed(&|name| format!("base_model.model.{name}")),
        renamed(&|name| name.replace("layers.1.", "layers.1._orig_mod.")),
        renamed(&|name| name.strip_prefix("model.").unwrap_or(name).to_string()),
    ] {
        let dir = folder(&all, &json!({}));
        let bare = open(dir.path());
        assert_eq!(bare.warnings, Vec::<String>::new());
        assert_same(&bare.weights, &plain);
        assert!(bare.weights.names().iter().all(|name| plain.contains_key(name)));
    }
    let mut twice = plain.clone();
    twice.insert("norm.weight".into(), plain[NORM].clone());
    let dir = folder(&twice, &json!({}));
    assert_says(
        Checkpoint::open_without_tokenizer(dir.path()),
        &["model.safetensors: expected one tensor `model.norm.weight`", "`norm.weight`", "both stand for it"],
    );
}

#[test]
fn shards_count_for_what_they_hold() {
    let dir = tempfile::tempdir().unwrap();
    let plain = tensors();
    let shard = |i: usize| format!("model-0000{i}-of-00002.safetensors");
    let (first, second): (Tensors, Tensors) =
        plain.iter().map(|(n, t)| (n.clone(), t.clone())).partition(|(name, _)| name.contains("layers.0"));
    let save =
        |tensors: &Tensors, i| candle_core::safetensors::save(tensors, dir.path().join(shard(i))).unwrap();
    save(&first, 1);
    save(&second, 2);
    assert_says(
        Weights::open_folder(dir.path()),
        &[
            "`model-00001-of-00002.safetensors` and 1 more shards without the index; download `model.safetensors.index.json`",
        ],
    );
    let index = |map: Value| {
        let text = json!({"weight_map": map}).to_string();
        std::fs::write(dir.path().join("model.safetensors.index.json"), text).unwrap();
        Weights::open_folder(dir.path())
    };
    // One tensor of each shard, one of them in the wrong shard, under the names of a wrapper.
    let up = "model.layers.0.mlp.up_proj.weight";
    for map in [
        json!({up: shard(1), NORM: shard(2)}),
        json!({up: shard(2), NORM: shard(2), HEAD: shard(1)}),
        json!({format!("_orig_mod.{up}"): shard(1), "norm.weight": shard(2)}),
    ] {
        assert_same(&index(map).unwrap(), &plain);
    }
    // Of a tensor that two shards hold the index says which counts.
    let mut other = first.clone();
    other.insert(NORM.into(), plain[NORM].affine(2.0, 0.0).unwrap());
    save(&other, 1);
    assert_same(&index(json!({up: shard(1), NORM: shard(2)})).unwrap(), &plain);
    let found = index(json!({NORM: shard(1), HEAD: shard(2)})).unwrap();
    assert_eq!(values(&found.tensor(NORM, &[16], DType::F32, &Device::Cpu).unwrap()), values(&other[NORM]));
}

#[test]
fn a_head_in_the_file_is_used_and_warned_about() {
    let (tied, plain) = (json!({"tie_word_embeddings": true}), tensors());
    let dir = folder(&plain, &tied);
    let bare = open(dir.path());
    assert!(!bare.config.tie_word_embeddings);
    let [warning] = &bare.warnings[..] else { panic!("{:?}", bare.warnings) };
    assert!(warning.contains("`tie_word_embeddings` true, and `lm_head.weight` is there"), "{warning}");

    let mut equal = plain.clone();
    equal.insert(HEAD.into(), plain[EMBEDDING].clone());
    let dir = folder(&equal, &tied);
    let bare = open(dir.path());
    assert!(bare.config.tie_word_embeddings && bare.warnings.is_empty(), "{:?}", bare.warnings);

    let mut alone = plain.clone();
    alone.remove(HEAD);
    let dir = folder(&alone, &tied);
    assert!(open(dir.path()).config.tie_word_embeddings);
    let dir = folder(&alone, &json!({}));
    assert_says(
        load(dir.path(), DType::F32).map(|_| ()),
        &["`lm_head.weight`", "`tie_word_embeddings` false"],
    );
}

#[test]
fn tensors_without_a_place_are_named() {
    let mut more = tensors();
    let extra = || Tensor::zeros(16, DType::F32, &Device::Cpu).unwrap();
    for name in ["model.layers.0.self_attn.rotary_emb.inv_freq", "step", "position_ids", "optimizer.state"] {
        more.insert(name.into(), extra());
    }
    let dir = folder(&more, &json!({}));
    assert_eq!(open(dir.path()).warnings, Vec::<String>::new());
    more.insert("model.layers.0.self_attn.q_proj.bias".into(), extra());
    let dir = folder(&more, &json!({}));
    let warnings = open(dir.path()).warnings;
    assert!(
        warnings[0].contains("a tensor has no place") && warnings[0].contains("q_proj.bias`"),
        "{warnings:?}"
    );
    // Fewer layers than the file has: nine tensors of the second.
    let dir = folder(&more, &json!({"num_hidden_layers": 1}));
    let warnings = open(dir.path()).warnings;
    assert!(
        warnings[0].contains("10 tensors have no place") && warnings[0].contains(", ..."),
        "{warnings:?}"
    );
}

#[test]
fn keys_of_another_arithmetic_are_named() {
    let warned = |changes: Value| open(folder(&tensors(), &changes).path()).warnings;
    for (key, value) in [
        ("sliding_window", json!(4096)),
        ("final_logit_softcapping", json!(30.0)),
        ("qk_norm", json!(true)),
        ("residual_multiplier", json!(0.22)),
        ("layer_types", json!(["full_attention", "sliding_attention"])),
        ("rope_interleaved", json!(true)),
    ] {
        let warnings = warned(json!({ key: value }));
        let [warning] = &warnings[..] else { panic!("{key}: {warnings:?}") };
        assert!(
            warning.contains(&format!("config.json: `{key}` is ")) && warning.contains("`llama`"),
            "{warning}"
        );
    }
    let harmless = json!({"sliding_window": null, "qk_norm": false, "embedding_multiplier": 1.0, "pretraining_tp": 2,
        "layer_types": ["full_attention", "full_attention"], "rope_interleaved": false, "attention_dropout": 0.1});
    assert_eq!(warned(harmless), Vec::<String>::new());
    assert!(warned(json!({"sliding_window": 4096, "use_sliding_window": false})).is_empty());
}

#[test]
fn values_that_are_not_finite_are_named_at_load() {
    let spoil = |name: &str, value: f32, dtype: DType| {
        let mut all = tensors();
        let shape = all[name].dims().to_vec();
        let mut flat = values(&all[name]);
        let at = flat.len() - 2;
        flat[at] = value;
        let spoilt = Tensor::from_vec(flat, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        all.insert(name.into(), spoilt);
        folder(&all, &json!({}))
    };
    let up = "model.layers.1.mlp.up_proj.weight";
    for stored in [DType::F64, DType::F32, DType::BF16, DType::F16] {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            for (value, said) in [(f32::NAN, "NaN"), (f32::NEG_INFINITY, "-inf")] {
                let dir = spoil(up, value, stored);
                let message = load(dir.path(), dtype).err().unwrap().to_string();
                let expected = format!(
                    "model.safetensors: tensor `{up}`: expected finite values, found {said} at [19, 14]"
                );
                assert!(message.contains(&expected), "{stored:?} as {dtype:?}: {message}");
                assert!(!message.contains("f16"), "{message}");
            }
        }
    }
    for name in [
        EMBEDDING, HEAD, NORM, "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.input_layernorm.weight",
    ] {
        let dir = spoil(name, f32::NAN, DType::F32);
        assert_says(load(dir.path(), DType::BF16).map(|_| ()), &[name, "found NaN at ["]);
    }
    // Finite on disk, and beyond f16.
    let dir = spoil(up, 7e4, DType::F32);
    assert!(load(dir.path(), DType::BF16).is_ok());
    assert_says(
        load(dir.path(), DType::F16).map(|_| ()),
        &[up, "expected values that f16 holds, found 7e4 at [19, 14]; hint: model.dtype = \"bf16\""],
    );
}

#[test]
fn values_of_gguf_files_that_are_not_finite_are_named() {
    let copy = super::gguf::Altered::of("granite.gguf");
    let width = 32;
    let norm: Vec<f32> = (0..width).map(|i| if i == 5 { f32::NAN } else { 1.0 }).collect();
    let copy = copy.tensor("blk.1.attn_norm.weight", &norm);
    let weights = Weights::open_gguf(&copy.path()).unwrap();
    let name = "model.layers.1.input_layernorm.weight";
    let read = weights.tensor(name, &[width], DType::F32, &Device::Cpu);
    assert_says(read, &["copy.gguf: tensor `model.layers.1.input_layernorm.weight`", "found NaN at [5]"]);
}

#[test]
fn f64_is_read_as_f32_is() {
    let plain = tensors();
    let wide = plain.iter().map(|(n, t)| (n.clone(), t.to_dtype(DType::F64).unwrap())).collect();
    let dir = folder(&wide, &json!({}));
    assert_same(&open(dir.path()).weights, &plain);
    for dtype in [DType::F32, DType::BF16] {
        let [a, b] = [dir.path(), &golden()].map(|path| load(path, dtype).unwrap());
        assert_eq!(values(a.embedding()), values(b.embedding()));
    }
}

#[test]
fn quantised_weights_are_refused_by_their_method() {
    for (quantised, says) in [
        (json!({"quant_method": "gptq", "bits": 4}), "quantised by `gptq`"),
        (json!({"quant_method": "awq"}), "quantised by `awq`"),
        (json!({"load_in_4bit": true}), "quantised by `bitsandbytes`"),
        (json!({"quant_method": "fp8"}), "quantised by `fp8`"),
        (json!({}), "`quantization_config` (quantised safetensors)"),
    ] {
        let dir = folder(&tensors(), &json!({"quantization_config": quantised}));
        assert_says(
            Checkpoint::open_without_tokenizer(dir.path()),
            &["config.json", says, "is not supported"],
        );
    }
    let mut all = tensors();
    all.insert(
        "model.layers.0.mlp.up_proj.qweight".into(),
        Tensor::zeros(4, DType::U32, &Device::Cpu).unwrap(),
    );
    let dir = folder(&all, &json!({}));
    assert_says(Checkpoint::open_without_tokenizer(dir.path()), &["up_proj.qweight`", "GPTQ or AWQ"]);
}

#[test]
fn files_that_are_something_else_are_named() {
    let dir = folder(&tensors(), &json!({}));
    let file = dir.path().join("model.safetensors");
    for (bytes, says) in [
        (&b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"[..], "a Git LFS pointer"),
        (b"<!doctype html>\n<html>", "a web page"),
        (b"PK\x03\x04", "a zip archive"),
        (b"\x80\x02}q", "a pickle"),
        (b"GGUF\x03\0\0\0", "a GGUF file"),
        (b"", "an empty file"),
    ] {
        std::fs::write(&file, bytes).unwrap();
        assert_says(
            Checkpoint::open_without_tokenizer(dir.path()),
            &["model.safetensors: expected a whole safetensors file, found ", says],
        );
    }
    std::fs::remove_file(&file).unwrap();
    for (name, says) in [
        ("tf_model.h5", "found `tf_model.h5`; save the model as safetensors"),
        ("pytorch_model-00001-of-00002.bin", "found `pytorch_model-00001-of-00002.bin`; save"),
        ("model.fp16.safetensors", "found `model.fp16.safetensors`; if it is the whole model"),
        ("adapter_model.safetensors", "found `adapter_model.safetensors`, an adapter"),
        ("model-00003-of-00004.safetensors", "found `model-00003-of-00004.safetensors` without the index"),
    ] {
        std::fs::write(dir.path().join(name), "").unwrap();
        assert_says(Weights::open_folder(dir.path()), &[says]);
    }
    let gguf = dir.path().join("m.gguf");
    std::fs::write(&gguf, "version https://git-lfs.github.com/spec/v1\n").unwrap();
    assert_says(Checkpoint::open(&gguf), &["m.gguf: expected a GGUF file, found a Git LFS pointer"]);
}

#[test]
fn a_tokenizer_that_was_not_fetched_is_named() {
    let dir = folder(&tensors(), &json!({}));
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n";
    std::fs::write(dir.path().join("tokenizer.json"), pointer).unwrap();
    assert_says(Checkpoint::open(dir.path()), &["tokenizer.json: expected JSON, found a Git LFS pointer"]);
}

/// A configuration as Python writes it, with a number that JSON does not have.
#[test]
fn bare_numbers_of_python_are_read() {
    let dir = folder(&tensors(), &json!({}));
    let path = dir.path().join("config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let with = |pairs: &str| std::fs::write(&path, text.replacen('{', &format!("{{{pairs},"), 1)).unwrap();
    with("\"time_step_limit\": [0.0, Infinity], \"x\": -Infinity, \"y\": NaN");
    assert_same(&open(dir.path()).weights, &tensors());
    with("\"initializer_range\": NaN, \"rope_scaling\": {\"type\": \"linear\", \"factor\": Infinity}");
    assert_says(
        Checkpoint::open_without_tokenizer(dir.path()),
        &["config.json: `rope_scaling.factor`: expected a finite number over 0, found inf"],
    );
}
