//! Launches of `kernels/adamw.cu`.

use super::{AdamW, AdamWStep, Norm, NormValue, Parameter, Updated};
use crate::ops::gpu::{self, Kernel};
use crate::{Error, Result};
use candle_core::{DType, Tensor};

gpu::parameters!(AdamWParameters {
    count: u32,
    partials: u32,
    keep: f32,
    beta1: f32,
    beta2: f32,
    eps: f32,
    rate: f32,
    root: f32,
    max_norm: f32,
});

/// Threads of a block, and the most blocks: each block later adds up one number of every block.
const THREADS: usize = 256;
const MAX_BLOCKS: usize = 256;

pub(super) fn forward(
    adamw: &AdamW,
    parameter: &Parameter,
    gradient: &Tensor,
    step: AdamWStep,
) -> Result<Updated> {
    let Parameter { value, m, v } = parameter;
    if value.dtype() != DType::F32 {
        return Err(Error::shape("adamw", "f32 parameters on a GPU", format!("{:?}", value.dtype())));
    }
    let count = value.elem_count();
    let blocks = count.div_ceil(8 * THREADS).min(MAX_BLOCKS);
    let (rate, root) = adamw.bias_corrected(step);
    let parameters = AdamWParameters {
        count: gpu::uint(count),
        partials: gpu::uint(blocks),
        keep: (1.0 - step.learning_rate * adamw.weight_decay) as f32,
        beta1: adamw.beta1 as f32,
        beta2: adamw.beta2 as f32,
        eps: adamw.eps as f32,
        rate: rate as f32,
        root: root as f32,
        max_norm: step.max_grad_norm as f32,
    };
    let like_value = || gpu::empty(value.shape(), DType::F32, value);
    let sums = || gpu::empty(blocks, DType::F32, value);
    let new = Parameter { value: like_value()?, m: like_value()?, v: like_value()? };
    let (grad_sums, value_sums) = (sums()?, sums()?);
    let kernel = |name| Kernel::new("adamw", name, blocks, THREADS);
    // SAFETY: the module has compared the gradient with the value; both are f32, and each block has one sum.
    unsafe { gpu::launch(&kernel("adamw_norm"), DType::F32, &[gradient, &grad_sums], &parameters) }?;
    let buffers = [value, m, v, gradient, &grad_sums, &new.value, &new.m, &new.v, &value_sums];
    // SAFETY: as above; the moments have the value's shape and dtype too.
    unsafe { gpu::launch(&kernel("adamw_step"), DType::F32, &buffers, &parameters) }?;
    let norm = |sums| Norm(NormValue::Sums(sums));
    Ok(Updated { parameter: new, grad_norm: norm(grad_sums), value_norm: norm(value_sums) })
}
