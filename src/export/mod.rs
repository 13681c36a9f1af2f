//! Tuned prompts for other engines.
//!
//! A *baked* checkpoint is the base with each prompt's vectors as embeddings of new special tokens:
//!
//! ```text
//! embedding   [ base's V rows | <|NAME:0|> <|NAME:1|> ... ]     rows of the prompts
//! head        [ base's V rows | u          u          ... ]     a row that does not win, see unlikely.rs
//! ```
//!
//! An engine that serves the base also serves the prompt if those tokens stand before the text. Without them the base
//! computes the same as before: its rows are copied bit for bit, and each row is looked up and multiplied independently.

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

/// File of a baked checkpoint with the text that puts each prompt before an input.
pub const PROMPTS: &str = "prompts.json";

/// Type of the written values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ValueType {
    /// 32-bit floats.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// Blocks of 32 8-bit integers with one scale; only in GGUF.
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
        Self::ALL[self as usize].2
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
        f.write_str(Self::ALL[*self as usize].1)
    }
}

/// Format of a baked checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// A folder of safetensors, configuration and tokenizer.
    Safetensors,
    /// One GGUF file.
    Gguf,
}

/// The options of [`bake`].
#[derive(Debug)]
pub struct Bake<'a> {
    /// The base: a checkpoint folder or a GGUF file.
    pub model: &'a Path,
    /// The prompts, at least one.
    pub prompts: Vec<NamedPrompt>,
    /// The folder or the `.gguf` file to write.
    pub out: &'a Path,
    /// The format.
    pub format: Format,
    /// Type of the values; `None` keeps the base's types, see [`bake`].
    pub value_type: Option<ValueType>,
}

/// The result of [`bake`].
#[derive(Debug)]
pub struct Baked {
    /// Content of [`PROMPTS`].
    pub prompts: serde_json::Value,
    /// Rows of the new embedding.
    pub vocab_size: usize,
    /// The head's row for the new tokens.
    pub unlikely: Unlikely,
    /// Largest fraction of its norm that a prompt's vector lost by rounding; 0 if it is written as f32.
    pub rounding: f64,
    /// Type in which the prompts' vectors are written.
    pub embedding_type: String,
    /// Prompts whose text form gives other tokens than those on which the prompt was tuned.
    pub inexact: Vec<String>,
    /// Warnings about the base and about differences between the base and the output.
    pub warnings: Vec<String>,
}

/// Progress callback: (stage, done, total).
pub type ProgressCallback<'a> = &'a mut dyn FnMut(&'static str, usize, usize);

/// Writes the base with the prompts as new special tokens `<|NAME:0|>`, `<|NAME:1|>` and so on.
///
/// Without a [`ValueType`] values keep their type, except those of a quantised GGUF base: for a folder its tensors are
/// dequantised to f32; for a GGUF file they are copied unchanged, but the embedding is written as f32, because
/// quantisation would spoil the prompts. With [`ValueType::Q8_0`] the embedding is f16 for the same reason.
///
/// The base runs once over a short text, on the CPU in bf16, to find tokens that are never likely (see [`Unlikely`]).
/// Otherwise one tensor at a time is read, converted and written. In the end `out` is complete, or it does not exist.
///
/// # Errors
/// Returns an error if the base can't be read, a prompt has another width, the base already has the tokens, `out`
/// exists, or the format does not have the type or the tokenizer; [`Error::Io`] if a file can't be written.
pub fn bake(options: Bake<'_>, progress: ProgressCallback<'_>) -> Result<Baked> {
    let Bake { model, prompts, out, format, value_type } = options;
    if format == Format::Safetensors && value_type == Some(ValueType::Q8_0) {
        return Err(Error::Invalid("--type: expected f32, f16 or bf16 for safetensors, found q8_0".into()));
    }
    let staging = staging::StagedOutput::new(out, format)?;
    let base = Base::open(model)?;
    let placed = Placed::new(&base, prompts)?;
    let vocabulary = match format {
        Format::Safetensors => None,
        Format::Gguf => Some(gguf::VocabularyPairs::new(&base, &placed)?),
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
