//! `adapter_config.json`.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{malformed, weights};
use crate::checkpoint::config::ModelConfig;
use crate::checkpoint::json;
use crate::checkpoint::json::bare_again;
use crate::{Error, Result};

/// The method that gneiss writes, in PEFT's words.
const PROMPT_TUNING: &str = "PROMPT_TUNING";
/// A method that gneiss reads too: PEFT saves the rows that its encoder came to, and puts them in front as they are.
const P_TUNING: &str = "P_TUNING";
/// The task that a prompt is for.
pub(super) const CAUSAL_LM: &str = "CAUSAL_LM";
/// Other tasks of PEFT whose prompts it puts in front of a decoder as those of [`CAUSAL_LM`]. The remaining one,
/// `SEQ_2_SEQ_LM`, has a prompt for an encoder and one for a decoder.
const OTHER_TASKS: [&str; 4] = ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"];
/// Keys that count as missing if they are null, as PEFT has a default for each or takes it from the base model.
const DEFAULTED: [&str; 5] =
    ["num_virtual_tokens", "token_dim", "num_transformer_submodules", "prompt_tuning_init", "inference_mode"];

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

/// PEFT's `PromptTuningConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AdapterConfig {
    /// `"PROMPT_TUNING"`, or `"P_TUNING"`, whose saved rows are the same.
    pub peft_type: String,
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
    /// Width of a row, C; PEFT takes it from the base model if the file does not say.
    #[serde(default)]
    pub token_dim: usize,
    /// Prompts of a forward pass: 1 for a decoder, also if the file does not say.
    #[serde(default = "one")]
    pub num_transformer_submodules: usize,
    /// The model's query heads, H.
    pub num_attention_heads: Option<usize>,
    /// The model's blocks.
    pub num_layers: Option<usize>,
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
        match json.get("peft_type").and_then(Value::as_str) {
            Some(PROMPT_TUNING | P_TUNING) => {}
            Some(other) => {
                let what = format!("an adapter of the method {other}");
                return Err(Error::Unsupported { path: path.to_path_buf(), what, hint: instead_of(other) });
            }
            None => {
                return Err(malformed(path, format!("peft_type: expected \"{PROMPT_TUNING}\", found none")));
            }
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
        let config: AdapterConfig = serde_json::from_value(json).map_err(|error| error.to_string())?;
        config.check()?;
        Ok(Self(config))
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
        if config.token_dim == 0 {
            config.token_dim = shape.get(1).copied().unwrap_or(0);
        }
        Ok(config)
    }
}

type Parsed<T> = std::result::Result<T, String>;

/// Keys whose values are whole numbers.
const COUNTS: [&str; 5] =
    ["num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"];
/// Keys whose values are texts.
const TEXTS: [&str; 6] = [
    "task_type", "base_model_name_or_path", "revision", "prompt_tuning_init", "prompt_tuning_init_text",
    "tokenizer_name_or_path",
];

/// Refuses a value of another type under `names`, by its key; missing and null ones are left to the defaults.
fn typed(
    keys: &serde_json::Map<String, Value>,
    names: &[&str],
    expected: &str,
    fits: fn(&Value) -> bool,
) -> Parsed<()> {
    let wrong = |key: &&&str| keys.get(**key).is_some_and(|value| !value.is_null() && !fits(value));
    match names.iter().find(wrong) {
        None => Ok(()),
        Some(key) => Err(format!("{key}: expected {expected}, found {}", keys[*key])),
    }
}

/// What to do with an adapter of a method that gneiss does not read.
fn instead_of(method: &str) -> String {
    let reads = format!("gneiss reads {PROMPT_TUNING} adapters");
    match method {
        "PREFIX_TUNING" | "CARTRIDGE" => {
            format!("{reads}; its rows are keys and values of every block, no embeddings")
        }
        "MULTITASK_PROMPT_TUNING" | "CPT" => format!("{reads}; save the rows of one task as such an adapter"),
        "ADAPTION_PROMPT" => reads,
        _ if method.eq_ignore_ascii_case(PROMPT_TUNING) => format!("{reads}, whose name is in capitals"),
        _ if method.contains("PROMPT") => reads,
        // The methods that change the base's weights can be merged into them.
        _ => format!(
            "{reads}; hint: merge it into its base with PEFT's merge_and_unload, and give the merged checkpoint as \
             the model"
        ),
    }
}

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

    /// What is wrong with the values.
    pub(super) fn check(&self) -> std::result::Result<(), String> {
        if ![PROMPT_TUNING, P_TUNING].contains(&self.peft_type.as_str()) {
            return Err(format!("peft_type: expected \"{PROMPT_TUNING}\", found {:?}", self.peft_type));
        }
        let known = |task: &&str| *task == CAUSAL_LM || OTHER_TASKS.contains(task);
        if let Some(task) = self.task_type.as_deref().filter(|task| !known(task)) {
            return Err(format!("task_type: expected \"{CAUSAL_LM}\", found {task:?}"));
        }
        if self.num_transformer_submodules != 1 {
            return Err(format!(
                "num_transformer_submodules: expected 1, found {}; gneiss tunes decoders, which have one",
                self.num_transformer_submodules
            ));
        }
        if self.prompt_tuning_init == PromptTuningInit::Text {
            // PEFT refuses such a configuration, even if it needs neither.
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
        sorted().map(|json| bare_again(json) + "\n").map_err(|error| error.to_string())
    }
}
