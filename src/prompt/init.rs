//! How a soft prompt starts.

use crate::checkpoint::{ModelConfig, TextTokenizer};
use crate::config::{InitMethod, PromptKind, PromptOptions};
use crate::model::{Decoder, keys_values_width};
use crate::ops::gpu;
use crate::prompt::peft::Adapter;
use crate::prompt::{Prefix, Prompt, PromptLayout};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use rand::SeedableRng;
use rand::distr::Uniform;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use std::path::Path;

/// The soft prompt that a run starts from, f32 [num_virtual_tokens, C] on the CPU, before Granite's embedding
/// multiplier.
///
/// * `text`: the embeddings of the text's tokens, cut or repeated to the length asked for, as PEFT does
///   (`peft/tuners/prompt_tuning/model.py`); without a length, as many as the text has.
/// * `vocab`: the embeddings of random tokens.
/// * `random`: normal values around the vocabulary's mean, per column as wide as the vocabulary is. (PEFT's own
///   random start is N(0, 1), which is far from where embeddings lie.)
/// * `file`: another adapter's prompt; of the length that is asked for, if one is.
///
/// # Errors
/// A text without tokens, or with one that the embedding has no row for; an adapter of another width or length.
pub fn initial(
    options: &PromptOptions,
    model: &Decoder,
    tokenizer: &TextTokenizer,
    seed: u64,
) -> Result<Prompt> {
    let prefix = match (options.init_method, options.kind) {
        (InitMethod::File, _) => from_file(options, model)?,
        _ => Prefix::Embeddings(embeddings(options, model, tokenizer, seed)?),
    };
    let prefix = as_kind(prefix, options.kind, model)?;
    Prompt::with_options(&prefix, options, token_dim(options.kind, model.config()), seed)
}

/// The trainable values of the prompt that [`initial`] makes, of this many virtual tokens, without the model's weights.
///
/// # Errors
/// Returns [`Error::Invalid`] if no row is left to be trained.
pub fn layout(
    options: &PromptOptions,
    model: &ModelConfig,
    num_virtual_tokens: usize,
) -> Result<PromptLayout> {
    let width = match options.kind {
        PromptKind::Embeddings => model.hidden_size,
        PromptKind::Prefix => keys_values_width(model),
    };
    PromptLayout::new((num_virtual_tokens, width), options, token_dim(options.kind, model))
}

/// Width of what PEFT's encoder of a prompt reads: C, or K D.
fn token_dim(kind: PromptKind, model: &ModelConfig) -> usize {
    match kind {
        PromptKind::Embeddings => model.hidden_size,
        PromptKind::Prefix => model.num_key_value_heads * model.head_dim,
    }
}

/// A prefix of the kind that the configuration asks for: the keys and values of embeddings are those that the model makes of
/// them, so that the first step is that of the embeddings.
fn as_kind(prefix: Prefix, kind: PromptKind, model: &Decoder) -> Result<Prefix> {
    match (prefix, kind) {
        (Prefix::Embeddings(embeddings), PromptKind::Prefix) => {
            let embeddings = gpu::to_device(&embeddings, model.device())?;
            let values = model.keys_values(&embeddings)?.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
            Ok(Prefix::KeysValues(values))
        }
        (Prefix::KeysValues(_), PromptKind::Embeddings) => Err(Error::Invalid(
            "prompt.init_file: expected embeddings, found keys and values (prefix tuning), which have no embeddings; hint: \
             prompt.kind = \"prefix\""
                .into(),
        )),
        (prefix, _) => Ok(prefix),
    }
}

fn embeddings(
    options: &PromptOptions,
    model: &Decoder,
    tokenizer: &TextTokenizer,
    seed: u64,
) -> Result<Tensor> {
    let asked = options.num_virtual_tokens;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    match options.init_method {
        InitMethod::Text => {
            let ids =
                tokenizer.encode(&options.init_text, true).map_err(|e| e.in_text("prompt.init_text"))?;
            if ids.is_empty() {
                return Err(Error::Invalid(
                    "prompt.init_text: expected at least one token, found none".into(),
                ));
            }
            let n = if asked == 0 { ids.len() } else { asked };
            let ids: Vec<u32> = ids.iter().copied().cycle().take(n).collect();
            rows(model, &ids)
        }
        InitMethod::Vocab => {
            let vocab = Uniform::new(0, model.config().vocab_size as u32)
                .map_err(|e| Error::Invalid(format!("the vocabulary is empty: {e}")))?;
            let ids: Vec<u32> = (0..asked).map(|_| vocab.sample(&mut rng)).collect();
            rows(model, &ids)
        }
        InitMethod::Random => {
            let embedding = model.embedding().to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
            let mean = embedding.mean_keepdim(0)?;
            let deviation = embedding.var_keepdim(0)?.sqrt()?;
            let width = model.config().hidden_size;
            let noise: Vec<f32> = StandardNormal.sample_iter(&mut rng).take(asked * width).collect();
            let noise = Tensor::from_vec(noise, (asked, width), &Device::Cpu)?;
            Ok(noise.broadcast_mul(&deviation)?.broadcast_add(&mean)?)
        }
        InitMethod::File => Ok(from_file(options, model)?.embeddings("prompt.init_file")?.clone()),
    }
}

/// The prompt of an adapter that fits the model, of the length that is asked for if one is.
fn from_file(options: &PromptOptions, model: &Decoder) -> Result<Prefix> {
    let asked = options.num_virtual_tokens;
    let path = Path::new(&options.init_file);
    let adapter = Adapter::open(path)?;
    adapter.check_fits(path, "the model", model.config()).map_err(in_init_file)?;
    let n = adapter.prompt.num_virtual_tokens();
    if asked != 0 && asked != n {
        return Err(Error::Invalid(format!(
            "prompt.num_virtual_tokens: expected 0 or {n}, the rows of prompt.init_file ({}), found {asked}",
            options.init_file
        )));
    }
    Ok(adapter.prompt)
}

/// The error of an adapter, with the key that names the adapter.
fn in_init_file(error: Error) -> Error {
    match error {
        Error::Checkpoint { path, problem } => {
            Error::Checkpoint { path, problem: format!("prompt.init_file: {problem}") }
        }
        other => other,
    }
}

/// Rows of the embedding matrix in f32 on the CPU.
fn rows(model: &Decoder, ids: &[u32]) -> Result<Tensor> {
    let ids = gpu::upload(ids, model.device())?;
    Ok(model.embedding().index_select(&ids, 0)?.to_dtype(DType::F32)?.to_device(&Device::Cpu)?)
}
