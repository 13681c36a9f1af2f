//! The model's configuration from GGUF metadata.

mod layers;
mod rope;

pub(super) use rope::RopeTensors;

use std::path::Path;

use candle_core::quantized::gguf_file::Content;

use self::layers::HeadCounts;
use super::metadata::GgufMetadata;
use crate::checkpoint::config::{ModelConfig, ModelType, unsupported};
use crate::checkpoint::typed::TypedKeys;
use crate::{Error, Result};

/// Metadata of one architecture: keys without its prefix, such as `granite.`.
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
}

/// Reads the configuration; `factors` are the values of the tensors of the rotary scaling.
pub(super) fn read(path: &Path, content: &Content, factors: &RopeTensors) -> Result<ModelConfig> {
    let metadata = GgufMetadata::new(path, &content.metadata);
    let (arch, model_type) = architecture(metadata)?;
    let keys = Keys { metadata, arch };
    let (experts, intermediate_size) = layers::feed_forward(&keys, model_type)?;
    let hidden_size = keys.size("embedding_length")?;
    let (num_attention_heads, kv_heads) = heads(&keys)?;
    let num_key_value_heads = kv_heads.count.unwrap_or(num_attention_heads);
    let mamba = layers::mamba(&keys, content, kv_heads)?;
    let with_attention =
        mamba.as_ref().and_then(|mamba| mamba.attention_layers.first().copied()).unwrap_or(0);
    let head_dim = head_dim(&keys, hidden_size, num_attention_heads)?;
    let attention_multiplier = keys.multiplier("attention.scale", (head_dim as f64).powf(-0.5))?;
    let granite = |name: &str| match model_type {
        ModelType::Llama => Ok(1.0),
        _ => keys.multiplier(name, 1.0),
    };
    let eps_key = "attention.layer_norm_rms_epsilon";
    let config = ModelConfig {
        model_type: match (model_type, experts) {
            (ModelType::GraniteMoe, None) => ModelType::Granite,
            (ModelType::GraniteMoe, Some(_)) if intermediate_size > 0 => ModelType::GraniteMoeShared,
            (other, _) => other,
        },
        vocab_size: vocab_size(path, content, hidden_size)?,
        hidden_size,
        intermediate_size,
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
        attention_bias: has_biases(
            path,
            content,
            with_attention,
            &["attn_q", "attn_k", "attn_v", "attn_output"],
        )?,
        mlp_bias: has_biases(path, content, 0, &["ffn_gate", "ffn_up", "ffn_down"])?,
        embedding_multiplier: granite("embedding_scale")?,
        residual_multiplier: granite("residual_scale")?,
        attention_multiplier,
        logits_scaling: granite("logit_scale")?,
        mamba,
        experts,
    };
    config.validate(path)?;
    Ok(config)
}

/// The architecture of a file that is not split.
fn architecture(metadata: GgufMetadata<'_>) -> Result<(&str, ModelType)> {
    let path = metadata.path();
    let key = "general.architecture";
    let Some(arch) = metadata.string(key)? else {
        return Err(metadata.missing(key, "`granite`, `granitemoe`, `granitehybrid` or `llama`"));
    };
    let model_type = match arch {
        "granite" => ModelType::Granite,
        "granitemoe" => ModelType::GraniteMoe,
        "granitehybrid" => ModelType::GraniteMoeHybrid,
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

/// HeadCounts of the queries, and of the keys and values.
fn heads(keys: &Keys<'_>) -> Result<(usize, HeadCounts)> {
    let not_over_0 =
        |name: &str, found: &str| keys.metadata.error(&keys.key(name), "a whole number over 0", found);
    let (name, kv_name) = ("attention.head_count", "attention.head_count_kv");
    let heads = match HeadCounts::read(keys, name)?.count {
        Some(heads @ 1..) => heads,
        Some(_) => return Err(not_over_0(name, "0")),
        None => return Err(not_over_0(name, "no such key")),
    };
    match HeadCounts::read(keys, kv_name)? {
        HeadCounts { count: Some(0), .. } => Err(not_over_0(kv_name, "0")),
        kv_heads => Ok((heads, kv_heads)),
    }
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

/// Whether the modules of layer `layer` have biases: all of them, or none.
fn has_biases(path: &Path, content: &Content, layer: usize, modules: &[&str]) -> Result<bool> {
    let has = |module: &&&str| content.tensor_infos.contains_key(&format!("blk.{layer}.{module}.bias"));
    match modules.iter().filter(has).count() {
        0 => Ok(false),
        n if n == modules.len() => Ok(true),
        n => Err(unsupported(path, format!("a bias on {n} of {modules:?}"))),
    }
}
