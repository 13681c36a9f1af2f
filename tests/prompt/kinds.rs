//! Every kind of prompt that PEFT has for a decoder: `tests/golden/peft_kinds.py` let PEFT write the folders.

use crate::{json_of, model};
use candle_core::{DType, Device, Tensor};
use gneiss::checkpoint::config::ModelConfig;
use gneiss::checkpoint::layers::MambaConfig;
use gneiss::checkpoint::{BareCheckpoint, Checkpoint, HubOptions};
use gneiss::config::PromptKind;
use gneiss::prompt::peft::{Adapter, AdapterConfig, ModelCard, PeftType, Place, PromptTuningInit};
use gneiss::prompt::{Prefix, Tuned};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn folder(name: &str) -> PathBuf {
    golden().join("peft_kinds").join(name)
}

fn checkpoint(name: &str) -> ModelConfig {
    let BareCheckpoint { config, .. } = Checkpoint::open_without_tokenizer(&golden().join(name)).unwrap();
    config
}

fn tensors(folder: &Path) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(folder.join("adapter_model.safetensors"), &Device::Cpu).unwrap()
}

fn rows(tensor: &Tensor) -> Vec<Vec<f32>> {
    tensor.to_vec2().unwrap()
}

/// A copy of a folder that PEFT wrote, with another configuration.
fn changed(name: &str, change: impl FnOnce(&mut serde_json::Map<String, Value>)) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    let mut config = json_of(&folder(name).join("adapter_config.json"));
    change(config.as_object_mut().unwrap());
    std::fs::write(copy.path().join("adapter_config.json"), config.to_string()).unwrap();
    let file = "adapter_model.safetensors";
    std::fs::copy(folder(name).join(file), copy.path().join(file)).unwrap();
    copy
}

/// `shared * (columns[task] @ rows[task])` by the definition, in f64.
fn prompt_of_task(folder: &Path, task: usize) -> Vec<Vec<f64>> {
    let tensors = tensors(folder);
    let f64s = |name: &str| tensors[name].to_dtype(DType::F64).unwrap();
    let shared = f64s("prompt_embeddings").to_vec2::<f64>().unwrap();
    let columns = f64s("prefix_task_cols").to_vec3::<f64>().unwrap();
    let factors = f64s("prefix_task_rows").to_vec3::<f64>().unwrap();
    let product = |i: usize, j: usize| -> f64 {
        (0..factors[task].len()).map(|k| columns[task][i][k] * factors[task][k][j]).sum()
    };
    let row = |(i, row): (usize, &Vec<f64>)| {
        row.iter().enumerate().map(|(j, value)| value * product(i, j)).collect()
    };
    shared.iter().enumerate().map(row).collect()
}

#[test]
fn every_kind_that_peft_writes_is_read_with_its_values() {
    let json = json_of(&golden().join("peft_kinds.json"));
    let cases = json["cases"].as_array().unwrap();
    assert!(cases.len() >= 20, "{}", cases.len());
    for case in cases {
        let name = case["folder"].as_str().unwrap();
        let task = case["task"].as_u64().map(|task| task as usize);
        let adapter =
            Adapter::read_task(&folder(name), task).unwrap_or_else(|error| panic!("{name}: {error}"));
        let is_prefix = ["prefix", "cartridge"].iter().any(|kind| name.contains(kind));
        let expected = if is_prefix { PromptKind::Prefix } else { PromptKind::Embeddings };
        assert_eq!(adapter.prompt.kind(), expected, "{name}");
        let ours = rows(adapter.prompt.values());
        match task {
            None => assert_eq!(ours, rows(&tensors(&folder(name))["prompt_embeddings"]), "{name}"),
            Some(task) => {
                let expected = prompt_of_task(&folder(name), task);
                for (ours, expected) in ours.iter().flatten().zip(expected.iter().flatten()) {
                    assert!((f64::from(*ours) - expected).abs() < 1e-6, "{name}: {ours} against {expected}");
                }
            }
        }
        let base = case["checkpoint"].as_str().unwrap();
        adapter.check_fits(Path::new(name), base, &checkpoint(base)).unwrap();
    }
}

#[test]
fn what_peft_wrote_is_written_again() {
    for name in [
        "granite/p_tuning_mlp", "granite/p_tuning_lstm", "granite/cpt", "granite/prefix",
        "granite/prefix_projection", "granite/cartridge", "llama_bias/prefix", "experts/cartridge",
    ] {
        let copy = tempfile::tempdir().unwrap();
        Adapter::read(&folder(name)).unwrap().write(copy.path(), &ModelCard::default()).unwrap();
        let file = "adapter_config.json";
        assert_eq!(json_of(&copy.path().join(file)), json_of(&folder(name).join(file)), "{name}");
        let file = "adapter_model.safetensors";
        let bytes = |folder: &Path| std::fs::read(folder.join(file)).unwrap();
        assert_eq!(bytes(copy.path()), bytes(&folder(name)), "{name}");
    }
}

#[test]
fn the_prompt_of_a_task_is_written_as_one_of_prompt_tuning() {
    let copy = tempfile::tempdir().unwrap();
    let task = Adapter::read_task(&folder("granite/multitask"), Some(2)).unwrap();
    assert_eq!((task.config.peft_type, task.config.tasks()), (PeftType::MultitaskPromptTuning, Some(3)));
    task.write(copy.path(), &ModelCard::default()).unwrap();
    let again = Adapter::read(copy.path()).unwrap();
    assert_eq!(rows(again.prompt.values()), rows(task.prompt.values()));
    let config = json_of(&copy.path().join("adapter_config.json"));
    assert_eq!(config["peft_type"], "PROMPT_TUNING");
    let keys = ["num_tasks", "num_ranks", "prompt_tuning_init_state_dict_path", "prompt_tuning_init_task"];
    assert!(keys.iter().all(|key| config.get(key).is_none()), "{config}");
}

/// What PEFT makes of each variant is in the golden file; what gneiss does otherwise is listed here.
#[test]
fn what_peft_loads_is_loaded_and_what_it_refuses_is_refused() {
    // PEFT takes the heads from the model, and the rows of CPT from another key; it leaves factors of tasks aside without
    // a word if the configuration is one of prompt tuning.
    let stricter = [
        json!({ "num_attention_heads": 5, "token_dim": 40 }),
        json!({ "num_virtual_tokens": 5 }),
        json!({ "peft_type": "PROMPT_TUNING" }),
    ];
    // The tensors say all that is missing here.
    let laxer = [
        (json!({}), json!(["num_attention_heads"])),
        (json!({}), json!(["token_dim"])),
        (json!({ "prompt_tuning_init": "ONLY_SOURCE_SHARED" }), json!([])),
    ];
    let json = json_of(&golden().join("peft_kinds.json"));
    let variants = json["variants"].as_array().unwrap();
    assert!(variants.len() >= 50, "{}", variants.len());
    let base = checkpoint("granite");
    for variant in variants {
        let kind = variant["kind"].as_str().unwrap();
        let (sets, removed) = (&variant["set"], &variant["remove"]);
        let copy = changed(&format!("granite/{kind}"), |config| {
            removed.as_array().unwrap().iter().for_each(|key| drop(config.remove(key.as_str().unwrap())));
            config.extend(sets.as_object().unwrap().clone());
        });
        let task = (kind == "multitask" && sets.get("peft_type").is_none()).then_some(1);
        let read = Adapter::read_task(copy.path(), task)
            .and_then(|adapter| adapter.check_fits(copy.path(), "granite", &base).map(|()| adapter));
        let loads = variant["peft"]["loads"] == json!(true);
        let strict = kind != "prefix" || sets["token_dim"] == json!(40);
        if (!loads && !laxer.contains(&(sets.clone(), removed.clone())))
            || (strict && stricter.contains(sets))
        {
            let error = read.err().unwrap_or_else(|| panic!("read: {variant}"));
            let keys = sets.as_object().unwrap().keys().map(String::as_str);
            let mut keys = keys.chain(removed.as_array().unwrap().iter().filter_map(Value::as_str));
            let text = error.to_string();
            assert!(error.is_bad_input() && keys.any(|key| text.contains(key)), "{variant}: {text}");
            continue;
        }
        let read = read.unwrap_or_else(|error| panic!("{variant}: {error}"));
        let original = Adapter::read_task(&folder(&format!("granite/{kind}")), task).unwrap();
        assert_eq!(rows(read.prompt.values()), rows(original.prompt.values()), "{variant}");
    }
}

#[test]
fn a_task_is_named_after_a_colon() {
    let place = tempfile::tempdir().unwrap();
    let copy = |name: &str, to: &str| {
        std::fs::create_dir_all(place.path().join(to)).unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            std::fs::copy(folder(name).join(file), place.path().join(to).join(file)).unwrap();
        }
    };
    copy("granite/multitask", "dogs");
    copy("granite/multitask", "dogs:2");
    copy("granite/cpt", "cats");
    let path = |name: &str| place.path().join(name);
    let find = |name: &str| Place::find(&path(name), &HubOptions::from_vars(|_| None));

    let task = find("dogs:1").unwrap();
    assert_eq!((task.folder.clone(), task.task), (path("dogs"), Some(1)));
    let expected = Adapter::read_task(&path("dogs"), Some(1)).unwrap();
    assert_eq!(rows(task.read().unwrap().prompt.values()), rows(expected.prompt.values()));
    assert_eq!(rows(Adapter::open(&path("dogs:1")).unwrap().prompt.values()), rows(expected.prompt.values()));
    // A path that exists is that path, and its own task can be named.
    assert_eq!((find("dogs:2").unwrap().folder, find("dogs:2").unwrap().task), (path("dogs:2"), None));
    assert_eq!((find("dogs:2:0").unwrap().folder, find("dogs:2:0").unwrap().task), (path("dogs:2"), Some(0)));

    for (argument, what) in [
        (
            "dogs",
            "dogs: expected a task, as the adapter holds the prompts of 3 tasks, found none; hint: name one from 0 to 2",
        ),
        ("dogs:3", "dogs: expected a task from 0 to 2 of the adapter's 3, found 3"),
        ("dogs:a", "dogs:a: expected the number of a task after the colon, found \"a\""),
        ("dogs:-1", "dogs:-1: expected the number of a task after the colon, found \"-1\""),
        (
            "cats:0",
            "cats: expected an adapter without a task, as a CPT adapter holds one prompt, found task 0",
        ),
        ("mice:0", "mice: expected an adapter folder, found nothing"),
    ] {
        let error = Adapter::open(&path(argument)).unwrap_err();
        assert!(error.is_bad_input() && error.to_string().contains(what), "{argument}: {error}");
    }

    let tuned = Tuned::read_all(&["dogs:0", "cats", "dogs:1"].map(path)).unwrap();
    let names: Vec<&str> = tuned.iter().map(|tuned| tuned.name.as_str()).collect();
    assert_eq!(names, ["dogs-0", "cats", "dogs-1"]);
    assert_eq!(tuned[2].argument(), path("dogs:1"));
    let twice = Tuned::read_all(&["dogs:0", "dogs:0"].map(path)).unwrap_err().to_string();
    assert!(twice.contains("expected every adapter once"), "{twice}");
    copy("granite/cpt", "dogs-0");
    let alike = Tuned::read_all(&["dogs:0", "dogs-0"].map(path)).unwrap_err().to_string();
    assert!(alike.contains("expected adapters whose names differ"), "{alike}");
}

#[test]
fn the_only_task_needs_no_name() {
    let one = tempfile::tempdir().unwrap();
    let all = tensors(&folder("granite/multitask"));
    let first = |name: &str| (name.to_owned(), all[name].narrow(0, 0, 1).unwrap().contiguous().unwrap());
    let mut tensors = HashMap::from([first("prefix_task_cols"), first("prefix_task_rows")]);
    tensors.insert("prompt_embeddings".into(), all["prompt_embeddings"].clone());
    candle_core::safetensors::save(&tensors, one.path().join("adapter_model.safetensors")).unwrap();
    let mut config = json_of(&folder("granite/multitask").join("adapter_config.json"));
    config["num_tasks"] = json!(1);
    std::fs::write(one.path().join("adapter_config.json"), config.to_string()).unwrap();
    let expected = Adapter::read_task(&folder("granite/multitask"), Some(0)).unwrap();
    assert_eq!(rows(Adapter::read(one.path()).unwrap().prompt.values()), rows(expected.prompt.values()));
}

#[test]
fn files_of_another_kind_are_named() {
    let problem =
        |copy: &tempfile::TempDir, task| Adapter::read_task(copy.path(), task).unwrap_err().to_string();
    let lacking = changed("granite/cpt", |config| {
        config["peft_type"] = json!("MULTITASK_PROMPT_TUNING");
    });
    assert!(
        problem(&lacking, None).ends_with(
            "expected the tensors prefix_task_cols, prefix_task_rows, prompt_embeddings, found prompt_embeddings"
        ),
        "{}",
        problem(&lacking, None)
    );
    let plain = changed("granite/multitask", |config| config["peft_type"] = json!("PROMPT_TUNING"));
    assert!(
        problem(&plain, None).ends_with(
            "prefix_task_cols and prefix_task_rows belong to an adapter of the method MULTITASK_PROMPT_TUNING, and \
             peft_type of adapter_config.json is PROMPT_TUNING"
        ),
        "{}",
        problem(&plain, None)
    );
    let prefix = changed("granite/prefix", |config| config["num_layers"] = json!(2));
    assert!(
        problem(&prefix, None).ends_with(
            "prompt_embeddings: expected shape [4, 32], as num_virtual_tokens, num_layers and token_dim of \
             adapter_config.json say, found [4, 48]"
        ),
        "{}",
        problem(&prefix, None)
    );
    let method = changed("granite/cpt", |config| config["peft_type"] = json!("cpt"));
    assert!(problem(&method, None).contains("and CARTRIDGE adapters, whose names are in capitals"));
}

#[test]
fn check_fits_names_what_differs() {
    let adapter = Adapter::read(&folder("granite/prefix")).unwrap();
    let granite = checkpoint("granite");
    let check = |adapter: &Adapter, config: &ModelConfig| {
        adapter.check_fits(Path::new("dogs"), "granite", config).map_err(|error| error.to_string())
    };
    check(&adapter, &granite).unwrap();
    let with = |config: AdapterConfig| Adapter { config, ..adapter.clone() };
    let config = &adapter.config;
    let wide = ModelConfig { num_key_value_heads: 5, ..granite.clone() };
    let deep = ModelConfig { num_hidden_layers: 4, ..granite.clone() };
    let mamba = checkpoint("mamba");
    let query = with(AdapterConfig { num_attention_heads: Some(5), token_dim: 40, ..config.clone() });
    let unknown =
        AdapterConfig { num_attention_heads: None, num_layers: None, token_dim: 0, ..config.clone() };
    check(&with(unknown.clone()), &granite).unwrap();
    let indexed = AdapterConfig { attention_layers: Some(vec![1]), num_layers: Some(1), ..config.clone() };
    let all = AdapterConfig { num_layers: Some(4), ..config.clone() };
    for (adapter, model, what) in [
        (
            &adapter,
            &deep,
            "dogs: num_layers: expected 4, the attention layers of granite, found 3; it was tuned on",
        ),
        (&adapter, &wide, "num_attention_heads: expected 5, the key-value heads of granite, found 1"),
        (&query, &granite, "expected 1, the key-value heads of granite, found 5; these are the query heads"),
        (
            &with(all),
            &mamba,
            "expected 1, the attention layers of granite, found 4; Mamba2 layers have no keys",
        ),
        (
            &with(indexed),
            &granite,
            "gneiss_attention_layers: expected [0, 1, 2], the attention layers of granite, found [1]",
        ),
        (
            &with(unknown),
            &wide,
            "expected keys and values of width 240, 2 for each of the 3 attention layers of granite",
        ),
        (
            &with(AdapterConfig { token_dim: 9, num_attention_heads: None, ..config.clone() }),
            &granite,
            "token_dim: expected 8, 1 key-value heads of size 8 as granite has, found 9",
        ),
    ] {
        let problem = check(adapter, model).unwrap_err();
        assert!(problem.contains(what), "{problem}");
    }
    let embeddings = Adapter::read(&folder("granite/cpt")).unwrap();
    let problem = check(&embeddings, &mamba).unwrap_err();
    assert!(
        problem.contains("expected a prompt of width 32, the hidden size of granite, found 40"),
        "{problem}"
    );
}

/// Keys and values of three virtual tokens for `model`, of which `frozen` were not trained.
fn keys_values(model: &ModelConfig, frozen: usize) -> Adapter {
    let config = AdapterConfig::keys_values("org/name@v2", model, 3, frozen);
    let width = config.num_layers.unwrap() * 2 * config.token_dim;
    let values = Tensor::arange(0f32, (3 * width) as f32, &Device::Cpu).unwrap().reshape((3, width)).unwrap();
    Adapter { prompt: Prefix::KeysValues(values), config, task: None }
}

fn hybrid() -> ModelConfig {
    let mamba = checkpoint("mamba").mamba.map(|mamba| MambaConfig { attention_layers: vec![1], ..mamba });
    ModelConfig { mamba, ..model() }
}

#[test]
fn keys_and_values_are_written_as_peft_has_them() {
    let common = json!({
        "base_model_name_or_path": "org/name", "inference_mode": true, "num_attention_heads": 2, "num_layers": 3,
        "num_transformer_submodules": 1, "num_virtual_tokens": 3, "peft_type": "PREFIX_TUNING", "revision": "v2",
        "task_type": "CAUSAL_LM", "token_dim": 4,
    });
    let with = |keys: Value| {
        let mut config = common.as_object().unwrap().clone();
        config.extend(keys.as_object().unwrap().clone());
        Value::Object(config)
    };
    let encoder = json!({ "encoder_hidden_size": 4, "init_weights": null, "prefix_projection": false });
    let frozen = json!({ "peft_type": "CARTRIDGE", "num_frozen_tokens": 1 });
    let hybrid_keys = json!({ "peft_type": "CARTRIDGE", "num_frozen_tokens": 1, "num_layers": 1, "gneiss_attention_layers": [1] });
    for (model, tokens, expected) in
        [(model(), 0, with(encoder)), (model(), 1, with(frozen)), (hybrid(), 1, with(hybrid_keys))]
    {
        let place = tempfile::tempdir().unwrap();
        let ours = keys_values(&model, tokens);
        ours.write(place.path(), &ModelCard::default()).unwrap();
        assert_eq!(json_of(&place.path().join("adapter_config.json")), expected);
        let read = Adapter::read(place.path()).unwrap();
        assert_eq!((read.prompt.kind(), &read.config), (PromptKind::Prefix, &ours.config));
        assert_eq!(rows(read.prompt.values()), rows(ours.prompt.values()));
        read.check_fits(place.path(), "org/name", &model).unwrap();
    }
}

#[test]
fn a_configuration_of_another_kind_is_not_written() {
    let place = tempfile::tempdir().unwrap();
    let dir = place.path().join("adapter");
    let ours = keys_values(&model(), 0);
    let embeddings = AdapterConfig::new("m", &model(), 3, PromptTuningInit::Random, None);
    let embeddings = AdapterConfig { token_dim: 24, ..embeddings };
    let frozen = AdapterConfig::keys_values("m", &model(), 3, 4);
    for (config, what) in [
        (
            embeddings,
            "peft_type: expected a method whose prompt.kind is \"prefix\", as the prompt's, found PROMPT_TUNING",
        ),
        (frozen, "num_frozen_tokens: expected at most 3, which is num_virtual_tokens, found 4"),
        (
            AdapterConfig { num_layers: None, ..ours.config.clone() },
            "token_dim and num_layers: expected the shape",
        ),
    ] {
        let error =
            Adapter { config, ..ours.clone() }.write(&dir, &ModelCard::default()).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
        assert!(!dir.exists());
    }
}

#[test]
fn the_card_of_keys_and_values_says_so() {
    let card = |adapter: &Adapter| ModelCard::default().render(&adapter.config);
    let prefix = card(&keys_values(&model(), 0));
    assert!(prefix.contains("tags:\n- prefix-tuning\n- gneiss\n"), "{prefix}");
    assert!(prefix.contains(
        "A soft prompt: keys and values of virtual tokens that stand before every input in the attention"
    ));
    assert!(prefix.contains("PeftModel.from_pretrained(base, \"DIR\")"), "{prefix}");
    assert!(
        prefix.contains("base.generate(**inputs, past_key_values=prefix, do_sample=False)\n")
            && !prefix.contains("use_cache"),
        "{prefix}"
    );
    assert!(!prefix.contains("Frozen"), "{prefix}");
    let cartridge = card(&keys_values(&model(), 1));
    assert!(
        cartridge.contains("- cartridge\n") && cartridge.contains("| Frozen virtual tokens | 1 |"),
        "{cartridge}"
    );
    let hybrid = card(&keys_values(&hybrid(), 0));
    assert!(hybrid.contains("PEFT can't use these keys and values: the base has Mamba2 layers"), "{hybrid}");
    assert!(!hybrid.contains("PeftModel") && hybrid.contains("gneiss generate"), "{hybrid}");
}
