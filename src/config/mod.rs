//! The configuration of a run: read from a TOML file and `--set key=value` options, checked as a whole.

mod choices;
mod set;
mod size;
mod validate;

use std::path::Path;

use serde::{Deserialize, Serialize};

pub use choices::{DtypeChoice, InitMethod, Keep, OnNotFinite, Schedule, Task};
pub use size::MemoryBudget;

use crate::device::DeviceChoice;
use crate::text::other_unicode;
use crate::{Error, Result};

/// Most virtual tokens that a prompt may have.
pub const MAX_VIRTUAL_TOKENS: usize = 4096;

/// A run's configuration. Paths are relative to the current folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Name of the run, and of its folder. Default `"prompt"`.
    pub name: String,
    /// Folder that holds the run folders. Default `"runs"`.
    pub runs: String,
    /// The frozen model.
    pub model: ModelOptions,
    /// The soft prompt.
    pub prompt: PromptOptions,
    /// The examples.
    pub data: DataOptions,
    /// The training.
    pub train: TrainOptions,
}

/// `[model]`: the frozen model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelOptions {
    /// Checkpoint: a folder, a `.gguf` file, or a hub id `org/name[@revision]`. Required.
    pub id: String,
    /// Number format of the weights. Default `"auto"`.
    pub dtype: DtypeChoice,
    /// Device that the model runs on. Default `"auto"`.
    pub device: DeviceChoice,
}

/// `[prompt]`: the soft prompt and its rows before the first step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PromptOptions {
    /// Where the first rows come from. Default `"text"`.
    pub init_method: InitMethod,
    /// Text whose token embeddings are the first rows; needed where `init_method = "text"`. Default `""`.
    pub init_text: String,
    /// Adapter whose rows are the first rows, named as for `--adapter`; needed where `init_method = "file"`. Default `""`.
    pub init_file: String,
    /// Rows of the prompt, up to 4096; 0 takes as many as the init text or file has. Default `0`.
    pub num_virtual_tokens: usize,
}

/// `[data]`: the examples, and how one becomes text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataOptions {
    /// What the outputs are. Default `"generation"`.
    pub task: Task,
    /// File of the training examples: `.csv`, `.tsv`, `.json`, `.jsonl`, `.ndjson` or `.parquet`. Required.
    pub train: String,
    /// File of the validation examples; empty for none. Default `""`.
    pub validation: String,
    /// File of the test examples; empty for none. Default `""`.
    pub test: String,
    /// Column or field that holds the input. Default `"input"`.
    pub input: String,
    /// Column or field that holds the output. Default `"output"`.
    pub output: String,
    /// Template of the text that the model reads; holds `{{input}}` once.
    /// Default `"Input: {{input}} Output:"`.
    pub verbalizer: String,
    /// Tokens that an input is cut to. Default `256`.
    pub max_input_tokens: usize,
    /// Tokens that an output is cut to, and that a generated answer may have. Default `128`.
    pub max_output_tokens: usize,
}

/// `[train]`: the optimizer and its course.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainOptions {
    /// AdamW's learning rate after the warm-up. Default `0.01`.
    pub learning_rate: f64,
    /// Course of the learning rate after the warm-up. Default `"linear"`.
    pub schedule: Schedule,
    /// Part of all optimizer steps in which the learning rate rises from 0, 0 to 1. Default `0.06`.
    pub warmup_ratio: f64,
    /// Examples of a micro-batch. Default `8`.
    pub batch_size: usize,
    /// Micro-batches of an optimizer step. Default `1`.
    pub accumulate_steps: usize,
    /// Times that every training example is seen. Default `5`.
    pub num_epochs: usize,
    /// Optimizer steps after which the run ends; 0 leaves it to `num_epochs`. Default `0`.
    pub max_steps: usize,
    /// AdamW's decoupled weight decay. Default `0.0`.
    pub weight_decay: f64,
    /// AdamW's decay of the gradient's mean, in [0, 1). Default `0.9`.
    pub beta1: f64,
    /// AdamW's decay of the squared gradient's mean, in [0, 1). Default `0.999`.
    pub beta2: f64,
    /// AdamW's term against division by 0. Default `1e-8`.
    pub eps: f64,
    /// L2 norm that the gradient is clipped to; 0 for no clipping. Default `1.0`.
    pub max_grad_norm: f64,
    /// Whether each epoch has an order of its own. Default `true`.
    pub shuffle: bool,
    /// Seed of the order and of random first rows. Default `42`.
    pub seed: u64,
    /// Which prompt becomes the adapter; `"best"` needs `data.validation`. Default `"best"`.
    pub keep: Keep,
    /// Epochs without a lower validation loss after which the run ends; 0 to run them all. Default `0`.
    pub early_stopping: usize,
    /// Optimizer steps after which a checkpoint is written, besides the one at every epoch's end; 0 for that one alone.
    /// Default `0`.
    pub checkpoint_steps: usize,
    /// Whether the run folder also gets an event file for TensorBoard. Default `false`.
    pub tensorboard: bool,
    /// Rows of a packed micro-batch that run at once, at most; 0 leaves it to the device. Default `0`.
    pub max_rows: usize,
    /// Memory that the run may take, weights included, such as `"24GB"` or `"16GiB"`; empty for what the device has
    /// free. Blocks are recomputed in the backward pass, and rows run in smaller numbers, where it takes that to fit.
    /// Default `""`.
    pub memory_budget: MemoryBudget,
    /// Whether a run on CUDA times each algorithm that cuBLASLt offers for its matrix products once, and keeps the fastest;
    /// `false` takes the library's first, the same in every run on one kind of GPU. Default `true`.
    pub time_products: bool,
    /// What a step does whose loss or gradient is not finite. Default `"stop"`.
    pub on_not_finite: OnNotFinite,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            name: "prompt".into(),
            runs: "runs".into(),
            model: ModelOptions::default(),
            prompt: PromptOptions::default(),
            data: DataOptions::default(),
            train: TrainOptions::default(),
        }
    }
}

impl Default for ModelOptions {
    fn default() -> Self {
        Self { id: String::new(), dtype: DtypeChoice::Auto, device: DeviceChoice::Auto }
    }
}

impl Default for PromptOptions {
    fn default() -> Self {
        Self {
            init_method: InitMethod::Text,
            init_text: String::new(),
            init_file: String::new(),
            num_virtual_tokens: 0,
        }
    }
}

impl Default for DataOptions {
    fn default() -> Self {
        Self {
            task: Task::Generation,
            train: String::new(),
            validation: String::new(),
            test: String::new(),
            input: "input".into(),
            output: "output".into(),
            verbalizer: "Input: {{input}} Output:".into(),
            max_input_tokens: 256,
            max_output_tokens: 128,
        }
    }
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self {
            learning_rate: 0.01,
            schedule: Schedule::Linear,
            warmup_ratio: 0.06,
            batch_size: 8,
            accumulate_steps: 1,
            num_epochs: 5,
            max_steps: 0,
            weight_decay: 0.0,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            max_grad_norm: 1.0,
            shuffle: true,
            seed: 42,
            keep: Keep::Best,
            early_stopping: 0,
            checkpoint_steps: 0,
            tensorboard: false,
            max_rows: 0,
            memory_budget: MemoryBudget::default(),
            time_products: true,
            on_not_finite: OnNotFinite::Stop,
        }
    }
}

impl Config {
    /// Reads a TOML file, lays `sets` (`key=value`, the last of a key counts) over it and checks the
    /// whole. A value is TOML; what isn't is a string, so `--set model.id=org/name` needs no quotes.
    ///
    /// # Errors
    /// [`Error::Io`] where the file can't be read; [`Error::Config`] with all problems and their lines:
    /// unknown keys, values of a wrong type, and those of [`Config::validate`].
    pub fn load(path: &Path, sets: &[String]) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        let origin = path.display().to_string();
        if let Some(found) = other_unicode(&bytes) {
            let problem = format!("line 1: expected UTF-8 text, found {found}; hint: save the file as UTF-8");
            return Err(Error::Config { origin, problems: vec![problem] });
        }
        match String::from_utf8(bytes) {
            Ok(text) => Self::parse(&text, &origin, sets),
            Err(error) => {
                let valid = error.utf8_error().valid_up_to();
                let line = set::line_at(error.as_bytes(), valid);
                let problem = format!("line {line}: expected UTF-8 text, found another byte");
                Err(Error::Config { origin, problems: vec![problem] })
            }
        }
    }

    /// As [`Config::load`], from the file's text; `origin` is what errors call it. A line break is LF, in a text over
    /// several lines too, however the file was saved: CRLF is read as LF, as Python's tomllib does.
    ///
    /// # Errors
    /// [`Error::Config`], as [`Config::load`].
    pub fn parse(text: &str, origin: &str, sets: &[String]) -> Result<Self> {
        let problems = match set::resolve(text, sets) {
            Ok(config) => return Ok(config),
            Err(problems) => problems,
        };
        Err(Error::Config { origin: origin.into(), problems })
    }

    /// Checks every value, alone and with the others.
    ///
    /// # Errors
    /// [`Error::Config`] with all problems.
    pub fn validate(&self) -> Result<()> {
        let problems: Vec<_> = self.problems().iter().map(validate::Problem::to_string).collect();
        if problems.is_empty() { Ok(()) } else { Err(Error::Config { origin: "config".into(), problems }) }
    }

    /// All keys with their values, as TOML that [`Config::parse`] reads back to the same.
    ///
    /// # Errors
    /// [`Error::Invalid`] where a value can't be written as TOML; what passed [`Config::validate`] can.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|error| Error::Invalid(format!("config as TOML: {error}")))
    }
}
