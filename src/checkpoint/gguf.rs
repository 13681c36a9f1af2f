//! GGUF checkpoints of the architectures `granite`, `granitemoe`, `granitehybrid` and `llama`: the configuration from the
//! metadata, and the tensors under their Hugging Face names, dequantised when they are read.
//!
//! The format is <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>; candle parses it. This module reverses
//! llama.cpp's conversion: names, rotary scaling, and what it does to tensors (`names.rs`).

mod blocks;
mod config;
mod header;
pub(super) mod metadata;
mod names;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{Content, TensorInfo, Value};
use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;

use self::config::RopeTensors;
use self::header::{check_extents, open_header};
use self::metadata::GgufMetadata;
pub(crate) use self::names::gguf_name;
use self::names::{Conversion, GgufTensor};
use super::config::{ModelConfig, unsupported};
use super::finite::{self, Float, Limit};
use crate::checkpoint::stored::{StoredDtype, StoredTensor, check_shape};
use crate::ops::cpu::{self, PART, View};
use crate::ops::gpu;
use crate::{Error, Result};

/// Divisors of the rotary frequencies, which belong to the configuration: Llama 3's, and longrope's two lists.
pub(crate) const ROPE_FREQS: &str = "rope_freqs.weight";
pub(crate) const ROPE_SHORT: &str = "rope_factors_short.weight";
pub(crate) const ROPE_LONG: &str = "rope_factors_long.weight";

/// A memory-mapped GGUF file. It must not be changed while this value lives.
pub struct GgufFile {
    path: PathBuf,
    map: Mmap,
    content: Content,
    config: ModelConfig,
    /// By Hugging Face name.
    tensors: BTreeMap<String, GgufTensor>,
}

impl GgufFile {
    /// Maps the file, reads its header, and checks that every tensor is complete and known.
    ///
    /// # Errors
    /// Returns [`Error::Unsupported`] with an architecture, a part of one or a quantisation type that gneiss can't
    /// read, and [`Error::Checkpoint`] if the file is no GGUF, truncated or inconsistent.
    pub fn open(path: &Path) -> Result<Self> {
        let (map, content) = open_header(path)?;
        check_extents(path, &content, map.len() as u64)?;
        let factors = |name| match content.tensor_infos.get(name) {
            Some(_) => dequantise(path, name, blocks_of(&content, &map, name)).map(Some),
            None => Ok(None),
        };
        let factors = RopeTensors {
            freqs: factors(ROPE_FREQS)?,
            short: factors(ROPE_SHORT)?,
            long: factors(ROPE_LONG)?,
        };
        let config = config::read(path, &content, &factors)?;
        let tensors = names::tensors(path, &content, &config)?;
        Ok(Self { path: path.to_path_buf(), map, content, config, tensors })
    }

    /// The key-value pairs of a file of any architecture, the tokenizer's included.
    ///
    /// # Errors
    /// Returns [`Error::Checkpoint`] if the file is no GGUF or is truncated, [`Error::Io`] if it can't be read.
    pub(super) fn read_metadata(path: &Path) -> Result<HashMap<String, Value>> {
        Ok(open_header(path)?.1.metadata)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Configuration from the metadata and the tensors' shapes.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Whether there is a tensor of this Hugging Face name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Hugging Face names of all tensors, sorted.
    pub fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    /// Bytes of the file.
    pub fn bytes_on_disk(&self) -> u64 {
        self.map.len() as u64
    }

    /// Types of the tensors, the most frequent first.
    pub fn quant_types(&self) -> Vec<String> {
        let mut counts = BTreeMap::<String, usize>::new();
        for info in self.content.tensor_infos.values() {
            *counts.entry(format!("{:?}", info.ggml_dtype)).or_default() += 1;
        }
        let mut counts: Vec<_> = counts.into_iter().collect();
        counts.sort_by(|(a, n), (b, m)| m.cmp(n).then(a.cmp(b)));
        counts.into_iter().map(|(name, _)| name).collect()
    }

    /// Dequantises one tensor by its Hugging Face name, with its rows in Hugging Face's order, and
    /// converts it to `dtype` on `device`.
    ///
    /// # Errors
    /// Returns [`Error::Checkpoint`] if the tensor is missing, has another shape or an unreadable type.
    pub fn tensor(&self, name: &str, shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
        let GgufTensor { name: stored, shape: hf_shape, conversion } = self.find(name)?;
        check_shape(&self.path, name, shape, hf_shape)?;
        let values = self.dequantise(stored, name)?;
        let values = match conversion {
            Conversion::Same | Conversion::Permuted { .. } => values,
            Conversion::GateUp { up } => Tensor::cat(&[values, self.dequantise(up, name)?], 1)?,
            Conversion::Decay => values.neg()?.log()?,
        };
        let beyond = finite::first_beyond(&View::<f32>::new("gguf", &values)?, Limit::for_dtype(dtype));
        if let Some((index, value)) = beyond {
            return Err(finite::error(&self.path, name, &finite::place(shape, index), value, dtype));
        }
        let values = match conversion {
            Conversion::Permuted { heads } => unpermute(&values, *heads)?,
            _ => values.reshape(shape)?,
        };
        gpu::to_device(&values.to_dtype(dtype)?, device)
    }

    /// Dequantises some rows of a matrix, or of matrices [.., n, k] one below the other, one after another, in Hugging
    /// Face's order.
    ///
    /// # Errors
    /// Returns [`Error::Checkpoint`] if the tensor is missing or the rows end inside a quantised block.
    ///
    /// # Panics
    /// Panics if the tensor is a vector, the rows are outside it, or `out` has another length.
    pub(super) fn rows<T: Float>(&self, name: &str, rows: Range<usize>, out: &mut [T]) -> Result<()> {
        let GgufTensor { name: stored, shape, conversion } = self.find(name)?;
        let [.., count, width] = shape[..] else { panic!("`{name}` is a vector") };
        assert_eq!(out.len(), rows.len() * width, "values of {} rows of `{name}`", rows.len());
        let reader = RowReader { file: self, name, width };
        match conversion {
            Conversion::Same | Conversion::Decay => reader.read(stored, rows.start, out),
            Conversion::Permuted { heads } => {
                let d = count / heads;
                rows.zip(out.chunks_exact_mut(width)).try_for_each(|(row, out)| {
                    let (head, i) = (row / d, row % d);
                    reader.read(stored, head * d + i % (d / 2) * 2 + i / (d / 2), out)
                })
            }
            Conversion::GateUp { up } => {
                let size = count / 2;
                rows.zip(out.chunks_exact_mut(width)).try_for_each(|(row, out)| {
                    let (expert, i) = (row / count, row % count);
                    let half = if i < size { stored } else { up };
                    reader.read(half, expert * size + i % size, out)
                })
            }
        }
    }

    /// Reads a tensor of the file as f32 on the CPU, for the Hugging Face tensor `name`.
    fn dequantise(&self, stored: &str, name: &str) -> Result<Tensor> {
        let (info, blocks) = blocks_of(&self.content, &self.map, stored);
        let values = dequantise(&self.path, name, (info, blocks))?;
        Ok(Tensor::from_vec(values, info.shape.dims(), &Device::Cpu)?)
    }

    /// Shape of a tensor in Hugging Face's files.
    ///
    /// # Errors
    /// Returns [`Error::Checkpoint`] if the tensor is missing.
    pub(super) fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.find(name)?.shape)
    }

    /// One tensor by its Hugging Face name, as it is on disk.
    ///
    /// # Errors
    /// Returns [`Error::Checkpoint`] if the tensor is missing, and [`Error::Unsupported`] if the file has its values in
    /// several tensors or as a function of them.
    pub(super) fn stored(&self, name: &str) -> Result<StoredTensor<'_>> {
        let GgufTensor { name: stored, conversion, .. } = self.find(name)?;
        if !matches!(conversion, Conversion::Same | Conversion::Permuted { .. }) {
            return Err(unsupported(&self.path, format!("a copy of the bytes of tensor `{name}`")));
        }
        Ok(self.bytes(stored))
    }

    /// The tensors of the file that hold one tensor, whatever was done to its values.
    ///
    /// # Errors
    /// Returns [`Error::Checkpoint`] if the tensor is missing.
    pub(super) fn stored_parts(&self, name: &str) -> Result<Vec<StoredTensor<'_>>> {
        let GgufTensor { name: stored, conversion, .. } = self.find(name)?;
        let mut parts = vec![self.bytes(stored)];
        if let Conversion::GateUp { up } = conversion {
            parts.push(self.bytes(up));
        }
        Ok(parts)
    }

    /// A tensor by its name in the file.
    fn bytes(&self, name: &str) -> StoredTensor<'_> {
        let (info, bytes) = blocks_of(&self.content, &self.map, name);
        StoredTensor { shape: info.shape.dims().to_vec(), dtype: StoredDtype::Gguf(info.ggml_dtype), bytes }
    }

    /// Hugging Face names of all tensors, sorted.
    pub(super) fn hf_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The file's key-value pairs, the tokenizer's included.
    pub fn values(&self) -> &HashMap<String, Value> {
        &self.content.metadata
    }

    fn find(&self, name: &str) -> Result<&GgufTensor> {
        self.tensors.get(name).ok_or_else(|| {
            let problem = format!("tensor `{name}`: expected it in the checkpoint, not found");
            Error::Checkpoint { path: self.path.clone(), problem }
        })
    }

    /// Drops the vocabulary's strings: a tokenizer has its own copies.
    pub(super) fn forget_tokenizer(&mut self) {
        self.content.metadata.retain(|key, _| !key.starts_with("tokenizer."));
    }

    pub(super) fn metadata(&self) -> GgufMetadata<'_> {
        GgufMetadata::new(&self.path, &self.content.metadata)
    }
}

impl fmt::Debug for GgufFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let types = self.quant_types();
        f.debug_struct("GgufFile").field("path", &self.path).field("types", &types).finish_non_exhaustive()
    }
}

/// Reads rows of a Hugging Face tensor, or of a part of it.
struct RowReader<'a> {
    file: &'a GgufFile,
    /// Hugging Face's name, for messages.
    name: &'a str,
    width: usize,
}

impl RowReader<'_> {
    /// Dequantises rows of the file's tensor `stored` from row `first` on.
    fn read<T: Float>(&self, stored: &str, first: usize, out: &mut [T]) -> Result<()> {
        let (path, name, width) = (&self.file.path, self.name, self.width);
        let (info, blocks) = blocks_of(&self.file.content, &self.file.map, stored);
        let (block, size) = (info.ggml_dtype.block_size(), info.ggml_dtype.type_size());
        if !width.is_multiple_of(block) {
            return Err(broken_block(path, name, info.ggml_dtype, &format!("rows of {width} values")));
        }
        let (blocks, limit) = (&blocks[first * width / block * size..], Limit::for_dtype(T::DTYPE));
        let mut values = [0.0; PART];
        for (i, out) in out.chunks_mut(PART).enumerate() {
            let values = &mut values[..out.len()];
            let blocks = &blocks[i * PART / block * size..][..out.len() / block * size];
            blocks::dequantise(info.ggml_dtype, blocks, values);
            if let Some((index, value)) = finite::first_beyond(values, limit) {
                let place = finite::place(info.shape.dims(), first * width + i * PART + index);
                return Err(finite::error(path, name, &place, value, T::DTYPE));
            }
            cpu::simd(
                #[inline(always)]
                |_| out.iter_mut().zip(&*values).for_each(|(y, x)| *y = T::nearest(*x)),
            );
        }
        Ok(())
    }
}

// Rows are dequantised, checked and converted in parts of whole blocks of every type.
const _: () = assert!(PART.is_multiple_of(256));

/// Restores Hugging Face's order of the rows of q or k.
///
/// llama.cpp rotates neighbouring rows (0, 1), (2, 3), ... of a head, Hugging Face row i with row
/// i + D/2; so the conversion stores each head's rows as [D/2, 2] where Hugging Face has [2, D/2]
/// (`LlamaModel.permute` of llama.cpp's `conversion/llama.py`). This is its inverse, for weights
/// [heads * D, C] and biases [heads * D].
fn unpermute(stored: &Tensor, heads: usize) -> Result<Tensor> {
    let rows = stored.dim(0)?;
    let (half, columns) = (rows / heads / 2, stored.elem_count() / rows);
    let by_half = stored.reshape((heads, half, 2, columns))?.transpose(1, 2)?.contiguous()?;
    Ok(by_half.reshape(stored.shape())?)
}

/// The inverse: rows of q or k, weights or biases, in llama.cpp's order.
pub(crate) fn permute(rows: &Tensor, heads: usize) -> Result<Tensor> {
    let count = rows.dim(0)?;
    let (half, columns) = (count / heads / 2, rows.elem_count() / count);
    let by_pair = rows.reshape((heads, 2, half, columns))?.transpose(1, 2)?.contiguous()?;
    Ok(by_pair.reshape(rows.shape())?)
}

/// A tensor by its name in the file, and its blocks: [`check_extents`] has checked that they lie inside the file.
fn blocks_of<'a>(content: &'a Content, map: &'a Mmap, name: &str) -> (&'a TensorInfo, &'a [u8]) {
    let info = &content.tensor_infos[name];
    let blocks = info.shape.elem_count().div_ceil(info.ggml_dtype.block_size());
    let start = (content.tensor_data_offset + info.offset) as usize;
    (info, &map[start..start + blocks * info.ggml_dtype.type_size()])
}

/// All values of a tensor.
fn dequantise(path: &Path, name: &str, (info, blocks): (&TensorInfo, &[u8])) -> Result<Vec<f32>> {
    let (dtype, count) = (info.ggml_dtype, info.shape.elem_count());
    if !count.is_multiple_of(dtype.block_size()) {
        return Err(broken_block(path, name, dtype, &format!("{count} values")));
    }
    let mut values = vec![0.0; count];
    blocks::dequantise(dtype, blocks, &mut values);
    Ok(values)
}

fn broken_block(path: &Path, name: &str, dtype: GgmlDType, found: &str) -> Error {
    let block = dtype.block_size();
    let problem =
        format!("tensor `{name}` ({dtype:?}): expected whole blocks of {block} values, found {found}");
    Error::Checkpoint { path: path.to_path_buf(), problem }
}
