//! The losses in plain candle ops.

use super::Softmax;
use crate::Result;
use crate::ops::IndexView;
use candle_core::{D, DType, Tensor};

/// [`super::TokenLosses::nll`] in plain candle ops, in f32 or, for logits in f64, in f64; for tests and `gneiss check`.
///
/// # Errors
/// Returns an error if shapes do not match or a device operation fails.
pub fn reference(logits: &Tensor, labels: IndexView, softmax: Softmax) -> Result<Tensor> {
    let computed = if logits.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let z = (logits.narrow(1, 0, softmax.vocab)?.to_dtype(computed)? * softmax.scale)?;
    let lse = z.log_sum_exp(D::Minus1)?;
    let labels = labels.to_device(logits.device())?.unsqueeze(1)?;
    Ok((lse - z.gather(&labels, 1)?.squeeze(1)?)?)
}
