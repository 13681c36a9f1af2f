//! Steps and validations whose examples are dealt to several ranks.
//!
//! ```text
//! each rank   its share of the examples ─ loss summed over its target tokens, gradient of (sum / target tokens of all ranks)
//! rank 0      sums in rank order ─ clip, AdamW ─ loss, norms, new values
//! each rank   takes these over
//! ```
//!
//! Every rank knows all examples and the step's order, so no rank has to be told its share. The optimizer's moments are those of
//! rank 0 alone.

mod message;

use super::attempt::{Attempt, Prepared, note};
use super::{Observer, StepPart, Trainer};
use crate::batch::{Example, PrefixGroup};
use crate::device::Shortage;
use crate::ops::adamw::Parameter;
use crate::ops::gpu;
use crate::prompt::Prefix;
use crate::ranks::{Ranks, deal};
use crate::tune::objective::{self, Loss, Mean};
use crate::tune::plan::{self, Limits};
use crate::tune::prompt_run::RunStep;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use message::{StepMessage, value_dtype};
use std::borrow::Cow;

impl<'a> Trainer<'a> {
    /// This trainer as one of `ranks`, each of which has the same run of the same examples: every step's examples are dealt to
    /// them. The limits are those of the rank with the least memory.
    ///
    /// # Errors
    /// Returns an error on all ranks if there are several runs and several ranks, or if a rank has ended.
    pub fn with_ranks(mut self, ranks: &'a dyn Ranks) -> Result<Self> {
        if ranks.size() > 1 && self.runs.len() > 1 {
            return Err(Error::Invalid(format!(
                "expected one run for a trainer on several ranks, found {}",
                self.runs.len()
            )));
        }
        if ranks.size() > 1 {
            let layers = self.decoder.config().num_hidden_layers;
            let max_rows = ranks.min(self.limits.max_rows)?;
            let kept = ranks.min(layers.saturating_sub(self.limits.recompute))?;
            self.limits = Limits { max_rows, recompute: layers - kept };
        }
        self.ranks = ranks;
        Ok(self)
    }

    /// Deals the examples `chunk` to the ranks.
    fn deal(&self, examples: &[Example], chunk: &[usize]) -> Vec<Vec<usize>> {
        let rows = |i: &usize| examples[*i].input.len() + examples[*i].target.len();
        let costs: Vec<usize> = chunk.iter().map(rows).collect();
        let pieces = deal(&costs, self.ranks.size()).into_iter();
        pieces.map(|pieces| pieces.into_iter().map(|piece| chunk[piece]).collect()).collect()
    }

    /// This rank's share of the examples `chunk`, in their order; it may be empty.
    pub(super) fn share_of<'c>(&self, examples: &[Example], chunk: &'c [usize]) -> Cow<'c, [usize]> {
        match self.ranks.size() {
            1 => Cow::Borrowed(chunk),
            _ => Cow::Owned(self.deal(examples, chunk).swap_remove(self.ranks.rank())),
        }
    }

    /// This rank's share of the training examples `chunk` of a run.
    pub(super) fn share<'c>(&self, run: usize, chunk: &'c [usize]) -> Cow<'c, [usize]> {
        self.share_of(self.runs[run].examples().train, chunk)
    }

    /// Rows of `groups`, which are the examples `chunk`; on several ranks about those of the largest share, so that all ranks
    /// know the same number.
    pub(super) fn rows(&self, groups: &[PrefixGroup], examples: &[Example], chunk: &[usize]) -> usize {
        if self.ranks.size() > 1 {
            let rows = |i: &usize| examples[*i].input.len() + examples[*i].target.len();
            let largest = self.deal(examples, chunk).iter().map(|share| share.iter().map(rows).sum()).max();
            return self.first().prompt().num_virtual_tokens() + largest.unwrap_or(0);
        }
        groups.iter().map(PrefixGroup::rows).sum()
    }

    /// Runs `work`, with less at a time if the device of any rank runs out of memory; `rows` are those of the whole work. Returns
    /// the limits under which it succeeded.
    pub(super) fn within_memory<T>(
        &self,
        rows: usize,
        observers: &mut [&mut dyn Observer],
        work: impl FnMut(Limits) -> Result<T>,
    ) -> Result<(T, Limits)> {
        let less = |limits: Limits| limits.less(rows, self.decoder.config().num_hidden_layers);
        plan::within_memory(self.decoder.device(), self.limits, less, work, |limits| {
            observers.iter_mut().try_for_each(|observer| observer.out_of_memory(limits))
        })
    }

    /// As [`Trainer::attempt`], of a step whose examples are dealt to several ranks; `groups` are those of this rank.
    pub(super) fn attempt_share(
        &self,
        groups: &[PrefixGroup],
        prepared: Option<Prepared>,
        part: &StepPart,
        limits: Limits,
    ) -> Result<Attempt> {
        let own = self.gradient_of_share(groups, prepared, part, limits);
        let (own, next) = match own {
            Ok((message, next)) => (Ok(message.encode()), next),
            Err(error) => (Err(error), None),
        };
        let mut updated = None;
        let reply = self.ranks.combine(self.shortage(own), |shares| {
            let (parameter, reply) = self.shortage(self.update_from(&shares, part))?;
            updated = Some(parameter);
            Ok(reply.encode())
        })?;
        let StepMessage { numbers: [loss, grad_norm, prompt_norm, rows], values } =
            StepMessage::decode(&reply)?;
        let run = &self.runs[part.run];
        let parameter = match updated {
            Some(parameter) => parameter,
            None => {
                let values = message::tensor(&values, run.values())?;
                let value = gpu::to_device(&values, self.decoder.device())?;
                Parameter { value, ..run.parameter() }
            }
        };
        let target_tokens = self.target_tokens(part);
        let result = RunStep { parameter, loss, grad_norm, prompt_norm, target_tokens };
        Ok(Attempt { results: vec![result], rows: rows as usize, next })
    }

    /// Target tokens of a step, those of all ranks.
    fn target_tokens(&self, part: &StepPart) -> usize {
        let train = self.runs[part.run].examples().train;
        part.examples.now.iter().map(|i| train[*i].target.len()).sum()
    }

    /// What this rank computes of a step: the sum of its losses, its rows, and its part of the gradient. Also the step after it.
    fn gradient_of_share(
        &self,
        groups: &[PrefixGroup],
        prepared: Option<Prepared>,
        part: &StepPart,
        limits: Limits,
    ) -> Result<(StepMessage<2>, Option<Prepared>)> {
        let parts = std::slice::from_ref(part);
        if groups.is_empty() {
            let next = self.prepare_next(parts, limits);
            return Ok((StepMessage { numbers: [0.0; 2], values: Vec::new() }, next));
        }
        let passes = self.passes(groups, prepared, parts, limits)?;
        let mean = Mean::OfPart { target_tokens: self.target_tokens(part) };
        let loss = Loss { mean, teacher: self.first().teacher() };
        let objective =
            objective::gradient_of(self.decoder, &self.prompts(parts)?, &passes, limits.recompute, loss)?;
        let next = self.prepare_next(parts, limits);
        note("wait");
        let Some(gradient) = objective.gradient.as_ref() else {
            return Err(Error::Invalid("the prompt has no gradient".into()));
        };
        let nll = objective.nll()?.iter().sum();
        let values = message::bytes(gradient.values(), value_dtype(self.runs[part.run].values()))?;
        Ok((StepMessage { numbers: [nll, objective.rows as f64], values }, next))
    }

    /// On rank 0: the optimizer step for the gradient that `shares` sum up to.
    fn update_from(&self, shares: &[Vec<u8>], part: &StepPart) -> Result<(Parameter, StepMessage<4>)> {
        let run = &self.runs[part.run];
        let shares =
            shares.iter().map(|share| StepMessage::<2>::decode(share)).collect::<Result<Vec<_>>>()?;
        let (nll, rows) = sums(&shares);
        let gradient = self.gradient_from(&shares, part)?;
        let updated = run.update(&gradient, part.learning_rate)?;
        let norms = [updated.grad_norm.value()?, updated.value_norm.value()?];
        let numbers = [nll / self.target_tokens(part) as f64, norms[0], norms[1], rows];
        let value = &updated.parameter.value;
        let values = message::bytes(value, value_dtype(value))?;
        Ok((updated.parameter, StepMessage { numbers, values }))
    }

    /// The sum of the shares' gradients, in rank order, on the device.
    fn gradient_from(&self, shares: &[StepMessage<2>], part: &StepPart) -> Result<Prefix> {
        let run = &self.runs[part.run];
        let layout = run.prompt().layout();
        let dtype = value_dtype(run.values());
        let sum = message::sum(shares.iter().map(|share| &share.values[..]), dtype)?;
        let sum = Tensor::from_vec(sum, (layout.num_virtual_tokens, layout.width), &Device::Cpu)?;
        Ok(Prefix::new(layout.kind, gpu::to_device(&sum.to_dtype(dtype)?, self.decoder.device())?))
    }

    /// The mean of the losses of all ranks, of which this one has `own`.
    pub(super) fn mean_of_shares(&self, own: Result<Vec<f64>>) -> Result<f64> {
        let own = own.map(|losses| StepMessage::numbers([losses.iter().sum(), losses.len() as f64]).encode());
        let reply = self.ranks.combine(self.shortage(own), |shares| {
            let shares =
                shares.iter().map(|share| StepMessage::<2>::decode(share)).collect::<Result<Vec<_>>>()?;
            let (sum, number) = sums(&shares);
            Ok(StepMessage::numbers([sum / number]).encode())
        })?;
        let StepMessage { numbers: [mean], .. } = StepMessage::decode(&reply)?;
        Ok(mean)
    }

    /// An error of a device that ran out of memory as one that all ranks know as such.
    fn shortage<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|error| match Shortage::new(self.decoder.device()).caused(&error) {
            true if !matches!(error, Error::OutOfMemory { .. }) => {
                Error::OutOfMemory { problem: error.to_string() }
            }
            _ => error,
        })
    }
}

/// The sums of the shares' two numbers, in rank order.
fn sums(shares: &[StepMessage<2>]) -> (f64, f64) {
    shares.iter().fold((0.0, 0.0), |(a, b), share| (a + share.numbers[0], b + share.numbers[1]))
}

#[cfg(test)]
mod tests;
