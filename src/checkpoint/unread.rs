//! Keys of `config.json` that would change the arithmetic but that transformers does not read for these model types.
//! The code that wrote them may follow them and give other answers.

use super::json::{JsonObject, describe};
use super::{ModelConfig, ModelType};
use crate::checkpoint::typed::TypedKeys;
use serde_json::Value;

/// Keys that mean another arithmetic unless their value is null, false, 0 or an empty list.
const FOREIGN: [&str; 21] = [
    "alibi", "attention_chunk_size", "attention_logit_cap", "attention_out_bias", "attn_logit_softcapping",
    "bias", "clip_qkv", "final_logit_softcapping", "lm_head_bias", "no_rope_layers", "parallel_attn",
    "qk_layernorm", "qk_norm", "qkv_bias", "query_pre_attn_scalar", "rope_interleaved", "scale_embeddings",
    "sliding_window", "use_bias", "use_parallel_residual", "use_qk_norm",
];

/// Granite's multipliers, which transformers' Llama does not have; 1 changes nothing.
const MULTIPLIERS: [&str; 4] =
    ["embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"];

/// A warning for each such key.
pub(super) fn warnings(json: &JsonObject, config: &ModelConfig) -> Vec<String> {
    let mut found: Vec<(&str, String)> = Vec::new();
    for key in FOREIGN {
        // Qwen's switch for the key.
        let off = key == "sliding_window" && json.get("use_sliding_window") == Some(&Value::Bool(false));
        if let Some(value) = json.get(key).filter(|value| !off && counts(value)) {
            found.push((key, describe(value)));
        }
    }
    if config.model_type == ModelType::Llama {
        let multipliers = MULTIPLIERS.iter().filter_map(|key| Some((*key, json.get(key)?)));
        let changing = multipliers.filter(|(_, value)| value.as_f64() != Some(1.0));
        found.extend(changing.map(|(key, value)| (key, describe(value))));
    }
    if config.model_type != ModelType::GraniteMoeHybrid {
        let of_kind = |layer: &&Value| {
            layer.as_str().is_some_and(|kind| !["full_attention", "attention"].contains(&kind))
        };
        let layers = json.get("layer_types").and_then(Value::as_array);
        if let Some(layer) = layers.and_then(|layers| layers.iter().find(of_kind)) {
            found.push(("layer_types", describe(layer)));
        }
    }
    let model_type = json.get("model_type").and_then(Value::as_str).unwrap_or_default();
    let warning = |(key, value): (&str, String)| {
        format!(
            "{}: `{key}` is {value} and is not read, as transformers does not read it for model type `{model_type}`",
            json.path().display()
        )
    };
    found.into_iter().map(warning).collect()
}

fn counts(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::Array(list) => !list.is_empty(),
        _ => true,
    }
}
