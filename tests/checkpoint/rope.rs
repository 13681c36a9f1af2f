//! Rotary frequencies of configurations and GGUF files against transformers and llama.cpp, by
//! `tests/fixtures/make_rope.py`.

use candle_core::quantized::gguf_file;
use gneiss::checkpoint::ModelConfig;
use gneiss::ops::rope::{Rope, RopeScaling};
use serde_json::{Value, json};

use super::gguf::{Altered, text};
use super::{assert_says, fixture_json};

fn parse(config: &Value) -> gneiss::Result<ModelConfig> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    std::fs::write(&path, config.to_string()).unwrap();
    ModelConfig::from_json(&path)
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

/// Both sides are f32 in between.
#[track_caller]
fn assert_like(name: &str, rope: &Rope, head_dim: usize, expected: &Value) {
    for (key, long) in [("frequencies", false), ("long", true)] {
        let (found, expected) = (rope.frequencies(head_dim, long), numbers(&expected[key]));
        assert_eq!(found.len(), expected.len(), "{name}");
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() <= 1e-6 * expected, "{name}, {key}: {found} against {expected}");
        }
    }
    let factor = expected["attention_factor"].as_f64().unwrap();
    assert!((rope.attention_factor() - factor).abs() < 1e-6, "{name}: {}", rope.attention_factor());
    assert_eq!(rope.long_above(), expected["long_above"].as_u64().map(|n| n as usize), "{name}");
}

#[test]
fn configurations_have_the_frequencies_of_transformers() {
    let fixture = fixture_json("rope.json");
    let cases = fixture["configs"].as_array().unwrap();
    assert_eq!(cases.len(), 32);
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let config = parse(&case["config"]).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(config.head_dim as u64, case["head_dim"].as_u64().unwrap(), "{name}");
        assert_like(name, &config.rope.unwrap(), config.head_dim, case);
    }
}

#[test]
fn gguf_files_have_the_frequencies_of_llama_cpp() {
    let fixture = fixture_json("rope.json");
    let cases = fixture["gguf"].as_array().unwrap();
    assert_eq!(cases.len(), 8);
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let mut copy = Altered::of("granite.gguf");
        for (key, value) in case["keys"].as_object().unwrap() {
            let value = match value {
                Value::String(kind) => text(kind),
                count if key == "original_context_length" => {
                    gguf_file::Value::U32(count.as_u64().unwrap() as u32)
                }
                number => gguf_file::Value::F32(number.as_f64().unwrap() as f32),
            };
            copy = copy.set(&format!("granite.rope.scaling.{key}"), value);
        }
        for (kind, factors) in case["factors"].as_object().unwrap() {
            let factors: Vec<f32> = numbers(factors).into_iter().map(|f| f as f32).collect();
            copy = copy.tensor(&format!("rope_factors_{kind}.weight"), &factors);
        }
        let config = copy.open().unwrap_or_else(|error| panic!("{name}: {error}")).config().clone();
        assert_like(name, &config.rope.unwrap(), config.head_dim, case);
    }
}

/// Up to its limit `dynamic` changes nothing; beyond it the frequencies are of the length, and gneiss does not go there.
#[test]
fn dynamic_scaling_has_a_limit() {
    let config = parse(&json!({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4,
        "max_position_embeddings": 128, "rope_scaling": {"type": "dynamic", "factor": 2.0}}));
    let rope = config.unwrap().rope.unwrap();
    assert_eq!((rope.most_positions(), rope.long_above()), (Some(128), None));
    assert_eq!(rope.frequencies(16, true), Rope::new(1e4).frequencies(16, false));
    assert_eq!(Rope::new(1e4).most_positions(), None);
}

#[test]
fn malformed_scalings_are_named() {
    let scaled = |scaling: Value| {
        parse(
            &json!({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "rope_scaling": scaling}),
        )
    };
    let eight = [1.0; 8];
    for (scaling, says) in [
        (json!({"type": "linear"}), "`rope_scaling.factor`: expected a number, for `rope_type` `linear`"),
        (json!({"type": "dynamic", "factor": null}), "`rope_scaling.factor`: expected a number"),
        (json!({"type": "dynamic", "factor": -2}), "`rope_scaling.factor`: expected a finite number over 0"),
        (json!({"type": "yarn"}), "`rope_scaling.factor`: expected a number, for `rope_type` `yarn`"),
        (json!({"type": "yarn", "factor": "4"}), "`rope_scaling.factor`: expected a number, found \"4\""),
        (json!({"type": "yarn", "factor": 4, "attention_factor": 0}), "`rope_scaling.attention_factor`"),
        (json!({"type": "yarn", "factor": 4, "beta_fast": -1}), "`rope_scaling.beta_fast`"),
        (
            json!({"type": "yarn", "factor": 4, "truncate": "no"}),
            "`rope_scaling.truncate`: expected true or false",
        ),
        (
            json!({"type": "longrope", "long_factor": eight}),
            "`rope_scaling.short_factor`: expected a list of 8 numbers",
        ),
        (
            json!({"type": "longrope", "short_factor": eight, "long_factor": [1.0, 2.0]}),
            "`rope_scaling.long_factor`: expected a list of 8 numbers over 0, one for each rotary frequency, found a \
             list of 2",
        ),
        (
            json!({"type": "longrope", "short_factor": eight, "long_factor": [1, 1, 1, 1, 1, 1, 1, 0]}),
            "`rope_scaling.long_factor`: expected a list of 8 numbers over 0",
        ),
        (json!({"rope_type": 3}), "`rope_scaling.rope_type`: expected a string, found 3"),
    ] {
        assert_says(scaled(scaling), &["config.json: ", says]);
    }
    for kind in ["su", "mrope", "proportional", "Linear", "none"] {
        assert_says(scaled(json!({"type": kind, "factor": 2})), &[&format!("rotary scaling `{kind}`")]);
    }
}

#[test]
fn gguf_scalings_that_are_not_known_are_named() {
    let set = |pairs: &[(&str, gguf_file::Value)]| {
        pairs.iter().fold(Altered::of("granite.gguf"), |copy, (key, value)| {
            copy.set(&format!("granite.rope.scaling.{key}"), value.clone())
        })
    };
    let number = gguf_file::Value::F32;
    for (copy, says) in [
        (set(&[("type", text("su"))]), "rotary scaling `su`"),
        (
            set(&[("attn_factor", number(0.5))]),
            "`granite.rope.scaling.attn_factor` 0.5 with rotary scaling `linear`",
        ),
        (set(&[("type", text("yarn")), ("yarn_ext_factor", number(0.5))]), "yarn_ext_factor` 0.5"),
        (set(&[("type", text("yarn")), ("yarn_log_multiplier", number(0.1))]), "yarn_log_multiplier"),
        (
            set(&[("type", text("longrope")), ("factor", number(4.0))]),
            "`longrope` (factor 4 in addition to its lists)",
        ),
        (
            set(&[]).tensor("rope_factors_long.weight", &[1.0; 4]),
            "`rope_factors_long.weight` with rotary scaling",
        ),
        (
            set(&[("type", text("longrope"))]).tensor("rope_factors_long.weight", &[1.0; 4]),
            "`rope_factors_short.weight`: expected 4 numbers over 0, for longrope, found no such tensor",
        ),
    ] {
        assert_says(copy.open(), &["copy.gguf", says]);
    }
    let freqs: Vec<f32> =
        Rope { theta: 1e7, scaling: llama3() }.divisors(8, false).iter().map(|d| *d as f32).collect();
    assert!(Altered::of("granite.gguf").tensor("rope_freqs.weight", &freqs).open().is_ok());
    let both = set(&[("factor", number(2.0))]).tensor("rope_freqs.weight", &freqs);
    assert_says(both.open(), &["`rope_freqs.weight` with rotary scaling `linear`"]);
}

fn llama3() -> RopeScaling {
    RopeScaling::Llama3(gneiss::ops::rope::Llama3Scaling {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    })
}
