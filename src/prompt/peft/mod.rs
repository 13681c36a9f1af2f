//! Soft prompts on disk, in the folder that PEFT reads and writes:
//!
//! ```text
//! adapter_config.json         what the prompt belongs to
//! adapter_model.safetensors   prompt_embeddings [P, C], or [P, L 2 K D] of keys and values
//! README.md                   model card
//! task.json                   what the prompt was tuned for, and where it stands, if gneiss tuned it
//! ```

mod card;
mod check;
mod config;
mod fits;
mod kind;
mod multitask;
mod place;
mod published;
mod task;
mod weights;

use std::path::Path;

use candle_core::{DType, Device};

pub use card::ModelCard;
pub(crate) use card::{pretrained, quoted};
pub(crate) use config::split_revision;
pub use config::{AdapterConfig, PromptTuningInit};
pub use kind::PeftType;
pub(crate) use place::with_task;
pub use place::{Place, adapters_in};
pub use published::{CardMetric, CardResults, published_card};
pub use task::PromptTask;

use crate::checkpoint::HubOptions;
use crate::files::write_atomically;
use crate::layout::adapter_folder::{CARD, CONFIG, TASK, WEIGHTS};
use crate::prompt::Prefix;
use crate::{Error, Result};
use config::Unfilled;

/// A tuned soft prompt.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// The virtual tokens; f32 on the CPU if [`Adapter::read`] made it.
    pub prompt: Prefix,
    /// What the prompt belongs to.
    pub config: AdapterConfig,
    /// What it was tuned for; `None` if PEFT wrote the folder.
    pub task: Option<PromptTask>,
}

impl Adapter {
    /// Reads the adapter that `argument` names, in any of the forms of [`Place::find`].
    ///
    /// # Errors
    /// Returns the errors of [`Place::find`] and [`Adapter::read_task`].
    pub fn open(argument: &Path) -> Result<Self> {
        Place::find(argument, &HubOptions::from_env())?.read()
    }

    /// Reads a folder that holds one prompt, as [`Adapter::read_task`].
    ///
    /// # Errors
    /// Returns the errors of [`Adapter::read_task`]; also if the folder holds the prompts of several tasks.
    pub fn read(dir: &Path) -> Result<Self> {
        Self::read_task(dir, None)
    }

    /// Reads a folder that PEFT or gneiss wrote: what PEFT loads for a decoder. A prompt in f16, bf16 or f64 becomes f32;
    /// keys of the configuration that PEFT fills from the base model may be missing or null; keys that are not known
    /// are kept and ignored. `task` chooses a prompt of `MULTITASK_PROMPT_TUNING`; it may be `None` if there is one task.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if a file is missing or malformed, if the adapter is not a prompt of a decoder or holds
    /// other weights than the prompt's, if configuration and tensors disagree, if a value is not finite, or if the
    /// adapter does not have this task; [`Error::Unsupported`] if it is an adapter of another method; [`Error::Io`] if a
    /// file can't be read.
    pub fn read_task(dir: &Path, task: Option<usize>) -> Result<Self> {
        if !dir.is_dir() {
            let found = if dir.exists() { "a file" } else { "nothing" };
            return Err(malformed(dir, format!("expected an adapter folder, found {found}")));
        }
        let config_path = dir.join(CONFIG);
        let config = Unfilled::read(&config_path)?;
        let path = dir.join(WEIGHTS);
        if !path.exists() {
            return Err(malformed(dir, weights::missing(dir)));
        }
        let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
        let tensors = weights::decode(&bytes, config.method());
        let tensors = tensors.map_err(|problem| malformed(&path, problem))?;
        let config = config.fill(tensors[0].dims()).map_err(|problem| malformed(&config_path, problem))?;
        if config.tasks().is_some() {
            multitask::check(&config, &tensors).map_err(|problem| malformed(&path, problem))?;
        }
        let task = multitask::chosen_task(&config, task).map_err(|problem| malformed(dir, problem))?;
        let prompt = multitask::prompt_of_task(&tensors, task)?;
        let values = prompt.flatten_all()?.to_vec1::<f32>()?;
        weights::check(&config, prompt.dims(), &values).map_err(|problem| malformed(&path, problem))?;
        let task = PromptTask::read(dir)?;
        let before = task.as_ref().and_then(|task| task.before.as_ref());
        let before = before.map_or(&[][..], |before| &before.token_ids);
        let prompt = Prefix::new(config.peft_type.prompt_kind(), prompt).after(before)?;
        let adapter = Self { prompt, config, task };
        adapter.check_position().map_err(|problem| malformed(&config_path, problem))?;
        Ok(adapter)
    }

    /// What the user should know before the prompt is used: it was tuned for another task than generating text.
    pub fn warning(&self) -> Option<String> {
        let task = self.config.task_type.as_deref().filter(|task| *task != config::CAUSAL_LM)?;
        Some(format!(
            "task_type {task}: the prompt was tuned for another head than the language model's, and that head is not \
             part of the adapter: its answers may mean nothing"
        ))
    }

    /// Writes the folder (made if it is missing), each file in full or not at all. The prompt is
    /// written as f32 from whatever dtype and device it has; that of one task of `MULTITASK_PROMPT_TUNING` as
    /// `PROMPT_TUNING`.
    ///
    /// # Errors
    /// Returns [`Error::Checkpoint`] if [`Adapter::read`] or PEFT would refuse the folder, [`Error::Io`] if a file can't be
    /// written, [`Error::Candle`] if the prompt can't be copied from its device.
    pub fn write(&self, dir: &Path, card: &ModelCard) -> Result<()> {
        let path = dir.join(WEIGHTS);
        let prompt = self.prompt.values().to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
        let values = prompt.flatten_all()?.to_vec1::<f32>()?;
        let config = self.config.of_one_prompt();
        weights::check(&config, prompt.dims(), &values).map_err(|problem| malformed(&path, problem))?;
        config.check_writable(self.prompt.kind()).map_err(|problem| malformed(&dir.join(CONFIG), problem))?;
        self.check_position().map_err(|problem| malformed(&dir.join(CONFIG), problem))?;
        let weights = weights::encode(prompt.dims(), &values).map_err(|problem| malformed(&path, problem))?;
        let json = config.to_json().map_err(|problem| malformed(&dir.join(CONFIG), problem))?;
        std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
        write_atomically(&path, |out| out.write_all(&weights))?;
        write_atomically(&dir.join(CARD), |out| out.write_all(card.render(&config).as_bytes()))?;
        match &self.task {
            Some(task) => task.write(dir)?,
            None => crate::files::remove_if_there(&dir.join(TASK))?,
        }
        // Last, so that a new folder with a configuration is a whole one.
        write_atomically(&dir.join(CONFIG), |out| out.write_all(json.as_bytes()))
    }
}

fn malformed(path: &Path, problem: impl Into<String>) -> Error {
    Error::Checkpoint { path: path.to_path_buf(), problem: problem.into() }
}
