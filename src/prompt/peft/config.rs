//! `adapter_config.json`.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::check::typed;
use super::kind::unread_hint;
use super::{PeftType, fits, malformed, weights};
use crate::checkpoint::config::ModelConfig;
use crate::checkpoint::json;
use crate::checkpoint::json::bare_again;
use crate::config::PromptKind;
use crate::{Error, Result};

/// The task that a prompt is for.
pub(super) const CAUSAL_LM: &str = "CAUSAL_LM";
/// Keys that count as missing if they are null, as PEFT has a default for each or takes it from the base model.
const DEFAULTED: [&str; 5] =
    ["num_virtual_tokens", "token_dim", "num_transformer_submodules", "prompt_tuning_init", "inference_mode"];
/// Key of [`AdapterConfig::attention_layers`], which PEFT does not have.
pub(super) const ATTENTION_LAYERS: &str = "gneiss_attention_layers";

/// Where a prompt's first rows came from, in PEFT's words.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum PromptTuningInit {
    /// The token embeddings of a text.
    Text,
    /// Token embeddings drawn from the vocabulary.
    SampleVocab,
    /// Random numbers.
    #[default]
    Random,
    /// A name that PEFT 0.21 does not know. The rows are in the file, so that nothing depends on it.
    #[serde(untagged)]
    Other(String),
}

/// PEFT's configuration of a prompt of a decoder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AdapterConfig {
    /// The method that made the prompt, such as `"PROMPT_TUNING"` or `"PREFIX_TUNING"`.
    pub peft_type: PeftType,
    /// `"CAUSAL_LM"`; PEFT writes none if its user gave none. A prompt of another task is read if PEFT puts it in front
    /// of a decoder all the same.
    pub task_type: Option<String>,
    /// Folder, GGUF file or hub id of the frozen model, without a revision.
    pub base_model_name_or_path: Option<String>,
    /// Revision of the frozen model on the hub.
    #[serde(default)]
    pub revision: Option<String>,
    /// Rows of the prompt, P.
    #[serde(default)]
    pub num_virtual_tokens: usize,
    /// Width of an embedding, C; of keys and values K D, the width of a layer's keys. PEFT takes it from the base model if
    /// the file does not say, and so does gneiss for keys and values: 0 then.
    #[serde(default)]
    pub token_dim: usize,
    /// Prompts of a forward pass: 1 for a decoder, also if the file does not say.
    #[serde(default = "one")]
    pub num_transformer_submodules: usize,
    /// The model's query heads, H; of keys and values the key-value heads, K.
    pub num_attention_heads: Option<usize>,
    /// The model's layers; of keys and values those with attention, L.
    pub num_layers: Option<usize>,
    /// Layers of a model with Mamba2 layers that keys and values are for: all that have attention. PEFT has no such key, and
    /// can't use such a prefix.
    #[serde(rename = "gneiss_attention_layers", default, skip_serializing_if = "Option::is_none")]
    pub attention_layers: Option<Vec<usize>>,
    /// Virtual tokens at the start of a `CARTRIDGE` that are not trained; 1 if the file does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_frozen_tokens: Option<usize>,
    /// Tasks of a `MULTITASK_PROMPT_TUNING` adapter, T; 1 if the file does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_tasks: Option<usize>,
    /// Columns of the left factor of a task, r; 1 if the file does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_ranks: Option<usize>,
    /// Where the first rows came from; random if the file does not say.
    #[serde(default)]
    pub prompt_tuning_init: PromptTuningInit,
    /// The text that they came from; needed with [`PromptTuningInit::Text`].
    pub prompt_tuning_init_text: Option<String>,
    /// Tokenizer of that text; needed with [`PromptTuningInit::Text`].
    pub tokenizer_name_or_path: Option<String>,
    /// Whether PEFT loads the rows as they are and frozen; no if the file does not say.
    #[serde(default)]
    pub inference_mode: bool,
    /// Whatever else PEFT wrote, kept as it is.
    #[serde(flatten)]
    pub extra: BTreeMap<String, Value>,
}

fn one() -> usize {
    1
}

/// A configuration as it was read, before what it leaves out is taken from the prompt's tensor.
pub(super) struct Unfilled(AdapterConfig);

impl Unfilled {
    /// Reads the file.
    pub fn read(path: &Path) -> Result<Self> {
        if !path.exists() {
            return Err(malformed(path, "expected the configuration of a PEFT adapter, found no such file"));
        }
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        if let Some(problem) = weights::lfs_pointer(&bytes) {
            return Err(malformed(path, problem));
        }
        // The method first: an adapter of another method lacks the keys of this one.
        let text = std::str::from_utf8(&bytes)
            .map_err(|error| malformed(path, format!("not a JSON file, which is UTF-8: {error}")))?;
        let json: Value =
            json::parse(text).map_err(|error| malformed(path, format!("not a JSON file: {error}")))?;
        let Some(name) = json.get("peft_type").and_then(Value::as_str) else {
            return Err(malformed(
                path,
                "peft_type: expected the name of a method such as \"PROMPT_TUNING\", found none",
            ));
        };
        if PeftType::parse(name).is_none() {
            let what = format!("an adapter of the method {name}");
            return Err(Error::Unsupported { path: path.to_path_buf(), what, hint: unread_hint(name) });
        }
        Self::parse(json).map_err(|problem| malformed(path, problem))
    }

    fn parse(mut json: Value) -> Parsed<Self> {
        let Value::Object(keys) = &mut json else { return Err("expected a JSON object".into()) };
        keys.retain(|key, value| !(value.is_null() && DEFAULTED.contains(&key.as_str())));
        typed(keys, &COUNTS, "a whole number", Value::is_u64)?;
        typed(keys, &TEXTS, "a text", Value::is_string)?;
        typed(keys, &["inference_mode"], "true or false", Value::is_boolean)?;
        for key in ["num_virtual_tokens", "token_dim"] {
            if keys.get(key) == Some(&Value::from(0)) {
                return Err(format!("{key}: expected 1 or more, found 0"));
            }
        }
        typed(keys, &[ATTENTION_LAYERS], "a list of whole numbers", is_counts)?;
        let mut config: AdapterConfig = serde_json::from_value(json).map_err(|error| error.to_string())?;
        if let (PeftType::Cpt, 0) = (config.peft_type, config.num_virtual_tokens) {
            // PEFT takes the number from these, whatever the key says.
            config.num_virtual_tokens =
                config.extra.get("cpt_token_ids").and_then(Value::as_array).map_or(0, Vec::len);
        }
        config.check()?;
        Ok(Self(config))
    }

    /// The method that made the prompt.
    pub fn method(&self) -> PeftType {
        self.0.peft_type
    }

    /// The configuration of a prompt of this shape. PEFT takes a missing width from the base model; the tensor has the
    /// same one, or does not fit that model. It refuses a configuration without the number of rows, as this does.
    pub fn fill(self, shape: &[usize]) -> Parsed<AdapterConfig> {
        let mut config = self.0;
        if config.num_virtual_tokens == 0 {
            let rows = shape.first().map_or(String::new(), |rows| {
                format!("; hint: the tensor has {rows} rows: add \"num_virtual_tokens\": {rows}")
            });
            return Err(format!(
                "num_virtual_tokens: expected the number of the prompt's rows, found none{rows}"
            ));
        }
        let width = shape.get(1).copied().unwrap_or(0);
        match (config.peft_type.prompt_kind(), config.num_layers) {
            (PromptKind::Embeddings, _) if config.token_dim == 0 => config.token_dim = width,
            (PromptKind::Prefix, Some(layers)) if config.token_dim == 0 && layers > 0 => {
                config.token_dim = width / (2 * layers);
            }
            (PromptKind::Prefix, None) if config.token_dim > 0 => {
                config.num_layers = Some(width / (2 * config.token_dim));
            }
            _ => {}
        }
        Ok(config)
    }
}

pub(super) type Parsed<T> = std::result::Result<T, String>;

fn is_counts(value: &Value) -> bool {
    value.as_array().is_some_and(|layers| layers.iter().all(Value::is_u64))
}

/// Keys whose values are whole numbers.
const COUNTS: [&str; 8] = [
    "num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers",
    "num_frozen_tokens", "num_tasks", "num_ranks",
];
/// Keys whose values are texts.
const TEXTS: [&str; 6] = [
    "task_type", "base_model_name_or_path", "revision", "prompt_tuning_init", "prompt_tuning_init_text",
    "tokenizer_name_or_path",
];

/// A model's name as it was written, and the revision after a hub id's `@`.
pub(crate) fn split_revision(model_id: &str) -> (&str, Option<&str>) {
    match model_id.split_once('@') {
        // A local path may hold an @ too.
        Some((name, revision)) if !Path::new(model_id).exists() => (name, Some(revision)),
        _ => (model_id, None),
    }
}

impl AdapterConfig {
    /// The configuration of a prompt of `num_virtual_tokens` rows for `model`.
    ///
    /// `model_id` is the model as it was asked for: a folder, a `.gguf` file, or a hub id
    /// `org/name[@revision]`, whose revision PEFT keeps apart. `init_text` goes with
    /// [`PromptTuningInit::Text`].
    pub fn new(
        model_id: &str,
        model: &ModelConfig,
        num_virtual_tokens: usize,
        init: PromptTuningInit,
        init_text: Option<&str>,
    ) -> Self {
        let (name, revision) = split_revision(model_id);
        Self {
            peft_type: PeftType::PromptTuning,
            task_type: Some(CAUSAL_LM.into()),
            base_model_name_or_path: Some(name.into()),
            revision: revision.map(str::to_owned),
            num_virtual_tokens,
            token_dim: model.hidden_size,
            num_transformer_submodules: 1,
            num_attention_heads: Some(model.num_attention_heads),
            num_layers: Some(model.num_hidden_layers),
            attention_layers: None,
            num_frozen_tokens: None,
            num_tasks: None,
            num_ranks: None,
            prompt_tuning_init: init,
            prompt_tuning_init_text: init_text.map(str::to_string),
            tokenizer_name_or_path: Some(name.into()),
            inference_mode: true,
            extra: BTreeMap::new(),
        }
    }

    /// The configuration of keys and values of `num_virtual_tokens` virtual tokens for `model`, of which the first
    /// `frozen_tokens` were not trained: `CARTRIDGE` if there are such, else `PREFIX_TUNING`.
    ///
    /// `model_id` is as in [`AdapterConfig::new`].
    pub fn keys_values(
        model_id: &str,
        model: &ModelConfig,
        num_virtual_tokens: usize,
        frozen_tokens: usize,
    ) -> Self {
        let random = PromptTuningInit::Random;
        let layers = fits::attention_layers(model);
        let token_dim = model.num_key_value_heads * model.head_dim;
        let (peft_type, keys) = match frozen_tokens {
            0 => (
                PeftType::PrefixTuning,
                vec![
                    ("encoder_hidden_size", token_dim.into()),
                    ("prefix_projection", false.into()),
                    ("init_weights", Value::Null),
                ],
            ),
            _ => (PeftType::Cartridge, Vec::new()),
        };
        Self {
            peft_type,
            token_dim,
            num_attention_heads: Some(model.num_key_value_heads),
            num_layers: Some(layers.len()),
            attention_layers: Some(layers).filter(|layers| layers.len() < model.num_hidden_layers),
            num_frozen_tokens: Some(frozen_tokens).filter(|tokens| *tokens > 0),
            tokenizer_name_or_path: None,
            extra: keys.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
            ..Self::new(model_id, model, num_virtual_tokens, random, None)
        }
    }

    /// Tasks of a multitask adapter; `None` if the adapter holds one prompt.
    pub fn tasks(&self) -> Option<usize> {
        (self.peft_type == PeftType::MultitaskPromptTuning).then_some(self.num_tasks.unwrap_or(1))
    }

    /// Columns of the prompt's matrix: C, or L 2 K D of keys and values; `None` if the configuration does not say.
    pub(super) fn width(&self) -> Option<usize> {
        let width = match self.peft_type.prompt_kind() {
            PromptKind::Embeddings => self.token_dim,
            PromptKind::Prefix => self.num_layers? * 2 * self.token_dim,
        };
        Some(width).filter(|width| *width > 0)
    }

    /// The configuration of the prompt of one task, which is one of prompt tuning.
    pub(super) fn of_one_prompt(&self) -> Self {
        let mut config = self.clone();
        if config.tasks().is_some() {
            config.peft_type = PeftType::PromptTuning;
            (config.num_tasks, config.num_ranks) = (None, None);
            for key in ["prompt_tuning_init_state_dict_path", "prompt_tuning_init_task"] {
                config.extra.remove(key);
            }
        }
        config
    }

    /// As PEFT writes it: sorted keys, two spaces.
    pub(super) fn to_json(&self) -> std::result::Result<String, String> {
        let sorted = || -> serde_json::Result<String> {
            let mut keys: BTreeMap<String, Value> = serde_json::from_value(serde_json::to_value(self)?)?;
            keys.retain(|key, _| !self.peft_type.absent_keys().contains(&key.as_str()));
            serde_json::to_string_pretty(&keys)
        };
        sorted().map(|json| bare_again(json) + "\n").map_err(|error| error.to_string())
    }
}
