//! The model's configuration from GGUF metadata.

mod rope;

pub(super) use rope::RopeTensors;

use std::path::Path;

use candle_core::quantized::gguf_file::{Content, Value};

use super::metadata::GgufMetadata;
use crate::checkpoint::config::{ModelConfig, ModelType, unsupported};
use crate::checkpoint::typed::TypedKeys;
use crate::{Error, Result};

/// Metadata of one architecture: keys without the prefix `granite.` or `llama.`.
struct Keys<'a> {
    metadata: GgufMetadata<'a>,
    arch: &'a str,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.arch)
    }

    fn size(&self, name: &str) -> Result<usize> {
        self.metadata.required_size(&self.key(name))
    }

    fn count(&self, name: &str) -> Result<Option<usize>> {
        self.metadata.count(&self.key(name))
    }

    fn number(&self, name: &str) -> Result<Option<f64>> {
        self.metadata.number(&self.key(name))
    }

    /// A multiplier; in llama.cpp 0 means "none".
    fn multiplier(&self, name: &str, default: f64) -> Result<f64> {
        Ok(self.number(name)?.filter(|value| *value != 0.0).unwrap_or(default))
    }

    /// A number of heads: one for all layers, or a list of equal ones, which llama.cpp writes for dense
    /// granitemoehybrid.
    fn heads(&self, name: &str) -> Result<Option<usize>> {
        let key = self.key(name);
        if !matches!(self.metadata.get(&key), Some(Value::Array(_))) {
            return self.count(name);
        }
        let heads = self.metadata.counts(&key)?.unwrap_or_default();
        match heads.first() {
            Some(first) if heads.iter().all(|n| n == first) => Ok(Some(*first)),
            _ => Err(unsupported(self.metadata.path(), format!("`{key}` that differs between layers"))),
        }
    }
}

/// Reads the configuration; `factors` are the values of the tensors of the rotary scaling.
pub(super) fn read(path: &Path, content: &Content, factors: &RopeTensors) -> Result<ModelConfig> {
    let metadata = GgufMetadata::new(path, &content.metadata);
    let (arch, model_type) = architecture(metadata)?;
    let keys = Keys { metadata, arch };
    if let Some(experts @ 1..) = keys.count("expert_count")? {
        return Err(unsupported(path, format!("a mixture of {experts} experts")));
    }
    let hidden_size = keys.size("embedding_length")?;
    let heads_key = "attention.head_count";
    let num_attention_heads = match keys.heads(heads_key)? {
        Some(heads @ 1..) => heads,
        found => {
            let found = found.map_or("no such key", |_| "0");
            return Err(metadata.error(&keys.key(heads_key), "a whole number over 0", found));
        }
    };
    let kv_key = "attention.head_count_kv";
    let num_key_value_heads = match keys.heads(kv_key)? {
        Some(0) => return Err(metadata.error(&keys.key(kv_key), "a whole number over 0", "0")),
        found => found.unwrap_or(num_attention_heads),
    };
    let head_dim = head_dim(&keys, hidden_size, num_attention_heads)?;
    let attention_multiplier = keys.multiplier("attention.scale", (head_dim as f64).powf(-0.5))?;
    let granite = |name: &str| match model_type {
        ModelType::Granite => keys.multiplier(name, 1.0),
        _ => Ok(1.0),
    };
    let eps_key = "attention.layer_norm_rms_epsilon";
    let config = ModelConfig {
        model_type,
        vocab_size: vocab_size(path, content, hidden_size)?,
        hidden_size,
        intermediate_size: keys.size("feed_forward_length")?,
        num_hidden_layers: keys.size("block_count")?,
        num_attention_heads,
        num_key_value_heads,
        head_dim,
        max_position_embeddings: keys.size("context_length")?,
        rms_norm_eps: match keys.number(eps_key)? {
            Some(eps) => eps,
            None => return Err(metadata.missing(&keys.key(eps_key), "a number over 0")),
        },
        rope: rope::read(&keys, head_dim, factors)?,
        tie_word_embeddings: !content.tensor_infos.contains_key("output.weight"),
        attention_bias: has_biases(path, content, &["attn_q", "attn_k", "attn_v", "attn_output"])?,
        mlp_bias: has_biases(path, content, &["ffn_gate", "ffn_up", "ffn_down"])?,
        embedding_multiplier: granite("embedding_scale")?,
        residual_multiplier: granite("residual_scale")?,
        attention_multiplier,
        logits_scaling: granite("logit_scale")?,
        mamba: None,
        experts: None,
    };
    config.validate(path)?;
    Ok(config)
}

/// The architecture of a file that is not split.
fn architecture(metadata: GgufMetadata<'_>) -> Result<(&str, ModelType)> {
    let path = metadata.path();
    let key = "general.architecture";
    let Some(arch) = metadata.string(key)? else {
        return Err(metadata.missing(key, "`granite` or `llama`"));
    };
    let model_type = match arch {
        "granite" => ModelType::Granite,
        "llama" => ModelType::Llama,
        other => return Err(unsupported(path, format!("GGUF architecture `{other}`"))),
    };
    if let Some(parts @ 2..) = metadata.count("split.count")? {
        let what = format!("a GGUF file split into {parts} parts");
        let hint = "join them with llama.cpp's `llama-gguf-split --merge`".to_string();
        return Err(Error::Unsupported { path: path.to_path_buf(), what, hint });
    }
    Ok((arch, model_type))
}

fn head_dim(keys: &Keys<'_>, hidden_size: usize, heads: usize) -> Result<usize> {
    let head_dim = match keys.count("attention.key_length")? {
        Some(length) => length,
        None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => {
            let expected = format!("a multiple of the {heads} heads");
            let key = keys.key("embedding_length");
            return Err(keys.metadata.error(&key, &expected, &hidden_size.to_string()));
        }
    };
    for name in ["attention.value_length", "rope.dimension_count"] {
        match keys.count(name)? {
            Some(other) if other != head_dim => {
                let what = format!("`{}` {other} with heads of size {head_dim}", keys.key(name));
                return Err(unsupported(keys.metadata.path(), what));
            }
            _ => {}
        }
    }
    Ok(head_dim)
}

/// Rows of the embedding: the metadata may have no size, and the tokenizer may know fewer tokens.
fn vocab_size(path: &Path, content: &Content, hidden_size: usize) -> Result<usize> {
    let found = content.tensor_infos.get("token_embd.weight").map(|info| info.shape.dims());
    match found {
        Some(&[rows, columns]) if rows > 0 && columns == hidden_size => Ok(rows),
        found => {
            let found = found.map_or("no such tensor".to_string(), |shape| format!("{shape:?}"));
            let problem = format!(
                "tensor `token_embd.weight`: expected shape [vocabulary, {hidden_size}], found {found}"
            );
            Err(Error::Checkpoint { path: path.to_path_buf(), problem })
        }
    }
}

/// Whether the first layer's modules have biases: all of them, or none.
fn has_biases(path: &Path, content: &Content, modules: &[&str]) -> Result<bool> {
    let has = |module: &&&str| content.tensor_infos.contains_key(&format!("blk.0.{module}.bias"));
    match modules.iter().filter(has).count() {
        0 => Ok(false),
        n if n == modules.len() => Ok(true),
        n => Err(unsupported(path, format!("a bias on {n} of {modules:?}"))),
    }
}
