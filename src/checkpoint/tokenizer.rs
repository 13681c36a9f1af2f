//! The checkpoint's tokenizer, from `tokenizer.json` of a folder or from GGUF metadata, with the tokens that end a
//! text.

mod configured;
mod gguf;
mod pre;
mod rows;
#[cfg(test)]
pub(crate) mod testing;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tokenizers::{Encoding, PaddingParams, Tokenizer};

pub(crate) use gguf::ends_by_text;
pub(crate) use pre::find_name as pre_tokenizer_name;
pub(crate) use rows::{TokenWithoutRow, first_without_row};

use self::configured::Configured;

use super::gguf::GgufFile;
use super::json::{JsonObject, describe};
use crate::checkpoint::typed::TypedKeys;
use crate::layout::model_folder::{CONFIG, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG};
use crate::{Error, Result};

/// The name of the end-of-text token.
const EOS: &str = "eos_token";

/// A tokenizer with the ids of the tokens that end a text.
#[derive(Debug, Clone)]
pub struct TextTokenizer {
    /// Encodes text without truncation and padding; each special token in a text becomes one id.
    pub tokenizer: Tokenizer,
    /// The token that ends a training target.
    pub eos_token_id: u32,
    /// The tokens that stop generation, `eos_token_id` first.
    pub stop_token_ids: Vec<u32>,
    /// Rows of the model's embedding: a text with a token that has no row is refused. `usize::MAX` if no configuration
    /// states the number.
    pub vocab_size: usize,
    /// Warnings about settings in the files that the tokenizer does not follow, and about values that were filled in.
    pub warnings: Vec<String>,
}

impl TextTokenizer {
    /// Reads the tokenizer of a folder or of a `.gguf` file.
    ///
    /// # Errors
    /// Returns the errors of [`TextTokenizer::from_folder`] and [`TextTokenizer::from_gguf`].
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() { Self::from_folder(path) } else { Self::from_gguf(&GgufFile::open(path)?) }
    }

    /// Reads `tokenizer.json` with the tokens that `tokenizer_config.json` and the files of older versions add, as
    /// transformers does, and the end-of-text tokens from these files, `generation_config.json` and `config.json`.
    ///
    /// # Errors
    /// Returns an error if `tokenizer.json` is missing or malformed, or if no file names an end-of-text token that the
    /// tokenizer knows.
    pub fn from_folder(dir: &Path) -> Result<Self> {
        let path = dir.join(TOKENIZER);
        if !path.is_file() {
            let problem = "expected `tokenizer.json`, found no such file; save the tokenizer with \
                           transformers' `AutoTokenizer` to get one"
                .to_string();
            return Err(Error::Checkpoint { path: dir.to_path_buf(), problem });
        }
        let failed = |error| Error::Tokenizer(format!("{}: {error}", path.display()));
        let mut tokenizer = Tokenizer::from_file(&path).map_err(failed)?;
        let configured = Configured::read(dir)?;
        known_eos(&configured, &tokenizer)?;
        let warnings = configured.apply(&mut tokenizer)?;
        // Both may be left over from the tokenizer's training, and would silently truncate or pad.
        tokenizer.with_truncation(None).map_err(failed)?;
        tokenizer.with_padding(None::<PaddingParams>);
        let (eos_token_id, mut stop_token_ids) = end_tokens(dir, &configured, &tokenizer)?;
        let config = JsonObject::read_if_exists(&dir.join(CONFIG))?;
        let vocab_size = config.map(|config| config.size("vocab_size")).transpose()?.flatten();
        let vocab_size = vocab_size.unwrap_or(usize::MAX);
        // A token without a row is never generated.
        stop_token_ids.retain(|id| *id == eos_token_id || (*id as usize) < vocab_size);
        Ok(Self { tokenizer, eos_token_id, stop_token_ids, vocab_size, warnings })
    }

    /// Texts of the tokens that a checkpoint's folder names, such as `eos_token`.
    ///
    /// # Errors
    /// Returns an error if a file or a value is malformed.
    pub fn named_tokens(dir: &Path) -> Result<BTreeMap<String, String>> {
        Ok(Configured::read(dir)?.names())
    }

    /// Builds the tokenizer from a GGUF file's metadata.
    ///
    /// # Errors
    /// Returns [`Error::Unsupported`] with a tokenizer model or pre-tokenizer that isn't known, [`Error::Checkpoint`]
    /// with a key that is missing or does not fit.
    pub fn from_gguf(file: &GgufFile) -> Result<Self> {
        gguf::build(file.metadata(), file.config().vocab_size)
    }

    /// Token ids of a text; `add_special_tokens` adds the tokens that the tokenizer puts around every text, such as a
    /// beginning-of-text token.
    ///
    /// # Errors
    /// Returns [`Error::Tokenizer`] with the tokenizer's error, or with the token for which the model's embedding has
    /// no row.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        Ok(self.encoding(text, add_special_tokens)?.get_ids().to_vec())
    }

    /// As [`encode`](Self::encode), with all information about the tokens.
    ///
    /// # Errors
    /// Returns the errors of [`encode`](Self::encode).
    pub fn encoding(&self, text: &str, add_special_tokens: bool) -> Result<Encoding> {
        let encoding = self.tokenizer.encode(text, add_special_tokens);
        let encoding = encoding.map_err(|error| Error::Tokenizer(error.to_string()))?;
        match first_without_row(&self.tokenizer, &encoding, self.vocab_size) {
            Some(rowless) => Err(Error::Tokenizer(rowless.problem)),
            None => Ok(encoding),
        }
    }

    /// Whether a token is special, so that it is left out of an answer's text.
    pub fn is_special(&self, id: u32) -> bool {
        let token = self.tokenizer.id_to_token(id);
        token.is_some_and(|token| self.tokenizer.get_added_vocabulary().is_special_token(&token))
    }

    /// The text of token ids; `skip_special_tokens` leaves special tokens out.
    ///
    /// # Errors
    /// Returns [`Error::Tokenizer`] with the tokenizer's error.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        let text = self.tokenizer.decode(ids, skip_special_tokens);
        text.map_err(|error| Error::Tokenizer(error.to_string()))
    }

    /// The text of one token, its leading space included; bytes that are not a whole character become U+FFFD. `None` if
    /// there is no such token.
    pub fn token_text(&self, id: u32) -> Option<String> {
        let piece = self.tokenizer.id_to_token(id)?;
        // Sentencepiece's mark of a space, which its decoder strips at the start of a text.
        if piece.starts_with('\u{2581}') {
            return Some(piece.replace('\u{2581}', " "));
        }
        self.tokenizer.decode(&[id], false).ok()
    }
}

/// Refuses an `eos_token` that is not in the vocabulary: transformers would add it, and no model ever generates it.
fn known_eos(configured: &Configured, tokenizer: &Tokenizer) -> Result<()> {
    let Some(eos) = configured.named(EOS) else { return Ok(()) };
    let content = eos.token.content.as_str();
    if tokenizer.token_to_id(content).is_some() || configured.defines(content) {
        return Ok(());
    }
    let problem = format!("`{EOS}`: expected a token of tokenizer.json, found `{content}`");
    Err(Error::Checkpoint { path: eos.path.clone(), problem })
}

/// The token that ends a target, and all tokens that stop generation.
fn end_tokens(dir: &Path, configured: &Configured, tokenizer: &Tokenizer) -> Result<(u32, Vec<u32>)> {
    let mut ids = Vec::new();
    let mut looked_at = Vec::<PathBuf>::new();
    looked_at.extend(Some(dir.join(TOKENIZER_CONFIG)).filter(|path| path.exists()));
    if let Some(eos) = configured.named(EOS) {
        ids.extend(tokenizer.token_to_id(&eos.token.content));
    }
    for name in [GENERATION_CONFIG, CONFIG] {
        let path = dir.join(name);
        if let Some(json) = JsonObject::read_if_exists(&path)? {
            ids.extend(eos_token_ids(&json)?);
            looked_at.push(path);
        }
    }
    let mut stop = Vec::new();
    for id in ids {
        // Configurations may name ids of another vocabulary; an id without a token stops nothing.
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
