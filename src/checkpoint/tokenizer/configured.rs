//! Tokens that a checkpoint's configuration files add to its `tokenizer.json`, by the rules of transformers 5
//! (`PreTrainedTokenizerBase._from_pretrained` in `tokenization_utils_base.py`, `TokenizersBackend.__init__` in
//! `tokenization_utils_tokenizers.py`).
//!
//! ```text
//! tokenizer_config.json
//!   bos_token, eos_token, ...  and every other key that ends in `_token`: named tokens, which are special
//!   extra_special_tokens       a list of special tokens, or an object of more names; before: additional_special_tokens
//!   added_tokens_decoder       tokens with their flags, by id
//!   split_special_tokens       special tokens in a text are split as other text is
//! special_tokens_map.json, added_tokens.json
//!                              more of the same; they count if there is no `added_tokens_decoder`
//! ```
//!
//! `add_bos_token` and `add_eos_token` don't count: transformers ignores them if there is a `tokenizer.json`, whose
//! post-processor decides which tokens are put around a text.

use super::super::json::{JsonObject, describe};
use crate::checkpoint::typed::TypedKeys;
use crate::layout::model_folder::{ADDED_TOKENS, SPECIAL_TOKENS, TOKENIZER_CONFIG};
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tokenizers::{AddedToken, Tokenizer};

const DECODER: &str = "added_tokens_decoder";
const EXTRA: [&str; 2] = ["extra_special_tokens", "additional_special_tokens"];
const A_TOKEN: &str = "a string, or an object with `content`";
/// The names that every tokenizer may have; new tokens get ids in this order, before those of other names.
const NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// A token to which a file gives a name, such as `eos_token`.
#[derive(Debug)]
pub(super) struct NamedToken {
    pub name: String,
    pub token: AddedToken,
    pub path: PathBuf,
}

/// The settings of a tokenizer in the configuration files.
#[derive(Debug, Default)]
pub(super) struct Configured {
    /// Tokens by the id in the file.
    numbered: BTreeMap<u32, AddedToken>,
    /// Whether they come from `added_tokens.json`, where tokenizer.json's tokens take their places.
    older: bool,
    named: Vec<NamedToken>,
    /// Special tokens without a name.
    extra: Vec<AddedToken>,
    split_special_tokens: bool,
}

impl Configured {
    /// Reads those files of a checkpoint's folder that exist.
    ///
    /// # Errors
    /// Returns an error if a file or a value is malformed.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(TOKENIZER_CONFIG);
        let config = JsonObject::read_if_exists(&path)?;
        let mut found = Self::default();
        let mut decoder = None;
        if let Some(config) = &config {
            found.read_names(config)?;
            let given = EXTRA.into_iter().find(|key| config.get(key).is_some_and(|value| !is_empty(value)));
            given.map(|key| found.read_extra(config, key, false)).transpose()?;
            found.split_special_tokens = config.boolean("split_special_tokens")?.unwrap_or(false);
            decoder = config.object(DECODER)?;
        }
        match decoder {
            Some(decoder) => found.read_decoder(&decoder)?,
            None => found.read_older(dir)?,
        }
        if found.named.len() > 1 {
            found.order(&std::fs::read_to_string(&path).unwrap_or_default());
        }
        Ok(found)
    }

    /// Reads the keys that end in `_token`.
    fn read_names(&mut self, json: &JsonObject) -> Result<()> {
        for (key, value) in json.entries().filter(|(key, _)| key.ends_with("_token")) {
            match value {
                Value::String(_) | Value::Object(_) => self.name(json, key, value, key)?,
                Value::Null => {}
                // `add_bos_token` and the like are settings.
                other if NAMES.contains(&key.as_str()) => {
                    return Err(json.error(key, A_TOKEN, &describe(other)));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Gives a name to the token of `key`; it replaces an earlier token of that name.
    fn name(&mut self, json: &JsonObject, name: &str, value: &Value, key: &str) -> Result<()> {
        let token = AddedToken { special: true, ..token(json, key, value, true)? };
        self.named.retain(|named| named.name != name);
        self.named.push(NamedToken { name: name.to_owned(), token, path: json.path().to_path_buf() });
        Ok(())
    }

    /// Sorts the names as transformers does: first those that every tokenizer may have, then others in the order of
    /// tokenizer_config.json, whose content is `text`; serde_json does not keep the order of keys.
    fn order(&mut self, text: &str) {
        self.named.sort_by_cached_key(|NamedToken { name, .. }| {
            let known = NAMES.iter().position(|known| known == name).unwrap_or(NAMES.len());
            (known, text.find(&format!("\"{name}\"")))
        });
    }

    /// Reads a list of special tokens, or an object of named ones. Tokens of the older files are always special.
    fn read_extra(&mut self, json: &JsonObject, key: &str, older: bool) -> Result<()> {
        match json.get(key) {
            None => {}
            Some(Value::Object(named)) => {
                named.iter().try_for_each(|(name, value)| self.name(json, name, value, key))?;
            }
            Some(Value::Array(items)) => {
                for item in items {
                    let token = token(json, key, item, older || item.get("__type").is_none())?;
                    if !self.extra.iter().any(|known| known.content == token.content) {
                        self.extra.push(token);
                    }
                }
            }
            Some(other) => {
                return Err(json.error(
                    key,
                    "a list of tokens, or an object of named ones",
                    &describe(other),
                ));
            }
        }
        Ok(())
    }

    fn read_decoder(&mut self, decoder: &JsonObject) -> Result<()> {
        for (key, value) in decoder.entries() {
            let Ok(id) = key.parse() else {
                return Err(decoder.error(key, "a token id as the key", &format!("`{key}`")));
            };
            if !value.is_object() {
                return Err(decoder.error(key, "an object with `content`", &describe(value)));
            }
            self.numbered.insert(id, token(decoder, key, value, false)?);
        }
        Ok(())
    }

    /// Reads `special_tokens_map.json` and `added_tokens.json`.
    fn read_older(&mut self, dir: &Path) -> Result<()> {
        self.older = true;
        if let Some(map) = JsonObject::read_if_exists(&dir.join(SPECIAL_TOKENS))? {
            self.read_names(&map)?;
            self.read_extra(&map, EXTRA[0], true)?;
            // The older key adds nothing to an existing list.
            if self.extra.is_empty() {
                self.read_extra(&map, EXTRA[1], true)?;
            }
        }
        if let Some(added) = JsonObject::read_if_exists(&dir.join(ADDED_TOKENS))? {
            for (content, id) in added.entries() {
                let Some(id) = id.as_u64().and_then(|id| u32::try_from(id).ok()) else {
                    return Err(added.error(content, "a token id", &describe(id)));
                };
                let named = self.named.iter().filter(|named| NAMES.contains(&named.name.as_str()));
                let mut special = named.map(|named| &named.token).chain(&self.extra);
                let special = special.any(|token| token.content == *content);
                self.numbered.insert(id, AddedToken::from(content.as_str(), special));
            }
        }
        Ok(())
    }

    /// The token with this name.
    pub fn named(&self, name: &str) -> Option<&NamedToken> {
        self.named.iter().find(|named| named.name == name)
    }

    /// Names with the texts of their tokens.
    pub fn names(self) -> BTreeMap<String, String> {
        self.named.into_iter().map(|named| (named.name, named.token.content)).collect()
    }

    /// Whether the files define a token of this text and do not only name it.
    pub fn defines(&self, content: &str) -> bool {
        self.numbered.values().chain(&self.extra).any(|token| token.content == content)
    }

    /// Adds the tokens to those of `tokenizer.json`. Returns warnings about settings that transformers does not follow.
    ///
    /// # Errors
    /// Returns the tokenizer's error.
    pub fn apply(&self, tokenizer: &mut Tokenizer) -> Result<Vec<String>> {
        let there = tokenizer.get_added_tokens_decoder();
        let is_there = |content: &str| there.values().any(|token| token.content == content);
        let is_named = |content: &str| self.named.iter().any(|named| named.token.content == content);
        let mut new: Vec<AddedToken> = Vec::new();
        for (id, token) in &self.numbered {
            let taken = self.older && there.contains_key(id);
            if !taken && !there.values().any(|same| same == token) {
                new.push(AddedToken { special: token.special || is_named(&token.content), ..token.clone() });
            }
        }
        for token in self.named.iter().map(|named| &named.token).chain(&self.extra) {
            if !is_there(&token.content) && !new.iter().any(|known| known.content == token.content) {
                new.push(token.clone());
            }
        }
        if !new.is_empty() {
            tokenizer.add_tokens(new).map_err(|error| Error::Tokenizer(error.to_string()))?;
        }
        tokenizer.set_encode_special_tokens(self.split_special_tokens);
        let other = |(id, token): (&u32, &AddedToken)| {
            let found = tokenizer.token_to_id(&token.content).filter(|found| found != id)?;
            Some(format!(
                "the files beside tokenizer.json have {id} for the token `{}`, which is {found} by tokenizer.json; \
                 {found} is taken, as transformers does",
                token.content
            ))
        };
        Ok(self.numbered.iter().filter_map(other).collect())
    }
}

/// A token: a string, which is special, or an object with its flags; `special` is the default of the object's flag.
fn token(json: &JsonObject, key: &str, value: &Value, special: bool) -> Result<AddedToken> {
    let wrong = || json.error(key, A_TOKEN, &describe(value));
    let map = match value {
        Value::String(content) => return Ok(AddedToken::from(content.as_str(), true)),
        Value::Object(map) => map,
        _ => return Err(wrong()),
    };
    let content = map.get("content").and_then(Value::as_str).ok_or_else(wrong)?;
    let flag = |name: &str, default: bool| {
        flag(map, name, default)
            .map_err(|found| json.error(key, &format!("true or false for `{name}`"), &found))
    };
    let special = flag("special", special)?;
    Ok(AddedToken::from(content, special)
        .single_word(flag("single_word", false)?)
        .lstrip(flag("lstrip", false)?)
        .rstrip(flag("rstrip", false)?)
        .normalized(flag("normalized", !special)?))
}

fn flag(map: &Map<String, Value>, name: &str, default: bool) -> std::result::Result<bool, String> {
    match map.get(name) {
        None | Some(Value::Null) => Ok(default),
        Some(Value::Bool(flag)) => Ok(*flag),
        Some(other) => Err(describe(other)),
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}
