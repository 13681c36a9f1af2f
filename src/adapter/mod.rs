//! Soft prompts on disk, in the folder that PEFT reads and writes:
//!
//! ```text
//! adapter_config.json         what the prompt belongs to
//! adapter_model.safetensors   prompt_embeddings [P, C]
//! README.md                   model card
//! task.json                   what the prompt was tuned for, where gneiss tuned it
//! ```

mod card;
mod config;
mod task;

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

pub use card::ModelCard;
pub(crate) use card::{pretrained, quoted};
pub(crate) use config::split_revision;
pub use config::{AdapterConfig, PromptTuningInit};
pub use task::PromptTask;

use crate::files::write_atomically;
use crate::{Error, Result};

/// Name of the configuration file.
pub(crate) const CONFIG: &str = "adapter_config.json";
/// Name of the file with the prompt.
const WEIGHTS: &str = "adapter_model.safetensors";
/// What PEFT wrote before safetensors: a Python pickle, which gneiss does not run.
const PICKLE: &str = "adapter_model.bin";
/// Name of the model card.
const CARD: &str = "README.md";
/// What makes up an adapter.
pub(crate) const FILES: [&str; 3] = [CONFIG, WEIGHTS, task::TASK];
/// The only tensor of a prompt-tuning adapter.
const PROMPT: &str = "prompt_embeddings";

/// A tuned soft prompt.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// The virtual tokens' embeddings, [P, C], as they are before the model's `embedding_multiplier`;
    /// f32 on the CPU where [`Adapter::read`] made it.
    pub prompt: Tensor,
    /// What the prompt belongs to.
    pub config: AdapterConfig,
    /// What it was tuned for; `None` where PEFT wrote the folder.
    pub task: Option<PromptTask>,
}

impl Adapter {
    /// Reads a folder that PEFT or gneiss wrote; f16 and bf16 prompts are widened to f32.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where a file is missing or malformed, where the adapter is not a prompt of
    /// a decoder, where configuration and tensor disagree, or where a value is not finite;
    /// [`Error::Io`] where a file can't be read.
    pub fn read(dir: &Path) -> Result<Self> {
        if !dir.is_dir() {
            let found = if dir.exists() { "a file" } else { "nothing" };
            return Err(malformed(dir, format!("expected an adapter folder, found {found}")));
        }
        let config = AdapterConfig::read(&dir.join(CONFIG))?;
        let path = dir.join(WEIGHTS);
        if !path.exists() {
            return Err(malformed(dir, no_weights(dir)));
        }
        let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
        let (shape, values) = decode(&bytes).map_err(|problem| malformed(&path, problem))?;
        check(&config, &shape, &values).map_err(|problem| malformed(&path, problem))?;
        let task = PromptTask::read(dir)?;
        Ok(Self { prompt: Tensor::from_vec(values, shape, &Device::Cpu)?, config, task })
    }

    /// Refuses a prompt, read from `path`, that is not as wide as `model`, whose hidden size is `width`.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] with both widths.
    pub fn check_width(&self, path: &Path, model: &str, width: usize) -> Result<()> {
        let found = self.prompt.dims()[1];
        if found == width {
            return Ok(());
        }
        let base = self.config.base_model_name_or_path.as_deref().unwrap_or("another model");
        Err(malformed(
            path,
            format!(
                "expected a prompt of width {width}, the hidden size of {model}, found {found}; it was tuned on {base}"
            ),
        ))
    }

    /// Writes the folder (made where it is missing), each file in full or not at all. The prompt is
    /// written as f32 from whatever dtype and device it has.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where [`Adapter::read`] or PEFT would refuse the folder; [`Error::Io`] where
    /// a file can't be written; [`Error::Candle`] where the prompt can't be had from its device.
    pub fn write(&self, dir: &Path, card: &ModelCard) -> Result<()> {
        let path = dir.join(WEIGHTS);
        let prompt = self.prompt.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
        let values = prompt.flatten_all()?.to_vec1::<f32>()?;
        check(&self.config, prompt.dims(), &values).map_err(|problem| malformed(&path, problem))?;
        self.config.check().map_err(|problem| malformed(&dir.join(CONFIG), problem))?;
        let weights = encode(prompt.dims(), &values).map_err(|problem| malformed(&path, problem))?;
        let config = self.config.to_json().map_err(|problem| malformed(&dir.join(CONFIG), problem))?;
        std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
        write_atomically(&path, |out| out.write_all(&weights))?;
        write_atomically(&dir.join(CARD), |out| out.write_all(card.render(&self.config).as_bytes()))?;
        match &self.task {
            Some(task) => task.write(dir)?,
            None => crate::files::remove_if_there(&dir.join(task::TASK))?,
        }
        // Last, so that a new folder with a configuration is a whole one.
        write_atomically(&dir.join(CONFIG), |out| out.write_all(config.as_bytes()))
    }
}

fn malformed(path: &Path, problem: impl Into<String>) -> Error {
    Error::Checkpoint { path: path.to_path_buf(), problem: problem.into() }
}

fn no_weights(dir: &Path) -> String {
    if dir.join(PICKLE).exists() {
        format!(
            "expected {WEIGHTS}, found {PICKLE}, a Python pickle; load it with PEFT and save it again with \
             save_pretrained to get safetensors"
        )
    } else {
        format!("expected {WEIGHTS}, found no such file")
    }
}

/// What is wrong with a prompt of this shape and these values.
fn check(config: &AdapterConfig, shape: &[usize], values: &[f32]) -> std::result::Result<(), String> {
    let expected = [config.num_virtual_tokens, config.token_dim];
    if shape != expected {
        return Err(format!(
            "{PROMPT}: expected shape {expected:?}, as num_virtual_tokens and token_dim of {CONFIG} say, \
             found {shape:?}"
        ));
    }
    if values.is_empty() {
        return Err(format!("{PROMPT}: expected one virtual token or more, found shape {shape:?}"));
    }
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(at) => Err(format!(
            "{PROMPT}: expected finite values, found {} at row {}, column {}",
            values[at],
            at / config.token_dim,
            at % config.token_dim
        )),
    }
}

/// Shape and values of the prompt in a safetensors file.
fn decode(bytes: &[u8]) -> std::result::Result<(Vec<usize>, Vec<f32>), String> {
    let file = SafeTensors::deserialize(bytes).map_err(|error| format!("not a safetensors file: {error}"))?;
    let mut names = file.names();
    names.sort_unstable();
    if names != [PROMPT] {
        let found = if names.is_empty() { "none".to_string() } else { names.join(", ") };
        return Err(format!("expected the one tensor {PROMPT}, found {found}"));
    }
    let tensor = file.tensor(PROMPT).map_err(|error| error.to_string())?;
    let data = tensor.data();
    let halves = || data.chunks_exact(2).map(|bytes| [bytes[0], bytes[1]]);
    let values = match tensor.dtype() {
        Dtype::F32 => data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Dtype::F16 => halves().map(|bytes| half::f16::from_le_bytes(bytes).to_f32()).collect(),
        Dtype::BF16 => halves().map(|bytes| half::bf16::from_le_bytes(bytes).to_f32()).collect(),
        other => return Err(format!("{PROMPT}: expected F32, F16 or BF16, found {other:?}")),
    };
    Ok((tensor.shape().to_vec(), values))
}

/// A safetensors file with the prompt, as f32.
fn encode(shape: &[usize], values: &[f32]) -> std::result::Result<Vec<u8>, String> {
    let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let tensor = TensorView::new(Dtype::F32, shape.to_vec(), &data).map_err(|error| error.to_string())?;
    // As PEFT writes it; transformers refuses a file that does not say which framework it is for.
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    safetensors::serialize([(PROMPT, tensor)], Some(metadata)).map_err(|error| error.to_string())
}
