//! From a configuration to what a run needs: device, frozen model, tokenizer, token ids.

use crate::Result;
use crate::checkpoint::{Checkpoint, HubOptions, Local, ModelConfig, TextTokenizer, resolve};
use crate::config::{Config, DataOptions, DtypeChoice, ModelOptions, Task};
use crate::data::{Dataset, Encoded, Encoder, Template};
use crate::device::{self, Chosen};
use crate::model::{Decoder, Dtypes};
use crate::ops::bf16::Isa;
use candle_core::{DType, Device};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A checkpoint with its weights on a device.
pub struct Session {
    /// The frozen model. A server and a run may share it.
    pub model: Arc<Decoder>,
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

/// Loads the model of a configuration; `progress` is called with (layers read, layers).
///
/// # Errors
/// Returns the errors of the source and the checkpoint, and an error if a device operation fails.
pub fn open(options: &ModelOptions, progress: &mut dyn FnMut(usize, usize)) -> Result<Session> {
    let Chosen { device, mut warnings } = device::open(options.device)?;
    let path = locate(&options.id)?;
    let dtype = dtype(options.dtype, &device);
    let Checkpoint { config, tokenizer, weights, format, warnings: of_checkpoint } = Checkpoint::open(&path)?;
    warnings.extend(of_checkpoint);
    let blocks = config.num_hidden_layers;
    let dtypes = Dtypes::for_weights(dtype, &device)?;
    let model = Decoder::load(&config, &weights, dtypes, &device, &mut |done| progress(done, blocks))?;
    Ok(Session { model: Arc::new(model), tokenizer, id: options.id.clone(), format, dtype, warnings })
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

/// Rows and token ids of one of the configuration's files; `None` if it names none.
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
