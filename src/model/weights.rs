//! The tensors of a checkpoint by their Hugging Face names, from safetensors or GGUF, memory-mapped:
//! a tensor is read, converted and put on its device when it is asked for.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use candle_core::quantized::GgmlDType;
use candle_core::safetensors::MmapedSafetensors;
use candle_core::{DType, Device, Tensor, WithDType};
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype;

use super::gguf::GgufFile;
use super::json::{JsonObject, describe};
use crate::{Error, Result};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Rows that a task reads at a time.
const ROWS: usize = 16;

/// A float that weights are read as.
pub(super) trait Float: WithDType + num_traits::Zero {
    /// The nearest value to `x`.
    fn nearest(x: f32) -> Self;
}

impl Float for f32 {
    fn nearest(x: f32) -> Self {
        x
    }
}

impl Float for f16 {
    fn nearest(x: f32) -> Self {
        Self::from_f32(x)
    }
}

impl Float for bf16 {
    fn nearest(x: f32) -> Self {
        Self::from_f32(x)
    }
}

/// The tensors of one checkpoint.
///
/// The files stay memory-mapped: they must not be changed while this value lives.
pub struct Weights(Source);

enum Source {
    Safetensors(Shards),
    Gguf(Box<GgufFile>),
}

/// Safetensors files and which of them holds each tensor.
struct Shards {
    origin: PathBuf,
    files: Vec<(PathBuf, MmapedSafetensors)>,
    tensors: BTreeMap<String, usize>,
    bytes: u64,
}

/// A tensor as its file holds it.
#[derive(Debug)]
pub struct Stored<'a> {
    /// Its shape.
    pub shape: Vec<usize>,
    /// Type of its values on disk.
    pub dtype: StoredDtype,
    /// Its values: those of safetensors in Hugging Face's order of rows, those of GGUF in llama.cpp's.
    pub bytes: &'a [u8],
}

/// Type of a tensor's values on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredDtype {
    /// Of a safetensors file.
    Safetensors(Dtype),
    /// Of a GGUF file.
    Gguf(GgmlDType),
}

impl Weights {
    /// Opens `model.safetensors` of a folder, or the files that `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// Where neither is there, a shard is missing, truncated, outside the folder, or lacks a tensor
    /// that the index promises.
    pub fn open_folder(dir: &Path) -> Result<Self> {
        let (single, index) = (dir.join(SINGLE), dir.join(INDEX));
        let shards = if single.is_file() {
            Shards::single(&single)
        } else if index.is_file() {
            Shards::indexed(dir, &index)
        } else {
            Err(no_weights(dir))
        };
        Ok(Self(Source::Safetensors(shards?)))
    }

    /// Opens a GGUF file; its tensors are read by their Hugging Face names.
    ///
    /// # Errors
    /// As [`GgufFile::open`].
    pub fn open_gguf(path: &Path) -> Result<Self> {
        Ok(GgufFile::open(path)?.into())
    }

    /// Whether there is a tensor of this Hugging Face name.
    pub fn contains(&self, name: &str) -> bool {
        match &self.0 {
            Source::Safetensors(shards) => shards.tensors.contains_key(name),
            Source::Gguf(file) => file.contains(name),
        }
    }

    /// Reads one tensor by its Hugging Face name (`model.layers.0.self_attn.q_proj.weight`), checks its
    /// shape, and converts it to `dtype` on `device`.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a missing tensor (with the nearest name that is there), another shape,
    /// or a type on disk that is not a floating point one.
    pub fn tensor(&self, name: &str, shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
        if !self.contains(name) {
            return Err(self.missing(name));
        }
        match &self.0 {
            Source::Safetensors(shards) => shards.tensor(name, shape, dtype, device),
            Source::Gguf(file) => file.tensor(name, shape, dtype, device),
        }
    }

    /// As [`Weights::tensor`], of a matrix [n, k]: on the CPU some rows at a time, in parallel, so that no second
    /// matrix is in memory, whatever the type on disk.
    ///
    /// # Errors
    /// As [`Weights::tensor`].
    pub fn matrix(
        &self,
        name: &str,
        (n, k): (usize, usize),
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        match dtype {
            DType::F32 if device.is_cpu() => self.in_memory::<f32>(name, (n, k)),
            DType::F16 if device.is_cpu() => self.in_memory::<f16>(name, (n, k)),
            DType::BF16 if device.is_cpu() => self.in_memory::<bf16>(name, (n, k)),
            _ => self.tensor(name, &[n, k], dtype, device),
        }
    }

    fn in_memory<T: Float>(&self, name: &str, (n, k): (usize, usize)) -> Result<Tensor> {
        self.check(name, &[n, k])?;
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
    /// As [`Weights::tensor`].
    pub(super) fn check(&self, name: &str, shape: &[usize]) -> Result<()> {
        check_shape(self.path(), name, shape, &self.stored(name)?.shape)
    }

    /// Reads some rows of a matrix, one after another.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a missing tensor or a type on disk that is not a floating point one.
    ///
    /// # Panics
    /// Rows beyond the matrix, or another length of `out` than theirs.
    pub(super) fn rows<T: Float>(&self, name: &str, rows: Range<usize>, out: &mut [T]) -> Result<()> {
        match &self.0 {
            Source::Safetensors(shards) if self.contains(name) => shards.rows(name, rows, out),
            Source::Gguf(file) if self.contains(name) => file.rows(name, rows, out),
            _ => Err(self.missing(name)),
        }
    }

    /// One tensor by its Hugging Face name, as it is on disk.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a missing tensor, with the nearest name that is there.
    pub fn stored(&self, name: &str) -> Result<Stored<'_>> {
        if !self.contains(name) {
            return Err(self.missing(name));
        }
        match &self.0 {
            Source::Safetensors(shards) => {
                let view = shards.files[shards.tensors[name]].1.get(name)?;
                let dtype = StoredDtype::Safetensors(view.dtype());
                Ok(Stored { shape: view.shape().to_vec(), dtype, bytes: view.data() })
            }
            Source::Gguf(file) => file.stored(name),
        }
    }

    /// The files, each with the Hugging Face names of its tensors, sorted.
    pub fn files(&self) -> Vec<(&Path, Vec<&str>)> {
        match &self.0 {
            Source::Safetensors(shards) => {
                let names = |file| {
                    let inside = shards.tensors.iter().filter(move |(_, in_file)| **in_file == file);
                    inside.map(|(name, _)| name.as_str()).collect()
                };
                shards.files.iter().enumerate().map(|(i, (path, _))| (path.as_path(), names(i))).collect()
            }
            Source::Gguf(file) => vec![(file.path(), file.hf_names().collect())],
        }
    }

    /// Hugging Face names of all tensors, sorted.
    pub fn names(&self) -> Vec<String> {
        match &self.0 {
            Source::Safetensors(shards) => shards.tensors.keys().cloned().collect(),
            Source::Gguf(file) => file.names(),
        }
    }

    /// Bytes that the files take on disk.
    pub fn bytes_on_disk(&self) -> u64 {
        match &self.0 {
            Source::Safetensors(shards) => shards.bytes,
            Source::Gguf(file) => file.bytes_on_disk(),
        }
    }

    /// `safetensors`, or `gguf` with its quantisation types, the most frequent first.
    pub fn format(&self) -> String {
        match &self.0 {
            Source::Safetensors(_) => "safetensors".to_string(),
            Source::Gguf(file) => format!("gguf {}", file.quant_types().join(", ")),
        }
    }

    /// The file, or for a sharded checkpoint its index.
    pub fn path(&self) -> &Path {
        match &self.0 {
            Source::Safetensors(shards) => &shards.origin,
            Source::Gguf(file) => file.path(),
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
        let problem = format!("tensor `{name}`: expected it in the checkpoint, not found; {nearest}");
        Error::Checkpoint { path: self.path().to_path_buf(), problem }
    }
}

impl From<GgufFile> for Weights {
    fn from(mut file: GgufFile) -> Self {
        file.forget_tokenizer();
        Self(Source::Gguf(Box::new(file)))
    }
}

impl fmt::Debug for Weights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Weights").field("path", &self.path()).field("format", &self.format()).finish()
    }
}

impl Shards {
    fn single(path: &Path) -> Result<Self> {
        let mut shards =
            Self { origin: path.to_path_buf(), files: Vec::new(), tensors: BTreeMap::new(), bytes: 0 };
        let file = shards.map(path)?;
        let names = shards.files[file].1.tensors().into_iter().map(|(name, _)| (name, file));
        shards.tensors = names.collect();
        Ok(shards)
    }

    fn indexed(dir: &Path, index: &Path) -> Result<Self> {
        let json = JsonObject::read(index)?;
        let Some(weight_map) = json.object("weight_map")? else {
            return Err(json.missing("weight_map", "an object of tensor names and file names"));
        };
        let mut shards =
            Self { origin: index.to_path_buf(), files: Vec::new(), tensors: BTreeMap::new(), bytes: 0 };
        let mut opened = BTreeMap::new();
        for (tensor, shard) in weight_map.entries() {
            let Some(shard) = shard.as_str() else {
                return Err(weight_map.error(tensor, "a file name", &describe(shard)));
            };
            let file = match opened.get(shard) {
                Some(file) => *file,
                None => {
                    // Only the name is checked: the hub's cache keeps its files as links to elsewhere.
                    let inside = Path::new(shard).components().all(|c| matches!(c, Component::Normal(_)));
                    if shard.is_empty() || !inside {
                        let found = format!("`{shard}`");
                        return Err(weight_map.error(
                            tensor,
                            "a file inside the checkpoint's folder",
                            &found,
                        ));
                    }
                    let path = dir.join(shard);
                    if !path.is_file() {
                        let found = format!("`{shard}`, which is not there; download the checkpoint again");
                        return Err(weight_map.error(tensor, "a file of the checkpoint's folder", &found));
                    }
                    let file = shards.map(&path)?;
                    opened.insert(shard.to_string(), file);
                    file
                }
            };
            if shards.files[file].1.get(tensor).is_err() {
                let found = format!("`{shard}`, which lacks it");
                return Err(weight_map.error(tensor, "the file that holds the tensor", &found));
            }
            shards.tensors.insert(tensor.clone(), file);
        }
        Ok(shards)
    }

    /// Maps a file into memory, checks its header against its length, and returns its number.
    fn map(&mut self, path: &Path) -> Result<usize> {
        self.bytes += std::fs::metadata(path).map_err(Error::io(path))?.len();
        // SAFETY: the mapping is read only; that nobody shortens the file meanwhile is the contract of
        // `Weights`, as it is of every program that maps checkpoints.
        let mapped = unsafe { MmapedSafetensors::new(path) }.map_err(|error| Error::Checkpoint {
            path: path.to_path_buf(),
            problem: format!("expected a whole safetensors file: {error}; download it again"),
        })?;
        self.files.push((path.to_path_buf(), mapped));
        Ok(self.files.len() - 1)
    }

    fn tensor(&self, name: &str, shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
        let (path, file) = &self.files[self.tensors[name]];
        let view = file.get(name)?;
        check_shape(path, name, shape, view.shape())?;
        let stored = match view.dtype() {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            found => return Err(not_a_float(path, name, found)),
        };
        Ok(Tensor::from_raw_buffer(view.data(), stored, shape, device)?.to_dtype(dtype)?)
    }

    fn rows<T: Float>(&self, name: &str, rows: Range<usize>, out: &mut [T]) -> Result<()> {
        let (path, file) = &self.files[self.tensors[name]];
        let view = file.get(name)?;
        let width = view.shape().iter().skip(1).product::<usize>();
        let (start, count) = (rows.start * width, rows.len() * width);
        assert_eq!(out.len(), count, "values of {} rows of `{name}`", rows.len());
        let halves = || view.data()[2 * start..2 * (start + count)].as_chunks::<2>().0.iter();
        match view.dtype() {
            Dtype::F32 => {
                let values = view.data()[4 * start..4 * (start + count)].as_chunks::<4>().0;
                out.iter_mut().zip(values).for_each(|(y, x)| *y = T::nearest(f32::from_le_bytes(*x)));
            }
            Dtype::F16 => {
                let values = halves().map(|x| f16::from_le_bytes(*x).to_f32());
                out.iter_mut().zip(values).for_each(|(y, x)| *y = T::nearest(x));
            }
            Dtype::BF16 => {
                let values = halves().map(|x| bf16::from_le_bytes(*x).to_f32());
                out.iter_mut().zip(values).for_each(|(y, x)| *y = T::nearest(x));
            }
            found => return Err(not_a_float(path, name, found)),
        }
        Ok(())
    }
}

fn not_a_float(path: &Path, name: &str, found: Dtype) -> Error {
    let problem = format!("tensor `{name}`: expected F32, F16 or BF16, found {found:?}");
    Error::Checkpoint { path: path.to_path_buf(), problem }
}

/// An error where a tensor has not the shape that the configuration implies.
pub(super) fn check_shape(path: &Path, name: &str, expected: &[usize], found: &[usize]) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    let problem = format!("tensor `{name}`: expected shape {expected:?}, found {found:?}");
    Err(Error::Checkpoint { path: path.to_path_buf(), problem })
}

fn no_weights(dir: &Path) -> Error {
    let ends = |ending: &str| {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).find(|f| f.ends_with(ending))
    };
    let found = if let Some(gguf) = ends(".gguf") {
        format!("`{gguf}`; name the .gguf file itself")
    } else if let Some(pickle) = ends(".bin") {
        format!("`{pickle}`; save the model as safetensors first")
    } else {
        "neither".to_string()
    };
    let problem = format!("expected `{SINGLE}` or `{INDEX}`, found {found}");
    Error::Checkpoint { path: dir.to_path_buf(), problem }
}
