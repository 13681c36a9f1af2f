//! transformers and PEFT themselves: a baked folder loads, gives PEFT's logits and tokens, and is the base otherwise.

use crate::bake::SETUPS;
use crate::fixtures::*;
use crate::python::python_with;
use candle_core::{Device, Tensor};
use gneiss::export::Format;
use serde_json::json;
use std::path::Path;

/// Bakes two prompts for the base in `folder` and asks `bake.py` about it.
fn check(python: &Path, folder: &Path, model: &Path, width: usize, options: &[&str]) {
    let (a, b, out) = (folder.join("a"), folder.join("b"), folder.join("out"));
    adapter(&a, folder, &prompt(7, width), Some("say {0, 1} {{input}}!"));
    adapter(&b, folder, &prompt(4, width).neg().unwrap(), None);
    let adapters = [("dogs", &a), ("cats.2", &b)].map(|(name, path)| format!("{name}={}", path.display()));
    baked(model, &adapters, &out, Format::Safetensors, None);
    let mut args = vec!["--base", folder.to_str().unwrap(), "--baked", out.to_str().unwrap()];
    adapters.iter().for_each(|adapter| args.extend(["--adapter", adapter]));
    args.extend(options);
    let said = script(python, "bake.py", &args);
    assert!(said.contains("2 prompts"), "{said}");
}

#[test]
fn transformers_serves_a_baked_folder_as_peft_serves_the_prompt() {
    let Some(python) = python_with("peft", "GNEISS_REQUIRE_PEFT") else { return };
    std::thread::scope(|scope| {
        for setup in &SETUPS {
            let python = &python;
            scope.spawn(move || {
                let here = tempfile::tempdir().unwrap();
                base(here.path(), setup);
                let width = gneiss::model::ModelConfig::from_json(&here.path().join("config.json")).unwrap().hidden_size;
                check(python, here.path(), here.path(), width, &[]);
            });
        }
    });
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

#[test]
fn transformers_serves_a_folder_made_of_a_gguf_file() {
    let Some(python) = python_with("peft", "GNEISS_REQUIRE_PEFT") else { return };
    for (name, width) in [("granite", 32), ("llama", 24)] {
        let here = tempfile::tempdir().unwrap();
        gguf_base(here.path(), name);
        let file = tests("fixtures").join(format!("{name}.gguf"));
        // Of the tokens that these vocabularies have.
        check(&python, here.path(), &file, width, &["--without-tokenizer", "--texts", "abab ba|c"]);
    }
}
