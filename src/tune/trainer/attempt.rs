//! One try of a step: everything is launched, then the next step is prepared, and only then does the host wait.
//!
//! ```text
//!   host   launch step n ── pack, plan, upload step n + 1 ── wait ── records, launch step n + 1 ── ...
//!   GPU        step n ─────────────────────────────────────────────┘ └─ step n + 1 ───────────────
//! ```

use super::Trainer;
use crate::batch::{Passes, PrefixGroup};
use crate::ops::adamw::{Norm, Step, Updated};
use crate::tune::objective::{self, Objective};
use crate::tune::plan::Limits;
use crate::{Error, Result};
use candle_core::{DType, Tensor};

/// What a step computed; nothing is changed yet.
pub(super) struct Attempt {
    pub(super) updated: Updated,
    /// The step after it.
    pub(super) next: Option<Prepared>,
    pub(super) rows: usize,
    pub(super) target_tokens: usize,
    pub(super) loss: f64,
    pub(super) grad_norm: f64,
    pub(super) prompt_norm: f64,
}

/// A step's passes, packed, planned and uploaded.
pub(super) struct Prepared {
    /// The examples that they are of.
    chunk: Vec<usize>,
    /// [`Limits::max_rows`] that they were packed under.
    max_rows: usize,
    passes: Passes,
}

impl Prepared {
    /// Whether this is the step of these examples. Another step follows where a run is resumed or its rate is tried.
    pub(super) fn is_of(&self, chunk: &[usize]) -> bool {
        self.chunk == chunk
    }

    /// Whether the step would be packed the same under `limits`. A device that ran out of memory has fewer rows.
    pub(super) fn fits(&self, limits: Limits) -> bool {
        self.max_rows == limits.max_rows
    }
}

impl Trainer<'_> {
    /// The examples of a step behind the prompt.
    pub(super) fn group(&self, chunk: &[usize]) -> PrefixGroup {
        let n = self.parameter.value.dims()[0] as u32;
        PrefixGroup::new(0..n, chunk.iter().map(|i| &self.task.train[*i]))
    }

    /// Loss, gradient and update of one step under `limits`; `next` are the examples of the step after it.
    pub(super) fn attempt(
        &self,
        group: &PrefixGroup,
        prepared: Option<Prepared>,
        next: Option<&[usize]>,
        step: Step,
        limits: Limits,
    ) -> Result<Attempt> {
        let model = self.task.model;
        let prompt = self.parameter.value.to_dtype(model.prompt_dtype())?;
        let passes = match prepared {
            Some(prepared) => prepared.passes,
            None => self.prepare(group, limits)?,
        };
        let objective = objective::gradient_of(model, &prompt, &passes, limits.recompute)?;
        let Some(gradient) = objective.gradient.as_ref() else {
            return Err(Error::Invalid("the prompt has no gradient".into()));
        };
        let updated = self.adamw.forward(&self.parameter, &gradient.to_dtype(DType::F32)?, step)?;
        // What fails here fails again when it is that step's turn, and is reported then.
        let next = next.and_then(|chunk| {
            let passes = self.prepare(&self.group(chunk), limits).ok()?;
            Some(Prepared { chunk: chunk.to_vec(), max_rows: limits.max_rows, passes })
        });
        let (rows, target_tokens) = (objective.rows, objective.target_tokens());
        let [loss, grad_norm, prompt_norm] = results(&objective, &updated)?;
        Ok(Attempt { updated, next, rows, target_tokens, loss, grad_norm, prompt_norm })
    }

    fn prepare(&self, group: &PrefixGroup, limits: Limits) -> Result<Passes> {
        note("prepare");
        objective::prepare(self.task.model, std::slice::from_ref(group), limits.max_rows)
    }
}

/// Loss, norm of the gradient and norm of the new prompt: the host waits for a GPU here alone, for one copy. The prompt's
/// norm: a huge learning rate overflows it by a gradient that is finite.
fn results(objective: &Objective, updated: &Updated) -> Result<[f64; 3]> {
    note("wait");
    let apart = || Ok([objective.loss()?, updated.grad_norm.value()?, updated.value_norm.value()?]);
    let (Some(gradient), Some(prompt)) = (updated.grad_norm.sums(), updated.value_norm.sums()) else {
        return apart();
    };
    let nll = objective.parts().iter().filter(|part| part.elem_count() > 0);
    let parts: Vec<&Tensor> = nll.chain([gradient, prompt]).collect();
    if parts.iter().any(|part| part.dtype() != DType::F32) {
        return apart();
    }
    let all = Tensor::cat(&parts, 0)?.to_vec1::<f32>()?;
    let (nll, norms) = all.split_at(objective.target_tokens());
    let (gradient, prompt) = norms.split_at(gradient.elem_count());
    let loss = nll.iter().copied().map(f64::from).sum::<f64>() / nll.len() as f64;
    Ok([loss, Norm::of_sums(gradient), Norm::of_sums(prompt)])
}

#[cfg(test)]
thread_local! {
    /// What this thread's attempts did, in order.
    pub(super) static ORDER: std::cell::RefCell<Vec<&'static str>> = const { std::cell::RefCell::new(Vec::new()) };
}

fn note(_what: &'static str) {
    #[cfg(test)]
    ORDER.with_borrow_mut(|order| order.push(_what));
}
