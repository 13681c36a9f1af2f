//! The likelihood of given outputs.

use crate::Result;
use crate::batch::{Example, PrefixGroup};
use crate::config::PromptKind;
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
    max_rows: usize,
    progress: &mut dyn FnMut(GenerateProgress),
) -> Result<Vec<f64>> {
    Ok(nll_after_each(model, &[prompt], examples, max_rows, progress)?.remove(0))
}

/// As [`nll`], after each of `prompts`: those of one kind in one batch, in which each prompt is a prefix of its own with the rows
/// of the examples after it. Returns the values of each prompt.
///
/// # Errors
/// As [`nll`].
pub(super) fn nll_after_each(
    model: &Decoder,
    prompts: &[Option<&Prefix>],
    examples: &[Example],
    mut max_rows: usize,
    progress: &mut dyn FnMut(GenerateProgress),
) -> Result<Vec<Vec<f64>>> {
    let prompts: Vec<Prefix> =
        prompts.iter().map(|prompt| generate::prompts(model, *prompt)).collect::<Result<_>>()?;
    let (mut nll, mut done) = (vec![Vec::new(); prompts.len()], 0);
    for kind in [PromptKind::Embeddings, PromptKind::Prefix] {
        let of_kind: Vec<usize> = (0..prompts.len()).filter(|i| prompts[*i].kind() == kind).collect();
        if of_kind.is_empty() {
            continue;
        }
        let batch = PromptBatch::new(of_kind.iter().map(|i| prompts[*i].clone()).collect())?;
        let (mut from, mut rows) = (0, 0);
        for to in 1..=examples.len() {
            rows += of_kind.len() * (examples[to - 1].input.len() + examples[to - 1].target.len());
            if to == examples.len() || rows >= max_rows.saturating_mul(PASSES) {
                let groups = batch.groups(&examples[from..to])?;
                let (values, limits) =
                    objective::evaluate_within_memory(model, &batch.matrix, &groups, max_rows)?;
                let tokens = examples[from..to].iter().map(|example| example.target.len()).sum::<usize>();
                let of_prompts = of_kind.iter().zip(values.chunks(tokens.max(1)));
                of_prompts.for_each(|(i, values)| nll[*i].extend_from_slice(values));
                max_rows = limits;
                done += of_kind.len() * (to - from);
                progress(GenerateProgress { texts: done, max_rows });
                (from, rows) = (to, 0);
            }
        }
    }
    let all = nll.iter().flatten();
    all.copied().try_for_each(|value| finite("the log-likelihood of an expected token", value))?;
    Ok(nll)
}

/// Prompts of one kind in one batch.
struct PromptBatch {
    prompts: Vec<Prefix>,
    /// Their rows, one prompt below the other.
    matrix: Prefix,
}

impl PromptBatch {
    fn new(prompts: Vec<Prefix>) -> Result<Self> {
        let matrix = Prefix::cat(&prompts)?;
        Ok(Self { prompts, matrix })
    }

    /// `examples` after each prompt.
    fn groups(&self, examples: &[Example]) -> Result<Vec<PrefixGroup>> {
        let mut start = 0;
        let group = |prompt: &Prefix| {
            let rows = start..start + prompt.num_virtual_tokens() as u32;
            start = rows.end;
            PrefixGroup::after(prompt.before(), rows, examples)
        };
        self.prompts.iter().map(group).collect()
    }
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
