//! What makes a configuration unfit to be read or written.

use super::config::{CAUSAL_LM, Parsed};
use super::{AdapterConfig, PeftType, PromptTuningInit};
use crate::config::PromptKind;
use serde_json::Value;

/// Other tasks of PEFT whose prompts it puts in front of a decoder as those of [`CAUSAL_LM`]. The remaining one,
/// `SEQ_2_SEQ_LM`, has a prompt for an encoder and one for a decoder.
const OTHER_TASKS: [&str; 4] = ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"];
/// Keys of CPT whose lists have an entry for each virtual token.
const CPT_LISTS: [&str; 3] = ["cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask"];

/// Refuses a value of another type under `names`, by its key; missing and null ones are left to the defaults.
pub(super) fn typed(
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

impl AdapterConfig {
    /// What is wrong with the values.
    pub(super) fn check(&self) -> Parsed<()> {
        self.check_task()?;
        if self.num_transformer_submodules != 1 {
            return Err(format!(
                "num_transformer_submodules: expected 1, found {}; gneiss tunes decoders, which have one",
                self.num_transformer_submodules
            ));
        }
        let retrained = self.extra.get("modules_to_save").and_then(Value::as_array);
        if let Some(modules) = retrained.filter(|modules| !modules.is_empty()) {
            let modules: Vec<String> = modules.iter().map(Value::to_string).collect();
            return Err(format!(
                "modules_to_save: expected none, found {}; gneiss takes the weights of the base as they are",
                modules.join(", ")
            ));
        }
        match self.peft_type {
            PeftType::PromptTuning | PeftType::GneissPromptTuning => self.check_init(),
            PeftType::PTuning => Ok(()),
            PeftType::Cpt => self.check_cpt(),
            PeftType::MultitaskPromptTuning => {
                for (key, value) in [("num_tasks", self.num_tasks), ("num_ranks", self.num_ranks)] {
                    if value == Some(0) {
                        return Err(format!("{key}: expected 1 or more, found 0"));
                    }
                }
                self.check_init()
            }
            PeftType::PrefixTuning => self.check_heads(),
            PeftType::Cartridge => {
                let (frozen, all) = (self.num_frozen_tokens.unwrap_or(1), self.num_virtual_tokens);
                if frozen > all && all > 0 {
                    return Err(format!(
                        "num_frozen_tokens: expected at most {all}, which is num_virtual_tokens, found {frozen}"
                    ));
                }
                self.check_heads()
            }
        }
    }

    /// What keeps a prompt of `kind` from being written with this configuration.
    pub(super) fn check_writable(&self, kind: PromptKind) -> Parsed<()> {
        if self.peft_type.prompt_kind() != kind {
            return Err(format!(
                "peft_type: expected a method whose prompt.kind is \"{kind}\", as the prompt's, found {}",
                self.peft_type
            ));
        }
        if self.width().is_none() {
            return Err(format!(
                "token_dim and num_layers: expected the shape of the prompt, found {} and {:?}",
                self.token_dim, self.num_layers
            ));
        }
        self.check()
    }

    fn check_task(&self) -> Parsed<()> {
        let task = self.task_type.as_deref();
        let known = |task: &&str| *task == CAUSAL_LM || OTHER_TASKS.contains(task);
        if let Some(task) = task.filter(|task| !known(task)) {
            return Err(format!("task_type: expected \"{CAUSAL_LM}\", found {task:?}"));
        }
        if self.peft_type == PeftType::Cpt && task != Some(CAUSAL_LM) {
            let found = task.map_or("none".to_owned(), |task| format!("{task:?}"));
            return Err(format!(
                "task_type: expected \"{CAUSAL_LM}\", found {found}; PEFT reads no CPT adapter of another task either"
            ));
        }
        Ok(())
    }

    /// PEFT refuses such a configuration, even if it needs neither text nor tokenizer.
    fn check_init(&self) -> Parsed<()> {
        if self.prompt_tuning_init != PromptTuningInit::Text {
            return Ok(());
        }
        if self.prompt_tuning_init_text.is_none() {
            return Err("prompt_tuning_init_text: required with prompt_tuning_init \"TEXT\"".into());
        }
        if self.tokenizer_name_or_path.as_deref().unwrap_or_default().is_empty() {
            return Err("tokenizer_name_or_path: required with prompt_tuning_init \"TEXT\"".into());
        }
        Ok(())
    }

    /// The keys of CPT that say how it was trained (`opt_*` and the masks) do not count any more, but for their lengths.
    fn check_cpt(&self) -> Parsed<()> {
        let rows = self.num_virtual_tokens;
        for key in CPT_LISTS {
            let found = match self.extra.get(key).filter(|value| !value.is_null()) {
                None if key == CPT_LISTS[0] => "none".to_owned(),
                None => continue,
                Some(Value::Array(list)) if list.len() == rows => continue,
                Some(Value::Array(list)) => list.len().to_string(),
                Some(other) => other.to_string(),
            };
            return Err(format!(
                "{key}: expected a list of {rows} entries, which is num_virtual_tokens, found {found}"
            ));
        }
        Ok(())
    }

    fn check_heads(&self) -> Parsed<()> {
        match self.num_attention_heads {
            Some(heads) if heads == 0 || !self.token_dim.is_multiple_of(heads) => Err(format!(
                "num_attention_heads: expected the key-value heads that token_dim {} is made of, found {heads}",
                self.token_dim
            )),
            _ => Ok(()),
        }
    }
}
