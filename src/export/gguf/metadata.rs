//! The key-value pairs of the file. The keys are those of llama.cpp's conversion (`gguf/constants.py`).

use super::vocabulary::VocabularyPairs;
use crate::checkpoint::gguf::{ROPE_FREQS, ROPE_LONG, ROPE_SHORT};
use crate::checkpoint::{MixerKind, ModelConfig, ModelType};
use crate::export::ValueType;
use crate::export::values::Matrices;
use crate::ops::rope::{Rope, RopeScaling, YarnScaling};
use crate::{Error, Result};
use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// Pairs by key, `general.architecture` first.
pub fn pairs(
    matrices: &Matrices<'_>,
    vocabulary: &VocabularyPairs,
    value_type: Option<ValueType>,
    dominant: GgmlDType,
) -> Vec<(String, Value)> {
    let base = matrices.base;
    let mut pairs: BTreeMap<String, Value> = match &base.metadata {
        Some(pairs) => pairs.iter().map(|(key, value)| (key.clone(), value.clone())).collect(),
        None => config_pairs(&base.config),
    };
    let arch = architecture(&base.config);
    pairs.insert(format!("{arch}.vocab_size"), count(matrices.vocab_size()));
    pairs.extend(vocabulary.pairs.iter().cloned());
    // The values of these tensors are aligned by the default.
    pairs.remove("general.alignment");
    if value_type.is_some() || base.metadata.is_none() {
        pairs.insert("general.file_type".into(), Value::U32(file_type(dominant)));
        pairs.insert("general.quantization_version".into(), Value::U32(2));
    }
    let first = "general.architecture".to_string();
    pairs.remove(&first);
    std::iter::once((first, text(arch))).chain(pairs).collect()
}

fn architecture(config: &ModelConfig) -> &'static str {
    match (config.model_type, &config.mamba, config.experts) {
        (ModelType::Llama, ..) => "llama",
        (_, Some(_), _) => "granitehybrid",
        (_, None, Some(_)) => "granitemoe",
        // llama.cpp's conversion also uses this name for dense granitemoehybrid.
        (_, None, None) => "granite",
    }
}

/// `llama_ftype`.
fn file_type(dtype: GgmlDType) -> u32 {
    match dtype {
        GgmlDType::F16 => 1,
        GgmlDType::Q8_0 => 7,
        GgmlDType::BF16 => 32,
        _ => 0,
    }
}

fn text(text: &str) -> Value {
    Value::String(text.to_string())
}

fn count(n: usize) -> Value {
    Value::U32(n as u32)
}

fn config_pairs(c: &ModelConfig) -> BTreeMap<String, Value> {
    let arch = architecture(c);
    let number = |value: f64| Value::F32(value as f32);
    let mut pairs = vec![
        ("block_count", count(c.num_hidden_layers)),
        // As llama.cpp's conversion: a model without positions has no end of them.
        (
            "context_length",
            count(if c.rope.is_none() && c.mamba.is_some() { 1 << 20 } else { c.max_position_embeddings }),
        ),
        ("embedding_length", count(c.hidden_size)),
        ("feed_forward_length", count(c.experts.map_or(c.intermediate_size, |experts| experts.size))),
        ("attention.head_count", count(c.num_attention_heads)),
        ("attention.head_count_kv", key_value_heads(c)),
        ("attention.key_length", count(c.head_dim)),
        ("attention.value_length", count(c.head_dim)),
        ("attention.layer_norm_rms_epsilon", number(c.rms_norm_eps)),
        ("rope.dimension_count", count(c.head_dim)),
    ];
    if let Some(experts) = c.experts {
        pairs.extend([
            ("expert_count", count(experts.count)),
            ("expert_used_count", count(experts.per_token)),
        ]);
    }
    if c.has_shared_mlp() && c.intermediate_size > 0 && (c.experts.is_some() || c.mamba.is_some()) {
        pairs.push(("expert_shared_feed_forward_length", count(c.intermediate_size)));
    }
    if let Some(mamba) = &c.mamba {
        pairs.extend([
            ("ssm.conv_kernel", count(mamba.taps)),
            ("ssm.state_size", count(mamba.state)),
            ("ssm.group_count", count(mamba.groups)),
            ("ssm.inner_size", count(mamba.inner())),
            // The number of heads, whatever the key is called.
            ("ssm.time_step_rank", count(mamba.heads)),
        ]);
    }
    match &c.rope {
        Some(rope) => pairs.extend(rope_pairs(rope)),
        // llama.cpp keeps Granite's switch between rotary and no position embedding in this key.
        None => pairs.push(("rope.scaling.finetuned", Value::Bool(false))),
    }
    if c.model_type != ModelType::Llama {
        pairs.extend([
            ("embedding_scale", number(c.embedding_multiplier)),
            ("residual_scale", number(c.residual_multiplier)),
            ("attention.scale", number(c.attention_multiplier)),
            ("logit_scale", number(c.logits_scaling)),
        ]);
        if c.rope.is_some() {
            pairs.push(("rope.scaling.finetuned", Value::Bool(true)));
        }
    }
    pairs.into_iter().map(|(key, value)| (format!("{arch}.{key}"), value)).collect()
}

/// One number, or one a layer if there are Mamba2 layers, which have none.
fn key_value_heads(c: &ModelConfig) -> Value {
    if c.mamba.is_none() {
        return count(c.num_key_value_heads);
    }
    let heads = |layer| match c.mixer(layer) {
        MixerKind::Attention => Value::I32(c.num_key_value_heads as i32),
        MixerKind::Mamba2 => Value::I32(0),
    };
    Value::Array((0..c.num_hidden_layers).map(heads).collect())
}

fn rope_pairs(rope: &Rope) -> Vec<(&'static str, Value)> {
    let number = |value: f64| Value::F32(value as f32);
    let mut pairs = vec![("rope.freq_base", number(rope.theta))];
    match &rope.scaling {
        // `dynamic` changes nothing up to the context length.
        RopeScaling::Default | RopeScaling::Dynamic { .. } | RopeScaling::Llama3(_) => {}
        RopeScaling::Linear { factor } => {
            pairs.extend([("rope.scaling.type", text("linear")), ("rope.scaling.factor", number(*factor))]);
        }
        RopeScaling::Yarn(scaling) => {
            pairs.extend([
                ("rope.scaling.type", text("yarn")),
                ("rope.scaling.factor", number(scaling.factor)),
                ("rope.scaling.original_context_length", count(scaling.original_max_position_embeddings)),
                ("rope.scaling.yarn_beta_fast", number(scaling.beta_fast)),
                ("rope.scaling.yarn_beta_slow", number(scaling.beta_slow)),
            ]);
            // llama.cpp multiplies by yarn's own factor in any case.
            let own = YarnScaling::default_attention_factor(scaling.factor);
            if scaling.attention_factor != own {
                pairs.push(("rope.scaling.attn_factor", number(scaling.attention_factor / own)));
            }
        }
        RopeScaling::LongRope(scaling) => pairs.extend([
            ("rope.scaling.type", text("longrope")),
            ("rope.scaling.original_context_length", count(scaling.original_max_position_embeddings)),
            ("rope.scaling.attn_factor", number(scaling.attention_factor)),
        ]),
    }
    pairs
}

/// Tensors of divisors of the rotary frequencies, [D / 2], by their names.
///
/// # Errors
/// Returns an error if llama.cpp does not have the scaling.
pub fn rope_factors(config: &ModelConfig, path: &Path) -> Result<Vec<(&'static str, Vec<f32>)>> {
    let Some(rope) = &config.rope else { return Ok(Vec::new()) };
    let divisors =
        |long| rope.divisors(config.head_dim, long).into_iter().map(|divisor| divisor as f32).collect();
    Ok(match &rope.scaling {
        RopeScaling::Llama3(_) => vec![(ROPE_FREQS, divisors(false))],
        RopeScaling::LongRope(_) => vec![(ROPE_SHORT, divisors(false)), (ROPE_LONG, divisors(true))],
        RopeScaling::Yarn(scaling) if !scaling.truncate => {
            let what = "GGUF of rotary scaling `yarn` with `truncate` false".to_string();
            let hint = "llama.cpp always truncates; bake it with --format safetensors".to_string();
            return Err(Error::Unsupported { path: path.to_path_buf(), what, hint });
        }
        _ => Vec::new(),
    })
}
