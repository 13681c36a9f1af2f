//! A checkpoint on disk: configuration, tokenizer and weights, of a folder or of a GGUF file.

use std::path::Path;

use super::config::ModelConfig;
use super::gguf::GgufFile;
use super::tokenizer::TextTokenizer;
use super::weights::Weights;
use crate::{Error, Result};

/// A checkpoint with its tokenizer.
#[derive(Debug)]
pub struct Checkpoint {
    /// Shape and multipliers.
    pub config: ModelConfig,
    /// Tokenizer and end-of-text tokens.
    pub tokenizer: TextTokenizer,
    /// The tensors.
    pub weights: Weights,
    /// `safetensors`, or `gguf` with its quantisation types.
    pub format: String,
}

/// A checkpoint without its tokenizer, for work on token ids alone.
#[derive(Debug)]
pub struct BareCheckpoint {
    /// Shape and multipliers.
    pub config: ModelConfig,
    /// The tensors.
    pub weights: Weights,
    /// `safetensors`, or `gguf` with its quantisation types.
    pub format: String,
}

impl Checkpoint {
    /// Opens a checkpoint folder (config.json, tokenizer.json, model.safetensors or its shards) or a
    /// `.gguf` file. Tensors are read later, through [`Weights::tensor`].
    ///
    /// # Errors
    /// Whatever is missing, malformed or not supported, by its name; see [`ModelConfig::from_json`],
    /// [`TextTokenizer::open`] and [`Weights`].
    pub fn open(local_path: &Path) -> Result<Self> {
        let (mut tokenizer, bare) = match kind(local_path)? {
            Kind::Folder => {
                let config = ModelConfig::from_json(&local_path.join("config.json"))?;
                let tokenizer = TextTokenizer::from_folder(local_path)?;
                (tokenizer, BareCheckpoint::new(config, Weights::open_folder(local_path)?))
            }
            Kind::Gguf => {
                let file = GgufFile::open(local_path)?;
                (TextTokenizer::from_gguf(&file)?, BareCheckpoint::new(file.config().clone(), file.into()))
            }
        };
        let BareCheckpoint { config, weights, format } = bare;
        tokenizer.vocab_size = config.vocab_size;
        if tokenizer.eos_token_id as usize >= config.vocab_size {
            let problem = format!(
                "end-of-text token: expected an id under `vocab_size` ({}), found {}",
                config.vocab_size, tokenizer.eos_token_id
            );
            return Err(Error::Checkpoint { path: local_path.to_path_buf(), problem });
        }
        Ok(Self { config, tokenizer, weights, format })
    }

    /// Opens a checkpoint that may lack a tokenizer.
    ///
    /// # Errors
    /// As [`Checkpoint::open`], the tokenizer's left out.
    pub fn open_without_tokenizer(local_path: &Path) -> Result<BareCheckpoint> {
        Ok(match kind(local_path)? {
            Kind::Folder => {
                let config = ModelConfig::from_json(&local_path.join("config.json"))?;
                BareCheckpoint::new(config, Weights::open_folder(local_path)?)
            }
            Kind::Gguf => {
                let file = GgufFile::open(local_path)?;
                BareCheckpoint::new(file.config().clone(), file.into())
            }
        })
    }
}

impl BareCheckpoint {
    fn new(config: ModelConfig, weights: Weights) -> Self {
        let format = weights.format();
        Self { config, weights, format }
    }
}

enum Kind {
    Folder,
    Gguf,
}

fn kind(path: &Path) -> Result<Kind> {
    let metadata = std::fs::metadata(path).map_err(Error::io(path))?;
    if metadata.is_dir() {
        return Ok(Kind::Folder);
    }
    if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
        return Ok(Kind::Gguf);
    }
    let problem = "expected a checkpoint folder or a .gguf file, found another file".to_string();
    Err(Error::Checkpoint { path: path.to_path_buf(), problem })
}
