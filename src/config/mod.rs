//! The configuration of a run, read from a TOML file and `--set key=value` options, and checked as a whole.

mod choices;
mod set;
mod size;
mod sweep;
mod validate;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use choices::{
    DtypeChoice, InitMethod, Keep, OnNotFinite, PromptKind, PromptPosition, Reparameterization, Schedule,
    SweepMethod, SweepMetric, Task,
};
pub use size::MemoryBudget;
pub use sweep::{SweepValues, TrialConfig};

use crate::device::DeviceChoice;
use crate::text::other_unicode;
use crate::{Error, Result};

/// Most virtual tokens that a prompt may have.
pub const MAX_VIRTUAL_TOKENS: usize = 4096;

/// Most hidden units of the network that makes a prompt's rows.
pub const MAX_BOTTLENECK: usize = 65536;

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
    /// The sweep; the configuration of a run has none.
    #[serde(skip_serializing_if = "SweepOptions::is_default")]
    pub sweep: SweepOptions,
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
    /// What the prompt puts in front of every input. Default `"embeddings"`.
    pub kind: PromptKind,
    /// Where the virtual tokens stand. Default `"start"`.
    pub position: PromptPosition,
    /// How the first rows are made. Default `"text"`.
    pub init_method: InitMethod,
    /// Text whose token embeddings are the first rows; required if `init_method = "text"`. Default `""`.
    pub init_text: String,
    /// Adapter whose rows are the first rows, in any form that `--adapter` accepts; required if `init_method = "file"`.
    /// Default `""`.
    pub init_file: String,
    /// Rows of the prompt, up to 4096; 0 means as many as the init text or file has. Default `0`.
    pub num_virtual_tokens: usize,
    /// First rows of the prompt that are not trained (an attention sink); fewer than the prompt has. Default `0`.
    pub frozen_tokens: usize,
    /// How the rows are made of the trainable values while the prompt is tuned; the adapter holds the plain rows.
    /// `"mlp"` needs `init_method = "random"`. Default `"none"`.
    pub reparameterization: Reparameterization,
    /// Hidden units of the reparameterization's network, up to 65536. 0 means 400, or the width of a row if that is
    /// smaller, for `"residual"`, and what PEFT takes for `"mlp"`: the width of the encoder's input. Default `0`.
    pub bottleneck: usize,
}

/// `[data]`: the examples, and how an example becomes text.
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
    /// Template of the text that the model reads; it contains `{{input}}` once. Default `"Input: {{input}} Output:"`.
    pub verbalizer: String,
    /// Most tokens of an input; longer inputs are cut. Default `256`.
    pub max_input_tokens: usize,
    /// Most tokens of an output, also of a generated answer; longer outputs are cut. Default `128`.
    pub max_output_tokens: usize,
    /// Text whose effect the prompt learns (distillation): the loss is the KL divergence from the distribution that the
    /// base model has after this text, a space and the input, at each token of the output. Empty for none. Default `""`.
    pub teacher_text: String,
}

/// `[train]`: the optimizer, the schedule and the limits of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainOptions {
    /// AdamW's learning rate after the warm-up. Default `0.01`.
    pub learning_rate: f64,
    /// Schedule of the learning rate after the warm-up. Default `"linear"`.
    pub schedule: Schedule,
    /// Fraction of all optimizer steps spent on linear warm-up, 0 to 1. Default `0.06`.
    pub warmup_ratio: f64,
    /// Examples of a micro-batch. Default `8`.
    pub batch_size: usize,
    /// Micro-batches of an optimizer step. Default `1`.
    pub accumulate_steps: usize,
    /// Number of passes over the training examples. Default `5`.
    pub num_epochs: usize,
    /// Optimizer steps of the run; 0 means the steps of `num_epochs` epochs. Default `0`.
    pub max_steps: usize,
    /// AdamW's decoupled weight decay. Default `0.0`.
    pub weight_decay: f64,
    /// Decay rate of AdamW's first moment, in [0, 1). Default `0.9`.
    pub beta1: f64,
    /// Decay rate of AdamW's second moment, in [0, 1). Default `0.999`.
    pub beta2: f64,
    /// Added to AdamW's denominator for numerical stability. Default `1e-8`.
    pub eps: f64,
    /// Largest L2 norm of the gradient; a longer gradient is scaled down to it. 0 for no clipping. Default `1.0`.
    pub max_grad_norm: f64,
    /// Whether the examples are shuffled anew in each epoch. Default `true`.
    pub shuffle: bool,
    /// Seed of the shuffling and of random first rows. Default `42`.
    pub seed: u64,
    /// Which prompt is saved as the adapter; `"best"` needs `data.validation`. Default `"best"`.
    pub keep: Keep,
    /// Epochs without a lower validation loss after which the run ends; 0 for no early stopping. Default `0`.
    pub early_stopping: usize,
    /// Optimizer steps between two checkpoints, in addition to the one at each epoch's end; 0 for those alone. Default
    /// `0`.
    pub checkpoint_steps: usize,
    /// Whether an event file for TensorBoard is written into the run folder. Default `false`.
    pub tensorboard: bool,
    /// Most rows of a packed micro-batch that run at once; 0 lets gneiss choose by the device's memory. Default `0`.
    pub max_rows: usize,
    /// Most memory that the run may use, weights included, such as `"24GB"` or `"16GiB"`; empty for the memory that the
    /// device has free. If a step needs more, layers are recomputed in the backward pass and fewer rows run at once.
    /// Default `""`.
    pub memory_budget: MemoryBudget,
    /// Whether a run on CUDA times each algorithm that cuBLASLt offers for its matrix products once and uses the
    /// fastest. With `false` it uses the library's first one, which is the same in every run on one kind of GPU.
    /// Default `true`.
    pub time_products: bool,
    /// What happens if the loss or the gradient of a step is not finite. Default `"stop"`.
    pub on_not_finite: OnNotFinite,
}

/// `[sweep]`: the trials of `gneiss sweep`, and which of them are pruned.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SweepOptions {
    /// How the trials' values are chosen. Default `"grid"`.
    pub method: SweepMethod,
    /// Trials of a random search; 0 with a grid, which has as many as there are combinations. Default `0`.
    pub trials: usize,
    /// Seed of a random search. Default `0`.
    pub seed: u64,
    /// What the trials are compared by. Default `"validation_loss"`.
    pub metric: SweepMetric,
    /// How much the number of trials shrinks at a rung: by 3, a third of them stays; by 1, all of them stay. Default `3`.
    pub reduction_factor: usize,
    /// Epochs before the first rung; the next ones follow after `reduction_factor` times as many each. Default `2`.
    pub grace_period: usize,
    /// Trials that are not pruned at least. Default `1`.
    pub keep: usize,
    /// Most prompts in one pass. 0 lets gneiss choose: one on a CPU, as many as fit into the memory of a GPU. Default `0`.
    pub max_prompts: usize,
    /// Keys with the values to try, such as `"train.seed" = { values = [1, 2] }` or
    /// `"train.learning_rate" = { min = 0.001, max = 0.1, log = true, count = 4 }`. Default `{}`.
    pub parameters: BTreeMap<String, SweepValues>,
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
            sweep: SweepOptions::default(),
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
            kind: PromptKind::Embeddings,
            position: PromptPosition::Start,
            init_method: InitMethod::Text,
            init_text: String::new(),
            init_file: String::new(),
            num_virtual_tokens: 0,
            frozen_tokens: 0,
            reparameterization: Reparameterization::None,
            bottleneck: 0,
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
            teacher_text: String::new(),
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

impl Default for SweepOptions {
    fn default() -> Self {
        Self {
            method: SweepMethod::Grid,
            trials: 0,
            seed: 0,
            metric: SweepMetric::ValidationLoss,
            reduction_factor: 3,
            grace_period: 2,
            keep: 1,
            max_prompts: 0,
            parameters: BTreeMap::new(),
        }
    }
}

impl Config {
    /// The text in plain words that the base model is given in the place of a tuned prompt: the teacher's, if the run distils
    /// one, otherwise the init text. Empty for none.
    pub fn hard_prompt(&self) -> &str {
        if self.distils() { &self.data.teacher_text } else { &self.prompt.init_text }
    }

    /// Whether the prompt learns the effect of a teacher's text, so that losses are divergences.
    pub fn distils(&self) -> bool {
        !self.data.teacher_text.is_empty()
    }

    /// Reads a TOML file, overrides its keys with `sets` (`key=value`, the last of a key counts) and checks the result.
    /// A value is TOML; anything else is a string, so `--set model.id=org/name` needs no quotes.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the file can't be read, and [`Error::Config`] with all problems and their lines:
    /// unknown keys, values of a wrong type, and the problems of [`Config::validate`].
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

    /// As [`Config::load`], from the file's text; `origin` names the text in errors. CRLF is read as LF, also inside
    /// strings over several lines, as in Python's tomllib.
    ///
    /// # Errors
    /// Returns [`Error::Config`] as [`Config::load`] does.
    pub fn parse(text: &str, origin: &str, sets: &[String]) -> Result<Self> {
        let problems = match set::resolve(text, sets) {
            Ok(config) => return Ok(config),
            Err(problems) => problems,
        };
        Err(Error::Config { origin: origin.into(), problems })
    }

    /// Checks every value, alone and in combination with the others.
    ///
    /// # Errors
    /// Returns [`Error::Config`] with all problems.
    pub fn validate(&self) -> Result<()> {
        let problems: Vec<_> = self.problems().iter().map(validate::ValueProblem::to_string).collect();
        if problems.is_empty() { Ok(()) } else { Err(Error::Config { origin: "config".into(), problems }) }
    }

    /// The keys whose values differ from those of `other`.
    ///
    /// # Errors
    /// Returns [`Error::Invalid`] if a value can't be written as TOML.
    pub fn changed_keys(&self, other: &Self) -> Result<Vec<String>> {
        let table = |config| {
            toml::Table::try_from(config).map_err(|error| Error::Invalid(format!("config as TOML: {error}")))
        };
        Ok(set::changed_keys(&table(self)?, &table(other)?))
    }

    /// The folder of the run or sweep: `runs/name`.
    pub fn folder(&self) -> PathBuf {
        Path::new(&self.runs).join(&self.name)
    }

    /// All keys with their values, as TOML from which [`Config::parse`] reads an equal configuration.
    ///
    /// # Errors
    /// Returns [`Error::Invalid`] if a value can't be written as TOML; a configuration that [`Config::validate`]
    /// accepts can be written.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|error| Error::Invalid(format!("config as TOML: {error}")))
    }
}

/// The keys in which two configurations, the TOML of [`Config::to_toml`], differ, as text.
pub fn other_keys(first: &str, other: &str) -> String {
    let parse = |text: &str| Config::parse(text, "the configuration of a rank", &[]);
    let keys = parse(first).and_then(|first| first.changed_keys(&parse(other)?));
    keys.map_or_else(|error| error.to_string(), |keys| format!("others: {}", keys.join(", ")))
}
