//! The checkpoint that prompts are baked into.

use crate::checkpoint::json::read_map;
use crate::checkpoint::{BareCheckpoint, GgufFile, ModelConfig, TextTokenizer, Weights};
use crate::{Error, Result};
use candle_core::quantized::gguf_file::Value;
use serde_json::{Map, Value as Json};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

pub(super) use crate::checkpoint::tensors::{EMBEDDING, HEAD};

/// An open checkpoint.
pub(super) struct Base {
    pub path: PathBuf,
    pub config: ModelConfig,
    pub tokenizer: TextTokenizer,
    pub weights: Weights,
    /// Key-value pairs of a GGUF file; `None` for a folder.
    pub metadata: Option<HashMap<String, Value>>,
    /// Warnings about differences from the configuration and about parts that are not read.
    pub warnings: Vec<String>,
}

impl Base {
    pub fn open(path: &Path) -> Result<Self> {
        let path = path.to_path_buf();
        if path.is_dir() {
            let BareCheckpoint { config, weights, mut warnings, .. } = BareCheckpoint::open_folder(&path)?;
            let mut tokenizer = TextTokenizer::from_folder(&path)?;
            tokenizer.vocab_size = config.vocab_size;
            warnings.extend(tokenizer.all_warnings());
            return Ok(Self { path, config, tokenizer, weights, metadata: None, warnings });
        }
        let file = GgufFile::open(&path)?;
        let (config, tokenizer) = (file.config().clone(), TextTokenizer::from_gguf(&file)?);
        let metadata = Some(file.values().clone());
        let warnings = tokenizer.all_warnings().collect();
        Ok(Self { path, config, tokenizer, weights: file.into(), metadata, warnings })
    }

    /// Name of the matrix that computes the logits.
    pub fn head(&self) -> &'static str {
        if self.config.tie_word_embeddings { EMBEDDING } else { HEAD }
    }

    /// A JSON object next to a folder's weights; `None` if there is no such file.
    ///
    /// # Errors
    /// Returns an error if the file can't be read or is no object.
    pub fn json(&self, name: &str) -> Result<Option<Map<String, Json>>> {
        let path = self.path.join(name);
        if self.metadata.is_some() || !path.is_file() {
            return Ok(None);
        }
        read_map(&path).map(Some)
    }

    /// A string of a GGUF file's key-value pairs.
    pub fn string(&self, key: &str) -> Option<&str> {
        self.metadata.as_ref()?.get(key)?.to_string().ok().map(String::as_str)
    }

    /// A whole number of a GGUF file's key-value pairs.
    pub fn number(&self, key: &str) -> Option<u32> {
        let value = self.metadata.as_ref()?.get(key)?;
        value.to_u32().ok()
    }

    /// The token ids that the tokenizer adds before and after every text.
    pub fn around(&self) -> Result<[Vec<u32>; 2]> {
        for probe in ["a", "0", "the", " ", "\n"] {
            let (bare, with_special) =
                (self.tokenizer.encode(probe, false)?, self.tokenizer.encode(probe, true)?);
            let at = (0..=with_special.len().saturating_sub(bare.len()))
                .find(|at| with_special[*at..].starts_with(&bare));
            if let Some(at) = at.filter(|_| !bare.is_empty()) {
                return Ok([with_special[..at].to_vec(), with_special[at + bare.len()..].to_vec()]);
            }
        }
        let problem = "expected a tokenizer that adds tokens around a text, found one that changes it";
        Err(Error::Tokenizer(format!("{}: {problem}", self.path.display())))
    }

    /// The text of special tokens, as in a prompt.
    pub fn text_of(&self, ids: &[u32]) -> String {
        ids.iter().filter_map(|id| self.tokenizer.tokenizer.id_to_token(*id)).collect()
    }
}
