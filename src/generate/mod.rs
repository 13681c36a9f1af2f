//! Generation: keys and values of what requests share once, then all requests together, in steps.

mod choices;
mod choose;
mod engine;
mod long;
mod prefixes;
mod request;
mod sampling;

pub use choices::Choices;
pub use engine::{Engine, SequenceId, Stepped};
pub use prefixes::PrefixId;
pub use request::{Event, Request, Sampling, StopReason, Token};

use crate::Result;
use crate::model::{Granite, Rope};
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

/// The matrix of prompts that a pass reads: `prompt` as the model computes, or no row.
pub(crate) fn prompts(model: &Granite, prompt: Option<&Tensor>) -> Result<Tensor> {
    Ok(match prompt {
        Some(prompt) => prompt.to_device(model.device())?.to_dtype(model.prompt_dtype())?,
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
/// how many are done. What comes of each, in their order.
///
/// # Errors
/// A prompt of another width; requests that [`Engine::submit`] refuses; logits that are no numbers; the device's.
pub fn generate(
    model: &Granite,
    prompt: Option<&Tensor>,
    requests: Vec<Request>,
    step_rows: usize,
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<Generated>> {
    let virtual_tokens = prompt.map_or(0, |prompt| prompt.dims()[0]);
    let long_above = model.config().rope.as_ref().and_then(Rope::long_above);
    // Long requests have a prefix of their own.
    let of_long = if long_above.is_some() { virtual_tokens } else { 0 };
    let rows = cache_rows(&requests, virtual_tokens, 4 * step_rows) + of_long;
    let mut engine = Engine::new(model, rows, step_rows)?;
    let prefix = engine.add_prefix(prompt)?;
    engine
        .share_head(prefix, crate::data::pack::common_head(requests.iter().map(|r| r.tokens.as_slice())))?;
    let empty = Generated { tokens: Vec::new(), stop_reason: StopReason::MaxTokens, scores: Vec::new() };
    let (mut generated, mut places) = (vec![empty; requests.len()], HashMap::new());
    for (place, request) in requests.into_iter().enumerate() {
        places.insert(engine.submit(prefix, request)?, place);
    }
    let mut done = 0;
    progress(done);
    while !engine.is_idle() {
        for (id, event) in engine.step()?.events {
            let of = &mut generated[places[&id]];
            match event {
                Event::Scored(_) => {}
                Event::FirstScores(scores) => of.scores = scores,
                Event::Token(token) => of.tokens.push(token.id),
                Event::Finished(reason) => {
                    of.stop_reason = reason;
                    done += 1;
                }
                Event::Failed(problem) => return Err(candle_core::Error::Msg(problem).into()),
            }
        }
        progress(done);
    }
    Ok(generated)
}
