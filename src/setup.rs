//! From a configuration to what a run needs: device, frozen model, tokenizer, token ids.

use crate::config::{Config, DataOptions, DeviceChoice, DtypeChoice, ModelOptions, Task, TrainOptions};
use crate::data::{Dataset, Encoded, Encoder, Example, PrefixGroup, Template};
use crate::device::{Shortage, free_memory};
use crate::model::pass::GPU_FULL_ROWS;
use crate::model::{
    Checkpoint, Dtypes, Granite, HubOptions, Local, ModelConfig, TextTokenizer, TuningMemory, granite,
    resolve,
};
use crate::ops::packed::Isa;
use crate::serve::client::Limits;
use crate::tune::{self, BackwardWeights, Budget, MemoryPlan, RowRange, Work};
use crate::{Error, Result};
use candle_core::utils::{cuda_is_available, metal_is_available};
use candle_core::{DType, Device, Tensor};
use std::path::{Path, PathBuf};

/// Rows of a pass on the CPU where the configuration names none. SmolLM2-135M in f32 keeps 0.7 MB of tape a
/// row; with this budget a step over 128 examples peaked at 1.05 GB, weights included, at 10.1 examples/s on 2
/// cores of a Zen 4 (LOG.md, 2026-11-22).
const CPU_MAX_ROWS: usize = 512;

/// Rows of a pass on a GPU where the configuration names none.
const GPU_MAX_ROWS: usize = 8192;

/// Rows of a pass of a tuning step on a GPU at most, where the configuration names none and the memory suffices: a
/// quarter more. [`GPU_MAX_ROWS`] is no limit of the hardware, and a step that has a few rows more is faster in one pass
/// than in two, each of which reads all weights.
const GPU_MOST_ROWS: usize = GPU_MAX_ROWS + GPU_MAX_ROWS / 4;

/// A checkpoint with its weights on a device.
pub struct Session {
    /// The frozen model.
    pub model: Granite,
    /// The checkpoint's own tokenizer.
    pub tokenizer: TextTokenizer,
    /// The folder, file or hub id that was asked for.
    pub id: String,
    /// How the weights are stored, such as `gguf Q4_1`.
    pub format: String,
    /// dtype of the weights on the device.
    pub dtype: DType,
    /// What is not as the checkpoint's configuration says, or is not read, and what to know of the device.
    pub warnings: Vec<String>,
}

/// A device, and what its user should know of it.
#[derive(Debug)]
pub struct Chosen {
    /// The device.
    pub device: Device,
    /// Why it is not the one that was to be expected, or what is slow there.
    pub warnings: Vec<String>,
}

/// The device that `choice` names. `auto` takes a GPU if this build can use one, and the CPU with a warning if the machine
/// has none that works.
///
/// # Errors
/// A device that this build or machine does not have.
pub fn device(choice: DeviceChoice) -> Result<Chosen> {
    let open_cuda: Option<OpenGpu> = if cuda_is_available() { Some(&cuda) } else { None };
    let open_metal: Option<OpenGpu> = if metal_is_available() { Some(&metal) } else { None };
    choose(choice, open_cuda, open_metal)
}

/// Opens the GPU of a number, for a build that has its backend.
type OpenGpu<'a> = &'a dyn Fn(usize) -> Result<Chosen>;

fn choose(choice: DeviceChoice, cuda: Option<OpenGpu>, metal: Option<OpenGpu>) -> Result<Chosen> {
    let absent = |name: &str| {
        Error::Invalid(format!(
            "model.device: expected a device of this build, found {name}; build with --features {name}"
        ))
    };
    let mut warnings = Vec::new();
    match choice {
        DeviceChoice::Cpu => {}
        DeviceChoice::Cuda(index) => return cuda.ok_or_else(|| absent("cuda"))?(index),
        DeviceChoice::Metal => return metal.ok_or_else(|| absent("metal"))?(0),
        DeviceChoice::Auto => {
            for (name, open) in [("cuda", cuda), ("metal", metal)] {
                match open.map(|open| open(0)) {
                    Some(Ok(chosen)) => return Ok(chosen),
                    Some(Err(error)) => warnings.push(format!(
                        "the CPU is used: this build can use {name}, but no GPU of this machine works: {error}; hint: \
                         --device cpu chooses the CPU without this warning"
                    )),
                    None => {}
                }
            }
        }
    }
    Ok(Chosen { device: Device::Cpu, warnings })
}

/// The device's name as the command line takes it.
pub fn device_kind(device: &Device) -> &'static str {
    match device {
        Device::Cpu => "cpu",
        Device::Cuda(_) => "cuda",
        Device::Metal(_) => "metal",
    }
}

#[cfg(feature = "cuda")]
fn cuda(index: usize) -> Result<Chosen> {
    let (device, warning) = crate::ops::gpu::cuda::open(index)?;
    Ok(Chosen { device, warnings: warning.into_iter().collect() })
}

#[cfg(not(feature = "cuda"))]
fn cuda(index: usize) -> Result<Chosen> {
    Ok(Chosen { device: Device::new_cuda(index)?, warnings: Vec::new() })
}

fn metal(index: usize) -> Result<Chosen> {
    Ok(Chosen { device: Device::new_metal(index)?, warnings: Vec::new() })
}

/// The dtype of the weights: `auto` is bf16 on a GPU and on a CPU that has instructions for it, f32 on another CPU.
pub fn dtype(choice: DtypeChoice, device: &Device) -> DType {
    match choice {
        DtypeChoice::F32 => DType::F32,
        DtypeChoice::Bf16 => DType::BF16,
        DtypeChoice::F16 => DType::F16,
        DtypeChoice::Auto if device.is_cpu() && !Isa::has_bf16() => DType::F32,
        DtypeChoice::Auto => DType::BF16,
    }
}

/// Rows of a pass: what the configuration says, else what suits the device.
pub fn max_rows(configured: usize, device: &Device) -> usize {
    match configured {
        0 if device.is_cpu() => CPU_MAX_ROWS,
        0 => GPU_MAX_ROWS,
        rows => rows,
    }
}

/// Rows of a server's step on the CPU: 32 classification requests of 34 rows. On machine A of LOG.md 819 rows of
/// SmolLM2-135M went through a second in steps of up to 2,048, 709 in steps of up to 512.
const CPU_SERVING_ROWS: usize = 1024;

/// Rows of keys and values that a server keeps at most where nobody says how many: 128 requests of 128 tokens on the
/// CPU.
const CPU_CACHE_ROWS: usize = 16_384;

/// The same on a GPU.
const GPU_CACHE_ROWS: usize = 131_072;

/// Memory of a GPU that a server leaves to the activations of a step, bytes.
const GPU_STEP_RESERVE: usize = 2 << 30;

/// What a server keeps for requests, where `configured` names none (0): rows of the cache by the memory that is free, a
/// quarter of it on the CPU, three quarters of what a step leaves on a GPU; rows of a step that fill the device.
///
/// # Errors
/// The device's; too little memory for a single row.
pub fn serving_limits(model: &Granite, configured: Limits) -> Result<Limits> {
    let (config, device) = (model.config(), model.device());
    let width = 2 * config.num_key_value_heads * config.head_dim;
    let row_bytes = config.num_hidden_layers * width * model.product_dtype().size_in_bytes();
    let (most, full) = match device.is_cpu() {
        true => (CPU_CACHE_ROWS, CPU_SERVING_ROWS),
        false => (GPU_CACHE_ROWS, GPU_FULL_ROWS),
    };
    let mut limits = configured;
    if limits.step_rows == 0 {
        limits.step_rows = full;
    }
    if limits.cache_rows == 0 {
        let free = free_memory(device)?;
        let share = |free: usize| match device.is_cpu() {
            true => free / 4,
            false => free.saturating_sub(GPU_STEP_RESERVE) / 4 * 3,
        };
        limits.cache_rows = free.map_or(most, |free| (share(free) / row_bytes).min(most));
    }
    if limits.sequence_tokens == 0 {
        limits.sequence_tokens = config.max_position_embeddings;
    }
    if limits.cache_rows == 0 {
        return Err(Error::Invalid(format!(
            "cache: expected memory for keys and values, {row_bytes} bytes a row, found {free:?} bytes free; hint: \
             --cache-tokens",
            free = free_memory(device)?
        )));
    }
    Ok(limits)
}

/// How a run fits into the memory of `device`; `loaded` says whether the weights are there yet.
///
/// # Errors
/// The device's.
pub fn plan(
    options: &TrainOptions,
    memory: &TuningMemory,
    work: &Work,
    device: &Device,
    loaded: bool,
) -> Result<MemoryPlan> {
    let budget = Budget::new(options.memory_budget.bytes, device, loaded)?;
    Ok(MemoryPlan::new(memory, work, budget, row_range(options.max_rows, device.is_cpu())))
}

/// Rows of a pass of a tuning step: what the configuration says is the limit of every pass.
fn row_range(configured: usize, on_cpu: bool) -> RowRange {
    match configured {
        0 if on_cpu => RowRange { full: CPU_MAX_ROWS, most: CPU_MAX_ROWS },
        0 => RowRange { full: GPU_FULL_ROWS, most: GPU_MOST_ROWS },
        rows => RowRange { full: rows, most: rows },
    }
}

/// As [`plan`], of a run over `train` behind `virtual_tokens` in a model that is on its device. A second copy of the model's
/// weights is made if the plan says so; what does not tune makes none.
///
/// # Errors
/// The device's.
pub fn plan_run(
    options: &TrainOptions,
    model: &Granite,
    train: &[Example],
    virtual_tokens: usize,
) -> Result<MemoryPlan> {
    if !model.device().is_cpu() && options.memory_budget.bytes.is_none() {
        warm_up(model, train, virtual_tokens)?;
    }
    let dtypes = Dtypes { weights: model.embedding().dtype(), activations: model.dtype() };
    let mut memory = TuningMemory::of(model.config(), dtypes, model.device().location());
    memory.has_transposes = memory.transposes > 0 && model.has_transposes();
    let work = Work::of(train, virtual_tokens, options.batch_size * options.accumulate_steps);
    let plan = plan(options, &memory, &work, model.device(), true)?;
    copy_weights(model, &plan);
    Ok(plan)
}

/// Makes the second copy of the weights that a plan has room for.
fn copy_weights(model: &Granite, plan: &MemoryPlan) {
    if let BackwardWeights::Copied { is_packed: false, .. } = plan.backward_weights {
        model.pack_transposes();
    }
}

/// Takes one example through the model and back, so that kernels, cuBLAS's own among them, are loaded before anybody asks how
/// much memory is free. A device that has no memory for the example is left to the plan.
///
/// # Errors
/// The device's, but for too little memory.
fn warm_up(model: &Granite, train: &[Example], virtual_tokens: usize) -> Result<()> {
    let rows = |example: &&Example| example.input.len() + example.target.len();
    let Some(example) = train.iter().min_by_key(rows) else { return Ok(()) };
    let prompts =
        Tensor::ones((virtual_tokens, model.config().hidden_size), model.prompt_dtype(), model.device())?;
    let group = PrefixGroup::new(0..virtual_tokens as u32, [example]);
    match tune::gradient(model, &prompts, &[group], tune::Limits::rows(usize::MAX))
        .and_then(|found| found.loss())
    {
        Err(error) if Shortage::on(model.device()).caused(&error) => Ok(()),
        outcome => outcome.map(drop),
    }
}

/// The local files of a model argument; a hub's are downloaded.
///
/// # Errors
/// What [`resolve`] says; a configuration that is not supported, before any weight is downloaded.
pub fn locate(id: &str) -> Result<PathBuf> {
    let check = |config: &Path| ModelConfig::from_json(config).map(|_| ());
    Ok(match resolve(id, &HubOptions::from_env(), &check)? {
        Local::Folder(path) | Local::Gguf(path) => path,
    })
}

/// Loads the model of a configuration; `progress` is told of (blocks read, blocks).
///
/// # Errors
/// Those of the source, the checkpoint and the device.
pub fn open(options: &ModelOptions, progress: &mut dyn FnMut(usize, usize)) -> Result<Session> {
    let Chosen { device, mut warnings } = device(options.device)?;
    let path = locate(&options.id)?;
    let dtype = dtype(options.dtype, &device);
    let Checkpoint { config, tokenizer, weights, format, warnings: of_checkpoint } = Checkpoint::open(&path)?;
    warnings.extend(of_checkpoint);
    let blocks = config.num_hidden_layers;
    let dtypes = granite::dtypes(dtype, &device)?;
    let model = Granite::load(&config, &weights, dtypes, &device, &mut |done| progress(done, blocks))?;
    Ok(Session { model, tokenizer, id: options.id.clone(), format, dtype, warnings })
}

/// The template and limits of a configuration, ready to encode.
pub fn encoder<'a>(
    options: &DataOptions,
    tokenizer: &'a TextTokenizer,
    template: &'a Template,
) -> Encoder<'a> {
    Encoder {
        tokenizer: &tokenizer.tokenizer,
        template,
        vocab_size: tokenizer.vocab_size,
        eos_token_id: tokenizer.eos_token_id,
        max_input_tokens: options.max_input_tokens,
        max_output_tokens: options.max_output_tokens,
        instruction: None,
    }
}

/// Rows and token ids of one of the configuration's files; nothing where it names none.
///
/// # Errors
/// Malformed rows, or rows that can't be encoded.
pub fn examples(file: &str, config: &Config, encoder: &Encoder) -> Result<Option<(Dataset, Encoded)>> {
    if file.is_empty() {
        return Ok(None);
    }
    let dataset = dataset(file, &config.data)?;
    let encoded = encoder.encode_dataset(&dataset)?;
    Ok(Some((dataset, encoded)))
}

/// Rows of one of the configuration's files; labels are in the form that they are trained and scored in.
///
/// # Errors
/// Malformed rows; labels of which nothing can be seen.
pub fn dataset(file: &str, options: &DataOptions) -> Result<Dataset> {
    let mut dataset = Dataset::read(Path::new(file), &options.input, &options.output)?;
    if options.task == Task::Classification {
        dataset.normalize_labels()?;
    }
    Ok(dataset)
}

#[cfg(test)]
mod tests;
