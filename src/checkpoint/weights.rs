//! The tensors of a checkpoint by their Hugging Face names, from memory-mapped safetensors or GGUF. A tensor is read,
//! converted and moved to its device when it is needed.

use std::fmt;
use std::ops::Range;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

use super::finite::Float;
use super::gguf::GgufFile;
use super::shards::Shards;
use super::stored::{StoredDtype, StoredTensor, check_shape};
use super::tensors::HEAD;
use crate::{Error, Result};

/// Rows that a task reads at once.
const ROWS: usize = 16;

/// Bytes that a task compares at once.
const COMPARED: usize = 1 << 20;

/// The tensors of one checkpoint.
///
/// The files stay memory-mapped: they must not be changed while this value lives.
pub struct Weights(TensorSource);

enum TensorSource {
    Safetensors(Shards),
    Gguf(Box<GgufFile>),
}

impl Weights {
    /// Opens `model.safetensors` of a folder, or the files that `model.safetensors.index.json` names.
    ///
    /// Tensors have their names in transformers' causal language model, whatever wrapper or base class they were saved
    /// from (`_orig_mod.model.norm.weight`, `norm.weight`).
    ///
    /// # Errors
    /// Returns an error if neither file exists; if a shard is missing, truncated or outside the folder; if no shard
    /// contains a tensor that the index lists; or if the weights are quantised or those of an adapter that is not
    /// merged.
    pub fn open_folder(dir: &Path) -> Result<Self> {
        Shards::open(dir).map(|shards| Self(TensorSource::Safetensors(shards)))
    }

    /// Opens a GGUF file; its tensors are read by their Hugging Face names.
    ///
    /// # Errors
    /// Returns the errors of [`GgufFile::open`].
    pub fn open_gguf(path: &Path) -> Result<Self> {
        Ok(GgufFile::open(path)?.into())
    }

    /// Whether there is a tensor of this Hugging Face name.
    pub fn contains(&self, name: &str) -> bool {
        match &self.0 {
            TensorSource::Safetensors(shards) => shards.contains(name),
            TensorSource::Gguf(file) => file.contains(name),
        }
    }

    /// Reads one tensor by its Hugging Face name (`model.layers.0.self_attn.q_proj.weight`), checks its
    /// shape, and converts it to `dtype` on `device`.
    ///
    /// # Errors
    /// Returns [`Error::Checkpoint`] if the tensor is missing (with the nearest name that exists), has another shape or
    /// a type on disk that is not floating-point, or contains a value that is not finite in `dtype`.
    pub fn tensor(&self, name: &str, shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
        if !self.contains(name) {
            return Err(self.missing(name));
        }
        match &self.0 {
            TensorSource::Safetensors(shards) => shards.tensor(name, shape, dtype, device),
            TensorSource::Gguf(file) => file.tensor(name, shape, dtype, device),
        }
    }

    /// As [`Weights::tensor`], for matrices [.., n, k], which become one matrix, one below the other. On the CPU some rows are
    /// read at a time, in parallel, so that there is never a second copy in memory, whatever the type on disk.
    ///
    /// # Errors
    /// Returns the errors of [`Weights::tensor`].
    ///
    /// # Panics
    /// Panics if `shape` has less than two dimensions.
    pub fn matrix(&self, name: &str, shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
        match dtype {
            DType::F32 if device.is_cpu() => self.in_memory::<f32>(name, shape),
            DType::F16 if device.is_cpu() => self.in_memory::<f16>(name, shape),
            DType::BF16 if device.is_cpu() => self.in_memory::<bf16>(name, shape),
            _ => Ok(self.tensor(name, shape, dtype, device)?.flatten_to(shape.len() - 2)?),
        }
    }

    fn in_memory<T: Float>(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.check(name, shape)?;
        let (k, n) = (shape[shape.len() - 1], shape[..shape.len() - 1].iter().product::<usize>());
        let mut values = vec![T::zero(); n * k];
        values
            .par_chunks_mut((ROWS * k).max(1))
            .enumerate()
            .try_for_each(|(i, values)| self.rows(name, i * ROWS..((i + 1) * ROWS).min(n), values))?;
        Ok(Tensor::from_vec(values, (n, k), &Device::Cpu)?)
    }

    /// Checks that there is a tensor of this Hugging Face name, and its shape.
    ///
    /// # Errors
    /// Returns the errors of [`Weights::tensor`].
    pub(crate) fn check(&self, name: &str, shape: &[usize]) -> Result<()> {
        match &self.0 {
            TensorSource::Gguf(file) if self.contains(name) => {
                check_shape(self.path(), name, shape, file.shape(name)?)
            }
            _ => check_shape(self.path(), name, shape, &self.stored(name)?.shape),
        }
    }

    /// Reads some rows of a matrix, or of matrices [.., n, k] one below the other, one after another.
    ///
    /// # Errors
    /// Returns [`Error::Checkpoint`] if the tensor is missing, has a type on disk that is not floating-point, or
    /// contains a value that is not finite in `T`.
    ///
    /// # Panics
    /// Panics if the rows are outside the matrix or `out` has another length.
    pub(crate) fn rows<T: Float>(&self, name: &str, rows: Range<usize>, out: &mut [T]) -> Result<()> {
        match &self.0 {
            TensorSource::Safetensors(shards) if self.contains(name) => shards.rows(name, rows, out),
            TensorSource::Gguf(file) if self.contains(name) => file.rows(name, rows, out),
            _ => Err(self.missing(name)),
        }
    }

    /// Makes the tensor `name` also available as `alias`, a name that no file contains; GGUF files have no such
    /// tensors.
    pub(super) fn alias(&mut self, alias: &str, name: &str) {
        if let TensorSource::Safetensors(shards) = &mut self.0 {
            shards.alias(alias, name);
        }
    }

    /// Whether two tensors have the same shape, type on disk and bytes.
    ///
    /// # Errors
    /// Returns an error if a tensor is missing.
    pub(super) fn are_equal(&self, a: &str, b: &str) -> Result<bool> {
        let (a, b) = (self.stored(a)?, self.stored(b)?);
        let chunks = || a.bytes.par_chunks(COMPARED).zip(b.bytes.par_chunks(COMPARED));
        Ok(a.shape == b.shape && a.dtype == b.dtype && chunks().all(|(a, b)| a == b))
    }

    /// One tensor by its Hugging Face name, as it is on disk.
    ///
    /// # Errors
    /// Returns [`Error::Checkpoint`] if the tensor is missing, with the nearest name that exists.
    pub fn stored(&self, name: &str) -> Result<StoredTensor<'_>> {
        if !self.contains(name) {
            return Err(self.missing(name));
        }
        match &self.0 {
            TensorSource::Safetensors(shards) => {
                let view = shards.view(name)?.1;
                let dtype = StoredDtype::Safetensors(view.dtype());
                Ok(StoredTensor { shape: view.shape().to_vec(), dtype, bytes: view.data() })
            }
            TensorSource::Gguf(file) => file.stored(name),
        }
    }

    /// Shape of a tensor in Hugging Face's files.
    ///
    /// # Errors
    /// Returns [`Error::Checkpoint`] if the tensor is missing.
    pub fn shape(&self, name: &str) -> Result<Vec<usize>> {
        match &self.0 {
            TensorSource::Gguf(file) if self.contains(name) => Ok(file.shape(name)?.to_vec()),
            _ => Ok(self.stored(name)?.shape),
        }
    }

    /// The tensors on disk that hold one tensor: of the experts' gates and ups in GGUF two.
    ///
    /// # Errors
    /// Returns [`Error::Checkpoint`] if the tensor is missing.
    pub(crate) fn stored_parts(&self, name: &str) -> Result<Vec<StoredTensor<'_>>> {
        match &self.0 {
            TensorSource::Gguf(file) if self.contains(name) => file.stored_parts(name),
            _ => Ok(vec![self.stored(name)?]),
        }
    }

    /// The files, each with the Hugging Face names of its tensors, sorted.
    pub fn files(&self) -> Vec<(&Path, Vec<&str>)> {
        match &self.0 {
            TensorSource::Safetensors(shards) => shards.files(),
            TensorSource::Gguf(file) => vec![(file.path(), file.hf_names().collect())],
        }
    }

    /// Hugging Face names of all tensors, sorted.
    pub fn names(&self) -> Vec<String> {
        match &self.0 {
            TensorSource::Safetensors(shards) => shards.names(),
            TensorSource::Gguf(file) => file.names(),
        }
    }

    /// Size of the files on disk, bytes.
    pub fn bytes_on_disk(&self) -> u64 {
        match &self.0 {
            TensorSource::Safetensors(shards) => shards.bytes_on_disk(),
            TensorSource::Gguf(file) => file.bytes_on_disk(),
        }
    }

    /// `safetensors`, or `gguf` with its quantisation types, the most frequent first.
    pub fn format(&self) -> String {
        match &self.0 {
            TensorSource::Safetensors(_) => "safetensors".to_string(),
            TensorSource::Gguf(file) => format!("gguf {}", file.quant_types().join(", ")),
        }
    }

    /// The file, or the index of a sharded checkpoint.
    pub fn path(&self) -> &Path {
        match &self.0 {
            TensorSource::Safetensors(shards) => shards.origin(),
            TensorSource::Gguf(file) => file.path(),
        }
    }

    fn missing(&self, name: &str) -> Error {
        let names = self.names();
        let nearest = names
            .iter()
            .map(|present| (strsim::normalized_levenshtein(name, present), present))
            .max_by(|(a, _), (b, _)| a.total_cmp(b));
        let nearest = match nearest {
            Some((_, present)) => format!("the nearest of the {} present is `{present}`", names.len()),
            None => "it holds no tensor at all".to_string(),
        };
        let hint = match name {
            HEAD => {
                "; the configuration has `tie_word_embeddings` false: it is true of a checkpoint whose head is the \
                 embedding"
            }
            _ => "",
        };
        let problem = format!("tensor `{name}`: expected it in the checkpoint, not found; {nearest}{hint}");
        Error::Checkpoint { path: self.path().to_path_buf(), problem }
    }
}

impl From<GgufFile> for Weights {
    fn from(mut file: GgufFile) -> Self {
        file.forget_tokenizer();
        Self(TensorSource::Gguf(Box::new(file)))
    }
}

impl fmt::Debug for Weights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Weights").field("path", &self.path()).field("format", &self.format()).finish()
    }
}
