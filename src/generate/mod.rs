//! Generation: the prefix's keys and values once, then all sequences together, a token each per step.

mod request;

pub use request::{Event, Request, Sampling, StopReason, Token};

use crate::Result;
use crate::data::pack::{Passes, PrefixGroup};
use crate::model::{Granite, KvCache, PrefixCache};
use candle_core::{D, DType, Device, Tensor};
use candle_transformers::generation::{LogitsProcessor, Sampling as Choice};

/// When to stop, and how to choose.
pub struct Options<'a> {
    /// Tokens to generate at most.
    pub max_new_tokens: usize,
    /// Tokens that end a sequence; they are not part of what was generated.
    pub stop_token_ids: &'a [u32],
    /// How the next token is chosen.
    pub sampling: Choice,
    /// Of the sampling.
    pub seed: u64,
    /// Tokens whose log-probability as the first generated token is wanted.
    pub score: &'a [u32],
}

/// What a sequence was continued with.
#[derive(Debug, Clone, PartialEq)]
pub struct Generated {
    /// Token ids, without the stop token.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub stop_reason: StopReason,
    /// Log-probabilities of [`Options::score`].
    pub scores: Vec<f64>,
}

/// Keys and values of a soft prompt f32 [P, C] (if any) and the tokens `head` behind it.
///
/// # Errors
/// A prompt of another width; the device's.
pub fn prefix(model: &Granite, prompt: Option<&Tensor>, head: &[u32]) -> Result<PrefixCache> {
    let prompts = prompts(model, prompt)?;
    let virtual_tokens = prompts.dims()[0] as u32;
    let group = PrefixGroup { prompt: 0..virtual_tokens, head: head.to_vec(), sequences: Vec::new() };
    let rows = group.prefix_rows();
    let lead = Passes::new(&[group], model.config().vocab_size, usize::MAX).lead;
    let layers = if rows == 0 { Vec::new() } else { model.keys_values(&lead, &prompts)? };
    Ok(PrefixCache { layers, rows })
}

/// The matrix of prompts that a pass reads: `prompt` as the model computes, or no row.
pub(crate) fn prompts(model: &Granite, prompt: Option<&Tensor>) -> Result<Tensor> {
    Ok(match prompt {
        Some(prompt) => prompt.to_device(model.device())?.to_dtype(model.prompt_dtype())?,
        None => crate::ops::no_rows(model.config().hidden_size, model.prompt_dtype(), model.device())?,
    })
}

/// Continues each of `inputs` (token ids behind the prefix, at least one each), all together.
///
/// # Errors
/// An empty input; the device's.
pub fn generate(
    model: &Granite,
    prefix: &PrefixCache,
    inputs: &[&[u32]],
    options: &Options,
) -> Result<Vec<Generated>> {
    let empty = Generated { tokens: Vec::new(), stop_reason: StopReason::MaxTokens, scores: Vec::new() };
    let mut generated = vec![empty; inputs.len()];
    if inputs.is_empty() || options.max_new_tokens == 0 {
        return Ok(generated);
    }
    let no_prompts = prompts(model, None)?;
    let capacities: Vec<usize> = inputs.iter().map(|i| i.len() + options.max_new_tokens).collect();
    let config = model.config();
    let width = 2 * config.num_key_value_heads * config.head_dim;
    let mut cache = KvCache::new(
        config.num_hidden_layers,
        width,
        &capacities,
        Some(prefix.clone()),
        (model.dtype(), model.device()),
    )?;
    let mut choosers: Vec<LogitsProcessor> = (0..inputs.len() as u64)
        .map(|i| LogitsProcessor::from_sampling(options.seed.wrapping_add(i), options.sampling.clone()))
        .collect();
    let mut next: Vec<(usize, Vec<u32>)> = inputs.iter().map(|i| i.to_vec()).enumerate().collect();
    for step in 0..options.max_new_tokens {
        let rows: Vec<(usize, &[u32])> =
            next.iter().map(|(slot, tokens)| (*slot, tokens.as_slice())).collect();
        let batch = cache.pack(&rows)?;
        let hidden = model.infer(&batch, &no_prompts, &mut cache)?;
        let logits = model.logits(&hidden)?.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
        let mut going_on = Vec::new();
        for (row, (slot, _)) in next.iter().enumerate() {
            let logits = logits.get(row)?;
            let of = &mut generated[*slot];
            if step == 0 {
                of.scores = log_probabilities(&logits, options.score)?;
            }
            let token = choosers[*slot].sample(&logits)?;
            if options.stop_token_ids.contains(&token) {
                of.stop_reason = StopReason::StopToken;
            } else {
                of.tokens.push(token);
                going_on.push((*slot, vec![token]));
            }
        }
        next = going_on;
        if next.is_empty() {
            break;
        }
    }
    Ok(generated)
}

fn log_probabilities(logits: &Tensor, tokens: &[u32]) -> Result<Vec<f64>> {
    let logits = logits.to_dtype(DType::F64)?;
    let lse = logits.log_sum_exp(D::Minus1)?.to_scalar::<f64>()?;
    tokens.iter().map(|t| Ok(logits.get(*t as usize)?.to_scalar::<f64>()? - lse)).collect()
}
