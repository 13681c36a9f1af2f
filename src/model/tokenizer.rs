//! The checkpoint's tokenizer: `tokenizer.json` of a folder, or one built from GGUF metadata, with the
//! tokens that end a text.

mod gguf;
mod pre;

use std::path::{Path, PathBuf};

use serde_json::Value;
use tokenizers::{PaddingParams, Tokenizer};

pub(crate) use pre::name_of as pre_tokenizer_name;

use super::gguf::GgufFile;
use super::json::{JsonObject, describe};
use crate::{Error, Result};

/// A tokenizer with the ids of the tokens that end a text.
#[derive(Debug, Clone)]
pub struct TextTokenizer {
    /// Encodes text without truncation and padding; special tokens in a text become one id each.
    pub tokenizer: Tokenizer,
    /// The token that ends a training target.
    pub eos_token_id: u32,
    /// The tokens that stop generation, `eos_token_id` first.
    pub stop_token_ids: Vec<u32>,
}

impl TextTokenizer {
    /// Reads the tokenizer of a checkpoint: of a folder, or of a `.gguf` file.
    ///
    /// # Errors
    /// As [`TextTokenizer::from_folder`] and [`TextTokenizer::from_gguf`].
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() { Self::from_folder(path) } else { Self::from_gguf(&GgufFile::open(path)?) }
    }

    /// Reads `tokenizer.json`, and the end-of-text tokens from `tokenizer_config.json`,
    /// `generation_config.json` and `config.json`.
    ///
    /// # Errors
    /// Where `tokenizer.json` is missing or malformed, or no file names an end-of-text token that the
    /// tokenizer knows.
    pub fn from_folder(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        if !path.is_file() {
            let problem = "expected `tokenizer.json`, found no such file; save the tokenizer with \
                           transformers' `AutoTokenizer` to get one"
                .to_string();
            return Err(Error::Checkpoint { path: dir.to_path_buf(), problem });
        }
        let failed = |error| Error::Tokenizer(format!("{}: {error}", path.display()));
        let mut tokenizer = Tokenizer::from_file(&path).map_err(failed)?;
        // Both may be left over from the training of the tokenizer's last user, and would cut or pad
        // without a word.
        tokenizer.with_truncation(None).map_err(failed)?;
        tokenizer.with_padding(None::<PaddingParams>);
        let (eos_token_id, stop_token_ids) = end_tokens(dir, &tokenizer)?;
        Ok(Self { tokenizer, eos_token_id, stop_token_ids })
    }

    /// Builds the tokenizer that a GGUF file's metadata describes.
    ///
    /// # Errors
    /// [`Error::Unsupported`] names a tokenizer model or pre-tokenizer that isn't known;
    /// [`Error::Checkpoint`] a key that is missing or does not fit.
    pub fn from_gguf(file: &GgufFile) -> Result<Self> {
        gguf::build(file.metadata(), file.config().vocab_size)
    }

    /// Token ids of a text; `add_special_tokens` adds what the tokenizer puts around every text, such as
    /// a beginning-of-text token.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] with what the tokenizer said.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode(text, add_special_tokens);
        Ok(encoding.map_err(|error| Error::Tokenizer(error.to_string()))?.get_ids().to_vec())
    }

    /// The text of token ids; `skip_special_tokens` leaves special tokens out.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] with what the tokenizer said.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        let text = self.tokenizer.decode(ids, skip_special_tokens);
        text.map_err(|error| Error::Tokenizer(error.to_string()))
    }

    /// The text of one token, its leading space included; bytes that are no whole character show as
    /// U+FFFD. `None` where there is no such token.
    pub fn token_text(&self, id: u32) -> Option<String> {
        let piece = self.tokenizer.id_to_token(id)?;
        // Sentencepiece's mark of a space, which its decoder strips at the start of a text.
        if piece.starts_with('\u{2581}') {
            return Some(piece.replace('\u{2581}', " "));
        }
        self.tokenizer.decode(&[id], false).ok()
    }
}

/// The token that ends a target, and all that stop generation.
fn end_tokens(dir: &Path, tokenizer: &Tokenizer) -> Result<(u32, Vec<u32>)> {
    let mut ids = Vec::new();
    let mut looked_at = Vec::<PathBuf>::new();
    let path = dir.join("tokenizer_config.json");
    if let Some(json) = JsonObject::read_if_exists(&path)? {
        ids.extend(eos_token(&json, tokenizer)?);
        looked_at.push(path);
    }
    for name in ["generation_config.json", "config.json"] {
        let path = dir.join(name);
        if let Some(json) = JsonObject::read_if_exists(&path)? {
            ids.extend(eos_token_ids(&json)?);
            looked_at.push(path);
        }
    }
    let mut stop = Vec::new();
    for id in ids {
        // Configurations may name ids of another vocabulary; what isn't a token never stops anything.
        if tokenizer.id_to_token(id).is_some() && !stop.contains(&id) {
            stop.push(id);
        }
    }
    let Some(eos) = stop.first() else {
        let problem = format!(
            "expected `eos_token` in tokenizer_config.json or `eos_token_id` in generation_config.json or \
             config.json, naming a token of tokenizer.json; found none in {looked_at:?}"
        );
        return Err(Error::Checkpoint { path: dir.to_path_buf(), problem });
    };
    Ok((*eos, stop))
}

/// `eos_token` of tokenizer_config.json: a string, or an object with `content`.
fn eos_token(json: &JsonObject, tokenizer: &Tokenizer) -> Result<Option<u32>> {
    let key = "eos_token";
    let token = match json.get(key) {
        None => return Ok(None),
        Some(Value::String(token)) => token.clone(),
        Some(Value::Object(_)) => {
            let object = json.object(key)?;
            let content = object.as_ref().map(|object| object.string("content")).transpose()?.flatten();
            match content {
                Some(content) => content.to_string(),
                None => return Err(json.error(key, "a string, or an object with `content`", "an object")),
            }
        }
        Some(other) => {
            return Err(json.error(key, "a string, or an object with `content`", &describe(other)));
        }
    };
    match tokenizer.token_to_id(&token) {
        Some(id) => Ok(Some(id)),
        None => Err(json.error(key, "a token of tokenizer.json", &format!("`{token}`"))),
    }
}

/// `eos_token_id`: an id, or a list of them.
fn eos_token_ids(json: &JsonObject) -> Result<Vec<u32>> {
    let key = "eos_token_id";
    let as_id = |value: &Value| match value.as_u64().and_then(|id| u32::try_from(id).ok()) {
        Some(id) => Ok(id),
        None => Err(json.error(key, "a token id, or a list of them", &describe(value))),
    };
    match json.get(key) {
        None => Ok(Vec::new()),
        Some(Value::Array(items)) => items.iter().map(as_id).collect(),
        Some(value) => Ok(vec![as_id(value)?]),
    }
}
