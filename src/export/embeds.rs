//! A prompt's vectors, followed by a text's embeddings, as a file that `torch.load` reads.

use super::base::{Base, EMBEDDING};
use super::{NamedPrompt, ValueType, torch, values};
use crate::data::Template;
use crate::files::write_atomically;
use crate::{Error, Result};
use candle_core::quantized::GgmlDType;
use candle_core::{Device, Tensor};
use std::path::Path;

/// The options of [`prompt_embeds`].
#[derive(Debug)]
pub struct PromptEmbeds<'a> {
    /// The prompt.
    pub prompt: &'a NamedPrompt,
    /// The base and the text whose embeddings follow, tokenised as in tuning; `None` for the prompt alone.
    pub text: Option<(&'a Path, &'a str)>,
    /// The file to write.
    pub out: &'a Path,
    /// Type of the values; `None` is f32.
    pub value_type: Option<ValueType>,
}

impl NamedPrompt {
    /// The text for an input in the form on which the prompt was tuned.
    ///
    /// # Errors
    /// Returns an error if the prompt's folder does not contain the verbalizer.
    pub fn render(&self, input: &str) -> Result<String> {
        match &self.adapter.task {
            Some(task) => Ok(Template::parse(&task.verbalizer)?.render(input)),
            None => Err(Error::Invalid(format!(
                "--input: expected a verbalizer in task.json of {}, found no such file; hint: --text with the whole text",
                self.name
            ))),
        }
    }
}

/// The result of [`prompt_embeds`].
#[derive(Debug)]
pub struct WrittenEmbeds {
    /// Rows of the tensor.
    pub rows: usize,
    /// Warnings about the base.
    pub warnings: Vec<String>,
}

/// Writes a tensor [rows, C] in `torch.save`'s format: the prompt's vectors, then those of the text's tokens, all
/// without the model's `embedding_multiplier`. If the prompt stands after a head, the head's tokens come first.
///
/// # Errors
/// Returns an error if the base can't be read or has another width, the text does not begin with the head, or a value does not fit the type; [`Error::Io`] if
/// the file can't be written.
pub fn prompt_embeds(options: &PromptEmbeds<'_>) -> Result<WrittenEmbeds> {
    let mut warnings = Vec::new();
    let prompt = options.prompt.adapter.prompt.embeddings("--embeds")?;
    let rows = match options.text {
        None if !options.prompt.adapter.prompt.before().is_empty() => {
            return Err(Error::Invalid(format!(
                "--text: required for {}, whose virtual tokens stand after a text (prompt.position = \"after_head\"); hint: \
                 --input, or --text with the whole text",
                options.prompt.name
            )));
        }
        None => prompt.clone(),
        Some((model, text)) => {
            let base = Base::open(model)?;
            warnings.clone_from(&base.warnings);
            let name = Path::new(&options.prompt.name);
            let adapter = &options.prompt.adapter;
            adapter.check_fits(name, &model.display().to_string(), &base.config)?;
            let ids = base.tokenizer.encode(text, true).map_err(|error| error.in_text("--text"))?;
            if ids.is_empty() {
                return Err(Error::Invalid("--text: expected at least one token, found none".into()));
            }
            if let Some(before) = adapter.task.as_ref().and_then(|task| task.before.as_ref()) {
                before.check(&ids).map_err(|problem| Error::Invalid(format!("--text: {problem}")))?;
            }
            let (before, own) = (adapter.prompt.before().len(), ids.len());
            let rows = base.config_matrix(EMBEDDING)?.index_select(&Tensor::new(ids, &Device::Cpu)?, 0)?;
            Tensor::cat(&[&rows.narrow(0, 0, before)?, prompt, &rows.narrow(0, before, own - before)?], 0)?
        }
    };
    let dtype = options.value_type.map_or(GgmlDType::F32, ValueType::ggml);
    let (n, width) = rows.dims2()?;
    if values::is_quantised(dtype) {
        return Err(Error::Invalid(
            "--type: expected f32, f16 or bf16 for prompt embeddings, found q8_0".into(),
        ));
    }
    let file = torch::file([n, width], dtype, &values::encode(&rows, dtype)?)?;
    write_atomically(options.out, |out| out.write_all(&file))?;
    Ok(WrittenEmbeds { rows: n, warnings })
}
