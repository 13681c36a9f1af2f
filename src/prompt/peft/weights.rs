//! `adapter_model.safetensors`: the prompt's tensors.

use super::multitask::{COLUMNS, ROWS};
use super::{AdapterConfig, PeftType};
use crate::checkpoint::LFS_POINTER;
use crate::config::PromptKind;
use crate::layout::adapter_folder::{CONFIG, PICKLE, WEIGHTS};
use candle_core::safetensors::Load;
use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::collections::HashMap;
use std::path::Path;

/// The only tensor of most adapters.
pub(super) const PROMPT: &str = "prompt_embeddings";

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

/// What is wrong with a prompt of this shape and these values, given row by row.
pub(super) fn check(config: &AdapterConfig, shape: &[usize], values: &[f32]) -> ParsedWeights<()> {
    let keys = match config.peft_type.prompt_kind() {
        PromptKind::Embeddings => "num_virtual_tokens and token_dim",
        PromptKind::Prefix => "num_virtual_tokens, num_layers and token_dim",
    };
    let rows = config.num_virtual_tokens;
    let width = config.width().or(shape.get(1).copied()).unwrap_or(0);
    let expected = [rows, width];
    if shape != expected {
        return Err(format!(
            "{PROMPT}: expected shape {expected:?}, as {keys} of {CONFIG} say, found {shape:?}"
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
            at / width,
            at % width
        )),
    }
}

/// Names of the tensors of an adapter, the prompt's first.
pub(super) fn names(method: PeftType) -> &'static [&'static str] {
    match method {
        PeftType::MultitaskPromptTuning => &[PROMPT, COLUMNS, ROWS],
        _ => &[PROMPT],
    }
}

/// The tensors of a safetensors file of an adapter of this method, in the order of [`names`], f32 on the CPU.
pub(super) fn decode(bytes: &[u8], method: PeftType) -> ParsedWeights<Vec<Tensor>> {
    if let Some(problem) = lfs_pointer(bytes) {
        return Err(problem);
    }
    let file = SafeTensors::deserialize(bytes).map_err(|error| format!("not a safetensors file: {error}"))?;
    let mut present = file.names();
    present.sort_unstable();
    let mut expected = names(method).to_vec();
    expected.sort_unstable();
    if present != expected {
        return Err(other_tensors(&present, &expected, method));
    }
    let tensor = |name: &&str| {
        let tensor = file.tensor(name).map_err(|error| error.to_string())?;
        if !matches!(tensor.dtype(), Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F64) {
            return Err(format!("{name}: expected F32, F16, BF16 or F64, found {:?}", tensor.dtype()));
        }
        // As PEFT, whose prompt is f32; what is too large for it becomes infinite, and is refused as that.
        let tensor = tensor.load(&Device::Cpu).and_then(|tensor| tensor.to_dtype(DType::F32));
        tensor.map_err(|error| format!("{name}: {error}"))
    };
    names(method).iter().map(tensor).collect()
}

/// Why a file of tensors with the names `present` is not a prompt of this method; both lists are sorted.
fn other_tensors(present: &[&str], expected: &[&str], method: PeftType) -> String {
    let found = if present.is_empty() { "none".to_string() } else { present.join(", ") };
    let problem = match expected {
        [one] => format!("expected the one tensor {one}, found {found}"),
        several => format!("expected the tensors {}, found {found}", several.join(", ")),
    };
    let is_lora = |name: &&str| name.contains("lora_");
    let state = present.iter().find(|name| name.starts_with("prompt_encoder."));
    let hint = if !expected.contains(&COLUMNS) && present.contains(&COLUMNS) {
        format!(
            "{COLUMNS} and {ROWS} belong to an adapter of the method {}, and peft_type of {CONFIG} is {method}",
            PeftType::MultitaskPromptTuning
        )
    } else if expected.iter().all(|name| present.contains(name)) {
        "the others are weights of the base model (embeddings that were resized or retrained, modules_to_save), and \
         gneiss takes the base as it is; if they are unchanged, save the adapter again with \
         save_pretrained(DIR, save_embedding_layers=False)"
            .to_owned()
    } else if present.iter().any(is_lora) {
        "these are LoRA's; gneiss reads tuned prompts".to_owned()
    } else if let Some(state) = state {
        format!("{state} is of the model's whole state; save the adapter with PEFT's save_pretrained")
    } else if let Some(name) = present.iter().find(|name| name.ends_with(&format!(".{PROMPT}"))) {
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
