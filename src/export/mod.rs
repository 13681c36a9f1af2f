//! Tuned prompts for other engines.
//!
//! A *baked* checkpoint is the base with each prompt's vectors as embeddings of new special tokens:
//!
//! ```text
//! embedding   [ base's V rows | <|NAME:0|> <|NAME:1|> ... ]     rows of the prompts
//! head        [ base's V rows | u          u          ... ]     a row that does not win, see unlikely.rs
//! ```
//!
//! An engine that serves the base serves the prompt where those tokens stand before the text. Without them the base
//! computes what it did: its rows are copied bit for bit, and rows are looked up and multiplied one by one.

mod base;
mod embeds;
mod folder;
mod gguf;
mod place;
mod prompts;
mod safetensors;
mod staging;
mod templates;
mod tokenizer;
pub(crate) mod torch;
mod unlikely;
mod values;

use crate::{Error, Result};
use base::Base;
use candle_core::quantized::GgmlDType;
use place::Placed;
use std::fmt;
use std::path::Path;
use std::str::FromStr;

pub use embeds::{PromptEmbeds, WrittenEmbeds, prompt_embeds};
pub use prompts::{NamedPrompt, base_model, read_prompts};
pub use unlikely::Unlikely;

/// File of a baked checkpoint that says how each prompt is put before a text.
pub const PROMPTS: &str = "prompts.json";

/// Type of the values that are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ValueType {
    /// 32-bit floats.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// Blocks of 32 8-bit integers with one scale, of GGUF alone.
    Q8_0,
}

impl ValueType {
    const ALL: [(Self, &'static str, GgmlDType); 4] = [
        (Self::F32, "f32", GgmlDType::F32),
        (Self::F16, "f16", GgmlDType::F16),
        (Self::Bf16, "bf16", GgmlDType::BF16),
        (Self::Q8_0, "q8_0", GgmlDType::Q8_0),
    ];

    fn ggml(self) -> GgmlDType {
        match self {
            Self::F32 => GgmlDType::F32,
            Self::F16 => GgmlDType::F16,
            Self::Bf16 => GgmlDType::BF16,
            Self::Q8_0 => GgmlDType::Q8_0,
        }
    }
}

impl FromStr for ValueType {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let found = Self::ALL.iter().find(|(_, known, _)| *known == name).map(|(value, ..)| *value);
        found.ok_or_else(|| Error::Invalid(format!("expected f32, f16, bf16 or q8_0, found {name:?}")))
    }
}

impl fmt::Display for ValueType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::ALL.iter().find(|(value, ..)| value == self).map_or("", |(_, name, _)| name);
        f.write_str(name)
    }
}

/// What a baked checkpoint is written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// A folder of safetensors, configuration and tokenizer.
    Safetensors,
    /// One GGUF file.
    Gguf,
}

/// What [`bake`] is asked for.
#[derive(Debug)]
pub struct Bake<'a> {
    /// The base: a checkpoint folder or a GGUF file.
    pub model: &'a Path,
    /// The prompts, one at least.
    pub prompts: Vec<NamedPrompt>,
    /// The folder or the `.gguf` file to write.
    pub out: &'a Path,
    /// What is written.
    pub format: Format,
    /// Type of the values; `None` keeps the base's, see [`bake`].
    pub value_type: Option<ValueType>,
}

/// What was written.
#[derive(Debug)]
pub struct Baked {
    /// Content of [`PROMPTS`].
    pub prompts: serde_json::Value,
    /// Rows of the new embedding.
    pub vocab_size: usize,
    /// The head's row of the new tokens.
    pub unlikely: Unlikely,
    /// Greatest part of its norm that a prompt's vector lost by rounding; 0 where it is written as f32.
    pub rounding: f64,
    /// Type that the prompts' vectors are written in.
    pub embedding_type: String,
    /// Prompts whose text form gives other tokens than the prompt was tuned on.
    pub inexact: Vec<String>,
    /// What of the base is read or written otherwise than it says, or is not read.
    pub warnings: Vec<String>,
}

/// Told of the work: what is done, how much of it, of how much.
pub type Progress<'a> = &'a mut dyn FnMut(&'static str, usize, usize);

/// Writes the base with the prompts as new special tokens `<|NAME:0|>`, `<|NAME:1|>` and so on.
///
/// Without a [`ValueType`] values keep the type that they have. The exceptions are those of a quantised GGUF base: its
/// tensors are dequantised to f32 for a folder; for a GGUF file they are copied as they are, but the embedding is written
/// as f32, as quantisation would spoil the prompts. With [`ValueType::Q8_0`] the embedding is f16 for the same reason.
///
/// The base runs once over a short text, on the CPU in bf16, to find tokens that are never likely (see [`Unlikely`]). All
/// other work reads, converts and writes one tensor at a time. `out` is there in full at the end, or not at all.
///
/// # Errors
/// A base that can't be read; prompts of another width; tokens that the base has already; an `out` that is there; a type or
/// tokenizer that the format does not have; [`Error::Io`].
pub fn bake(options: Bake<'_>, progress: Progress<'_>) -> Result<Baked> {
    let Bake { model, prompts, out, format, value_type } = options;
    if format == Format::Safetensors && value_type == Some(ValueType::Q8_0) {
        return Err(Error::Invalid("--type: expected f32, f16 or bf16 for safetensors, found q8_0".into()));
    }
    let staging = staging::Staging::new(out, format)?;
    let base = Base::open(model)?;
    let placed = Placed::new(&base, prompts)?;
    let vocabulary = match format {
        Format::Safetensors => None,
        Format::Gguf => Some(gguf::Vocabulary::new(&base, &placed)?),
    };
    let unlikely = unlikely::find(&base, &placed, progress)?;
    let matrices = values::Matrices::new(&base, &placed, &unlikely)?;
    let listed = templates::prompts_json(&base, &placed)?;
    let mut warnings = base.warnings.clone();
    let embedding = match vocabulary {
        None => folder::write(&staging, &matrices, value_type, progress)?,
        Some(vocabulary) => {
            let written = gguf::write(&staging, &matrices, &vocabulary, value_type, progress)?;
            warnings.extend(written.warnings);
            written.embedding
        }
    };
    staging.finish(&listed.json)?;
    Ok(Baked {
        prompts: listed.json,
        vocab_size: matrices.vocab_size(),
        rounding: values::rounding(&placed.rows, embedding)?,
        embedding_type: format!("{embedding:?}").to_lowercase(),
        inexact: listed.inexact,
        warnings,
        unlikely,
    })
}
