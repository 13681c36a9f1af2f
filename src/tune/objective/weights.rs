//! What each target token's loss counts in the loss of a batch.

use super::Mean;
use crate::Result;
use crate::batch::{PackedBatch, Passes};
use crate::model::Decoder;
use crate::ops::backend::{Route, route};
use crate::ops::cross_entropy::LossWeights;
use crate::ops::gpu;
use candle_core::{DType, Device, Tensor};

/// The weight of each target row's loss, pass by pass: 1 / target tokens of its [`Mean`], times [`loss_scale`].
///
/// The head applies it in f32 before it rounds the gradient of a row to the weights' dtype. So the gradient of a row does not
/// depend on the other groups of the batch.
pub(super) struct PassWeights {
    pub(super) loss_scale: f64,
    /// The prefix pass first; a single one if all rows of the batch have the same weight.
    passes: Vec<LossWeights>,
}

impl PassWeights {
    pub(super) fn new(model: &Decoder, passes: &Passes, mean: Mean) -> Result<Self> {
        let tokens = match mean {
            Mean::All => vec![passes.target_tokens(); passes.groups],
            Mean::OfEachGroup => passes.target_tokens_by_group(),
            Mean::OfPart { target_tokens } => vec![target_tokens; passes.groups],
        };
        let fewest = tokens.iter().copied().filter(|tokens| *tokens > 0).min().unwrap_or(0);
        let loss_scale = loss_scale(model, fewest);
        let passes = match tokens.iter().all(|tokens| [0, fewest].contains(tokens)) {
            true => vec![LossWeights::Uniform(loss_scale / fewest as f64)],
            // Before the first pass: a copy to a GPU may wait for what it has been given.
            false => {
                let of_group = |group: usize| loss_scale / tokens[group] as f64;
                passes.iter().map(|batch| per_row(model, batch, of_group)).collect::<Result<_>>()?
            }
        };
        Ok(Self { loss_scale, passes })
    }

    /// The weights of the target rows of the pass of an index in [`Passes::iter`].
    pub(super) fn of_pass(&self, pass: usize) -> &LossWeights {
        match &self.passes[..] {
            [uniform] => uniform,
            passes => &passes[pass],
        }
    }
}

/// The weights of a pass's target rows, from those of their groups.
fn per_row(model: &Decoder, batch: &PackedBatch, of_group: impl Fn(usize) -> f64) -> Result<LossWeights> {
    let groups = batch.target_groups.iter();
    let weights: Vec<f64> =
        groups.flat_map(|(group, rows)| std::iter::repeat_n(of_group(*group), *rows)).collect();
    let weights = match weights.len() {
        0 => crate::ops::no_rows(1, DType::F64, &Device::Cpu)?.flatten_all()?,
        rows => Tensor::from_vec(weights, rows, &Device::Cpu)?,
    };
    Ok(LossWeights::PerRow(match route(model.embedding()) {
        Route::Cpu => weights,
        Route::Kernel => gpu::to_device(&weights.to_dtype(DType::F32)?, model.device())?,
    }))
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
pub(super) fn loss_scale(model: &Decoder, targets: usize) -> f64 {
    if model.dtype() != DType::F16 || route(model.embedding()) != Route::Kernel {
        return 1.0;
    }
    scale_in_f16(targets, model.config().logits_scaling)
}

/// [`loss_scale`] of activations in f16.
pub(super) fn scale_in_f16(targets: usize, logits_scaling: f64) -> f64 {
    (targets as f64 * logits_scaling).log2().ceil().clamp(10.0, 14.0).exp2()
}
