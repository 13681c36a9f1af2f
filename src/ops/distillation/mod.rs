//! Kullback-Leibler divergence of a student's distribution over the vocabulary from a teacher's, row by row (Hinton et al.,
//! 2015, arXiv:1503.02531, at temperature 1). The gradient replaces the student's logits in place. Columns beyond the
//! vocabulary are no tokens, as in [`super::cross_entropy`], and their gradient is 0.
//!
//! ```text
//! log p    = scale * teacher - lse(scale * teacher)          scale = 1 / logits_scaling
//! log q    = scale * student - lse(scale * student)
//! kl       = sum(p * (log p - log q)) = sum(p * (d + exp(-d) - 1))          d = log p - log q
//! dstudent = dloss * scale * (q - p)                         dloss of the row
//! ```
//!
//! The two sums are equal since p and q add up to 1. The second one is computed: none of its terms is negative, so that a
//! divergence near 0 is not lost in rounding, and equal logits give exactly 0. Where d is small, `d + exp(-d) - 1` is its Taylor
//! series.

mod cpu;
mod gpu;
mod reference;
#[cfg(test)]
mod tests;

pub use reference::reference;

use super::backend::{Route, route};
use super::cross_entropy::{LossWeights, Softmax};
use super::profile;
use crate::{Error, Result};
use candle_core::Tensor;

/// Divergences of rows of logits, and what the backward pass reads.
#[derive(Debug, Clone)]
pub struct Divergences {
    /// KL(teacher || student) of each row, nats; `[rows]`, f64 on the CPU and f32 on a GPU.
    pub kl: Tensor,
    /// Log-sum-exp of each row of the student's scaled logits; shape and dtype of `kl`.
    pub student_lse: Tensor,
    /// The same of the teacher's.
    pub teacher_lse: Tensor,
}

/// Divergences of the logits of a student and a teacher, both [rows, V or more] in one dtype.
///
/// # Errors
/// Returns an error if shapes or dtypes differ, rows are narrower than the vocabulary, or a device operation fails.
pub fn forward(student: &Tensor, teacher: &Tensor, softmax: Softmax) -> Result<Divergences> {
    let _timed = profile::scope("distillation", student.device());
    check(student, teacher, softmax)?;
    match route(student) {
        Route::Cpu => cpu::forward(student, teacher, softmax),
        Route::Kernel => gpu::forward(student, teacher, softmax),
    }
}

/// Gradient of `sum(dloss * kl)` with respect to the student's logits [rows, V or more]; it replaces them in memory.
///
/// # Errors
/// As [`forward`]; also if `divergences` or `dloss` are those of another number of rows.
pub fn backward(
    student: Tensor,
    teacher: &Tensor,
    softmax: Softmax,
    divergences: &Divergences,
    dloss: &LossWeights,
) -> Result<Tensor> {
    let _timed = profile::scope("distillation backward", student.device());
    check(&student, teacher, softmax)?;
    let rows = student.dims()[0];
    for lse in [&divergences.student_lse, &divergences.teacher_lse] {
        if lse.dims() != [rows] {
            return Err(Error::shape(
                "distillation backward",
                format!("the log-sum-exp of {rows} rows"),
                format!("{:?}", lse.dims()),
            ));
        }
    }
    dloss.check("distillation backward", rows)?;
    match route(&student) {
        Route::Cpu => cpu::backward(&student, teacher, softmax, divergences, dloss)?,
        Route::Kernel => gpu::backward(&student, teacher, softmax, divergences, dloss)?,
    }
    Ok(student)
}

fn check(student: &Tensor, teacher: &Tensor, Softmax { vocab, .. }: Softmax) -> Result<()> {
    let (_, width) = student.dims2()?;
    if student.dims() != teacher.dims() || student.dtype() != teacher.dtype() {
        let of = |t: &Tensor| format!("{:?} {:?}", t.dims(), t.dtype());
        return Err(Error::shape(
            "distillation",
            format!("logits of the teacher as the student's, {}", of(student)),
            of(teacher),
        ));
    }
    if width < vocab {
        return Err(Error::shape(
            "distillation",
            format!("logits of a vocabulary of {vocab}"),
            format!("{:?}", student.dims()),
        ));
    }
    Ok(())
}
