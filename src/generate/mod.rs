//! Generation: keys and values of what requests share once, then all requests together, in steps.

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
pub use engine::{Engine, Stepped};
pub use prefixes::PrefixId;
pub use request::{Event, Request, Sampling, StopReason, Token};
pub use sequence::SequenceId;

use crate::device::Shortage;
use crate::model::Decoder;
use crate::ops::gpu;
use crate::ops::rope::Rope;
use crate::{Error, Result};
use candle_core::Tensor;
use std::collections::HashMap;

/// What a request came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Generated {
    /// Token ids, without the stop token.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub stop_reason: StopReason,
    /// Log-probabilities of [`Request::score`].
    pub scores: Vec<f64>,
}

/// How far a list of texts is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Done {
    /// Texts that are done.
    pub texts: usize,
    /// Rows that go through the model at a time: less than was asked for after the device ran out of memory.
    pub max_rows: usize,
}

/// The matrix of prompts that a pass reads: `prompt` as the model computes, or no row.
pub(crate) fn prompts(model: &Decoder, prompt: Option<&Tensor>) -> Result<Tensor> {
    Ok(match prompt {
        Some(prompt) => gpu::to_device(prompt, model.device())?.to_dtype(model.prompt_dtype())?,
        None => crate::ops::no_rows(model.config().hidden_size, model.prompt_dtype(), model.device())?,
    })
}

/// Room that a batch of `requests` behind `virtual_tokens` needs, where it may have `most` rows at a time.
fn cache_rows(requests: &[Request], virtual_tokens: usize, most: usize) -> usize {
    let rows = |request: &Request| request.tokens.len() + request.max_new_tokens;
    let (all, largest) =
        (requests.iter().map(rows).sum::<usize>(), requests.iter().map(rows).max().unwrap_or(0));
    let longest_text = requests.iter().map(|request| request.tokens.len()).max().unwrap_or(0);
    // The head that all share is at most a text.
    2 * virtual_tokens + longest_text + all.min(most.max(largest))
}

/// Runs `requests` behind `prompt` f32 [P, C], or without one, in steps of at most `step_rows` rows; `progress` is told
/// how many are done. What comes of each, in their order. If the device runs out of memory, steps have fewer rows; if it has
/// no room for the keys and values of so many requests, fewer are under way at a time.
///
/// # Errors
/// A prompt of another width; requests that [`Engine::submit`] refuses; logits that are no numbers; [`Error::OutOfMemory`]
/// for a request that does not fit by itself; the device's.
pub fn generate(
    model: &Decoder,
    prompt: Option<&Tensor>,
    requests: Vec<Request>,
    step_rows: usize,
    progress: &mut dyn FnMut(Done),
) -> Result<Vec<Generated>> {
    let virtual_tokens = prompt.map_or(0, |prompt| prompt.dims()[0]);
    let long_above = model.config().rope.as_ref().and_then(Rope::long_above);
    // Long requests have a prefix of their own.
    let of_long = if long_above.is_some() { virtual_tokens } else { 0 };
    let (mut shortage, mut step_rows, mut last) = (Shortage::on(model.device()), step_rows.max(1), 0);
    loop {
        let rows = cache_rows(&requests, virtual_tokens, 4 * step_rows) + of_long;
        let outcome = match Engine::new(model, rows, step_rows) {
            Ok(engine) => run_all(engine, prompt, &requests, step_rows, progress),
            Err(error) => Err(error),
        };
        let error = match outcome {
            Err(error) if shortage.caused(&error) => error,
            other => return other,
        };
        // As many rows as one request needs: nothing less is left to try.
        if rows == last || step_rows == 1 {
            return Err(Error::OutOfMemory { problem: error.to_string() });
        }
        (step_rows, last) = (step_rows / 2, rows);
    }
}

fn run_all(
    mut engine: Engine,
    prompt: Option<&Tensor>,
    requests: &[Request],
    step_rows: usize,
    progress: &mut dyn FnMut(Done),
) -> Result<Vec<Generated>> {
    let prefix = engine.add_prefix(prompt)?;
    engine.share_head(prefix, crate::batch::common_head(requests.iter().map(|r| r.tokens.as_slice())))?;
    let empty = Generated { tokens: Vec::new(), stop_reason: StopReason::MaxTokens, scores: Vec::new() };
    let (mut generated, mut places) = (vec![empty; requests.len()], HashMap::new());
    for (place, request) in requests.iter().enumerate() {
        places.insert(engine.submit(prefix, request.clone())?, place);
    }
    let mut done = Done { texts: 0, max_rows: step_rows };
    progress(done);
    while !engine.is_idle() {
        let stepped = engine.step()?;
        done.max_rows = stepped.less_rows.unwrap_or(done.max_rows);
        for (id, event) in stepped.events {
            let of = &mut generated[places[&id]];
            match event {
                Event::Scored(_) => {}
                Event::FirstScores(scores) => of.scores = scores,
                Event::Token(token) => of.tokens.push(token.id),
                Event::Finished(reason) => {
                    of.stop_reason = reason;
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
