//! The loss of a batch, and its gradient in the prompts: cross-entropy or, with a teacher, divergence per target token, over
//! everything that the optimizer step sees.

mod prompts;
mod targets;
mod weights;

use super::plan::{self, Limits};
use super::teacher::Teacher;
use crate::batch::{Packing, Passes, PrefixGroup};
use crate::config::PromptKind;
use crate::model::{Decoder, PrefixGradient, PrefixPass, Prefixes, Tape};
use crate::ops::cross_entropy::LossWeights;
use crate::ops::rope::Rope;
use crate::prompt::Prefix;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use prompts::{BatchPrompts, ExampleGradients};
use targets::Targets;
pub use targets::{Loss, Mean};
use weights::PassWeights;

/// Losses of a batch: sums and counts of each prefix group's target tokens.
#[derive(Debug, Clone)]
pub struct Objective {
    /// Negative log-likelihood of each target token or, with a teacher, the divergence of its row; nats, pass by pass in the
    /// order of groups, examples and tokens. A GPU may not have computed it yet.
    nll: Vec<Tensor>,
    /// As [`Passes::target_groups`].
    target_groups: Vec<(usize, usize)>,
    /// Number of prefix groups.
    groups: usize,
    /// Rows that went through the model.
    pub rows: usize,
    /// Gradient of the [`Mean`] in the prompts, of their kind and shape; `None` if none was asked for.
    pub gradient: Option<Prefix>,
}

impl Objective {
    fn new(nll: Vec<Tensor>, passes: &Passes, gradient: Option<Prefix>) -> Self {
        Self {
            nll,
            target_groups: passes.target_groups().collect(),
            groups: passes.groups,
            rows: passes.rows(),
            gradient,
        }
    }

    /// Mean over all target tokens, nats.
    pub fn loss(&self) -> Result<f64> {
        let nll = self.nll()?;
        Ok(nll.iter().sum::<f64>() / nll.len() as f64)
    }

    /// Negative log-likelihood of each target token or, with a teacher, the divergence of its row, in the order of groups,
    /// examples and tokens, nats; waits for the device.
    pub fn nll(&self) -> Result<Vec<f64>> {
        let mut all = Vec::with_capacity(self.target_tokens());
        for nll in self.nll.iter().filter(|nll| nll.elem_count() > 0) {
            all.extend(nll.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.to_vec1::<f64>()?);
        }
        Ok(all)
    }

    /// Sum of `nll`, which is [`Objective::nll`], and number of target tokens of each group.
    pub fn sums(&self, nll: &[f64]) -> Vec<(f64, usize)> {
        let mut sums = vec![(0.0, 0); self.groups];
        let mut values = nll.iter();
        for (group, rows) in &self.target_groups {
            let (sum, tokens) = &mut sums[*group];
            values.by_ref().take(*rows).for_each(|value| *sum += value);
            *tokens += rows;
        }
        sums
    }

    /// [`Objective::nll`] as tensors, one a pass, which a device may not have computed yet.
    pub(super) fn parts(&self) -> &[Tensor] {
        &self.nll
    }

    /// Target tokens of the batch.
    pub fn target_tokens(&self) -> usize {
        self.nll.iter().map(Tensor::elem_count).sum()
    }
}

/// Loss and gradient of `groups`. `prompts`, of [`Decoder::prompt_dtype`], holds the virtual tokens
/// that the groups name. At most `limits.max_rows` rows (and a single sequence at the least) go through the
/// model at a time; the prefixes go through it once, whatever the limit is:
///
/// ```text
/// prefix pass       prefixes, on a GPU some sequences ── forward ── keys, values ──┐    ┌── loss, backward ── gradient
/// example pass i                                 forward, loss, backward ──────────┴────┘   dK, dV of the prefixes
///                                                                                           are added up
/// ```
///
/// # Errors
/// Returns an error if shapes do not match or a device operation fails.
pub fn gradient(
    model: &Decoder,
    prompts: &Prefix,
    groups: &[PrefixGroup],
    limits: Limits,
) -> Result<Objective> {
    check_position(prompts, groups)?;
    gradient_of(
        model,
        prompts,
        &prepare(model, groups, prompts.kind(), limits.max_rows)?,
        limits.recompute,
        Mean::All,
    )
}

/// What [`gradient`] needs of the host: passes, the plans of their attention, and the copies of both on the device.
///
/// # Errors
/// Returns an error if sequences are longer than the model takes, or if a device operation fails.
pub(super) fn prepare(
    model: &Decoder,
    groups: &[PrefixGroup],
    kind: PromptKind,
    max_rows: usize,
) -> Result<Passes> {
    let passes = packed(model, groups, kind, max_rows)?;
    model.prepare(&passes, true)?;
    Ok(passes)
}

/// As [`gradient`], of a batch that is packed; of the first `recompute` layers of each pass only the input is saved.
///
/// # Errors
/// As [`gradient`].
pub fn gradient_of<'a>(
    model: &Decoder,
    prompts: &Prefix,
    passes: &Passes,
    recompute: usize,
    loss: impl Into<Loss<'a>>,
) -> Result<Objective> {
    let Loss { mean, teacher } = loss.into();
    let weights = PassWeights::new(model, passes, mean)?;
    let targets = |pass: usize| Targets::new(model, passes, pass, teacher);
    let virtual_tokens = prompts.num_virtual_tokens();
    let prompts = BatchPrompts::new(model, prompts, passes)?;
    let (embeddings, given) = (&prompts.embeddings, prompts.given());
    let Passes { prefix_pass, example_passes, .. } = passes;
    let of_prefix_pass = targets(0)?;
    let tape = model.forward(prefix_pass, embeddings, given, recompute)?;
    let mut nll = Vec::with_capacity(1 + example_passes.len());
    let mut of_examples: Option<Vec<PrefixGradient>> = None;
    if !example_passes.is_empty() {
        let states = prompts.for_examples(|| tape.prefix_states())?;
        let prefixes = Prefixes { states: Some(&states), gradients: None };
        for (i, batch) in example_passes.iter().enumerate() {
            let targets = targets(1 + i)?;
            let tape = model.forward(batch, embeddings, Some(&states), recompute)?;
            let dhidden = head(model, &tape, &targets, weights.of_pass(1 + i), &mut nll)?;
            let found = model.backward(batch, tape, &dhidden, prefixes, virtual_tokens)?.prefixes;
            of_examples = prompts::add(of_examples, found)?;
        }
    }
    let mut first = Vec::with_capacity(1);
    let dhidden = head(model, &tape, &of_prefix_pass, weights.of_pass(0), &mut first)?;
    nll.splice(0..0, first);
    let ExampleGradients { given: of_given, computed } = prompts.split(of_examples)?;
    let prefixes = Prefixes { states: given, gradients: computed.as_deref() };
    let backward = model.backward(prefix_pass, tape, &dhidden, prefixes, virtual_tokens)?;
    let gradient = prompts.gradient(of_given, backward.prompts, backward.prefixes)?;
    let scale = weights.loss_scale;
    // f32 on a GPU, where the division by a power of two is exact and what is not finite stays so.
    let gradient = match gradient {
        Some(scaled) if scale != 1.0 => Some(scaled.with_values((scaled.values() / scale)?)),
        other => other,
    };
    Ok(Objective::new(nll, passes, gradient))
}

/// Losses of a batch, which are added to `nll`, and the gradient of its target rows' hidden states.
fn head(
    model: &Decoder,
    tape: &Tape,
    targets: &Targets,
    weights: &LossWeights,
    nll: &mut Vec<Tensor>,
) -> Result<Tensor> {
    let losses = targets.losses(model, tape.hidden(), Some(weights))?;
    nll.push(losses.losses);
    let Some(dhidden) = losses.dhidden else { unreachable!("a gradient was asked for") };
    Ok(dhidden)
}

/// Loss of `groups` without a gradient, and without a tape: one layer's memory at a time, and the keys and values of
/// the prefixes if there is more than one pass. Passes of at most `max_rows` rows, otherwise as [`gradient`].
///
/// # Errors
/// Returns an error if shapes do not match or a device operation fails.
pub fn evaluate(
    model: &Decoder,
    prompts: &Prefix,
    groups: &[PrefixGroup],
    max_rows: usize,
) -> Result<Objective> {
    check_position(prompts, groups)?;
    evaluate_of(model, prompts, &packed(model, groups, prompts.kind(), max_rows)?)
}

/// As [`evaluate`], of a batch that is packed.
///
/// # Errors
/// As [`evaluate`].
pub fn evaluate_of(model: &Decoder, prompts: &Prefix, passes: &Passes) -> Result<Objective> {
    evaluate_with(model, prompts, passes, None)
}

/// As [`evaluate_of`], against `teacher` if there is one.
pub(super) fn evaluate_with(
    model: &Decoder,
    prompts: &Prefix,
    passes: &Passes,
    teacher: Option<&Teacher>,
) -> Result<Objective> {
    model.prepare(passes, false)?;
    let prompts = BatchPrompts::new(model, prompts, passes)?;
    let (embeddings, given) = (&prompts.embeddings, prompts.given());
    let Passes { prefix_pass, example_passes, .. } = passes;
    let targets = |pass: usize| Targets::new(model, passes, pass, teacher);
    let losses_of = |hidden: &Tensor, targets: Targets| -> Result<Tensor> {
        Ok(targets.losses(model, hidden, None)?.losses)
    };
    let mut nll = Vec::with_capacity(1 + example_passes.len());
    let of_prefix_pass = targets(0)?;
    if example_passes.is_empty() {
        nll.push(losses_of(&model.hidden(prefix_pass, embeddings, given)?, of_prefix_pass)?);
    } else {
        let (states, hidden) = match &passes.given {
            // No pass reads another one's rows.
            Some(given_prompts) if given_prompts.joined.is_empty() => {
                let hidden = model.hidden(prefix_pass, embeddings, given)?;
                (prompts.for_examples(|| Ok(Vec::new()))?, hidden)
            }
            _ => {
                let PrefixPass { states, hidden } = model.prefix_pass(prefix_pass, embeddings, given)?;
                (prompts.for_examples(|| Ok(states))?, hidden)
            }
        };
        nll.push(losses_of(&hidden, of_prefix_pass)?);
        for (i, batch) in example_passes.iter().enumerate() {
            let targets = targets(1 + i)?;
            nll.push(losses_of(&model.hidden(batch, embeddings, Some(&states))?, targets)?);
        }
    }
    Ok(Objective::new(nll, passes, None))
}

/// Negative log-likelihoods of the targets of `groups`, in their order, and the rows of a pass with which they were taken: half of `max_rows`
/// and half again while the device runs out of memory.
///
/// # Errors
/// Returns [`Error::OutOfMemory`] if a single sequence does not fit, and the errors of [`evaluate`].
pub(crate) fn evaluate_within_memory(
    model: &Decoder,
    prompts: &Prefix,
    groups: &[PrefixGroup],
    max_rows: usize,
) -> Result<(Vec<f64>, usize)> {
    let rows = groups.iter().map(PrefixGroup::rows).sum();
    let (nll, limits) = plan::within_memory(
        model.device(),
        Limits::rows(max_rows),
        // Without a tape there is nothing to compute again: rows alone make a difference.
        |limits| limits.less(rows, 1),
        |limits| evaluate(model, prompts, groups, limits.max_rows)?.nll(),
        |_| Ok(()),
    )?;
    Ok((nll, limits.max_rows))
}

/// Refuses groups that have the prompt in another place.
fn check_position(prompts: &Prefix, groups: &[PrefixGroup]) -> Result<()> {
    let before = prompts.before();
    let is_elsewhere = |group: &&PrefixGroup| !group.prompt.is_empty() && group.before != before;
    match groups.iter().find(is_elsewhere) {
        Some(group) if !before.is_empty() => Err(Error::Invalid(format!(
            "expected a group with the tokens {before:?} before the prompt, found {:?}",
            group.before
        ))),
        _ => Ok(()),
    }
}

/// Packs `groups`, whose prompts are of `kind`, for `model`.
pub(super) fn packed(
    model: &Decoder,
    groups: &[PrefixGroup],
    kind: PromptKind,
    max_rows: usize,
) -> Result<Passes> {
    let rope = model.config().rope.as_ref();
    if let Some(most) = rope.and_then(Rope::most_positions) {
        let longest = |g: &PrefixGroup| {
            let own = g.sequences.iter().map(|s| s.input.len() + s.target.len()).max().unwrap_or(0);
            g.prefix_rows() + own
        };
        let found = groups.iter().map(longest).max().unwrap_or(0);
        if found > most {
            return Err(Error::Invalid(format!(
                "expected sequences of at most {most} positions, virtual tokens and target included, found {found}: in \
                 longer ones the rotary scaling `dynamic` turns every position by frequencies of the length; hint: a \
                 lower data.max_input_tokens"
            )));
        }
    }
    let long_above = rope.and_then(Rope::long_above);
    if kind == PromptKind::Prefix {
        if let Some(group) = groups.iter().find(|group| !group.before.is_empty()) {
            let found = &group.before;
            return Err(Error::Invalid(format!(
                "expected keys and values at the start, found the tokens {found:?} before them"
            )));
        }
        return Ok(Passes::after_given(groups, max_rows, long_above));
    }
    let prefix_pass_rows = model.prefix_pass_rows(max_rows);
    Ok(Passes::packed(groups, Packing { max_rows, prefix_pass_rows, long_above }))
}

#[cfg(test)]
mod tests;
