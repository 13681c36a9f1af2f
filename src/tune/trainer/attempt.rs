//! One try of a step: everything is launched, then the next step is prepared, and only then does the host wait.
//!
//! ```text
//!   host   launch step n ── pack, plan, upload step n + 1 ── wait ── records, launch step n + 1 ── ...
//!   GPU        step n ─────────────────────────────────────────────┘ └─ step n + 1 ───────────────
//! ```

use super::{StepPart, Trainer};
use crate::batch::{Passes, PrefixGroup};
use crate::ops::adamw::{Norm, Updated};
use crate::prompt::Prefix;
use crate::tune::objective::{self, Loss, Mean, Objective};
use crate::tune::plan::Limits;
use crate::tune::prompt_run::RunStep;
use crate::{Error, Result};
use candle_core::{DType, Tensor};

/// What a step computed; nothing is changed yet.
pub(super) struct Attempt {
    /// Of each run.
    pub(super) results: Vec<RunStep>,
    /// Packed rows of the step.
    pub(super) rows: usize,
    /// The step after it.
    pub(super) next: Option<Prepared>,
}

/// A step's passes, packed, planned and uploaded.
pub(super) struct Prepared {
    /// Each part's run and examples.
    parts: Vec<(usize, Vec<usize>)>,
    /// [`Limits::max_rows`] that they were packed under.
    max_rows: usize,
    passes: Passes,
}

impl Prepared {
    /// Whether this is the step of these parts. It is another one if a run ended, was resumed or tries a learning rate.
    pub(super) fn is_for(&self, parts: &[StepPart]) -> bool {
        let is_same = |((run, examples), part): (&(usize, Vec<usize>), &StepPart)| {
            *run == part.run && *examples == part.examples.now
        };
        self.parts.len() == parts.len() && self.parts.iter().zip(parts).all(is_same)
    }

    /// Whether the step would be packed the same under `limits`. A device that ran out of memory has fewer rows.
    pub(super) fn fits(&self, limits: Limits) -> bool {
        self.max_rows == limits.max_rows
    }
}

impl Trainer<'_> {
    /// Losses, gradients and updates of one step under `limits`.
    pub(super) fn attempt(
        &self,
        groups: &[PrefixGroup],
        prepared: Option<Prepared>,
        parts: &[StepPart],
        limits: Limits,
    ) -> Result<Attempt> {
        let passes = self.passes(groups, prepared, parts, limits)?;
        let loss = Loss { mean: Mean::OfEachGroup, teacher: self.first().teacher() };
        let objective =
            objective::gradient_of(self.decoder, &self.prompts(parts)?, &passes, limits.recompute, loss)?;
        let Some(gradient) = objective.gradient.as_ref() else {
            return Err(Error::Invalid("the prompt has no gradient".into()));
        };
        let mut updates = Vec::with_capacity(parts.len());
        for (part, PrefixGroup { prompt, .. }) in parts.iter().zip(groups) {
            let gradient = match parts {
                [_] => gradient.clone(),
                _ => {
                    let rows = gradient.values().narrow(0, prompt.start as usize, prompt.len())?;
                    gradient.with_values(rows.contiguous()?)
                }
            };
            updates.push(self.runs[part.run].update(&gradient, part.learning_rate)?);
        }
        // What fails here fails again when it is that step's turn, and is reported then.
        let next = self.prepare_next(parts, limits);
        Ok(Attempt { rows: objective.rows, results: results(&objective, updates)?, next })
    }

    /// The passes of `groups`, which may be prepared.
    pub(super) fn passes(
        &self,
        groups: &[PrefixGroup],
        prepared: Option<Prepared>,
        parts: &[StepPart],
        limits: Limits,
    ) -> Result<Passes> {
        match prepared {
            Some(prepared) => Ok(prepared.passes),
            None => self.prepare(groups, parts.first().map_or(&[], |part| &part.examples.now), limits),
        }
    }

    /// The prompts of all parts, one below the other.
    pub(super) fn prompts(&self, parts: &[StepPart]) -> Result<Prefix> {
        let prefixes = parts.iter().map(|part| self.runs[part.run].prompt().prefix());
        Prefix::cat(&prefixes.collect::<Result<Vec<_>>>()?)?.to_dtype(self.decoder.prompt_dtype())
    }

    /// The step after that of `parts`, if all of them have one that is known.
    pub(super) fn prepare_next(&self, parts: &[StepPart], limits: Limits) -> Option<Prepared> {
        let next = |part: &StepPart| Some((part.run, part.examples.next.clone()?));
        let parts: Vec<(usize, Vec<usize>)> = parts.iter().map(next).collect::<Option<_>>()?;
        let groups = self.groups(parts.iter().map(|(run, chunk)| (*run, &chunk[..]))).ok()?;
        if groups.is_empty() {
            return None;
        }
        let first = parts.first().map_or(&[][..], |(_, chunk)| chunk);
        let passes = self.prepare(&groups, first, limits).ok()?;
        Some(Prepared { parts, max_rows: limits.max_rows, passes })
    }

    /// The passes of `groups`; a teacher has one group alone, that of this rank's share of the step `first`.
    fn prepare(&self, groups: &[PrefixGroup], first: &[usize], limits: Limits) -> Result<Passes> {
        note("prepare");
        let kind = self.first().prompt().kind();
        let mut passes = objective::prepare(self.decoder, groups, kind, limits.max_rows)?;
        if let Some(teacher) = self.first().teacher() {
            passes.teacher_passes = teacher.training_passes(&passes, &self.share(0, first));
        }
        Ok(passes)
    }
}

/// Norms of a run's gradient and of its new prompt.
type RunNorms = [f64; 2];

/// What the step computed for each run: the host waits for a GPU here alone, for one copy. The prompt's norm is taken since a
/// huge learning rate overflows it by a gradient that is finite.
fn results(objective: &Objective, updates: Vec<Updated>) -> Result<Vec<RunStep>> {
    note("wait");
    let (nll, norms) = match in_one_copy(objective, &updates)? {
        Some(values) => values,
        None => {
            let norms =
                updates.iter().map(|updated| Ok([updated.grad_norm.value()?, updated.value_norm.value()?]));
            (objective.nll()?, norms.collect::<Result<_>>()?)
        }
    };
    let mut results = Vec::with_capacity(updates.len());
    for ((updated, norms), (sum, target_tokens)) in updates.into_iter().zip(norms).zip(objective.sums(&nll)) {
        let ([grad_norm, prompt_norm], loss) = (norms, sum / target_tokens as f64);
        let parameter = updated.parameter;
        results.push(RunStep { parameter, loss, grad_norm, prompt_norm, target_tokens });
    }
    Ok(results)
}

/// Negative log-likelihoods and norms, if a device has them all in f32.
fn in_one_copy(objective: &Objective, updates: &[Updated]) -> Result<Option<(Vec<f64>, Vec<RunNorms>)>> {
    let mut parts: Vec<&Tensor> = objective.parts().iter().filter(|part| part.elem_count() > 0).collect();
    for updated in updates {
        let (Some(gradient), Some(prompt)) = (updated.grad_norm.sums(), updated.value_norm.sums()) else {
            return Ok(None);
        };
        parts.extend([gradient, prompt]);
    }
    if parts.iter().any(|part| part.dtype() != DType::F32) {
        return Ok(None);
    }
    let lengths: Vec<usize> = parts.iter().map(|part| part.elem_count()).collect();
    let all = Tensor::cat(&parts, 0)?.to_vec1::<f32>()?;
    let (nll, mut sums) = all.split_at(objective.target_tokens());
    let nll = nll.iter().copied().map(f64::from).collect();
    let mut norms = Vec::with_capacity(updates.len());
    for pair in lengths[lengths.len() - 2 * updates.len()..].chunks(2) {
        let (gradient, rest) = sums.split_at(pair[0]);
        let (prompt, rest) = rest.split_at(pair[1]);
        norms.push([Norm::from_sums(gradient), Norm::from_sums(prompt)]);
        sums = rest;
    }
    Ok(Some((nll, norms)))
}

#[cfg(test)]
thread_local! {
    /// What this thread's attempts did, in order.
    pub(super) static ORDER: std::cell::RefCell<Vec<&'static str>> = const { std::cell::RefCell::new(Vec::new()) };
}

pub(super) fn note(_what: &'static str) {
    #[cfg(test)]
    ORDER.with_borrow_mut(|order| order.push(_what));
}
