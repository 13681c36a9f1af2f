//! `adapter_config.json`.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::malformed;
use crate::model::config::ModelConfig;
use crate::{Error, Result};

/// The method that gneiss reads and writes, in PEFT's words.
const PROMPT_TUNING: &str = "PROMPT_TUNING";
/// The task that it is for.
const CAUSAL_LM: &str = "CAUSAL_LM";

/// Where a prompt's first rows came from, in PEFT's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum PromptTuningInit {
    /// The token embeddings of a text.
    Text,
    /// Token embeddings drawn from the vocabulary.
    SampleVocab,
    /// Random numbers.
    Random,
}

/// PEFT's `PromptTuningConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AdapterConfig {
    /// `"PROMPT_TUNING"`.
    pub peft_type: String,
    /// `"CAUSAL_LM"`; PEFT writes none where its user gave none.
    pub task_type: Option<String>,
    /// Folder, GGUF file or hub id of the frozen model, without a revision.
    pub base_model_name_or_path: Option<String>,
    /// Revision of the frozen model on the hub.
    #[serde(default)]
    pub revision: Option<String>,
    /// Rows of the prompt, P.
    pub num_virtual_tokens: usize,
    /// Width of a row, C.
    pub token_dim: usize,
    /// Prompts of a forward pass: 1 for a decoder.
    pub num_transformer_submodules: usize,
    /// The model's query heads, H.
    pub num_attention_heads: Option<usize>,
    /// The model's blocks.
    pub num_layers: Option<usize>,
    /// Where the first rows came from.
    pub prompt_tuning_init: PromptTuningInit,
    /// The text that they came from; needed with [`PromptTuningInit::Text`].
    pub prompt_tuning_init_text: Option<String>,
    /// Tokenizer of that text; needed with [`PromptTuningInit::Text`].
    pub tokenizer_name_or_path: Option<String>,
    /// Whether PEFT loads the rows as they are and frozen.
    pub inference_mode: bool,
    /// Whatever else PEFT wrote, kept as it is.
    #[serde(flatten)]
    pub extra: BTreeMap<String, Value>,
}

/// A model as it was asked for, and the revision behind a hub id's `@`.
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
            peft_type: PROMPT_TUNING.into(),
            task_type: Some(CAUSAL_LM.into()),
            base_model_name_or_path: Some(name.into()),
            revision: revision.map(str::to_owned),
            num_virtual_tokens,
            token_dim: model.hidden_size,
            num_transformer_submodules: 1,
            num_attention_heads: Some(model.num_attention_heads),
            num_layers: Some(model.num_hidden_layers),
            prompt_tuning_init: init,
            prompt_tuning_init_text: init_text.map(str::to_string),
            tokenizer_name_or_path: Some(name.into()),
            inference_mode: true,
            extra: BTreeMap::new(),
        }
    }

    pub(super) fn read(path: &Path) -> Result<Self> {
        if !path.exists() {
            return Err(malformed(path, "expected the configuration of a PEFT adapter, found no such file"));
        }
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        // The method first: an adapter of another method lacks the keys of this one.
        let json: Value = serde_json::from_slice(&bytes)
            .map_err(|error| malformed(path, format!("not a JSON file: {error}")))?;
        match json.get("peft_type").and_then(Value::as_str) {
            Some(PROMPT_TUNING) => {}
            Some(other) => {
                let what = format!("an adapter of the method {other}");
                let hint = format!("gneiss reads {PROMPT_TUNING} adapters");
                return Err(Error::Unsupported { path: path.to_path_buf(), what, hint });
            }
            None => {
                return Err(malformed(path, format!("peft_type: expected \"{PROMPT_TUNING}\", found none")));
            }
        }
        let config: Self =
            serde_json::from_slice(&bytes).map_err(|error| malformed(path, error.to_string()))?;
        config.check().map_err(|problem| malformed(path, problem))?;
        Ok(config)
    }

    /// What is wrong with the values.
    pub(super) fn check(&self) -> std::result::Result<(), String> {
        if self.peft_type != PROMPT_TUNING {
            return Err(format!("peft_type: expected \"{PROMPT_TUNING}\", found {:?}", self.peft_type));
        }
        if let Some(task) = self.task_type.as_deref().filter(|task| *task != CAUSAL_LM) {
            return Err(format!("task_type: expected \"{CAUSAL_LM}\", found {task:?}"));
        }
        if self.num_transformer_submodules != 1 {
            return Err(format!(
                "num_transformer_submodules: expected 1, found {}; gneiss tunes decoders, which have one",
                self.num_transformer_submodules
            ));
        }
        if self.prompt_tuning_init == PromptTuningInit::Text {
            // PEFT refuses such a configuration, even where it needs neither.
            if self.prompt_tuning_init_text.is_none() {
                return Err("prompt_tuning_init_text: required with prompt_tuning_init \"TEXT\"".into());
            }
            if self.tokenizer_name_or_path.as_deref().unwrap_or_default().is_empty() {
                return Err("tokenizer_name_or_path: required with prompt_tuning_init \"TEXT\"".into());
            }
        }
        Ok(())
    }

    /// As PEFT writes it: sorted keys, two spaces.
    pub(super) fn to_json(&self) -> std::result::Result<String, String> {
        let sorted = || -> serde_json::Result<String> {
            let keys: BTreeMap<String, Value> = serde_json::from_value(serde_json::to_value(self)?)?;
            serde_json::to_string_pretty(&keys)
        };
        sorted().map(|json| json + "\n").map_err(|error| error.to_string())
    }
}
