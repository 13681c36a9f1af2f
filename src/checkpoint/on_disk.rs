//! A checkpoint on disk: configuration, tokenizer and weights of a folder or of a GGUF file.

use std::path::Path;

use super::config::ModelConfig;
use super::gguf::GgufFile;
use super::tokenizer::TextTokenizer;
use super::weights::Weights;
use super::{content, names};
use crate::layout::model_folder::{CONFIG, TOKENIZER};
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
    /// Warnings about differences from the configuration and about parts that are not read; the checkpoint can be used.
    pub warnings: Vec<String>,
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
    /// Warnings about differences from the configuration and about parts that are not read; the checkpoint can be used.
    pub warnings: Vec<String>,
}

impl Checkpoint {
    /// Opens a checkpoint folder (config.json, tokenizer.json, model.safetensors or its shards) or a
    /// `.gguf` file. Tensors are read later, through [`Weights::tensor`].
    ///
    /// # Errors
    /// Returns an error if a part is missing, malformed or not supported; see [`ModelConfig::from_json`],
    /// [`TextTokenizer::open`] and [`Weights`].
    pub fn open(local_path: &Path) -> Result<Self> {
        let (mut tokenizer, bare) = match kind(local_path)? {
            CheckpointKind::Folder => {
                let bare = BareCheckpoint::open_folder(local_path)?;
                let tokenizer = local_path.join(TOKENIZER);
                if tokenizer.is_file() {
                    content::expect_file(&tokenizer, "JSON")?;
                }
                (TextTokenizer::from_folder(local_path)?, bare)
            }
            CheckpointKind::Gguf => {
                let file = GgufFile::open(local_path)?;
                (TextTokenizer::from_gguf(&file)?, BareCheckpoint::from_gguf(file))
            }
        };
        let BareCheckpoint { config, weights, format, mut warnings } = bare;
        tokenizer.vocab_size = config.vocab_size;
        warnings.extend(tokenizer.all_warnings());
        if tokenizer.eos_token_id as usize >= config.vocab_size {
            let problem = format!(
                "end-of-text token: expected an id under `vocab_size` ({}), found {}",
                config.vocab_size, tokenizer.eos_token_id
            );
            return Err(Error::Checkpoint { path: local_path.to_path_buf(), problem });
        }
        Ok(Self { config, tokenizer, weights, format, warnings })
    }

    /// Opens a checkpoint that may lack a tokenizer.
    ///
    /// # Errors
    /// Returns the errors of [`Checkpoint::open`], except those about the tokenizer.
    pub fn open_without_tokenizer(local_path: &Path) -> Result<BareCheckpoint> {
        Ok(match kind(local_path)? {
            CheckpointKind::Folder => BareCheckpoint::open_folder(local_path)?,
            CheckpointKind::Gguf => {
                let file = GgufFile::open(local_path)?;
                BareCheckpoint::from_gguf(file)
            }
        })
    }
}

impl BareCheckpoint {
    /// Opens configuration and weights of a folder.
    ///
    /// # Errors
    /// Returns the errors of [`Checkpoint::open`].
    pub(crate) fn open_folder(path: &Path) -> Result<Self> {
        let (mut config, mut warnings) = ModelConfig::read(&path.join(CONFIG))?;
        let mut weights = Weights::open_folder(path)?;
        warnings.extend(names::settle_head(&mut config, &mut weights)?);
        warnings.extend(names::unused(&config, &weights));
        let format = weights.format();
        Ok(Self { config, weights, format, warnings })
    }

    fn from_gguf(file: GgufFile) -> Self {
        let config = file.config().clone();
        let weights = Weights::from(file);
        let format = weights.format();
        Self { config, weights, format, warnings: Vec::new() }
    }
}

enum CheckpointKind {
    Folder,
    Gguf,
}

fn kind(path: &Path) -> Result<CheckpointKind> {
    let metadata = std::fs::metadata(path).map_err(Error::io(path))?;
    if metadata.is_dir() {
        return Ok(CheckpointKind::Folder);
    }
    if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
        return Ok(CheckpointKind::Gguf);
    }
    let problem = "expected a checkpoint folder or a .gguf file, found another file".to_string();
    Err(Error::Checkpoint { path: path.to_path_buf(), problem })
}
