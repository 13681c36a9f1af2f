//! The loss of a batch, and its gradient in the prompts: cross-entropy per target token, over everything that
//! the optimizer step sees.

use super::plan::{self, Limits};
use crate::batch::Sequence;
use crate::batch::{PackedBatch, Packing, Passes, PrefixGroup};
use crate::model::Granite;
use crate::model::pass::PrefixPass;
use crate::ops::gpu::{self, Route};
use crate::ops::rope::Rope;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};

/// Loss of a batch.
#[derive(Debug, Clone)]
pub struct Objective {
    /// Negative log-likelihood of each target token, nats, pass by pass in the order of groups, examples and
    /// tokens. On a GPU it may still be on its way.
    nll: Vec<Tensor>,
    /// Rows that went through the model.
    pub rows: usize,
    /// Gradient of the mean of `nll` in the prompts, of their shape; `None` where none was asked for.
    pub gradient: Option<Tensor>,
}

impl Objective {
    /// Mean over the target tokens.
    ///
    /// # Errors
    /// The device's.
    pub fn loss(&self) -> Result<f64> {
        let nll = self.nll()?;
        Ok(nll.iter().sum::<f64>() / nll.len() as f64)
    }

    /// Negative log-likelihood of each target token in the order of groups, examples and tokens, nats; waits for
    /// the device.
    ///
    /// # Errors
    /// The device's.
    pub fn nll(&self) -> Result<Vec<f64>> {
        let mut all = Vec::with_capacity(self.target_tokens());
        for nll in self.nll.iter().filter(|nll| nll.elem_count() > 0) {
            all.extend(nll.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.to_vec1::<f64>()?);
        }
        Ok(all)
    }

    /// [`Objective::nll`] where it is, which may be on its way; one tensor a pass.
    pub(super) fn parts(&self) -> &[Tensor] {
        &self.nll
    }

    /// Target tokens of the batch.
    pub fn target_tokens(&self) -> usize {
        self.nll.iter().map(Tensor::elem_count).sum()
    }
}

/// Loss and gradient of `groups`. `prompts` [n, C], of [`Granite::prompt_dtype`], holds the virtual tokens
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
/// Shapes that do not fit; the device's.
pub fn gradient(
    model: &Granite,
    prompts: &Tensor,
    groups: &[PrefixGroup],
    limits: Limits,
) -> Result<Objective> {
    gradient_of(model, prompts, &prepare(model, groups, limits.max_rows)?, limits.recompute)
}

/// What [`gradient`] needs of the host: passes, the plans of their attention, and the copies of both on the device.
///
/// # Errors
/// Sequences longer than the model takes; the device's.
pub(super) fn prepare(model: &Granite, groups: &[PrefixGroup], max_rows: usize) -> Result<Passes> {
    let passes = passes(model, groups, max_rows)?;
    model.prepare(&passes, true)?;
    Ok(passes)
}

/// As [`gradient`], of a batch that is packed; of the first `recompute` blocks of each pass only the input is kept.
///
/// # Errors
/// As [`gradient`].
pub fn gradient_of(
    model: &Granite,
    prompts: &Tensor,
    passes: &Passes,
    recompute: usize,
) -> Result<Objective> {
    let scale = loss_scale(model, passes.target_tokens());
    let dloss = scale / passes.target_tokens() as f64;
    let virtual_tokens = prompts.dims()[0];
    let Passes { lead, rest } = passes;
    let tape = model.forward(lead, prompts, None, recompute)?;
    let mut nll = Vec::with_capacity(1 + rest.len());
    let mut behind: Option<Vec<Tensor>> = None;
    if !rest.is_empty() {
        let prefix = tape.keys_values()?;
        for batch in rest {
            let tape = model.forward(batch, prompts, Some(&prefix), recompute)?;
            let head = model.head_loss(tape.hidden(), &batch.labels, Some(dloss))?;
            nll.push(head.nll);
            let Some(dhidden) = head.dhidden else { unreachable!("a gradient was asked for") };
            let found = model.backward(batch, tape, &dhidden, Some(&prefix), None, virtual_tokens)?.prefixes;
            behind = match (behind, found) {
                (Some(sum), Some(found)) => {
                    Some(sum.iter().zip(&found).map(|(a, b)| a + b).collect::<candle_core::Result<_>>()?)
                }
                (sum, found) => sum.or(found),
            };
        }
    }
    let head = model.head_loss(tape.hidden(), &lead.labels, Some(dloss))?;
    nll.insert(0, head.nll);
    let Some(dhidden) = head.dhidden else { unreachable!("a gradient was asked for") };
    let backward = model.backward(lead, tape, &dhidden, None, behind.as_deref(), virtual_tokens)?;
    // f32 on a GPU, where the division by a power of two is exact and what is not finite stays so.
    let gradient =
        backward.prompts.map(|scaled| if scale == 1.0 { Ok(scaled) } else { scaled / scale }).transpose()?;
    Ok(Objective { nll, rows: passes.rows(), gradient })
}

/// Factor on the loss in the backward pass, a power of two that is taken out of the prompts' gradient again. 1 but for
/// activations in f16, whose smallest number is 2^-24 and whose largest is 65,504.
///
/// A logit's gradient is `scale / (targets * logits_scaling)` times a probability, less 1 for the label. At 512 targets and
/// a `logits_scaling` of 16 the first factor is 2^-13 without a scale: probabilities under 2^-12 are flushed to zero, and
/// nearly all of a vocabulary of 100,352 is under that. So the scale is `targets * logits_scaling`, which leaves the gradient
/// at the size of the probabilities, within two bounds:
///
/// * 2^14 at most. Gradients of the prefix rows are sums over all targets: they are `scale` times those of the mean loss, and
///   may have elements up to 4. At 8,192 targets and 16 the logits' factor is then 2^-3, and the flush begins at 2^-22.
/// * 2^10 at least, as one target's gradient spreads over all rows that it attends to. At one target and a `logits_scaling`
///   of 1 the absolute values of its logits' gradient add up to 2^11 at most: weights of up to 31 do not overflow the hidden
///   state's gradient, and the elements of the prefix rows' may be up to 63.
fn loss_scale(model: &Granite, targets: usize) -> f64 {
    if model.dtype() != DType::F16 || gpu::route(model.embedding()) != Route::Kernel {
        return 1.0;
    }
    scale_in_f16(targets, model.config().logits_scaling)
}

/// [`loss_scale`] of activations in f16.
fn scale_in_f16(targets: usize, logits_scaling: f64) -> f64 {
    (targets as f64 * logits_scaling).log2().ceil().clamp(10.0, 14.0).exp2()
}

/// Loss of `groups` without a gradient, and without a tape: one block's memory at a time, and the keys and values of
/// the prefixes where there is more than one pass. Passes of at most `max_rows` rows, otherwise as [`gradient`].
///
/// # Errors
/// Shapes that do not fit; the device's.
pub fn evaluate(
    model: &Granite,
    prompts: &Tensor,
    groups: &[PrefixGroup],
    max_rows: usize,
) -> Result<Objective> {
    evaluate_of(model, prompts, &passes(model, groups, max_rows)?)
}

/// As [`evaluate`], of a batch that is packed.
///
/// # Errors
/// As [`evaluate`].
pub fn evaluate_of(model: &Granite, prompts: &Tensor, passes: &Passes) -> Result<Objective> {
    model.prepare(passes, false)?;
    let Passes { lead, rest } = passes;
    let nll_of = |hidden: &Tensor, batch: &PackedBatch| -> Result<Tensor> {
        Ok(model.head_loss(hidden, &batch.labels, None)?.nll)
    };
    let mut nll = Vec::with_capacity(1 + rest.len());
    if rest.is_empty() {
        nll.push(nll_of(&model.hidden(lead, prompts, None)?, lead)?);
    } else {
        let PrefixPass { keys_values, hidden } = model.prefix_pass(lead, prompts)?;
        nll.push(nll_of(&hidden, lead)?);
        for batch in rest {
            nll.push(nll_of(&model.hidden(batch, prompts, Some(&keys_values))?, batch)?);
        }
    }
    Ok(Objective { nll, rows: passes.rows(), gradient: None })
}

/// Negative log-likelihoods of the targets of `group`, and the rows of a pass with which they were taken: half of `max_rows`
/// and half again while the device runs out of memory.
///
/// # Errors
/// [`Error::OutOfMemory`] where a single sequence does not fit; those of [`evaluate`].
pub(crate) fn evaluate_within_memory(
    model: &Granite,
    prompts: &Tensor,
    group: PrefixGroup,
    max_rows: usize,
) -> Result<(Vec<f64>, usize)> {
    let rows = group.prefix_rows() + group.sequences.iter().map(Sequence::rows).sum::<usize>();
    let groups = [group];
    let (nll, limits) = plan::within_memory(
        model.device(),
        Limits::rows(max_rows),
        // Without a tape there is nothing to compute again: rows alone make a difference.
        |limits| limits.less(rows, 1),
        |limits| evaluate(model, prompts, &groups, limits.max_rows)?.nll(),
        |_| Ok(()),
    )?;
    Ok((nll, limits.max_rows))
}

/// Packs `groups` for `model`.
fn passes(model: &Granite, groups: &[PrefixGroup], max_rows: usize) -> Result<Passes> {
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
    let prefix_pass_rows = model.prefix_pass_rows(max_rows);
    Ok(Passes::packed(groups, Packing { max_rows, prefix_pass_rows, long_above }))
}

#[cfg(test)]
mod tests;
