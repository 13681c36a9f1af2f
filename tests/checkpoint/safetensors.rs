//! Weights from safetensors: one file, shards, types on disk, and broken folders.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use gneiss::checkpoint::{Checkpoint, Weights};
use serde_json::json;

use super::{assert_says, read, values};

const Q: &str = "model.layers.0.self_attn.q_proj.weight";
const NORM: &str = "model.norm.weight";

/// Values that bf16 holds exactly.
fn tensors(dtype: DType) -> HashMap<String, Tensor> {
    let tensor = |shape: &[usize], from: f32| {
        let n: usize = shape.iter().product();
        let data: Vec<f32> = (0..n).map(|i| from + i as f32 * 0.5).collect();
        Tensor::from_vec(data, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
    };
    HashMap::from([(Q.to_string(), tensor(&[4, 3], -2.0)), (NORM.to_string(), tensor(&[3], 1.0))])
}

fn save(tensors: &HashMap<String, Tensor>, path: &Path) {
    candle_core::safetensors::save(tensors, path).unwrap();
}

fn save_shards(dir: &Path) {
    for (i, (name, tensor)) in tensors(DType::BF16).into_iter().enumerate() {
        save(&HashMap::from([(name, tensor)]), &dir.join(format!("model-{i}.safetensors")));
    }
    let file = |name: &str| if dir_has(dir, 0, name) { "model-0.safetensors" } else { "model-1.safetensors" };
    let index = json!({"metadata": {"total_size": 30}, "weight_map": {Q: file(Q), NORM: file(NORM)}});
    write_index(dir, &index);
}

fn dir_has(dir: &Path, shard: usize, name: &str) -> bool {
    let bytes = std::fs::read(dir.join(format!("model-{shard}.safetensors"))).unwrap();
    safetensors::SafeTensors::deserialize(&bytes).unwrap().names().contains(&name)
}

fn write_index(dir: &Path, index: &serde_json::Value) {
    std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

#[test]
fn reads_each_type_on_disk_as_each_type_asked_for() {
    for stored in [DType::F32, DType::F16, DType::BF16] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        save(&tensors(stored), &path);
        let weights = Weights::open_folder(dir.path()).unwrap();
        assert_eq!(weights.names(), [Q, NORM]);
        assert!(weights.contains(NORM) && !weights.contains("lm_head.weight"));
        assert_eq!(weights.format(), "safetensors");
        assert_eq!(weights.bytes_on_disk(), path.metadata().unwrap().len());
        for asked in [DType::F32, DType::F16, DType::BF16] {
            let tensor = weights.tensor(Q, &[4, 3], asked, &Device::Cpu).unwrap();
            assert_eq!((tensor.dtype(), tensor.dims()), (asked, &[4, 3][..]));
            assert_eq!(values(&tensor), (0..12).map(|i| i as f32 * 0.5 - 2.0).collect::<Vec<_>>());
        }
    }
}

#[test]
fn reads_shards() {
    let dir = tempfile::tempdir().unwrap();
    save_shards(dir.path());
    let weights = Weights::open_folder(dir.path()).unwrap();
    assert_eq!(weights.names(), [Q, NORM]);
    assert_eq!(read(&weights, NORM, &[3]), [1.0, 1.5, 2.0]);
    assert_eq!(read(&weights, Q, &[4, 3])[11], 3.5);
    let size = |i: usize| dir.path().join(format!("model-{i}.safetensors")).metadata().unwrap().len();
    assert_eq!(weights.bytes_on_disk(), size(0) + size(1));
}

#[test]
fn names_missing_tensors_and_wrong_shapes() {
    let dir = tempfile::tempdir().unwrap();
    save(&tensors(DType::F32), &dir.path().join("model.safetensors"));
    let weights = Weights::open_folder(dir.path()).unwrap();
    let get = |name: &str, shape: &[usize]| weights.tensor(name, shape, DType::F32, &Device::Cpu);
    assert_says(
        get("model.layers.0.self_attn.k_proj.weight", &[4, 3]),
        &["model.safetensors", "tensor `model.layers.0.self_attn.k_proj.weight`", "not found", Q],
    );
    assert_says(get("norm.weight", &[3]), &["the nearest of the 2 present is `model.norm.weight`"]);
    assert_says(get(Q, &[3, 4]), &[Q, "expected shape [3, 4], found [4, 3]"]);
    assert_says(get(NORM, &[3, 1]), &["expected shape [3, 1], found [3]"]);
}

#[test]
fn refuses_types_that_are_not_floating_point() {
    let dir = tempfile::tempdir().unwrap();
    let tensor = Tensor::zeros(3, DType::U8, &Device::Cpu).unwrap();
    save(&HashMap::from([(NORM.to_string(), tensor)]), &dir.path().join("model.safetensors"));
    let weights = Weights::open_folder(dir.path()).unwrap();
    let found = weights.tensor(NORM, &[3], DType::F32, &Device::Cpu);
    assert_says(found, &[NORM, "expected F64, F32, F16 or BF16, found U8"]);
}

#[test]
fn truncated_files_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    save(&tensors(DType::F32), &path);
    let whole = std::fs::read(&path).unwrap();
    for length in (0..whole.len()).step_by(7) {
        std::fs::write(&path, &whole[..length]).unwrap();
        assert_says(
            Weights::open_folder(dir.path()),
            &["model.safetensors: expected a whole safetensors file"],
        );
    }
}

#[test]
fn broken_indexes_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    save_shards(dir.path());
    let open = |weight_map: serde_json::Value| {
        write_index(dir.path(), &json!({"weight_map": weight_map}));
        Weights::open_folder(dir.path())
    };
    let here = "model.safetensors.index.json: `weight_map.model.norm.weight`";
    assert_says(
        open(json!({NORM: "model-7.safetensors"})),
        &[here, "`model-7.safetensors`, which is not there"],
    );
    for outside in ["../model-0.safetensors", "/etc/passwd", "", "a/../../b"] {
        assert_says(open(json!({NORM: outside})), &[here, "a file inside the checkpoint's folder", outside]);
    }
    assert_says(open(json!({NORM: 4})), &[here, "expected a file name, found 4"]);
    let other = if dir_has(dir.path(), 0, NORM) { "model-1.safetensors" } else { "model-0.safetensors" };
    assert_says(open(json!({NORM: other})), &[here, other, "which lacks it"]);
    write_index(dir.path(), &json!({}));
    assert_says(Weights::open_folder(dir.path()), &["`weight_map`: expected an object", "found no such key"]);
}

#[test]
fn folders_without_weights_say_what_is_there() {
    let dir = tempfile::tempdir().unwrap();
    assert_says(Weights::open_folder(dir.path()), &["`model.safetensors.index.json`, found neither"]);
    std::fs::write(dir.path().join("pytorch_model.bin"), "").unwrap();
    assert_says(
        Weights::open_folder(dir.path()),
        &["found `pytorch_model.bin`; save the model as safetensors"],
    );
    std::fs::write(dir.path().join("m.gguf"), "").unwrap();
    assert_says(Weights::open_folder(dir.path()), &["found `m.gguf`; name the .gguf file itself"]);
}

#[test]
fn a_folder_without_tokenizer_opens_bare() {
    let dir = tempfile::tempdir().unwrap();
    save(&tensors(DType::F32), &dir.path().join("model.safetensors"));
    let config = json!({"model_type": "granite", "hidden_size": 3, "head_dim": 4, "num_attention_heads": 1});
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let bare = Checkpoint::open_without_tokenizer(dir.path()).unwrap();
    assert_eq!((bare.config.hidden_size, bare.format.as_str()), (3, "safetensors"));
    assert_eq!(read(&bare.weights, NORM, &[3]), [1.0, 1.5, 2.0]);
    assert_says(Checkpoint::open(dir.path()), &["expected `tokenizer.json`, found no such file"]);
}

#[test]
fn paths_that_are_no_checkpoint_are_named() {
    let dir = tempfile::tempdir().unwrap();
    assert_says(Checkpoint::open(&dir.path().join("nothing")), &["nothing: ", "No such file"]);
    let path = dir.path().join("model.safetensors");
    std::fs::write(&path, "").unwrap();
    assert_says(Checkpoint::open(&path), &["expected a checkpoint folder or a .gguf file"]);
}
