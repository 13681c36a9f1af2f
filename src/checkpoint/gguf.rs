//! GGUF checkpoints of the architectures `granite` and `llama`: the configuration from the metadata, and the tensors
//! under their Hugging Face names, dequantised when they are read.
//!
//! The format is <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>; candle parses it. This module reverses
//! llama.cpp's conversion (`conversion/llama.py`, `conversion/granite.py`): names, rotary scaling, and the order of the
//! rows of q and k.

mod config;
mod header;
pub(super) mod metadata;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io::Cursor;
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{Content, TensorInfo, Value};
use candle_core::quantized::{QStorage, QTensor};
use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;

use self::config::RopeTensors;
use self::header::{check_extents, open_header};
use self::metadata::GgufMetadata;
use super::config::{ModelConfig, unsupported};
use super::finite::{self, Float, Limit};
use crate::checkpoint::stored::{StoredDtype, StoredTensor, check_shape};
use crate::ops::cpu::View;
use crate::ops::gpu;
use crate::{Error, Result};

/// Names of a layer's modules: Hugging Face's and GGUF's.
const LAYER_MODULES: [(&str, &str); 9] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// Names of the tensors outside the layers.
const OUTER: [(&str, &str); 3] = [
    ("model.embed_tokens.weight", "token_embd.weight"),
    ("model.norm.weight", "output_norm.weight"),
    ("lm_head.weight", "output.weight"),
];

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
    /// Hugging Face name to GGUF name.
    names: BTreeMap<String, String>,
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
            Some(info) => {
                Ok::<_, Error>(Some(dequantise(path, name, info, &content, &map)?.to_vec1::<f32>()?))
            }
            None => Ok(None),
        };
        let factors = RopeTensors {
            freqs: factors(ROPE_FREQS)?,
            short: factors(ROPE_SHORT)?,
            long: factors(ROPE_LONG)?,
        };
        let config = config::read(path, &content, &factors)?;
        let names = hf_names(path, &content, config.num_hidden_layers)?;
        Ok(Self { path: path.to_path_buf(), map, content, config, names })
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
        self.names.contains_key(name)
    }

    /// Hugging Face names of all tensors, sorted.
    pub fn names(&self) -> Vec<String> {
        self.names.keys().cloned().collect()
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
        let info = self.info(name)?;
        check_shape(&self.path, name, shape, info.shape.dims())?;
        let values = dequantise(&self.path, name, info, &self.content, &self.map)?;
        let found = finite::first_beyond(&View::<f32>::new("gguf", &values)?, Limit::for_dtype(dtype));
        if let Some((index, value)) = found {
            return Err(finite::error(&self.path, name, &finite::place(shape, index), value, dtype));
        }
        let values = match self.permuted_heads(name) {
            Some(heads) => unpermute(&values, heads)?,
            None => values,
        };
        gpu::to_device(&values.to_dtype(dtype)?, device)
    }

    /// Dequantises some rows of a matrix, one after another, in Hugging Face's order.
    ///
    /// # Errors
    /// Returns [`Error::Checkpoint`] if the tensor is missing or the rows end inside a quantised block.
    ///
    /// # Panics
    /// Panics if the rows are outside the matrix or `out` has another length.
    pub(super) fn rows<T: Float>(&self, name: &str, rows: Range<usize>, out: &mut [T]) -> Result<()> {
        let info = self.info(name)?;
        let (count, width) = (info.shape.dims()[0], info.shape.elem_count() / info.shape.dims()[0].max(1));
        assert_eq!(out.len(), rows.len() * width, "values of {} rows of `{name}`", rows.len());
        let block = info.ggml_dtype.block_size();
        if !width.is_multiple_of(block) {
            let problem = format!(
                "tensor `{name}`: expected rows of whole blocks of {block} values, found {width} values"
            );
            return Err(Error::Checkpoint { path: self.path.clone(), problem });
        }
        let bytes = width / block * info.ggml_dtype.type_size();
        let data = self.stored(name)?.bytes;
        let read = |first: usize, out: &mut [T]| -> Result<()> {
            let data = Cow::Borrowed(&data[first * bytes..][..out.len() / width.max(1) * bytes]);
            let values = QStorage::from_data(data, &Device::Cpu, info.ggml_dtype)
                .and_then(|storage| QTensor::new(storage, out.len()))
                .and_then(|quantised| quantised.dequantize(&Device::Cpu))
                .and_then(|values| values.to_vec1::<f32>())
                .map_err(|error| unreadable(&self.path, name, info, &error))?;
            if let Some((index, value)) = finite::first_beyond(&values, Limit::for_dtype(T::DTYPE)) {
                let place = finite::place(info.shape.dims(), first * width + index);
                return Err(finite::error(&self.path, name, &place, value, T::DTYPE));
            }
            out.iter_mut().zip(values).for_each(|(y, x)| *y = T::nearest(x));
            Ok(())
        };
        match self.permuted_heads(name) {
            None => read(rows.start, out),
            Some(heads) => {
                let d = count / heads;
                rows.zip(out.chunks_exact_mut(width)).try_for_each(|(row, out)| {
                    let (head, i) = (row / d, row % d);
                    read(head * d + i % (d / 2) * 2 + i / (d / 2), out)
                })
            }
        }
    }

    /// Number of heads of a tensor whose rows llama.cpp's conversion permutes.
    fn permuted_heads(&self, name: &str) -> Option<usize> {
        if name.contains(".self_attn.q_proj.") {
            Some(self.config.num_attention_heads)
        } else if name.contains(".self_attn.k_proj.") {
            Some(self.config.num_key_value_heads)
        } else {
            None
        }
    }

    /// One tensor by its Hugging Face name, as it is on disk.
    ///
    /// # Errors
    /// Returns [`Error::Checkpoint`] if the tensor is missing.
    pub(super) fn stored(&self, name: &str) -> Result<StoredTensor<'_>> {
        let info = self.info(name)?;
        let blocks = info.shape.elem_count().div_ceil(info.ggml_dtype.block_size());
        // `open` has checked that it lies inside the file.
        let start = (self.content.tensor_data_offset + info.offset) as usize;
        let bytes = &self.map[start..start + blocks * info.ggml_dtype.type_size()];
        Ok(StoredTensor {
            shape: info.shape.dims().to_vec(),
            dtype: StoredDtype::Gguf(info.ggml_dtype),
            bytes,
        })
    }

    /// Hugging Face names of all tensors, sorted.
    pub(super) fn hf_names(&self) -> impl Iterator<Item = &str> {
        self.names.keys().map(String::as_str)
    }

    /// The file's key-value pairs, the tokenizer's included.
    pub fn values(&self) -> &HashMap<String, Value> {
        &self.content.metadata
    }

    fn info(&self, name: &str) -> Result<&TensorInfo> {
        let found = self.names.get(name).and_then(|gguf| self.content.tensor_infos.get(gguf));
        found.ok_or_else(|| {
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

/// Reads a tensor as f32 on the CPU.
fn dequantise(path: &Path, name: &str, info: &TensorInfo, content: &Content, map: &Mmap) -> Result<Tensor> {
    let mut reader = Cursor::new(&map[..]);
    info.read(&mut reader, content.tensor_data_offset, &Device::Cpu)
        .and_then(|quantised| quantised.dequantize(&Device::Cpu))
        .map_err(|error| unreadable(path, name, info, &error))
}

fn unreadable(path: &Path, name: &str, info: &TensorInfo, error: &candle_core::Error) -> Error {
    let problem = format!("tensor `{name}` ({:?}): {error}", info.ggml_dtype);
    Error::Checkpoint { path: path.to_path_buf(), problem }
}

/// The GGUF name of every tensor by its Hugging Face name.
fn hf_names(path: &Path, content: &Content, layers: usize) -> Result<BTreeMap<String, String>> {
    let mut names = BTreeMap::new();
    let of_rope = |gguf: &str| [ROPE_FREQS, ROPE_SHORT, ROPE_LONG].contains(&gguf);
    for gguf in content.tensor_infos.keys().filter(|gguf| !of_rope(gguf)) {
        // A tensor that the model does not use would silently change the results.
        let hf = hf_name(gguf, layers).ok_or_else(|| unsupported(path, format!("tensor `{gguf}`")))?;
        names.insert(hf, gguf.clone());
    }
    Ok(names)
}

/// GGUF's name of a Hugging Face tensor; `None` if the architectures have no such tensor.
pub(crate) fn gguf_name(hf: &str) -> Option<String> {
    if let Some((_, gguf)) = OUTER.iter().find(|(outer, _)| *outer == hf) {
        return Some((*gguf).to_string());
    }
    let (layer, rest) = hf.strip_prefix("model.layers.")?.split_once('.')?;
    let (module, kind) = rest.rsplit_once('.')?;
    let (_, gguf) = LAYER_MODULES.iter().find(|(known, _)| *known == module)?;
    matches!(kind, "weight" | "bias").then(|| format!("blk.{layer}.{gguf}.{kind}"))
}

fn hf_name(gguf: &str, layers: usize) -> Option<String> {
    if let Some((hf, _)) = OUTER.iter().find(|(_, outer)| *outer == gguf) {
        return Some((*hf).to_string());
    }
    let (layer, rest) = gguf.strip_prefix("blk.")?.split_once('.')?;
    let (module, kind) = rest.rsplit_once('.')?;
    let (hf, _) = LAYER_MODULES.iter().find(|(_, known)| *known == module)?;
    let layer = layer.parse::<usize>().ok().filter(|layer| *layer < layers)?;
    matches!(kind, "weight" | "bias").then(|| format!("model.layers.{layer}.{hf}.{kind}"))
}
