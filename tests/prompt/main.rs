//! Adapters: what PEFT wrote is read, what is written reads back, what is malformed is named.

use gneiss::prompt::Prefix;
#[path = "../common/mod.rs"]
mod common;
mod kinds;
mod position;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use gneiss::checkpoint::config::{ModelConfig, ModelType};
use gneiss::prompt::peft::{Adapter, AdapterConfig, ModelCard, PromptTuningInit};
use serde_json::{Value, json};

fn peft_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/peft_adapter")
}

fn model() -> ModelConfig {
    ModelConfig {
        model_type: ModelType::Granite,
        vocab_size: 50,
        hidden_size: 5,
        intermediate_size: 8,
        num_hidden_layers: 3,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 2,
        max_position_embeddings: 64,
        rms_norm_eps: 1e-5,
        rope: None,
        tie_word_embeddings: true,
        attention_bias: false,
        mlp_bias: false,
        embedding_multiplier: 12.0,
        residual_multiplier: 0.22,
        attention_multiplier: 0.5,
        logits_scaling: 8.0,
        mamba: None,
        experts: None,
    }
}

fn adapter() -> Adapter {
    let text = Some("Say `yes`.");
    Adapter {
        prompt: Prefix::Embeddings(Tensor::arange(0f32, 15., &Device::Cpu).unwrap().reshape((3, 5)).unwrap()),
        config: AdapterConfig::new("org/name@v2", &model(), 3, PromptTuningInit::Text, text),
        task: None,
    }
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A copy of PEFT's folder, its configuration changed.
fn changed(change: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(peft_folder().join(name), folder.path().join(name)).unwrap();
    }
    let path = folder.path().join("adapter_config.json");
    let mut config = json_of(&path);
    change(&mut config);
    std::fs::write(&path, config.to_string()).unwrap();
    folder
}

/// The error of reading a folder, without the folder's own path.
#[track_caller]
fn problem(folder: &Path) -> String {
    let error = Adapter::read(folder).unwrap_err();
    assert!(error.is_bad_input());
    let message = error.to_string();
    message.strip_prefix(&folder.display().to_string()).unwrap().trim_start_matches('/').to_string()
}

#[test]
fn reads_what_peft_wrote() {
    let adapter = Adapter::read(&peft_folder()).unwrap();
    assert_eq!(
        (adapter.prompt.values().dims(), adapter.prompt.values().dtype()),
        ([7, 40].as_slice(), DType::F32)
    );
    let config = &adapter.config;
    assert_eq!((config.num_virtual_tokens, config.token_dim), (7, 40));
    assert_eq!((config.num_attention_heads, config.num_layers), (Some(5), Some(3)));
    assert_eq!(config.prompt_tuning_init, PromptTuningInit::Random);
    assert_eq!(config.base_model_name_or_path.as_deref(), Some("tests/golden/granite"));
    assert_eq!(config.extra["peft_version"], json!("0.21.2"));
    // candle's own reader is the reference for the values.
    let path = peft_folder().join("adapter_model.safetensors");
    let expected = &candle_core::safetensors::load(path, &Device::Cpu).unwrap()["prompt_embeddings"];
    assert_eq!(adapter.prompt.values().to_vec2::<f32>().unwrap(), expected.to_vec2::<f32>().unwrap());
    assert_ne!(expected.to_vec2::<f32>().unwrap()[0][0], 0.);
}

#[test]
fn writes_peft_s_bytes_again() {
    let folder = tempfile::tempdir().unwrap();
    Adapter::read(&peft_folder()).unwrap().write(folder.path(), &ModelCard::default()).unwrap();
    let name = "adapter_model.safetensors";
    let bytes = |folder: &Path| std::fs::read(folder.join(name)).unwrap();
    assert_eq!(bytes(folder.path()), bytes(&peft_folder()));
    let name = "adapter_config.json";
    assert_eq!(json_of(&folder.path().join(name)), json_of(&peft_folder().join(name)));
    let mut names: Vec<_> =
        std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["README.md", "adapter_config.json", "adapter_model.safetensors"]);
}

#[test]
fn what_is_written_reads_back() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("made/on/the/way");
    let ours = adapter();
    for _ in 0..2 {
        ours.write(&dir, &ModelCard::default()).unwrap();
    }
    let read = Adapter::read(&dir).unwrap();
    assert_eq!(read.config, ours.config);
    assert_eq!(
        read.prompt.values().to_vec2::<f32>().unwrap(),
        ours.prompt.values().to_vec2::<f32>().unwrap()
    );
    assert_eq!(
        json_of(&dir.join("adapter_config.json")),
        json!({
            "base_model_name_or_path": "org/name", "inference_mode": true, "num_attention_heads": 4,
            "num_layers": 3, "num_transformer_submodules": 1, "num_virtual_tokens": 3,
            "peft_type": "PROMPT_TUNING", "prompt_tuning_init": "TEXT",
            "prompt_tuning_init_text": "Say `yes`.", "revision": "v2", "task_type": "CAUSAL_LM",
            "token_dim": 5, "tokenizer_name_or_path": "org/name",
        })
    );
}

#[test]
fn a_prompt_of_any_dtype_and_layout_is_written_as_f32() {
    let folder = tempfile::tempdir().unwrap();
    let mut ours = adapter();
    let rows = ours.prompt.values().to_vec2::<f32>().unwrap();
    for dtype in [DType::BF16, DType::F16, DType::F64] {
        // The transpose of a transpose: right values, rows not contiguous.
        let columns = ours.prompt.values().t().unwrap().contiguous().unwrap();
        ours.prompt = Prefix::Embeddings(columns.to_dtype(dtype).unwrap().t().unwrap());
        ours.write(folder.path(), &ModelCard::default()).unwrap();
        ours = Adapter::read(folder.path()).unwrap();
        assert_eq!(
            (ours.prompt.values().dtype(), ours.prompt.values().to_vec2::<f32>().unwrap()),
            (DType::F32, rows.clone())
        );
    }
}

#[test]
fn half_precision_is_widened() {
    for dtype in [DType::F16, DType::BF16] {
        let folder = changed(|_| {});
        let prompt = Adapter::read(&peft_folder()).unwrap().prompt.values().to_dtype(dtype).unwrap();
        let path = folder.path().join("adapter_model.safetensors");
        candle_core::safetensors::save(&HashMap::from([("prompt_embeddings", prompt.clone())]), path)
            .unwrap();
        let expected = prompt.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(Adapter::read(folder.path()).unwrap().prompt.values().to_vec2::<f32>().unwrap(), expected);
    }
}

/// `tests/golden/peft_loads.py` asked PEFT what it makes of each variant.
#[test]
fn what_peft_loads_is_loaded_with_its_rows() {
    // PEFT leaves the tensor aside, without a word; gneiss says what it is.
    const REFUSED: [&str; 1] = ["an extra tensor"];
    let golden = peft_folder().parent().unwrap().to_path_buf();
    let loads = json_of(&golden.join("peft_loads.json"));
    let variants = loads["variants"].as_array().unwrap();
    assert!(variants.len() >= 50, "{}", variants.len());
    for variant in variants {
        let name = variant["name"].as_str().unwrap();
        let folder = changed(|config| {
            let config = config.as_object_mut().unwrap();
            for key in variant["remove"].as_array().unwrap() {
                config.remove(key.as_str().unwrap());
            }
            config.extend(variant["set"].as_object().unwrap().clone());
        });
        if let Some(file) = variant["tensors"].as_str() {
            let to = folder.path().join("adapter_model.safetensors");
            std::fs::copy(golden.join("peft_loads").join(file), to).unwrap();
        }
        let peft = &variant["peft"];
        let read = Adapter::read(folder.path());
        if peft["loads"] != json!(true) || REFUSED.contains(&name) {
            let error = read.expect_err(name);
            assert!(error.is_bad_input() && error.to_string().contains("adapter_"), "{name}: {error}");
            continue;
        }
        let Adapter { prompt, config, .. } = read.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!((config.num_virtual_tokens, config.token_dim), (7, 40), "{name}");
        let rows = prompt.values().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let first: Vec<f64> = serde_json::from_value(peft["first"].clone()).unwrap();
        assert_eq!(rows.iter().take(4).map(|x| f64::from(*x)).collect::<Vec<_>>(), first, "{name}");
        let sum: f64 = rows.iter().map(|x| f64::from(*x)).sum();
        assert!((sum - peft["sum"].as_f64().unwrap()).abs() < 1e-12, "{name}: {sum}");
    }
}

#[test]
fn what_the_configuration_leaves_out_is_written_when_it_is_known() {
    let folder = changed(|config| {
        let config = config.as_object_mut().unwrap();
        config.retain(|key, _| ["peft_type", "num_virtual_tokens"].contains(&key.as_str()));
        config.insert("prompt_tuning_init".into(), json!("KMEANS"));
        config.insert("later".into(), json!([1, null]));
    });
    let again = tempfile::tempdir().unwrap();
    Adapter::read(folder.path()).unwrap().write(again.path(), &ModelCard::default()).unwrap();
    let config = json_of(&again.path().join("adapter_config.json"));
    assert_eq!((&config["token_dim"], &config["num_transformer_submodules"]), (&json!(40), &json!(1)));
    assert_eq!((&config["prompt_tuning_init"], &config["later"]), (&json!("KMEANS"), &json!([1, null])));
    assert_eq!((&config["task_type"], &config["inference_mode"]), (&json!(null), &json!(false)));
}

/// Python's `json` writes and reads these, and so does PEFT.
#[test]
fn adapter_read_and_write_keep_the_bare_numbers_of_python() {
    let folder = changed(|config| config["later"] = json!({"limit": 7.5, "text": "NaN"}));
    let path = folder.path().join("adapter_config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains("7.5"), "{text}");
    std::fs::write(&path, text.replace("7.5", "[NaN, -Infinity]")).unwrap();
    let again = tempfile::tempdir().unwrap();
    Adapter::read(folder.path()).unwrap().write(again.path(), &ModelCard::default()).unwrap();
    let written = std::fs::read_to_string(again.path().join("adapter_config.json")).unwrap();
    let written: String = written.split_whitespace().collect();
    assert!(written.contains(r#""later":{"limit":[NaN,-Infinity],"text":"NaN"}"#), "{written}");
}

#[test]
fn configurations_that_do_not_fit_are_named() {
    let cases = [
        (
            "peft_type",
            json!("LORA"),
            "an adapter of the method LORA is not supported; gneiss reads PROMPT_TUNING, P_TUNING, CPT, \
             MULTITASK_PROMPT_TUNING, PREFIX_TUNING and CARTRIDGE adapters; hint: merge it into its base with PEFT's \
             merge_and_unload, and give the merged checkpoint as the model",
        ),
        (
            "peft_type",
            json!(null),
            "peft_type: expected the name of a method such as \"PROMPT_TUNING\", found none",
        ),
        ("task_type", json!("SEQ_2_SEQ_LM"), "task_type: expected \"CAUSAL_LM\", found \"SEQ_2_SEQ_LM\""),
        ("task_type", json!("causal_lm"), "task_type: expected \"CAUSAL_LM\", found \"causal_lm\""),
        (
            "num_transformer_submodules",
            json!(2),
            "num_transformer_submodules: expected 1, found 2; gneiss tunes decoders, which have one",
        ),
        (
            "prompt_tuning_init",
            json!("TEXT"),
            "prompt_tuning_init_text: required with prompt_tuning_init \"TEXT\"",
        ),
    ];
    for (key, value, what) in cases {
        let folder = changed(|config| config[key] = value);
        assert_eq!(problem(folder.path()), format!("adapter_config.json: {what}"));
    }
    for (key, value) in [("num_virtual_tokens", json!(8)), ("token_dim", json!(41))] {
        let shape = if key == "token_dim" { [7, 41] } else { [8, 40] };
        let folder = changed(|config| config[key] = value);
        let expected = format!(
            "adapter_model.safetensors: prompt_embeddings: expected shape {shape:?}, as num_virtual_tokens and \
             token_dim of adapter_config.json say, found [7, 40]"
        );
        assert_eq!(problem(folder.path()), expected);
    }
    for (key, value, what) in [
        ("token_dim", json!("wide"), "token_dim: expected a whole number, found \"wide\""),
        ("token_dim", json!(0), "token_dim: expected 1 or more, found 0"),
        ("num_virtual_tokens", json!(7.0), "num_virtual_tokens: expected a whole number, found 7.0"),
        ("num_layers", json!(-1), "num_layers: expected a whole number, found -1"),
        ("revision", json!(1), "revision: expected a text, found 1"),
        ("inference_mode", json!("yes"), "inference_mode: expected true or false, found \"yes\""),
        (
            "num_virtual_tokens",
            json!(null),
            "num_virtual_tokens: expected the number of the prompt's rows, found none; hint: the tensor has 7 rows: add \
             \"num_virtual_tokens\": 7",
        ),
    ] {
        let folder = changed(|config| config[key] = value);
        assert_eq!(problem(folder.path()), format!("adapter_config.json: {what}"));
    }
    let folder = changed(|config| config["task_type"] = json!(null));
    assert_eq!(Adapter::read(folder.path()).unwrap().config.task_type, None);
}

#[test]
fn files_that_do_not_fit_are_named() {
    let folder = changed(|_| {});
    let (dir, path) = (folder.path(), folder.path().join("adapter_model.safetensors"));
    let save = |tensors: &[(&str, Tensor)]| {
        candle_core::safetensors::save(&tensors.iter().cloned().collect::<HashMap<_, _>>(), &path).unwrap();
    };
    let prompt = Tensor::zeros((7, 40), DType::F32, &Device::Cpu).unwrap();

    save(&[("prompt_embeddings", prompt.to_dtype(DType::I64).unwrap())]);
    let expected = "adapter_model.safetensors: prompt_embeddings: expected F32, F16, BF16 or F64, found I64";
    assert_eq!(problem(dir), expected);
    save(&[("prompt_embeddings", prompt.clone()), ("lm_head.weight", prompt.clone())]);
    let expected = "adapter_model.safetensors: expected the one tensor prompt_embeddings, found lm_head.weight, \
                    prompt_embeddings; the others are weights of the base model (embeddings that were resized or \
                    retrained, modules_to_save), and gneiss takes the base as it is; if they are unchanged, save the \
                    adapter again with save_pretrained(DIR, save_embedding_layers=False)";
    assert_eq!(problem(dir), expected);
    save(&[]);
    let expected = "adapter_model.safetensors: expected the one tensor prompt_embeddings, found none";
    assert_eq!(problem(dir), expected);
    save(&[("prompt_embeddings", (&prompt / 0.).unwrap())]);
    let expected = "adapter_model.safetensors: prompt_embeddings: expected finite values, found NaN at row 0, \
                    column 0";
    assert_eq!(problem(dir), expected);
    save(&[("prompt_embeddings", prompt.flatten_all().unwrap())]);
    assert!(problem(dir).ends_with("found [280]"));
    save(&[("base_model.model.prompt_embeddings", prompt.clone())]);
    assert!(problem(dir).ends_with(
        "PEFT loads no base_model.model.prompt_embeddings either: rename it to prompt_embeddings"
    ));
    save(&[("prompt_encoder.default.embedding.weight", prompt.clone())]);
    assert!(
        problem(dir).ends_with("is of the model's whole state; save the adapter with PEFT's save_pretrained")
    );
    save(&[("base_model.model.q_proj.lora_A.weight", prompt.clone())]);
    assert!(problem(dir).ends_with("these are LoRA's; gneiss reads tuned prompts"));
    save(&[("prompt_embeddings", (prompt.to_dtype(DType::F64).unwrap() + 1e39).unwrap())]);
    assert!(problem(dir).contains("expected finite values, found inf at row 0"), "{}", problem(dir));
    std::fs::write(&path, "version https://git-lfs.github.com/spec/v1\noid sha256:0\n").unwrap();
    assert!(problem(dir).contains("a Git LFS pointer to it; hint: `git lfs pull`"), "{}", problem(dir));
    std::fs::write(&path, "half").unwrap();
    assert!(problem(dir).starts_with("adapter_model.safetensors: not a safetensors file: "));

    std::fs::remove_file(&path).unwrap();
    assert_eq!(problem(dir), ": expected adapter_model.safetensors, found no such file");
    std::fs::write(dir.join("adapter_model.bin"), "").unwrap();
    assert_eq!(
        problem(dir),
        ": expected adapter_model.safetensors, found adapter_model.bin, a Python pickle; load it with PEFT and \
         save it again with save_pretrained to get safetensors"
    );
    std::fs::write(dir.join("adapter_config.json"), "{").unwrap();
    assert!(problem(dir).starts_with("adapter_config.json: not a JSON file: "));
    std::fs::remove_file(dir.join("adapter_config.json")).unwrap();
    let expected = "adapter_config.json: expected the configuration of a PEFT adapter, found no such file";
    assert_eq!(problem(dir), expected);
    assert_eq!(problem(&dir.join("adapter_model.bin")), ": expected an adapter folder, found a file");
    assert_eq!(problem(&dir.join("missing")), ": expected an adapter folder, found nothing");
}

#[test]
fn what_could_not_be_read_is_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("adapter");
    let nan = Prefix::Embeddings((adapter().prompt.values() / 0.).unwrap());
    let wide = Tensor::zeros((3, 6), DType::F32, &Device::Cpu).unwrap();
    let text = AdapterConfig::new("m", &model(), 3, PromptTuningInit::Text, None);
    for (adapter, what) in [
        (Adapter { prompt: nan, ..adapter() }, "expected finite values, found NaN at row 0, column 0"),
        (Adapter { prompt: Prefix::Embeddings(wide), ..adapter() }, "expected shape [3, 5]"),
        (Adapter { config: text, ..adapter() }, "prompt_tuning_init_text: required"),
    ] {
        let error = adapter.write(&dir, &ModelCard::default()).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
        assert!(!dir.exists());
    }
}

#[test]
fn a_revision_is_split_off_a_hub_id_only() {
    let new = |id: &str| AdapterConfig::new(id, &model(), 3, PromptTuningInit::Random, None);
    let parts = |id: &str| {
        let config = new(id);
        assert_eq!(config.tokenizer_name_or_path, config.base_model_name_or_path);
        (config.base_model_name_or_path.unwrap(), config.revision)
    };
    assert_eq!(parts("org/name"), ("org/name".into(), None));
    assert_eq!(parts("org/name@v2"), ("org/name".into(), Some("v2".into())));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a@b");
    std::fs::create_dir(&path).unwrap();
    let path = path.display().to_string();
    assert_eq!(parts(&path), (path.clone(), None));
}

#[test]
fn the_card_says_what_it_is_and_how_to_load_it() {
    let card = ModelCard {
        name: "tutorial".into(),
        task: "classification".into(),
        verbalizer: "classify {0, 1} {{input}}".into(),
        before: None,
        max_output_tokens: Some(2),
        hyperparameters: vec![("learning_rate".into(), "0.01".into()), ("a|b".into(), "c\nd".into())],
        num_steps: Some(150),
        train_loss: Some(0.25),
        validation_loss: Some(0.123_456),
    };
    let expected = r#"---
base_model: "org/name"
base_model_relation: adapter
library_name: peft
pipeline_tag: text-generation
tags:
- prompt-tuning
- gneiss
---

# tutorial

A soft prompt: embeddings of virtual tokens that stand before every input of a frozen model.

| | |
|---|---|
| Base model | org/name |
| Revision | v2 |
| Task | classification |
| Virtual tokens | 3 |
| Steps | 150 |
| Training loss | 0.2500 |
| Validation loss | 0.1235 |

## Verbalizer

```text
classify {0, 1} {{input}}
```

## Init text

```text
Say `yes`.
```

## Hyperparameters

| | |
|---|---|
| learning_rate | 0.01 |
| a\|b | c d |

## With PEFT

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("org/name", revision="v2")
tokenizer = AutoTokenizer.from_pretrained("org/name", revision="v2")
model = PeftModel.from_pretrained(base, "DIR")  # this folder

text = "classify {0, 1} {{input}}".replace("{{input}}", "...")
inputs = tokenizer(text, return_tensors="pt")
# use_cache=False: with a cache, PEFT 0.21 on transformers 5.24 puts the prompt in again at every token
answer = model.generate(**inputs, max_new_tokens=2, do_sample=False, use_cache=False)
print(tokenizer.decode(answer[0], skip_special_tokens=True))
```

## With gneiss

```sh
gneiss generate --model 'org/name@v2' --adapter DIR TEXT
```

`TEXT` is the verbalizer with the input in its place, and `DIR` is this folder.
"#;
    let folder = tempfile::tempdir().unwrap();
    adapter().write(folder.path(), &card).unwrap();
    assert_eq!(std::fs::read_to_string(folder.path().join("README.md")).unwrap(), expected);
}

#[test]
fn a_card_of_little_is_short_and_a_gguf_is_loaded_from_its_folder() {
    let mut config = AdapterConfig::new("models/a.gguf", &model(), 3, PromptTuningInit::SampleVocab, None);
    let card = ModelCard { verbalizer: "```\n{{input}}".into(), ..ModelCard::default() }.render(&config);
    assert!(card.contains("from_pretrained(\"models\", gguf_file=\"a.gguf\")"), "{card}");
    assert!(card.contains("````text\n```\n{{input}}\n````\n"), "{card}");
    assert!(!card.contains("Init text") && !card.contains("loss") && !card.contains("Steps"), "{card}");
    config.base_model_name_or_path = None;
    let card = ModelCard::default().render(&config);
    assert!(!card.contains("base_model") && !card.contains("from_pretrained"), "{card}");
}
