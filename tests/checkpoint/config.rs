//! `ModelConfig::from_json` against transformers, and what it refuses.

use gneiss::checkpoint::{ExpertsConfig, MixerKind, ModelConfig, ModelType};
use gneiss::ops::rope::RopeScaling;
use serde_json::{Value, json};

use super::{assert_says, fixture_json};

fn parse(config: &Value) -> gneiss::Result<ModelConfig> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    std::fs::write(&path, config.to_string()).unwrap();
    ModelConfig::from_json(&path)
}

/// A small configuration that parses, with some keys changed; `null` takes a key away.
fn changed(model_type: &str, changes: &Value) -> Value {
    let mut config = json!({
        "model_type": model_type, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 2, "num_local_experts": 0, "layer_types": ["attention", "attention"],
        "position_embedding_type": "rope",
    });
    let map = config.as_object_mut().unwrap();
    for (key, value) in changes.as_object().unwrap() {
        map.insert(key.clone(), value.clone());
    }
    config
}

#[test]
fn reads_what_transformers_reads() {
    let fixture = fixture_json("configs.json");
    let cases = fixture["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 14);
    for case in cases {
        let (name, expected) = (case["name"].as_str().unwrap(), &case["expected"]);
        let config = parse(&case["config"]).unwrap_or_else(|error| panic!("{name}: {error}"));
        let size = |key: &str| expected[key].as_u64().unwrap() as usize;
        let number = |key: &str| expected[key].as_f64().unwrap();
        let model_type = match case["config"]["model_type"].as_str().unwrap() {
            "granite" => ModelType::Granite,
            "llama" => ModelType::Llama,
            _ => ModelType::GraniteMoeHybrid,
        };
        assert_eq!(config.model_type, model_type, "{name}");
        for (key, found) in [
            ("vocab_size", config.vocab_size),
            ("hidden_size", config.hidden_size),
            ("intermediate_size", config.intermediate_size),
            ("num_hidden_layers", config.num_hidden_layers),
            ("num_attention_heads", config.num_attention_heads),
            ("num_key_value_heads", config.num_key_value_heads),
            ("head_dim", config.head_dim),
            ("max_position_embeddings", config.max_position_embeddings),
        ] {
            assert_eq!(found, size(key), "{name}: {key}");
        }
        for (key, found) in [
            ("rms_norm_eps", config.rms_norm_eps),
            ("embedding_multiplier", config.embedding_multiplier),
            ("residual_multiplier", config.residual_multiplier),
            ("attention_multiplier", config.attention_multiplier),
            ("logits_scaling", config.logits_scaling),
        ] {
            assert_eq!(found, number(key), "{name}: {key}");
        }
        for (key, found) in [
            ("tie_word_embeddings", config.tie_word_embeddings),
            ("attention_bias", config.attention_bias),
            ("mlp_bias", config.mlp_bias),
        ] {
            assert_eq!(found, expected[key].as_bool().unwrap(), "{name}: {key}");
        }
        assert_rope(name, &config, &expected["rope_parameters"]);
    }
}

#[test]
fn reads_layers_of_mamba_and_experts() {
    let spellings = [
        json!({"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": "auto"}),
        json!({"layer_types": ["linear_attention", "full_attention"], "mamba_n_heads": 8, "mamba_d_head": 16}),
        json!({"layer_types": null, "layers_block_type": ["mamba", "attention"], "mamba_n_heads": 8}),
    ];
    for changes in spellings {
        let config = parse(&changed("granitemoehybrid", &changes)).unwrap();
        assert_eq!(
            [0, 1].map(|layer| config.mixer(layer)),
            [MixerKind::Mamba2, MixerKind::Attention],
            "{changes}"
        );
        let mamba = config.mamba.unwrap();
        assert_eq!((mamba.heads, mamba.head_dim, mamba.state, mamba.groups), (8, 16, 256, 1));
        assert_eq!((mamba.inner(), mamba.channels(), mamba.taps, mamba.conv_bias), (128, 640, 4, true));
        assert_eq!((mamba.dt_limit, config.experts), ((0.0, f64::INFINITY), None));
    }
    // As transformers 5 writes an infinite bound, and as Python's json does.
    for limit in [r#"[0.0, {"__float__": "Infinity"}]"#, "[0.0, Infinity]"] {
        let changes = json!({"layer_types": null, "mamba_n_heads": 8, "time_step_limit": "LIMIT"});
        let text = changed("granitemoehybrid", &changes).to_string().replace("\"LIMIT\"", limit);
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), text).unwrap();
        let config = ModelConfig::from_json(&dir.path().join("config.json")).unwrap();
        assert_eq!(config.mamba.unwrap().dt_limit, (0.0, f64::INFINITY));
        assert!(config.rope.is_some(), "`position_embedding_type` is rope");
    }
    let experts = json!({"num_local_experts": 32, "num_experts_per_tok": 8, "intermediate_size": 48});
    for (model_type, dense) in [("granitemoe", 0), ("granitemoeshared", 0), ("granitemoehybrid", 1024)] {
        let config = parse(&changed(model_type, &experts)).unwrap();
        assert_eq!(config.experts, Some(ExpertsConfig { count: 32, per_token: 8, size: 48 }), "{model_type}");
        assert_eq!((config.intermediate_size, config.mamba), (dense, None), "{model_type}");
    }
    // transformers' defaults.
    let config = parse(&changed("granitemoehybrid", &json!({"num_local_experts": null}))).unwrap();
    assert_eq!(config.experts, Some(ExpertsConfig { count: 8, per_token: 2, size: 11008 }));
}

fn assert_rope(name: &str, config: &ModelConfig, expected: &Value) {
    let Some(rope) = &config.rope else {
        assert!(expected.is_null(), "{name}: expected {expected}, found no rope");
        return;
    };
    assert_eq!(Some(rope.theta), expected["rope_theta"].as_f64(), "{name}");
    let RopeScaling::Llama3(llama3) = &rope.scaling else {
        assert_eq!(
            (&rope.scaling, &expected["rope_type"]),
            (&RopeScaling::Default, &json!("default")),
            "{name}"
        );
        return;
    };
    assert_eq!(expected["rope_type"], "llama3", "{name}");
    assert_eq!(Some(llama3.factor), expected["factor"].as_f64(), "{name}");
    assert_eq!(Some(llama3.low_freq_factor), expected["low_freq_factor"].as_f64(), "{name}");
    assert_eq!(Some(llama3.high_freq_factor), expected["high_freq_factor"].as_f64(), "{name}");
    let original = expected["original_max_position_embeddings"].as_u64().unwrap() as usize;
    assert_eq!(llama3.original_max_position_embeddings, original, "{name}");
}

#[test]
fn names_what_is_not_supported() {
    let cases = [
        ("mistral", json!({}), "model type `mistral`"),
        (
            "granitemoehybrid",
            json!({"layer_types": ["mamba", "attention"], "mamba_proj_bias": true}),
            "Mamba layers whose projections have biases (`mamba_proj_bias`)",
        ),
        ("granite", json!({"rope_scaling": {"type": "su", "factor": 4.0}}), "rotary scaling `su`"),
        ("llama", json!({"rope_parameters": {"rope_type": "mrope"}}), "rotary scaling `mrope`"),
        ("llama", json!({"partial_rotary_factor": 0.5}), "a partial rotary embedding (0.5)"),
        ("llama", json!({"rope_parameters": {"full_attention": {}}}), "by layer type (`full_attention`)"),
        ("granite", json!({"hidden_act": "gelu"}), "activation `gelu`"),
        ("granite", json!({"quantization_config": {"quant_method": "fp8"}}), "`quantization_config`"),
    ];
    for (model_type, changes, what) in cases {
        let error = parse(&changed(model_type, &changes)).expect_err(what);
        assert!(matches!(error, gneiss::Error::Unsupported { .. }), "{error}");
        assert_says::<()>(
            Err(error),
            &["config.json", what, "is not supported; gneiss tunes Granite 3.x and 4.x"],
        );
    }
}

#[test]
fn names_key_expected_and_found() {
    let llama3 = |key: &str, value: Value| {
        let mut scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                 "high_freq_factor": 4.0});
        scaling[key] = value;
        json!({"rope_scaling": scaling})
    };
    let cases = [
        (
            "granite",
            json!({"model_type": null}),
            "`model_type`: expected `granite`, `llama`, `granitemoe`, `granitemoeshared` or `granitemoehybrid`, found no such key",
        ),
        ("granite", json!({"model_type": 3}), "`model_type`: expected a string, found 3"),
        (
            "granite",
            json!({"hidden_size": "64"}),
            "`hidden_size`: expected a whole number over 0, found \"64\"",
        ),
        (
            "granite",
            json!({"hidden_size": 64.5}),
            "`hidden_size`: expected a whole number over 0, found 64.5",
        ),
        ("granite", json!({"vocab_size": 0}), "`vocab_size`: expected a whole number over 0, found 0"),
        (
            "granite",
            json!({"num_hidden_layers": -1}),
            "`num_hidden_layers`: expected a whole number over 0, found -1",
        ),
        (
            "granite",
            json!({"num_key_value_heads": 3}),
            "`num_attention_heads`: expected a multiple of `num_key_value_heads` (3), found 4",
        ),
        ("llama", json!({"head_dim": 15}), "`head_dim`: expected an even head size, found 15"),
        (
            "llama",
            json!({"hidden_size": 66}),
            "`hidden_size`: expected a multiple of `num_attention_heads` (4), found 66",
        ),
        ("granite", json!({"rms_norm_eps": [1e-5]}), "`rms_norm_eps`: expected a number, found a list of 1"),
        ("granite", json!({"rms_norm_eps": 0}), "`rms_norm_eps`: expected a finite number over 0, found 0"),
        (
            "granite",
            json!({"logits_scaling": 0.0}),
            "`logits_scaling`: expected a finite number over 0, found 0",
        ),
        (
            "granite",
            json!({"attention_bias": "no"}),
            "`attention_bias`: expected true or false, found \"no\"",
        ),
        ("granite", json!({"rope_scaling": 2}), "`rope_scaling`: expected an object, found 2"),
        ("granite", json!({"rope_theta": -1.0}), "`rope_theta`: expected a finite number over 0, found -1"),
        (
            "llama",
            llama3("factor", Value::Null),
            "`rope_scaling.factor`: expected a number, for `rope_type` `llama3`, found no such key",
        ),
        (
            "llama",
            llama3("factor", json!(0)),
            "`rope_scaling.factor`: expected a finite number over 0, found 0",
        ),
        (
            "llama",
            llama3("high_freq_factor", json!(1.0)),
            "`rope_scaling.high_freq_factor`: expected more than `low_freq_factor` (1), found 1",
        ),
        (
            "granitemoehybrid",
            json!({"layer_types": ["attention"]}),
            "`layer_types`: expected `num_hidden_layers` (2) entries, found 1",
        ),
        (
            "granitemoehybrid",
            json!({"layer_types": ["attention", "hyena"]}),
            "`layer_types`: expected `attention` or `mamba` entries, found \"hyena\"",
        ),
        (
            "granitemoehybrid",
            json!({"layer_types": null, "mamba_n_heads": 24}),
            "`mamba_n_heads`: expected a number that divides `mamba_expand` times `hidden_size` (128), found 24",
        ),
        (
            "granitemoehybrid",
            json!({"layer_types": null, "mamba_n_heads": 8, "mamba_d_head": 32}),
            "`mamba_d_head`: expected `mamba_expand` times `hidden_size` (128) over `mamba_n_heads` (8), found 32",
        ),
        (
            "granitemoehybrid",
            json!({"layer_types": null, "mamba_n_heads": 8, "mamba_n_groups": 3}),
            "`mamba_n_heads`: expected a multiple of `mamba_n_groups` (3), found 8",
        ),
        (
            "granitemoehybrid",
            json!({"layer_types": null, "mamba_n_heads": 8, "time_step_limit": [0.5, 0.1]}),
            "`time_step_limit`: expected a lower bound of 0 or more and an upper bound over it, found 0.5 and 0.1",
        ),
        (
            "granitemoehybrid",
            json!({"layer_types": null, "mamba_n_heads": 8, "time_step_limit": [0.5]}),
            "`time_step_limit`: expected two numbers, found a list of 1",
        ),
        (
            "granitemoe",
            json!({"num_local_experts": 4, "num_experts_per_tok": 5}),
            "`num_experts_per_tok`: expected at most `num_local_experts` (4), found 5",
        ),
        ("granitemoe", json!({}), "`num_local_experts`: expected a whole number over 0, found 0"),
        (
            "granitemoehybrid",
            json!({"position_embedding_type": "alibi"}),
            "`position_embedding_type`: expected `rope` or `nope`, found `alibi`",
        ),
    ];
    for (model_type, changes, says) in cases {
        let error = parse(&changed(model_type, &changes)).expect_err(says);
        assert!(matches!(error, gneiss::Error::Checkpoint { .. }), "{error}");
        assert_says::<()>(Err(error), &["config.json: ", says]);
    }
}

#[test]
fn names_the_file_that_is_no_json() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    assert_says(ModelConfig::from_json(&path), &["config.json", "No such file"]);
    std::fs::write(&path, "{\"hidden_size\": ").unwrap();
    assert_says(ModelConfig::from_json(&path), &["config.json: expected JSON", "line 1"]);
    std::fs::write(&path, "[1]").unwrap();
    assert_says(ModelConfig::from_json(&path), &["expected a JSON object, found a list of 1"]);
}
