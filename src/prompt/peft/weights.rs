//! `adapter_model.safetensors`: the prompt's tensor.

use super::AdapterConfig;
use crate::checkpoint::LFS_POINTER;
use crate::layout::adapter_folder::{CONFIG, PICKLE, WEIGHTS};
use candle_core::safetensors::Load;
use candle_core::{DType, Device};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::collections::HashMap;
use std::path::Path;

/// The only tensor of a prompt-tuning adapter.
const PROMPT: &str = "prompt_embeddings";

type ParsedWeights<T> = std::result::Result<T, String>;

/// Why a folder without [`WEIGHTS`] can't be read.
pub(super) fn missing(dir: &Path) -> String {
    if dir.join(PICKLE).exists() {
        format!(
            "expected {WEIGHTS}, found {PICKLE}, a Python pickle; load it with PEFT and save it again with \
             save_pretrained to get safetensors"
        )
    } else {
        format!("expected {WEIGHTS}, found no such file")
    }
}

/// What Git LFS left in the place of a file, if `bytes` are that.
pub(super) fn lfs_pointer(bytes: &[u8]) -> Option<String> {
    bytes.starts_with(LFS_POINTER.as_bytes()).then(|| {
        "expected the file itself, found a Git LFS pointer to it; hint: `git lfs pull` in the repository's folder \
         fetches it"
            .into()
    })
}

/// What is wrong with a prompt of this shape and these values.
pub(super) fn check(config: &AdapterConfig, shape: &[usize], values: &[f32]) -> ParsedWeights<()> {
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
pub(super) fn decode(bytes: &[u8]) -> ParsedWeights<(Vec<usize>, Vec<f32>)> {
    if let Some(problem) = lfs_pointer(bytes) {
        return Err(problem);
    }
    let file = SafeTensors::deserialize(bytes).map_err(|error| format!("not a safetensors file: {error}"))?;
    let mut names = file.names();
    names.sort_unstable();
    if names != [PROMPT] {
        return Err(other_tensors(&names));
    }
    let tensor = file.tensor(PROMPT).map_err(|error| error.to_string())?;
    if !matches!(tensor.dtype(), Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F64) {
        return Err(format!("{PROMPT}: expected F32, F16, BF16 or F64, found {:?}", tensor.dtype()));
    }
    // As PEFT, whose prompt is f32; what is too large for it becomes infinite, and is refused as that.
    let values = tensor.load(&Device::Cpu).and_then(|t| t.to_dtype(DType::F32)?.flatten_all()?.to_vec1());
    Ok((tensor.shape().to_vec(), values.map_err(|error| format!("{PROMPT}: {error}"))?))
}

/// Why a file of tensors with these names, sorted, is not a prompt.
fn other_tensors(names: &[&str]) -> String {
    let found = if names.is_empty() { "none".to_string() } else { names.join(", ") };
    let problem = format!("expected the one tensor {PROMPT}, found {found}");
    let is_lora = |name: &&str| name.contains("lora_");
    let state = names.iter().find(|name| name.starts_with("prompt_encoder."));
    let hint = if names.contains(&PROMPT) {
        "the others are weights of the base model (embeddings that were resized or retrained, modules_to_save), and \
         gneiss takes the base as it is; if they are unchanged, save the adapter again with \
         save_pretrained(DIR, save_embedding_layers=False)"
            .to_owned()
    } else if names.iter().any(is_lora) {
        "these are LoRA's; gneiss reads tuned prompts".to_owned()
    } else if let Some(state) = state {
        format!("{state} is of the model's whole state; save the adapter with PEFT's save_pretrained")
    } else if let Some(name) = names.iter().find(|name| name.ends_with(&format!(".{PROMPT}"))) {
        format!("PEFT loads no {name} either: rename it to {PROMPT}")
    } else {
        return problem;
    };
    format!("{problem}; {hint}")
}

/// A safetensors file with the prompt, as f32.
pub(super) fn encode(shape: &[usize], values: &[f32]) -> ParsedWeights<Vec<u8>> {
    let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let tensor = TensorView::new(Dtype::F32, shape.to_vec(), &data).map_err(|error| error.to_string())?;
    // As PEFT writes it; transformers refuses a file that does not say which framework it is for.
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    safetensors::serialize([(PROMPT, tensor)], Some(metadata)).map_err(|error| error.to_string())
}
