//! The tokenizer in GGUF's form: lists of tokens, their types and merges, and the name of a pre-tokenizer.

use crate::checkpoint::tokenizer::{ends_by_text, pre_tokenizer_name};
use crate::export::base::Base;
use crate::export::place::Placed;
use crate::export::templates::{BaseTemplate, with_prompts};
use crate::export::unlikely::TEXTS;
use crate::layout::model_folder::{CONFIG, TOKENIZER};
use crate::{Error, Result};
use candle_core::quantized::gguf_file::Value;
use serde_json::Value as Json;
use std::collections::HashMap;

// `tokenizer.ggml.token_type`
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";

/// The key-value pairs of the tokenizer.
pub(in crate::export) struct VocabularyPairs {
    pub pairs: Vec<(String, Value)>,
}

impl VocabularyPairs {
    /// # Errors
    /// Returns an error if llama.cpp has no name for the tokenizer.
    pub fn new(base: &Base, placed: &Placed) -> Result<Self> {
        let mut pairs = match &base.metadata {
            Some(metadata) => grown(base, metadata, placed),
            None => folder_pairs(base, placed)?,
        };
        // One token for each row of the embedding: llama.cpp requires equal numbers.
        let rows = base.config.vocab_size.max(placed.ids().end as usize);
        for (key, value) in &mut pairs {
            if let Value::Array(items) = value {
                match key.as_str() {
                    TOKENS => items.extend((items.len()..rows).map(|id| Value::String(format!("[PAD{id}]")))),
                    TYPES => items.resize(rows, Value::I32(UNUSED)),
                    SCORES => items.resize(rows, Value::F32(0.0)),
                    _ => {}
                }
            }
        }
        let template = match BaseTemplate::find(base)? {
            Some(BaseTemplate::One(template)) => Some(template),
            Some(BaseTemplate::Named(templates)) => default_template(&templates),
            None => None,
        };
        if let Some(template) = template {
            let template = Value::String(with_prompts(&template, base, placed)?);
            pairs.push(("tokenizer.chat_template".into(), template));
        }
        Ok(Self { pairs })
    }
}

/// The lists of a GGUF base with the new tokens. Tokens with equal texts get different ones, because llama.cpp fails if
/// a text occurs twice.
fn grown(base: &Base, metadata: &HashMap<String, Value>, placed: &Placed) -> Vec<(String, Value)> {
    let list = |key: &str| match metadata.get(key) {
        Some(Value::Array(items)) => Some(items.clone()),
        _ => None,
    };
    let mut lists = Vec::new();
    for (key, new) in [(TYPES, Value::I32(CONTROL)), (SCORES, Value::F32(0.0))] {
        if let Some(mut items) = list(key) {
            items.resize(placed.ids().end as usize, new);
            lists.push((key.to_string(), Value::Array(items)));
        }
    }
    let old = &base.tokenizer.tokenizer;
    let mut tokens: Vec<Value> =
        (0..placed.first).map(|id| Value::String(old.id_to_token(id).unwrap_or_default())).collect();
    tokens.extend(placed.numbered().map(|(_, token)| Value::String(token)));
    lists.push((TOKENS.to_string(), Value::Array(tokens)));
    lists
}

/// The lists of a `tokenizer.json`.
fn folder_pairs(base: &Base, placed: &Placed) -> Result<Vec<(String, Value)>> {
    let json = base.json(TOKENIZER)?.unwrap_or_default();
    let model =
        json.get("model").and_then(Json::as_object).filter(|model| model.get("type") == Some(&"BPE".into()));
    let model = model.ok_or_else(|| unsupported(base, "a tokenizer that is no BPE"))?;
    let Some(pre) = pre_tokenizer_name(&base.tokenizer.tokenizer, &TEXTS)? else {
        return Err(unsupported(
            base,
            "a pre-tokenizer that is none of those that gneiss knows by llama.cpp's names",
        ));
    };
    let merges = model.get("merges").and_then(Json::as_array).into_iter().flatten().map(merge);
    let merges: Option<Vec<Value>> = merges.collect();
    let merges = merges.ok_or_else(|| unsupported(base, "a merge that is no pair"))?;
    let added = placed.tokenizer.get_added_tokens_decoder();
    let (mut tokens, mut types) = (Vec::new(), Vec::new());
    for id in 0..placed.ids().end {
        let kind = match (added.get(&id), placed.tokenizer.id_to_token(id)) {
            (Some(token), _) if token.special => CONTROL,
            (Some(_), _) => USER_DEFINED,
            (None, Some(_)) => NORMAL,
            (None, None) => UNUSED,
        };
        let token = placed.tokenizer.id_to_token(id).unwrap_or_else(|| format!("[PAD{id}]"));
        tokens.push(Value::String(token));
        types.push(Value::I32(kind));
    }
    let mut pairs = vec![
        ("tokenizer.ggml.model".to_string(), Value::String("gpt2".into())),
        ("tokenizer.ggml.pre".to_string(), Value::String(pre.into())),
        (TOKENS.to_string(), Value::Array(tokens)),
        (TYPES.to_string(), Value::Array(types)),
        ("tokenizer.ggml.merges".to_string(), Value::Array(merges)),
    ];
    pairs.extend(special(base)?);
    Ok(pairs)
}

/// A merge of two pieces: `"a b"`, or in newer files `["a", "b"]`.
fn merge(json: &Json) -> Option<Value> {
    match json {
        Json::String(text) => Some(Value::String(text.clone())),
        Json::Array(pair) => {
            let [left, right] = pair.as_slice() else { return None };
            Some(Value::String(format!("{} {}", left.as_str()?, right.as_str()?)))
        }
        _ => None,
    }
}

/// Ids of special tokens, and which of them are added to every text.
fn special(base: &Base) -> Result<Vec<(String, Value)>> {
    let around = base.around()?;
    // Two keys for all ends but the first: readers find some tokens by their text, without a key.
    let by_text =
        |id: &u32| base.tokenizer.tokenizer.id_to_token(*id).is_some_and(|text| ends_by_text(&text));
    let mut others = base.tokenizer.stop_token_ids[1..].to_vec();
    others.sort_by_key(by_text);
    let config = base.json(CONFIG)?.unwrap_or_default();
    let configured_id = |key: &str| {
        let id = config.get(key)?.as_u64()?.try_into().ok()?;
        base.tokenizer.tokenizer.id_to_token(id).map(|_| id)
    };
    let ids = [
        ("bos_token_id", around[0].first().copied().or_else(|| configured_id("bos_token_id"))),
        ("eos_token_id", Some(base.tokenizer.eos_token_id)),
        ("eot_token_id", others.first().copied()),
        ("eom_token_id", others.get(1).copied()),
        ("padding_token_id", configured_id("pad_token_id")),
    ];
    let ids = ids.into_iter().filter_map(|(key, id)| Some((key, Value::U32(id?))));
    let flags = [
        ("add_bos_token", Value::Bool(!around[0].is_empty())),
        ("add_eos_token", Value::Bool(!around[1].is_empty())),
    ];
    Ok(ids.chain(flags).map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)).collect())
}

/// The template named `default`, or the first.
fn default_template(templates: &[Json]) -> Option<String> {
    let named = templates.iter().find(|template| template["name"] == "default");
    named.or(templates.first())?.get("template")?.as_str().map(str::to_owned)
}

pub(in crate::export) fn unsupported(base: &Base, what: &str) -> Error {
    let hint = "bake it as safetensors, and convert that with llama.cpp's convert_hf_to_gguf.py".to_string();
    Error::Unsupported { path: base.path.clone(), what: format!("{what} in GGUF"), hint }
}
