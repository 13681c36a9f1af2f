//! The divergences in candle's ops.

use super::Softmax;
use crate::Result;
use candle_core::{D, DType, Tensor};

/// [`super::Divergences::kl`] in candle's ops, in f32 or, for logits in f64, in f64; for tests and `gneiss check`.
///
/// # Errors
/// Returns an error if shapes do not match or a device operation fails.
pub fn reference(student: &Tensor, teacher: &Tensor, softmax: Softmax) -> Result<Tensor> {
    let computed = if student.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let log_softmax = |logits: &Tensor| -> Result<Tensor> {
        let z = (logits.narrow(1, 0, softmax.vocab)?.to_dtype(computed)? * softmax.scale)?;
        Ok(z.broadcast_sub(&z.log_sum_exp(D::Minus1)?.unsqueeze(1)?)?)
    };
    let (log_q, log_p) = (log_softmax(student)?, log_softmax(teacher)?);
    Ok((log_p.exp()? * (log_p - log_q)?)?.sum(1)?)
}
