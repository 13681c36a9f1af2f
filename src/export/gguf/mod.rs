//! A baked checkpoint as one GGUF file, in the layout of llama.cpp's conversion.

mod layers;
mod metadata;
mod vocabulary;
mod writer;

use super::base::{Base, EMBEDDING, HEAD};
use super::staging::StagedOutput;
use super::unlikely::TEXTS;
use super::values::{self, Matrices};
use super::{ProgressCallback, ValueType};
use crate::checkpoint::gguf::{gguf_name, permute};
use crate::checkpoint::{GgufFile, TextTokenizer, names};
use crate::{Error, Result};
use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};
use layers::LayerValues;
use std::borrow::Cow;
use std::io::Write;
use writer::GgufEntry;

pub(super) use vocabulary::VocabularyPairs;

/// A tensor to write, and its source.
struct Planned {
    entry: GgufEntry,
    source: PlannedSource,
}

enum PlannedSource {
    Embedding,
    Head,
    /// A tensor of a GGUF base, unchanged.
    Copied(String),
    /// A tensor by its Hugging Face name, converted; the rows of q and k are brought into llama.cpp's order.
    Converted(String),
    /// Rows of a stacked tensor by its Hugging Face name.
    Rows(String, std::ops::Range<usize>),
    /// A part of a tensor of experts or of a Mamba2 layer by its Hugging Face name, converted.
    Layer(String, LayerValues),
    /// The same of a GGUF base, unchanged.
    CopiedPart(String, usize),
    /// Computed values.
    Values(Vec<f32>),
}

/// The result.
pub(super) struct Written {
    /// Type of the embedding.
    pub embedding: GgmlDType,
    /// Warnings about readers of the file that behave differently from the base.
    pub warnings: Vec<String>,
}

/// Writes the file and reads it to check it.
pub(super) fn write(
    staging: &StagedOutput,
    matrices: &Matrices<'_>,
    vocabulary: &VocabularyPairs,
    value_type: Option<ValueType>,
    progress: ProgressCallback<'_>,
) -> Result<Written> {
    let base = matrices.base;
    if base.config.mamba.as_ref().is_some_and(|mamba| mamba.dt_limit != (0.0, f64::INFINITY)) {
        let what = "GGUF of Mamba2 layers whose time step is limited (`time_step_limit`)".to_string();
        let hint = "llama.cpp does not limit it; bake it with --format safetensors".to_string();
        return Err(Error::Unsupported { path: base.path.clone(), what, hint });
    }
    let plan = TensorPlan { base, matrices, value_type };
    let planned = plan.all()?;
    let embedding =
        planned.iter().find(|p| matches!(p.source, PlannedSource::Embedding)).map(|p| p.entry.dtype);
    let metadata = metadata::pairs(matrices, vocabulary, value_type, dominant(&planned));
    let path = staging.gguf();
    let entries: Vec<&GgufEntry> = planned.iter().map(|planned| &planned.entry).collect();
    let mut written = 0;
    staging.write(&path, |out| {
        writer::write(&path, &metadata, &entries, out, |i, out| {
            written += 1;
            progress("writing", written, planned.len());
            plan.values(&planned[i], out)
        })
    })?;
    let warnings = check(&path, matrices)?;
    let embedding = embedding
        .ok_or_else(|| Error::Invalid("expected an embedding among the tensors, found none".into()))?;
    Ok(Written { embedding, warnings })
}

/// The type of most matrices.
fn dominant(planned: &[Planned]) -> GgmlDType {
    let of = |dtype| planned.iter().filter(|p| p.entry.shape.len() > 1 && p.entry.dtype == dtype).count();
    let types = planned.iter().map(|planned| planned.entry.dtype);
    types.max_by_key(|dtype| of(*dtype)).unwrap_or(GgmlDType::F32)
}

struct TensorPlan<'a> {
    base: &'a Base,
    matrices: &'a Matrices<'a>,
    value_type: Option<ValueType>,
}

impl TensorPlan<'_> {
    fn all(&self) -> Result<Vec<Planned>> {
        let base = self.base;
        let mut all = Vec::new();
        let outer = |name: &str, source, dtype| Planned {
            entry: GgufEntry { name: name.into(), shape: self.matrices.shape().to_vec(), dtype },
            source,
        };
        all.push(outer("token_embd.weight", PlannedSource::Embedding, self.embedding()?));
        all.push(outer(
            "output.weight",
            PlannedSource::Head,
            self.matrix(base.head(), base.config.hidden_size)?,
        ));
        // Tensors that the model does not use are left out, because llama.cpp would use them: a bias that the
        // configuration switches off.
        let read = names::expected(&base.config, &base.weights);
        for name in base.weights.names() {
            if name == EMBEDDING || name == HEAD || !read.contains(&name) {
                continue;
            }
            all.extend(self.tensor(name)?);
        }
        for (name, factors) in metadata::rope_factors(&base.config, &base.path)? {
            let entry = GgufEntry { name: name.into(), shape: vec![factors.len()], dtype: GgmlDType::F32 };
            all.push(Planned { entry, source: PlannedSource::Values(factors) });
        }
        Ok(all)
    }

    /// Type of the embedding: prompts are not quantised.
    fn embedding(&self) -> Result<GgmlDType> {
        let dtype = match self.value_type {
            Some(ValueType::Q8_0) => GgmlDType::F16,
            Some(value_type) => value_type.ggml(),
            None => self.base.dtype_of(EMBEDDING)?,
        };
        Ok(if values::is_quantised(dtype) { GgmlDType::F32 } else { dtype })
    }

    /// Type of a matrix with rows of `columns`: f16 if rows are not a multiple of the quantisation block, as in
    /// llama.cpp.
    fn matrix(&self, name: &str, columns: usize) -> Result<GgmlDType> {
        let dtype = match self.value_type {
            Some(value_type) => value_type.ggml(),
            None => self.base.dtype_of(name)?,
        };
        Ok(if columns.is_multiple_of(dtype.block_size()) { dtype } else { GgmlDType::F16 })
    }

    /// One tensor of the base; two if it is gate and up in one.
    fn tensor(&self, name: String) -> Result<Vec<Planned>> {
        if let Some(planned) = self.layer_tensor(&name)? {
            return Ok(planned);
        }
        let stored = self.base.weights.stored(&name)?;
        let (shape, from_gguf) = (stored.shape, self.base.metadata.is_some());
        // llama.cpp computes with norms and biases in f32.
        let dtype = match shape[..] {
            [_, columns] => self.matrix(&name, columns)?,
            _ => GgmlDType::F32,
        };
        if let Some((layer, "weight")) = name.split_once(".shared_mlp.input_linear.") {
            let (rows, f) = (&shape[..], self.base.config.intermediate_size);
            let part = |module: &str, range: std::ops::Range<usize>| {
                let hf = format!("{layer}.mlp.{module}.weight");
                let gguf = self.gguf_name(&hf).ok_or_else(|| self.unknown(&hf))?;
                let entry = GgufEntry { name: gguf, shape: vec![f, rows[1]], dtype };
                Ok::<_, Error>(Planned { entry, source: PlannedSource::Rows(name.clone(), range) })
            };
            return Ok(vec![part("gate_proj", 0..f)?, part("up_proj", f..2 * f)?]);
        }
        let hf = name.replace(".shared_mlp.output_linear.", ".mlp.down_proj.");
        let entry = GgufEntry { name: self.gguf_name(&hf).ok_or_else(|| self.unknown(&name))?, shape, dtype };
        let same = values::is(stored.dtype, dtype);
        let source =
            if from_gguf && same { PlannedSource::Copied(name) } else { PlannedSource::Converted(name) };
        Ok(vec![Planned { entry, source }])
    }

    /// GGUF's name of a tensor. If the model has experts too, the names of the dense network end in `_shexp`.
    fn gguf_name(&self, hf: &str) -> Option<String> {
        let name = gguf_name(hf)?;
        let dense = [".ffn_gate.", ".ffn_up.", ".ffn_down."].into_iter().find(|module| name.contains(module));
        Some(match dense {
            Some(module) if self.base.config.experts.is_some() => {
                name.replace(module, &format!("{}_shexp.", module.trim_end_matches('.')))
            }
            _ => name,
        })
    }

    fn unknown(&self, name: &str) -> Error {
        let hint = "bake it as safetensors".to_string();
        Error::Unsupported { path: self.base.path.clone(), what: format!("tensor `{name}` in GGUF"), hint }
    }

    fn values(&self, planned: &Planned, out: &mut dyn Write) -> Result<()> {
        let (dtype, weights) = (planned.entry.dtype, &self.base.weights);
        let converted = |tensor: Tensor| Ok::<_, Error>(vec![Cow::Owned(values::encode(&tensor, dtype)?)]);
        let pieces: Vec<Cow<'_, [u8]>> = match &planned.source {
            PlannedSource::Embedding => self.matrices.embedding(dtype)?.into(),
            PlannedSource::Head => self.matrices.head(dtype)?.into(),
            PlannedSource::Copied(name) => vec![Cow::Borrowed(weights.stored(name)?.bytes)],
            PlannedSource::Layer(name, part) => converted(self.layer_values(name, *part)?)?,
            PlannedSource::CopiedPart(name, part) => {
                vec![Cow::Borrowed(weights.stored_parts(name)?[*part].bytes)]
            }
            PlannedSource::Converted(name) => converted(self.rotated(name)?)?,
            PlannedSource::Rows(name, range) => {
                let shape = weights.stored(name)?.shape;
                let all = weights.tensor(name, &shape, DType::F32, &Device::Cpu)?;
                converted(all.narrow(0, range.start, range.len())?.contiguous()?)?
            }
            PlannedSource::Values(list) => converted(Tensor::new(list.as_slice(), &Device::Cpu)?)?,
        };
        let path = self.base.weights.path();
        pieces.iter().try_for_each(|piece| out.write_all(piece)).map_err(Error::io(path))
    }

    fn rotated(&self, name: &str) -> Result<Tensor> {
        let (config, shape) = (&self.base.config, self.base.weights.stored(name)?.shape);
        let tensor = self.base.weights.tensor(name, &shape, DType::F32, &Device::Cpu)?;
        if name.contains(".self_attn.q_proj.") {
            permute(&tensor, config.num_attention_heads)
        } else if name.contains(".self_attn.k_proj.") {
            permute(&tensor, config.num_key_value_heads)
        } else {
            Ok(tensor)
        }
    }
}

/// Checks that the vocabulary of the file gives the same tokens as the base's tokenizer: GGUF stores only a name and
/// lists of a tokenizer. The file may end a generation at more tokens, which is a warning, but not at fewer.
fn check(path: &std::path::Path, matrices: &Matrices<'_>) -> Result<Vec<String>> {
    let Some(read) = TextTokenizer::from_gguf_vocabulary(path)? else { return Ok(Vec::new()) };
    let placed = matrices.placed;
    for text in TEXTS.iter().map(|text| (*text).to_string()).chain(placed.tokens.iter().map(|t| t.text())) {
        let expected = placed.tokenizer.encode(text.as_str(), true);
        let expected = expected.map_err(|error| Error::Tokenizer(error.to_string()))?;
        if read.encode(&text, true)? != expected.get_ids() {
            return Err(vocabulary::unsupported(matrices.base, "a tokenizer that would give other tokens"));
        }
    }
    let (before, after) = (&matrices.base.tokenizer.stop_token_ids, &read.stop_token_ids);
    if let Some(id) = before.iter().find(|id| !after.contains(id)) {
        let what = format!("`{}` as one more end of a text", matrices.base.text_of(&[*id]));
        return Err(vocabulary::unsupported(matrices.base, &what));
    }
    let more: Vec<String> = after
        .iter()
        .filter(|id| !before.contains(id))
        .map(|id| format!("`{}`", matrices.base.text_of(&[*id])))
        .collect();
    let warning = format!(
        "readers of GGUF also end a generation at {} because of its text; the base does not",
        more.join(", ")
    );
    Ok(if more.is_empty() { Vec::new() } else { vec![warning] })
}

impl TextTokenizer {
    /// The tokenizer of a file, also if gneiss can't run its model; `None` if it can't read the file.
    fn from_gguf_vocabulary(path: &std::path::Path) -> Result<Option<Self>> {
        match GgufFile::open(path) {
            Ok(file) => Self::from_gguf(&file).map(Some),
            Err(Error::Unsupported { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}
