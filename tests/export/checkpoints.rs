//! Bases as people have them: a head of their own under `tie_word_embeddings`, saved from the base class, wide values, scaled
//! rotary embeddings.

use crate::bake::SETUPS;
use crate::fixtures::*;
use candle_core::{DType, Device, Tensor};
use gneiss::checkpoint::{Checkpoint, GgufFile, ModelConfig};
use gneiss::export::{Baked, Format, ValueType};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

type Tensors = HashMap<String, Tensor>;

/// A base whose tensors and configuration are changed, and a prompt for it.
struct Place {
    here: tempfile::TempDir,
    soft: Tensor,
}

impl Place {
    fn new(changes: &Value, change: impl FnOnce(Tensors) -> Tensors) -> Self {
        let here = tempfile::tempdir().unwrap();
        base(here.path(), &SETUPS[1]);
        let file = here.path().join("model.safetensors");
        let mut tensors = Tensors::new();
        for entry in std::fs::read_dir(here.path()).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.extension().is_some_and(|extension| extension == "safetensors") {
                tensors.extend(candle_core::safetensors::load(&entry, &Device::Cpu).unwrap());
                std::fs::remove_file(entry).unwrap();
            }
        }
        candle_core::safetensors::save(&change(tensors), file).unwrap();
        let path = here.path().join("config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        std::fs::write(&path, config.to_string()).unwrap();
        let soft = prompt(5, 40);
        adapter(&here.path().join("a"), here.path(), &soft, None);
        Self { here, soft }
    }

    fn path(&self) -> &Path {
        self.here.path()
    }

    fn bake(&self, name: &str, format: Format, value_type: Option<ValueType>) -> (PathBuf, Baked) {
        let out = self.here.path().join(name);
        let adapters = [format!("p={}", self.here.path().join("a").display())];
        let written = baked(self.path(), &adapters, &out, format, value_type);
        (out, written)
    }
}

fn read(path: &Path, name: &str, rows: usize) -> Vec<Vec<f32>> {
    let bare = Checkpoint::open_without_tokenizer(path).unwrap();
    let shape = [bare.config.vocab_size, bare.config.hidden_size];
    let tensor = bare.weights.tensor(name, &shape, DType::F32, &Device::Cpu).unwrap();
    tensor.narrow(0, 0, rows).unwrap().to_vec2().unwrap()
}

#[test]
fn a_head_of_its_own_is_baked() {
    let own = prompt(131, 40);
    let add = |mut tensors: Tensors| {
        tensors.insert("lm_head.weight".into(), own.clone());
        tensors
    };
    let place = Place::new(&json!({}), add);
    for (name, format) in [("folder", Format::Safetensors), ("file.gguf", Format::Gguf)] {
        let (out, written) = place.bake(name, format, None);
        assert!(written.warnings[0].contains("`tie_word_embeddings` true"), "{:?}", written.warnings);
        assert_eq!(read(&out, "lm_head.weight", 131), own.to_vec2::<f32>().unwrap(), "{name}");
        let [a, b] =
            [place.path(), &out].map(|path| logits(&model(path), &[5, 6, 7]).narrow(1, 0, 131).unwrap());
        assert!(difference(&a.contiguous().unwrap(), &b.contiguous().unwrap()) < 1e-5, "{name}");
    }
}

#[test]
fn a_base_class_becomes_a_causal_language_model() {
    let strip = |tensors: Tensors| -> Tensors {
        tensors.into_iter().map(|(name, t)| (name.trim_start_matches("model.").to_string(), t)).collect()
    };
    let place = Place::new(&json!({"architectures": ["GraniteModel"]}), strip);
    let path = place.path().join("config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replacen('{', "{\"time_step_limit\": [0.0, Infinity],", 1)).unwrap();
    let (out, written) = place.bake("out", Format::Safetensors, None);
    assert_eq!(written.warnings, Vec::<String>::new());
    let config = std::fs::read_to_string(out.join("config.json")).unwrap();
    assert!(config.contains("GraniteForCausalLM") && !config.contains("GraniteModel"), "{config}");
    assert!(
        config.contains("Infinity") && !config.contains("\"Infinity") && !config.contains("u0000"),
        "{config}"
    );
    let [a, b] = [place.path(), &out].map(|path| logits(&model(path), &[5, 6, 7]).narrow(1, 0, 131).unwrap());
    assert!(difference(&a.contiguous().unwrap(), &b.contiguous().unwrap()) < 1e-5);
}

#[test]
fn wide_values_are_baked() {
    let widen = |tensors: Tensors| -> Tensors {
        tensors.into_iter().map(|(name, t)| (name, t.to_dtype(DType::F64).unwrap())).collect()
    };
    let place = Place::new(&json!({}), widen);
    let embedding = "model.embed_tokens.weight";
    for (name, format, value_type) in [
        ("same", Format::Safetensors, None),
        ("f32", Format::Safetensors, Some(ValueType::F32)),
        ("file.gguf", Format::Gguf, None),
    ] {
        let (out, _) = place.bake(name, format, value_type);
        assert_eq!(read(&out, embedding, 131), read(place.path(), embedding, 131), "{name}");
        let [a, b] =
            [place.path(), &out].map(|path| logits(&model(path), &[5, 6, 7]).narrow(1, 0, 131).unwrap());
        assert!(difference(&a.contiguous().unwrap(), &b.contiguous().unwrap()) < 1e-5, "{name}");
    }
    assert_eq!(place.soft.dims(), [5, 40]);
}

/// What llama.cpp does not read with the configuration's bias switched off it would read without it.
#[test]
fn tensors_without_a_place_do_not_come_into_a_gguf_file() {
    let add = |mut tensors: Tensors| {
        tensors.insert(
            "model.layers.0.self_attn.q_proj.bias".into(),
            Tensor::ones(40, DType::F32, &Device::Cpu).unwrap(),
        );
        tensors.insert("position_ids".into(), Tensor::zeros(4, DType::I64, &Device::Cpu).unwrap());
        tensors
    };
    let place = Place::new(&json!({}), add);
    let (out, written) = place.bake("out.gguf", Format::Gguf, None);
    assert!(written.warnings[0].contains("q_proj.bias"), "{:?}", written.warnings);
    let names = GgufFile::open(&out).unwrap().names();
    assert!(names.iter().all(|name| name.ends_with(".weight")), "{names:?}");
}

#[test]
fn rotary_scalings_come_into_a_gguf_file_and_back() {
    let scalings = [
        json!({"type": "linear", "factor": 2.5}),
        json!({"type": "dynamic", "factor": 2.0}),
        json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
        json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 0.75,
               "beta_fast": 16.0, "beta_slow": 2.0}),
        json!({"type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.0, 3.0, 5.0, 7.0], "factor": 4.0,
               "original_max_position_embeddings": 64}),
    ];
    for scaling in scalings {
        let rope = json!({"rope_parameters": null, "rope_theta": 1000.0, "rope_scaling": scaling});
        let place = Place::new(&rope, |tensors| tensors);
        let own = ModelConfig::from_json(&place.path().join("config.json")).unwrap();
        let (gguf, _) = place.bake("out.gguf", Format::Gguf, None);
        // And a folder of that file again.
        let out = place.here.path().join("again");
        adapter(&place.here.path().join("b"), &gguf, &place.soft, None);
        baked(
            &gguf,
            &[format!("q={}", place.here.path().join("b").display())],
            &out,
            Format::Safetensors,
            None,
        );
        for path in [gguf, out] {
            let found = Checkpoint::open_without_tokenizer(&path).unwrap().config;
            let (own, found) = (own.rope.as_ref().unwrap(), found.rope.as_ref().unwrap());
            let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-6 * a.abs(), "{scaling}: {a} {b}");
            for long in [false, true] {
                let [a, b] = [own, found].map(|rope| rope.frequencies(8, long));
                a.iter().zip(b).for_each(|(a, b)| near(*a, b));
            }
            near(own.attention_factor(), found.attention_factor());
            assert_eq!(own.long_above(), found.long_above());
        }
    }
    let scaling = json!({"type": "yarn", "factor": 4.0, "truncate": false});
    let rope = json!({"rope_parameters": null, "rope_theta": 1000.0, "rope_scaling": scaling});
    let place = Place::new(&rope, |tensors| tensors);
    let prompts =
        gneiss::export::read_prompts(&[format!("p={}", place.here.path().join("a").display())]).unwrap();
    let out = place.here.path().join("out.gguf");
    let options = gneiss::export::Bake {
        model: place.path(),
        prompts,
        out: &out,
        format: Format::Gguf,
        value_type: None,
    };
    let message = gneiss::export::bake(options, &mut |_, _, _| ()).unwrap_err().to_string();
    assert!(
        message.contains("`yarn` with `truncate` false") && message.contains("--format safetensors"),
        "{message}"
    );
}
