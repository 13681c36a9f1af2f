//! The likelihood of given outputs.

use crate::Result;
use crate::batch::Example;
use crate::generate::{self, GenerateProgress};
use crate::model::Decoder;
use crate::prompt::Prefix;
use crate::tune::objective;

/// Passes that run together between two progress reports: they share one pass of the prefix through the model.
const PASSES: usize = 8;

/// Negative log-likelihood of each target token of `examples`, nats, in their order, after `prompt` or
/// without a prompt. At most `max_rows` rows go through the model at once, fewer after the device ran out of memory;
/// `progress` is called with the number of examples done.
///
/// # Errors
/// Returns an error if an input does not begin with the tokens before the prompt, a value is not finite or a device operation fails, and
/// [`Error::OutOfMemory`](crate::Error::OutOfMemory) if a single example does not fit.
pub fn nll(
    model: &Decoder,
    prompt: Option<&Prefix>,
    examples: &[Example],
    mut max_rows: usize,
    progress: &mut dyn FnMut(GenerateProgress),
) -> Result<Vec<f64>> {
    let prompts = generate::prompts(model, prompt)?;
    let (mut nll, mut from, mut rows) = (Vec::new(), 0, 0);
    for to in 1..=examples.len() {
        rows += examples[to - 1].input.len() + examples[to - 1].target.len();
        if to == examples.len() || rows >= max_rows.saturating_mul(PASSES) {
            let group = prompts.group(&examples[from..to])?;
            let (found, limits) = objective::evaluate_within_memory(model, &prompts, group, max_rows)?;
            nll.extend(found);
            max_rows = limits;
            progress(GenerateProgress { texts: to, max_rows });
            (from, rows) = (to, 0);
        }
    }
    nll.iter().try_for_each(|value| finite("the log-likelihood of an expected token", *value))?;
    Ok(nll)
}

/// Returns an error if the value is not finite: a working model gives no such value, and it would spoil every mean.
pub(super) fn finite(what: &str, value: f64) -> Result<()> {
    if value.is_finite() {
        return Ok(());
    }
    let problem = format!(
        "{what} is {value}; hint: the prompt's tuning diverged, or the weights overflow in f16; --dtype f32 shows which"
    );
    Err(candle_core::Error::Msg(problem).into())
}
