//! The safetensors files of a folder: one, or the shards that an index names.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use candle_core::safetensors::MmapedSafetensors;
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use super::finite::{self, Float};
use super::json::{JsonObject, describe};
use super::{content, names};
use crate::checkpoint::stored::check_shape;
use crate::checkpoint::typed::TypedKeys;
use crate::layout::model_folder::{WEIGHTS, WEIGHTS_INDEX};
use crate::ops::gpu;
use crate::{Error, Result};

/// Bytes that a task checks for values that are not finite.
const SCANNED: usize = 1 << 20;

/// Safetensors files, and the file of each tensor.
pub(super) struct Shards {
    origin: PathBuf,
    files: Vec<(PathBuf, MmapedSafetensors)>,
    /// By the names in a causal language model.
    tensors: BTreeMap<String, TensorLocation>,
    bytes: u64,
}

/// The place of a tensor.
#[derive(Clone)]
struct TensorLocation {
    file: usize,
    /// Its name in the file.
    name: String,
}

impl Shards {
    /// Opens `model.safetensors` of a folder, or the files that its index names.
    pub fn open(dir: &Path) -> Result<Self> {
        let (single, index) = (dir.join(WEIGHTS), dir.join(WEIGHTS_INDEX));
        let origin = if single.is_file() { &single } else { &index };
        let mut shards =
            Self { origin: origin.clone(), files: Vec::new(), tensors: BTreeMap::new(), bytes: 0 };
        if single.is_file() {
            shards.map(&single)?;
        } else if index.is_file() {
            shards.map_indexed(dir, &index)?;
        } else {
            return Err(no_weights(dir));
        }
        names::refuse_foreign(&shards.origin, shards.tensors.keys().map(String::as_str))?;
        Ok(shards)
    }

    /// Maps the files that an index names. As in transformers, all their tensors count, because an index may be written
    /// by hand, by another tool, or for an earlier version of the files.
    fn map_indexed(&mut self, dir: &Path, index: &Path) -> Result<()> {
        let json = JsonObject::read(index)?;
        let Some(weight_map) = json.object("weight_map")? else {
            return Err(json.missing("weight_map", "an object of tensor names and file names"));
        };
        // If two files contain a tensor, the index decides which one counts.
        let mut promised = BTreeMap::new();
        for (tensor, shard) in weight_map.entries() {
            let Some(shard) = shard.as_str() else {
                return Err(weight_map.error(tensor, "a file name", &describe(shard)));
            };
            // Only the name is checked: the files in the hub's cache are links to other folders.
            let inside = Path::new(shard).components().all(|c| matches!(c, Component::Normal(_)));
            if shard.is_empty() || !inside {
                let found = format!("`{shard}`");
                return Err(weight_map.error(tensor, "a file inside the checkpoint's folder", &found));
            }
            if !dir.join(shard).is_file() {
                let found = format!("`{shard}`, which is not there; download the checkpoint again");
                return Err(weight_map.error(tensor, "a file of the checkpoint's folder", &found));
            }
            promised.insert(names::canonical(tensor).into_owned(), (tensor, shard));
        }
        let mut files: Vec<&str> = promised.values().map(|(_, shard)| *shard).collect();
        files.sort_unstable();
        files.dedup();
        for file in files {
            self.map_where(&dir.join(file), |name| {
                promised.get(name).is_some_and(|(_, shard)| *shard == file)
            })?;
        }
        match promised.iter().find(|(name, _)| !self.tensors.contains_key(*name)) {
            None => Ok(()),
            Some((_, (tensor, shard))) => {
                let found = format!("`{shard}`, which lacks it");
                Err(weight_map.error(tensor, "the file that holds the tensor", &found))
            }
        }
    }

    fn map(&mut self, path: &Path) -> Result<()> {
        self.map_where(path, |_| false)
    }

    /// Maps a file into memory, checks its header against its length, and adds its tensors. If an earlier file contains
    /// the same tensor, this file's tensor replaces it if `counts` returns true.
    fn map_where(&mut self, path: &Path, counts: impl Fn(&str) -> bool) -> Result<()> {
        let error = |problem: String| Error::Checkpoint { path: path.to_path_buf(), problem };
        content::expect_file(path, "a whole safetensors file")?;
        self.bytes += std::fs::metadata(path).map_err(Error::io(path))?.len();
        // SAFETY: the mapping is read only. That nobody shortens the file meanwhile is part of the contract of
        // `Weights`, as in every program that maps checkpoints.
        let mapped = unsafe { MmapedSafetensors::new(path) }.map_err(|problem| {
            error(format!("expected a whole safetensors file: {problem}; download it again"))
        })?;
        let file = self.files.len();
        for (name, _) in mapped.tensors() {
            let known = names::canonical(&name).into_owned();
            if let Some(other) = self.tensors.get(&known) {
                if other.file == file {
                    let problem = format!(
                        "expected one tensor `{known}`, found `{}` and `{name}`, which both stand for it",
                        other.name
                    );
                    return Err(error(problem));
                }
                if !counts(&known) {
                    continue;
                }
            }
            self.tensors.insert(known, TensorLocation { file, name });
        }
        self.files.push((path.to_path_buf(), mapped));
        Ok(())
    }

    /// The file, or the index.
    pub fn origin(&self) -> &Path {
        &self.origin
    }

    /// Bytes of the files.
    pub fn bytes_on_disk(&self) -> u64 {
        self.bytes
    }

    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    /// The files, each with the names of its tensors, sorted.
    pub fn files(&self) -> Vec<(&Path, Vec<&str>)> {
        let names = |file| {
            let inside = self.tensors.iter().filter(move |(_, place)| place.file == file);
            inside.map(|(name, _)| name.as_str()).collect()
        };
        self.files.iter().enumerate().map(|(i, (path, _))| (path.as_path(), names(i))).collect()
    }

    pub fn alias(&mut self, alias: &str, name: &str) {
        if let Some(place) = self.tensors.get(name).cloned() {
            self.tensors.insert(alias.to_string(), place);
        }
    }

    /// A tensor that exists, and its file.
    pub fn view(&self, name: &str) -> Result<(&Path, TensorView<'_>)> {
        let place = &self.tensors[name];
        let (path, file) = &self.files[place.file];
        Ok((path, file.get(&place.name)?))
    }

    pub fn tensor(&self, name: &str, shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
        let (path, view) = self.view(name)?;
        check_shape(path, name, shape, view.shape())?;
        let stored = match view.dtype() {
            Dtype::F64 => DType::F64,
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            found => return Err(not_a_float(path, name, found)),
        };
        let (bytes, size) = (view.data(), stored.size_in_bytes());
        bytes.par_chunks(SCANNED).enumerate().try_for_each(|(i, part)| {
            finite::check_on_disk((path, name, shape), (part, view.dtype()), i * SCANNED / size, dtype)
        })?;
        // On the CPU first: no GPU needs f64.
        let place = if stored == DType::F64 { &Device::Cpu } else { device };
        let tensor = Tensor::from_raw_buffer(bytes, stored, shape, place)?;
        gpu::settle(place)?;
        gpu::to_device(&tensor.to_dtype(dtype)?, device)
    }

    pub fn rows<T: Float>(&self, name: &str, rows: Range<usize>, out: &mut [T]) -> Result<()> {
        let (path, view) = self.view(name)?;
        let width = view.shape().iter().skip(1).last().copied().unwrap_or(1);
        let (start, count) = (rows.start * width, rows.len() * width);
        assert_eq!(out.len(), count, "values of {} rows of `{name}`", rows.len());
        let bytes = |size: usize| &view.data()[size * start..size * (start + count)];
        let fill = |out: &mut [T], values: &mut dyn Iterator<Item = f32>| {
            out.iter_mut().zip(values).for_each(|(y, x)| *y = T::nearest(x));
        };
        let size = match view.dtype() {
            Dtype::F64 => 8,
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
            found => return Err(not_a_float(path, name, found)),
        };
        finite::check_on_disk((path, name, view.shape()), (bytes(size), view.dtype()), start, T::DTYPE)?;
        match view.dtype() {
            Dtype::F64 => {
                let values = bytes(8).as_chunks::<8>().0;
                fill(out, &mut values.iter().map(|x| f64::from_le_bytes(*x) as f32));
            }
            Dtype::F32 => {
                let values = bytes(4).as_chunks::<4>().0;
                out.iter_mut().zip(values).for_each(|(y, x)| *y = T::nearest(f32::from_le_bytes(*x)));
            }
            Dtype::F16 => {
                let values = bytes(2).as_chunks::<2>().0.iter().map(|x| f16::from_le_bytes(*x).to_f32());
                out.iter_mut().zip(values).for_each(|(y, x)| *y = T::nearest(x));
            }
            _ => {
                let values = bytes(2).as_chunks::<2>().0.iter().map(|x| bf16::from_le_bytes(*x).to_f32());
                out.iter_mut().zip(values).for_each(|(y, x)| *y = T::nearest(x));
            }
        }
        Ok(())
    }
}

fn not_a_float(path: &Path, name: &str, found: Dtype) -> Error {
    let problem = format!("tensor `{name}`: expected F64, F32, F16 or BF16, found {found:?}");
    Error::Checkpoint { path: path.to_path_buf(), problem }
}

fn no_weights(dir: &Path) -> Error {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort_unstable();
    let that = |matches: &dyn Fn(&str) -> bool| names.iter().find(|name| matches(name));
    let pickles = [".bin", ".pt", ".pth", ".ckpt", ".bin.index.json", ".h5", ".msgpack"];
    let found = if let Some(shard) = that(&|name| is_shard(name)) {
        let shards = names.iter().filter(|name| is_shard(name)).count();
        format!(
            "`{shard}`{} without the index; download `{WEIGHTS_INDEX}` too",
            if shards > 1 { format!(" and {} more shards", shards - 1) } else { String::new() }
        )
    } else if let Some(gguf) = that(&|name| name.ends_with(".gguf")) {
        format!("`{gguf}`; name the .gguf file itself")
    } else if let Some(adapter) = that(&|name| name.starts_with("adapter_model.")) {
        format!("`{adapter}`, an adapter; give its base model, and the folder as --adapter")
    } else if let Some(other) = that(&|name| name.ends_with(".safetensors")) {
        format!("`{other}`; if it is the whole model in transformers' names, call it `{WEIGHTS}`")
    } else if let Some(pickle) = that(&|name| pickles.iter().any(|ending| name.ends_with(ending))) {
        format!("`{pickle}`; save the model as safetensors first, with save_pretrained of transformers")
    } else {
        "neither".to_string()
    };
    let problem = format!("expected `{WEIGHTS}` or `{WEIGHTS_INDEX}`, found {found}");
    Error::Checkpoint { path: dir.to_path_buf(), problem }
}

/// Whether a file has the name of a shard, `model-00001-of-00002.safetensors`.
fn is_shard(name: &str) -> bool {
    let numbers = name.strip_prefix("model-").and_then(|rest| rest.strip_suffix(".safetensors"));
    numbers.and_then(|numbers| numbers.split_once("-of-")).is_some_and(|(part, of)| {
        [part, of].iter().all(|n| !n.is_empty() && n.bytes().all(|byte| byte.is_ascii_digit()))
    })
}
