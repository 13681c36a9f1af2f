//! A baked checkpoint as a folder: weights, configuration, tokenizer.

use super::base::{Base, EMBEDDING, HEAD};
use super::safetensors::{self, SafetensorsEntry};
use super::staging::StagedOutput;
use super::values::{self, Matrices};
use super::{ProgressCallback, ValueType, tokenizer};
use crate::checkpoint::stored::StoredDtype;
use crate::checkpoint::{ModelConfig, ModelType};
use crate::layout::model_folder::{CONFIG, GENERATION_CONFIG, WEIGHTS, WEIGHTS_INDEX};
use crate::{Error, Result};
use ::safetensors::Dtype;
use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device};
use serde_json::{Map, Value, json};
use std::io::Write;

/// Files that are copied if the base has them: licences, and tokenizers in older forms.
const COPIED: [&str; 7] =
    ["LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "vocab.json", "merges.txt", "tokenizer.model"];

/// Writes all files except `prompts.json`. Returns the type of the embedding.
pub(super) fn write(
    staging: &StagedOutput,
    matrices: &Matrices<'_>,
    value_type: Option<ValueType>,
    progress: ProgressCallback<'_>,
) -> Result<GgmlDType> {
    let (base, placed) = (matrices.base, matrices.placed);
    let weights = WeightsWriter { staging, matrices, target: target(base, value_type) };
    weights.write(progress)?;
    staging.write_json(CONFIG, &config(base, matrices.vocab_size(), value_type)?)?;
    let suppressed: Vec<u32> = placed.ids().collect();
    staging.write_json(GENERATION_CONFIG, &generation(base, &suppressed)?)?;
    tokenizer::write(staging, base, placed)?;
    if base.metadata.is_none() {
        for name in COPIED {
            let from = base.path.join(name);
            if from.is_file() {
                std::fs::copy(&from, staging.path(name)).map_err(Error::io(&from))?;
            }
        }
    }
    weights.dtype(EMBEDDING)
}

/// The type in which all tensors are written; `None` if each keeps its own.
fn target(base: &Base, value_type: Option<ValueType>) -> Option<GgmlDType> {
    match value_type {
        Some(value_type) => Some(value_type.ggml()),
        // A GGUF file has f32 vectors and matrices of any type; transformers has one type for all.
        None => base.metadata.is_some().then_some(GgmlDType::F32),
    }
}

struct WeightsWriter<'a> {
    staging: &'a StagedOutput,
    matrices: &'a Matrices<'a>,
    target: Option<GgmlDType>,
}

impl WeightsWriter<'_> {
    fn write(&self, progress: ProgressCallback<'_>) -> Result<()> {
        let base = self.matrices.base;
        let files = base.weights.files();
        let total = base.weights.names().len();
        let (mut written, mut map, mut bytes) = (0, Map::new(), 0);
        for (path, names) in &files {
            let name = match (&base.metadata, path.file_name()) {
                (None, Some(name)) => name.to_string_lossy().into_owned(),
                _ => WEIGHTS.to_string(),
            };
            let mut entries = self.entries(names)?;
            safetensors::order(&mut entries);
            bytes += entries.iter().map(SafetensorsEntry::bytes).sum::<usize>();
            map.extend(entries.iter().map(|entry| (entry.name.clone(), json!(name))));
            let path = self.staging.path(&name);
            self.staging.write(&path, |out| {
                safetensors::write(&path, &entries, out, |entry, out| {
                    written += 1;
                    progress("writing", written.min(total), total);
                    self.values(entry, out)
                })
            })?;
        }
        if files.len() > 1 || !map.values().all(|file| file == WEIGHTS) {
            let index = json!({"metadata": {"total_size": bytes}, "weight_map": map});
            self.staging.write_json(WEIGHTS_INDEX, &index)?;
        }
        Ok(())
    }

    /// The tensors of a file of the base. If the head was tied to the embedding, it is written to the embedding's file.
    fn entries(&self, names: &[&str]) -> Result<Vec<SafetensorsEntry>> {
        let (base, tied) = (self.matrices.base, self.matrices.base.config.tie_word_embeddings);
        let mut entries = Vec::new();
        for name in names.iter().copied().filter(|name| !(tied && *name == HEAD)) {
            let stored = base.weights.stored(name)?;
            let dtype = match (self.target, stored.dtype) {
                (None, _) if [EMBEDDING, HEAD].contains(&name) => safetensors_dtype(base.dtype_of(name)?),
                (Some(target), dtype) if values::ggml(dtype).is_some() => safetensors_dtype(target),
                (_, StoredDtype::Safetensors(dtype)) => dtype,
                (_, StoredDtype::Gguf(dtype)) => safetensors_dtype(dtype),
            };
            let shape =
                if [EMBEDDING, HEAD].contains(&name) { self.matrices.shape().to_vec() } else { stored.shape };
            if tied && name == EMBEDDING {
                entries.push(SafetensorsEntry { name: HEAD.into(), dtype, shape: shape.clone() });
            }
            entries.push(SafetensorsEntry { name: name.into(), dtype, shape });
        }
        Ok(entries)
    }

    fn dtype(&self, name: &str) -> Result<GgmlDType> {
        self.target.map_or_else(|| self.matrices.base.dtype_of(name), Ok)
    }

    fn values(&self, entry: &SafetensorsEntry, out: &mut dyn Write) -> Result<()> {
        let base = self.matrices.base;
        let name = entry.name.as_str();
        let io = |result: std::io::Result<()>| result.map_err(Error::io(self.staging.path(WEIGHTS)));
        if [EMBEDDING, HEAD].contains(&name) {
            let pieces = match name {
                EMBEDDING => self.matrices.embedding(self.dtype(EMBEDDING)?)?,
                _ => self.matrices.head(self.dtype(base.head())?)?,
            };
            return pieces.iter().try_for_each(|piece| io(out.write_all(piece)));
        }
        let stored = base.weights.stored(name)?;
        match (self.target, values::ggml(stored.dtype)) {
            (Some(target), Some(_)) if base.metadata.is_some() || !values::is(stored.dtype, target) => {
                let tensor = base.weights.tensor(name, &stored.shape, DType::F32, &Device::Cpu)?;
                io(out.write_all(&values::encode(&tensor, target)?))
            }
            _ => io(out.write_all(stored.bytes)),
        }
    }
}

/// The safetensors type for a type that both formats have.
fn safetensors_dtype(dtype: GgmlDType) -> Dtype {
    match dtype {
        GgmlDType::F16 => Dtype::F16,
        GgmlDType::BF16 => Dtype::BF16,
        _ => Dtype::F32,
    }
}

/// transformers' name of a type.
fn torch_name(dtype: GgmlDType) -> &'static str {
    match dtype {
        GgmlDType::F16 => "float16",
        GgmlDType::BF16 => "bfloat16",
        _ => "float32",
    }
}

/// `config.json`.
fn config(base: &Base, vocab_size: usize, value_type: Option<ValueType>) -> Result<Map<String, Value>> {
    let mut json = match base.json(CONFIG)? {
        Some(json) => json,
        None => config_of_gguf(base)?,
    };
    json.insert("vocab_size".into(), json!(vocab_size));
    json.insert("tie_word_embeddings".into(), json!(false));
    // A base saved from the base class becomes a causal language model.
    let class = json.get("architectures").and_then(|classes| classes.get(0)).and_then(Value::as_str);
    if let Some(family) = class.and_then(|class| class.strip_suffix("Model")) {
        let class = format!("{family}ForCausalLM");
        json.insert("architectures".into(), json!([class]));
    }
    if let Some(target) = target(base, value_type) {
        // transformers 5 writes the first key and reads both.
        let keys: Vec<&str> =
            ["dtype", "torch_dtype"].into_iter().filter(|key| json.contains_key(*key)).collect();
        let keys = if keys.is_empty() { vec!["torch_dtype"] } else { keys };
        keys.into_iter().for_each(|key| drop(json.insert(key.into(), json!(torch_name(target)))));
    }
    Ok(json)
}

/// `config.json` for a GGUF base, with the keys of the checkpoints on the hub.
fn config_of_gguf(base: &Base) -> Result<Map<String, Value>> {
    let c: &ModelConfig = &base.config;
    let Some(rope) = &c.rope else {
        let hint = "bake it with --format gguf, or take the checkpoint's folder".to_string();
        let what = "a folder of a GGUF file without rotary embeddings".to_string();
        return Err(Error::Unsupported { path: base.path.clone(), what, hint });
    };
    let (model_type, class) = match c.model_type {
        ModelType::Llama => ("llama", "LlamaForCausalLM"),
        ModelType::Granite => ("granite", "GraniteForCausalLM"),
        other => {
            let hint = "bake it with --format gguf, or take the checkpoint's folder".to_string();
            let what = format!("a folder of a GGUF file of model type `{}`", other.name());
            return Err(Error::Unsupported { path: base.path.clone(), what, hint });
        }
    };
    let stops = &base.tokenizer.stop_token_ids;
    let mut json = json!({
        "architectures": [class],
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_position_embeddings,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": rope.theta,
        "rope_scaling": rope.scaling_json(),
        "attention_bias": c.attention_bias,
        "mlp_bias": c.mlp_bias,
        "bos_token_id": base.number("tokenizer.ggml.bos_token_id"),
        "eos_token_id": stops,
        "pad_token_id": base.number("tokenizer.ggml.padding_token_id"),
    });
    if let ([only], Some(json)) = (stops.as_slice(), json.as_object_mut()) {
        json.insert("eos_token_id".into(), json!(only));
    }
    if c.model_type != ModelType::Llama {
        for (key, value) in [
            ("embedding_multiplier", c.embedding_multiplier),
            ("residual_multiplier", c.residual_multiplier),
            ("attention_multiplier", c.attention_multiplier),
            ("logits_scaling", c.logits_scaling),
        ] {
            json[key] = json!(value);
        }
    }
    match json {
        Value::Object(map) => Ok(map),
        _ => Ok(Map::new()),
    }
}

/// `generation_config.json`: transformers never generates `suppress_tokens`.
fn generation(base: &Base, suppressed: &[u32]) -> Result<Map<String, Value>> {
    let mut json = match base.json(GENERATION_CONFIG)? {
        Some(json) => json,
        None => {
            let config = match base.json(CONFIG)? {
                Some(config) => config,
                None => config_of_gguf(base)?,
            };
            let ids = ["bos_token_id", "eos_token_id", "pad_token_id"];
            let ids = ids.iter().filter_map(|key| Some(((*key).to_string(), config.get(*key)?.clone())));
            ids.filter(|(_, id)| !id.is_null()).collect()
        }
    };
    let mut all = match json.remove("suppress_tokens") {
        Some(Value::Array(all)) => all,
        _ => Vec::new(),
    };
    all.extend(suppressed.iter().map(|id| json!(id)));
    json.insert("suppress_tokens".into(), Value::Array(all));
    Ok(json)
}
