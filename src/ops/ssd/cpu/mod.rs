//! The scan on the CPU, in f32 or f64; xBC and y may be bf16. A task is a run of blocks with a slice of heads. The runs of a level
//! are independent, so that tasks run in parallel; their sums are added up in a fixed order.

mod backward;
mod chunk_gradient;
mod decay;
mod forward;
mod operand;
mod pass;
mod sides;
mod states;
mod triangle;

use super::{SsdGradients, SsdInputs, SsdOutput, SsdShape, SsdWeights};
use crate::Result;
use crate::ops::cpu::{self, Disjoint, Real, StorageFloat, UninitBuffer, with_real, with_storage};
use candle_core::Tensor;
use pass::Pass;
use states::StateMemory;

pub(super) fn forward(inputs: SsdInputs, shape: &SsdShape, weights: &SsdWeights) -> Result<SsdOutput> {
    with_storage!("scan", weights.a.dtype(), inputs.xbc.dtype(), T, O => {
        Pass::<T>::with("scan", inputs, (shape, weights), forward_in::<T, O>)
    })
}

fn forward_in<T: Real, O: StorageFloat<T>>(pass: &Pass<T>) -> Result<SsdOutput> {
    let (rows, inner, plan) = (pass.rows(), pass.shape.inner(), pass.plan);
    let mut y = UninitBuffer::<O>::new(rows * inner);
    let mut ends = UninitBuffer::<T>::new(plan.ends.len() * pass.state_len());
    let mut scratch = UninitBuffer::<T>::new(plan.slots[0] * pass.state_len());
    {
        let y = Disjoint::new(y.as_slice());
        let memory = StateMemory {
            ends: Disjoint::new(ends.as_slice()),
            scratch: Disjoint::new(scratch.as_slice()),
            slots: plan.chunks.iter().map(|chunk| chunk.forward_slot).collect(),
        };
        for level in &plan.levels {
            cpu::par_tasks(level.len() * pass.slices.len(), &|task| {
                let (run, slice) = (level[task / pass.slices.len()], task % pass.slices.len());
                // SAFETY: a task writes the rows of its run in the columns of its heads, and the states of its run's chunks in the
                // rows of its heads; it reads those of lower levels, which are complete.
                unsafe { pass.forward_run::<O>(&plan.runs[run], &pass.slices[slice], &memory, y) };
            });
        }
        // SAFETY: the end states of all chunks are complete, and no task runs.
        unsafe { pass.copy_ends(&memory) };
    }
    // SAFETY: every row belongs to one block, and every head to one slice, which wrote them; so did every end state.
    unsafe {
        let ends = match plan.ends.len() {
            0 => None,
            n => Some(ends.into_tensor((n, inner, pass.shape.state))?),
        };
        Ok(SsdOutput { y: y.into_tensor((rows, inner))?, ends })
    }
}

pub(super) fn backward(
    gradients: (&Tensor, Option<&Tensor>),
    inputs: SsdInputs,
    shape: &SsdShape,
    weights: &SsdWeights,
) -> Result<SsdGradients> {
    with_real!("scan backward", weights.a.dtype(), T => {
        Pass::<T>::with("scan backward", inputs, (shape, weights), |pass| backward::run(pass, gradients, inputs.states.is_some()))
    })
}
