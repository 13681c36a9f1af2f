//! transformers and PEFT themselves: a baked folder loads, gives PEFT's logits and tokens, and is the base otherwise.

use crate::bake::SETUPS;
use crate::common::python::python_with;
use crate::fixtures::*;
use candle_core::{Device, Tensor};
use gneiss::checkpoint::ModelConfig;
use gneiss::export::Format;
use serde_json::{Value, json};
use std::path::Path;

/// Bakes two prompts for the base in `folder`; what `bake.py` is to look at.
fn case(folder: &Path, model: &Path, width: usize, mut options: Value) -> Value {
    let (a, b, out) = (folder.join("a"), folder.join("b"), folder.join("out"));
    adapter(&a, folder, &prompt(7, width), Some("say {0, 1} {{input}}!"));
    adapter(&b, folder, &prompt(4, width).neg().unwrap(), None);
    let adapters = [("dogs", &a), ("cats.2", &b)].map(|(name, path)| format!("{name}={}", path.display()));
    baked(model, &adapters, &out, Format::Safetensors, None);
    options["base"] = json!(folder);
    options["baked"] = json!(out);
    options["adapters"] = json!({"dogs": a, "cats.2": b});
    options
}

#[test]
fn transformers_serves_a_baked_folder_as_peft_serves_the_prompt() {
    let Some(python) = python_with(&["peft"], "GNEISS_REQUIRE_PEFT") else { return };
    let (mut folders, mut cases) = (Vec::new(), Vec::new());
    for setup in &SETUPS {
        let here = tempfile::tempdir().unwrap();
        base(here.path(), setup);
        let width = ModelConfig::from_json(&here.path().join("config.json")).unwrap().hidden_size;
        cases.push(case(here.path(), here.path(), width, json!({"has_tokenizer": true})));
        folders.push(here);
    }
    // Folders made of GGUF files, with texts of the few tokens that these know.
    for (name, width) in [("granite", 32), ("llama", 24)] {
        let here = tempfile::tempdir().unwrap();
        gguf_base(here.path(), name);
        let file = tests("fixtures").join(format!("{name}.gguf"));
        let options = json!({"has_tokenizer": false, "texts": ["abab ba", "c"]});
        cases.push(case(here.path(), &file, width, options));
        folders.push(here);
    }
    let said = script(&python, "bake.py", &[&Value::Array(cases).to_string()]);
    assert_eq!(said, "8 checkpoints, 16 prompts\n");
}

/// What the GGUF files of `tests/fixtures` are, as a folder: the tensors as the gguf package dequantises them, and the
/// configuration of `make_gguf.py` in transformers' words.
pub fn gguf_base(folder: &Path, name: &str) {
    let fixtures = tests("fixtures");
    std::fs::copy(fixtures.join(format!("{name}.safetensors")), folder.join("model.safetensors")).unwrap();
    let tensors = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap();
    let tensors: std::collections::HashMap<String, Tensor> = tensors;
    let rows = tensors["model.embed_tokens.weight"].dims()[0];
    let mut config = json!({"vocab_size": rows, "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 512});
    let own = match name {
        "granite" => json!({
            "model_type": "granite", "architectures": ["GraniteForCausalLM"], "hidden_size": 32, "intermediate_size": 32,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 1e7,
            "tie_word_embeddings": true, "attention_multiplier": 0.015625, "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22, "logits_scaling": 8.0, "eos_token_id": 0, "bos_token_id": 0,
        }),
        _ => json!({
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 24, "intermediate_size": 20,
            "num_hidden_layers": 1, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16,
            "rope_theta": 500000.0, "tie_word_embeddings": false, "attention_bias": true, "mlp_bias": true,
            "eos_token_id": [1, 2], "bos_token_id": 0,
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 8192},
        }),
    };
    config.as_object_mut().unwrap().extend(own.as_object().unwrap().clone());
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
}
