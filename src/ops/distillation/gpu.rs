//! Launches of `kernels/distillation.cu`.

use super::{Divergences, Softmax};
use crate::Result;
use crate::ops::cross_entropy::LossWeights;
use crate::ops::gpu::{self, Kernel};
use candle_core::{DType, Tensor};

gpu::parameters!(DistillationParameters {
    rows: u32,
    vocab: u32,
    stride: u32,
    per_row: u32,
    scale: f32,
    dloss: f32
});

/// Threads of the block that reads a row.
const FORWARD_THREADS: usize = 512;

/// Threads of a block that writes a part of a row's gradient, and elements of each thread.
const BACKWARD_THREADS: usize = 256;
const BACKWARD_ELEMENTS: usize = 16;

pub(super) fn forward(student: &Tensor, teacher: &Tensor, softmax: Softmax) -> Result<Divergences> {
    let (rows, _) = student.dims2()?;
    let empty = || gpu::empty(rows, DType::F32, student);
    let (kl, student_lse, teacher_lse) = (empty()?, empty()?, empty()?);
    let kernel = Kernel::new("distillation", "distillation_forward", rows, FORWARD_THREADS);
    let parameters = parameters(student, softmax, Some(1.0))?;
    let arguments = [student, teacher, &kl, &student_lse, &teacher_lse];
    // SAFETY: `check` of the module has compared the logits with each other and with the vocabulary; the outputs have a value a
    // row.
    unsafe { gpu::launch(&kernel, student.dtype(), &arguments, &parameters) }?;
    Ok(Divergences { kl, student_lse, teacher_lse })
}

/// Replaces the student's logits by their gradient.
pub(super) fn backward(
    student: &Tensor,
    teacher: &Tensor,
    softmax: Softmax,
    divergences: &Divergences,
    dloss: &LossWeights,
) -> Result<()> {
    let (rows, _) = student.dims2()?;
    let mut kernel = Kernel::new("distillation", "distillation_backward", rows, BACKWARD_THREADS);
    // Rows need not begin at a multiple of 16 bytes: the first access covers up to 7 elements.
    kernel.grid[1] = (softmax.vocab + 7).div_ceil(BACKWARD_ELEMENTS * BACKWARD_THREADS);
    let Divergences { student_lse, teacher_lse, .. } = divergences;
    let (uniform, per_row) = dloss.for_kernel(student_lse);
    gpu::check_dtype("distillation backward", &[student_lse, teacher_lse, per_row], DType::F32)?;
    let parameters = parameters(student, softmax, uniform)?;
    let arguments = [student, teacher, student_lse, teacher_lse, per_row];
    // SAFETY: the module has compared the logits with each other, the vocabulary, the log-sum-exps and the weights.
    unsafe { gpu::launch(&kernel, student.dtype(), &arguments, &parameters) }
}

/// `dloss` is `None` if each row has its own.
fn parameters(logits: &Tensor, softmax: Softmax, dloss: Option<f64>) -> Result<DistillationParameters> {
    let (rows, stride) = logits.dims2()?;
    Ok(DistillationParameters {
        rows: gpu::uint(rows),
        vocab: gpu::uint(softmax.vocab),
        stride: gpu::uint(stride),
        per_row: u32::from(dloss.is_none()),
        scale: softmax.scale as f32,
        dloss: dloss.unwrap_or(0.0) as f32,
    })
}
