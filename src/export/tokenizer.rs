//! The tokenizer's files of a baked folder: the base's files with the new tokens.

use super::base::Base;
use super::place::Placed;
use super::staging::StagedOutput;
use super::templates::{BaseTemplate, with_prompts};
use crate::files::write_atomically;
use crate::layout::model_folder::{ADDED_TOKENS, CHAT_TEMPLATE, SPECIAL_TOKENS, TOKENIZER, TOKENIZER_CONFIG};
use crate::{Error, Result};
use serde_json::{Map, Value, json};

/// Writes `tokenizer.json`, `tokenizer_config.json`, the chat template, and the base's files in older forms.
pub(super) fn write(staging: &StagedOutput, base: &Base, placed: &Placed) -> Result<()> {
    let text = match &base.metadata {
        Some(_) => placed.tokenizer.to_string(false).map_err(|error| Error::Tokenizer(error.to_string()))?,
        None => edited(base, placed)?,
    };
    write_atomically(&staging.path(TOKENIZER), |out| out.write_all(text.as_bytes()))?;
    let mut config = match base.json(TOKENIZER_CONFIG)? {
        Some(config) => config,
        None => new_config(base),
    };
    extend(&mut config, placed);
    match BaseTemplate::find(base)? {
        Some(BaseTemplate::One(template)) => {
            config.remove("chat_template");
            let text = with_prompts(&template, base, placed)?;
            write_atomically(&staging.path(CHAT_TEMPLATE), |out| out.write_all(text.as_bytes()))?;
        }
        Some(BaseTemplate::Named(mut templates)) => {
            for template in &mut templates {
                if let Some(Value::String(text)) = template.get_mut("template") {
                    *text = with_prompts(text, base, placed)?;
                }
            }
            config.insert("chat_template".into(), Value::Array(templates));
        }
        None => {}
    }
    staging.write_json(TOKENIZER_CONFIG, &config)?;
    for name in [SPECIAL_TOKENS, ADDED_TOKENS] {
        if let Some(mut json) = base.json(name)? {
            if name == ADDED_TOKENS {
                json.extend(placed.numbered().map(|(id, token)| (token, json!(id))));
            } else {
                append(&mut json, placed);
            }
            staging.write_json(name, &json)?;
        }
    }
    Ok(())
}

/// The base's `tokenizer.json` with the new tokens; everything else is unchanged.
fn edited(base: &Base, placed: &Placed) -> Result<String> {
    let malformed =
        |problem: &str| Error::Checkpoint { path: base.path.join(TOKENIZER), problem: problem.to_string() };
    let mut json = base.json(TOKENIZER)?.ok_or_else(|| malformed("expected a JSON object, found no file"))?;
    let added = json.entry("added_tokens").or_insert_with(|| json!([]));
    let added = added.as_array_mut().ok_or_else(|| malformed("`added_tokens`: expected a list"))?;
    // Tokens of the other files have ids before the new ones.
    let mut configured: Vec<_> = base.tokenizer.tokenizer.get_added_tokens_decoder().into_iter().collect();
    configured.retain(|(_, token)| !added.iter().any(|known| known["content"] == token.content));
    configured.sort_by_key(|(id, _)| *id);
    for (id, token) in configured {
        let mut token = serde_json::to_value(token).map_err(|error| malformed(&error.to_string()))?;
        token["id"] = json!(id);
        added.push(token);
    }
    added.extend(placed.numbered().map(|(id, content)| {
        let mut token = token(content);
        token["id"] = json!(id);
        token
    }));
    let text = Value::Object(json).to_string();
    // The written file must give the ids of the embedding's rows.
    let read: tokenizers::Tokenizer =
        text.parse().map_err(|error: tokenizers::Error| Error::Tokenizer(error.to_string()))?;
    match placed.numbered().find(|(id, token)| read.token_to_id(token) != Some(*id)) {
        None => Ok(text),
        Some((id, token)) => {
            Err(malformed(&format!("expected {id} as the id of {token} once it is added, found another")))
        }
    }
}

fn token(content: String) -> Value {
    json!({
        "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true,
    })
}

/// Adds the new tokens in the places where the versions of transformers look for them.
fn extend(config: &mut Map<String, Value>, placed: &Placed) {
    if let Some(Value::Object(decoder)) = config.get_mut("added_tokens_decoder") {
        decoder.extend(placed.numbered().map(|(id, content)| (id.to_string(), token(content))));
    }
    append(config, placed);
}

/// Adds the new tokens at the end of the list of special tokens: transformers 5 calls it `extra_special_tokens` and
/// accepts the older name.
fn append(config: &mut Map<String, Value>, placed: &Placed) {
    let newer = config.get("extra_special_tokens").is_some_and(Value::is_array);
    let key = if newer { "extra_special_tokens" } else { "additional_special_tokens" };
    let list = config.entry(key).or_insert_with(|| json!([]));
    if !list.is_array() {
        *list = json!([]);
    }
    if let Value::Array(list) = list {
        list.extend(placed.numbered().map(|(_, token)| json!(token)));
    }
}

/// `tokenizer_config.json` of a base that has none.
fn new_config(base: &Base) -> Map<String, Value> {
    let token = |id: Option<u32>| id.and_then(|id| base.tokenizer.tokenizer.id_to_token(id));
    let special = [
        ("bos_token", token(base.number("tokenizer.ggml.bos_token_id"))),
        ("eos_token", token(Some(base.tokenizer.eos_token_id))),
        ("pad_token", token(base.number("tokenizer.ggml.padding_token_id"))),
        ("unk_token", token(base.number("tokenizer.ggml.unknown_token_id"))),
    ];
    let mut config = Map::from_iter([
        ("tokenizer_class".to_string(), json!("PreTrainedTokenizerFast")),
        ("model_max_length".to_string(), json!(base.config.max_position_embeddings)),
        ("clean_up_tokenization_spaces".to_string(), json!(false)),
    ]);
    config.extend(special.into_iter().filter_map(|(key, token)| Some((key.to_string(), json!(token?)))));
    config
}
