//! Generation. Keys and values that requests share are computed once; then all requests run together, in steps.

mod choices;
mod choose;
mod engine;
mod long;
mod prefixes;
mod request;
mod sampling;
mod sequence;
pub mod stop;
pub mod text_stream;

pub use choices::Choices;
pub use engine::{Engine, StepOutput};
pub use prefixes::PrefixId;
pub use request::{Event, Request, Sampling, StopReason, Token};
pub use sequence::SequenceId;

use crate::device::Shortage;
use crate::model::Decoder;
use crate::ops::gpu;
use crate::ops::rope::Rope;
use crate::prompt::Prefix;
use crate::{Error, Result};
use std::collections::HashMap;

/// The answer to a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Generated {
    /// Token ids, without the stop token.
    pub tokens: Vec<u32>,
    /// Why the text ended.
    pub stop_reason: StopReason,
    /// Log-probabilities of [`Request::score`].
    pub scores: Vec<f64>,
}

/// Progress of [`generate`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GenerateProgress {
    /// Number of texts that are complete.
    pub texts: usize,
    /// Rows per step: fewer than requested after the device ran out of memory.
    pub max_rows: usize,
}

/// The virtual tokens that a pass reads: `prompt` on the model's device and in its dtype, or no rows.
pub(crate) fn prompts(model: &Decoder, prompt: Option<&Prefix>) -> Result<Prefix> {
    match prompt {
        Some(prompt) => {
            let values = gpu::to_device(prompt.values(), model.device())?;
            Ok(prompt.with_values(values.to_dtype(model.prompt_dtype())?))
        }
        None => Ok(Prefix::Embeddings(model.no_prompts()?)),
    }
}

/// Rows of the cache for `requests` after each of `prompts` prefixes of `prefix_rows` rows in all, if at most `most` rows of
/// requests are kept at a time.
fn cache_rows(requests: &[Request], prompts: usize, prefix_rows: usize, most: usize) -> usize {
    let rows = |request: &Request| request.tokens.len() + request.max_new_tokens;
    let (all, largest) =
        (requests.iter().map(rows).sum::<usize>(), requests.iter().map(rows).max().unwrap_or(0));
    let longest_text = requests.iter().map(|request| request.tokens.len()).max().unwrap_or(0);
    // The head that all requests share is at most as long as a text.
    2 * prefix_rows + prompts * longest_text + (prompts * all).min(most.max(largest))
}

/// Runs `requests` after `prompt`, or after no prompt, in steps of at most `step_rows` rows. `progress` is
/// called with the number of complete texts. Returns the answers in the order of the requests. If the device runs out
/// of memory, steps have fewer rows; if the keys and values of so many requests do not fit, fewer requests run at a
/// time.
///
/// # Errors
/// Returns an error if the prompt has another width than the model, [`Engine::submit`] refuses a request, logits are
/// not finite, or a device operation fails; and [`Error::OutOfMemory`] if one request does not fit by itself.
pub fn generate(
    model: &Decoder,
    prompt: Option<&Prefix>,
    requests: Vec<Request>,
    step_rows: usize,
    progress: &mut dyn FnMut(GenerateProgress),
) -> Result<Vec<Generated>> {
    Ok(generate_after_each(model, &[prompt], &requests, step_rows, progress)?.remove(0))
}

/// As [`generate`], after each of `prompts`, whatever their kinds are: a step has rows of requests after all of them. Returns
/// the answers of each prompt.
///
/// # Errors
/// As [`generate`].
pub fn generate_after_each(
    model: &Decoder,
    prompts: &[Option<&Prefix>],
    requests: &[Request],
    step_rows: usize,
    progress: &mut dyn FnMut(GenerateProgress),
) -> Result<Vec<Vec<Generated>>> {
    let rows_of = |prompt: &&Prefix| prompt.before().len() + prompt.num_virtual_tokens();
    let prefix_rows = prompts.iter().flatten().map(rows_of).sum();
    let long_above = model.config().rope.as_ref().and_then(Rope::long_above);
    // Long requests have prefixes of their own.
    let long_prefix_rows = if long_above.is_some() { prefix_rows } else { 0 };
    let (mut shortage, mut step_rows, mut last) = (Shortage::new(model.device()), step_rows.max(1), 0);
    loop {
        let rows = cache_rows(requests, prompts.len(), prefix_rows, 4 * step_rows) + long_prefix_rows;
        let outcome = match Engine::new(model, rows, step_rows) {
            Ok(engine) => run_all(engine, prompts, requests, step_rows, progress),
            Err(error) => Err(error),
        };
        let error = match outcome {
            Err(error) if shortage.caused(&error) => error,
            other => return other,
        };
        // The cache has as many rows as one request needs, so it cannot be smaller.
        if rows == last || step_rows == 1 {
            return Err(Error::OutOfMemory { problem: error.to_string() });
        }
        (step_rows, last) = (step_rows / 2, rows);
    }
}

fn run_all(
    mut engine: Engine,
    prompts: &[Option<&Prefix>],
    requests: &[Request],
    step_rows: usize,
    progress: &mut dyn FnMut(GenerateProgress),
) -> Result<Vec<Vec<Generated>>> {
    let head = crate::batch::common_head(requests.iter().map(|r| r.tokens.as_slice()));
    let mut prefixes = Vec::with_capacity(prompts.len());
    for prompt in prompts {
        let prefix = engine.add_prefix(*prompt)?;
        engine.share_head(prefix, head)?;
        prefixes.push(prefix);
    }
    let empty = Generated { tokens: Vec::new(), stop_reason: StopReason::MaxTokens, scores: Vec::new() };
    let (mut generated, mut places) = (vec![vec![empty; requests.len()]; prompts.len()], HashMap::new());
    for (place, request) in requests.iter().enumerate() {
        for (prompt, prefix) in prefixes.iter().enumerate() {
            places.insert(engine.submit(*prefix, request.clone())?, (prompt, place));
        }
    }
    let mut done = GenerateProgress { texts: 0, max_rows: step_rows };
    progress(done);
    while !engine.is_idle() {
        let output = engine.step()?;
        done.max_rows = output.less_rows.unwrap_or(done.max_rows);
        for (id, event) in output.events {
            let (prompt, place) = places[&id];
            let answer = &mut generated[prompt][place];
            match event {
                Event::Scored(_) => {}
                Event::FirstScores(scores) => answer.scores = scores,
                Event::Token(token) => answer.tokens.push(token.id),
                Event::Finished(reason) => {
                    answer.stop_reason = reason;
                    done.texts += 1;
                }
                Event::Failed(problem) => return Err(candle_core::Error::Msg(problem).into()),
                Event::NoMemory(problem) => return Err(Error::OutOfMemory { problem }),
            }
        }
        progress(done);
    }
    Ok(generated)
}

#[cfg(test)]
mod tests;
