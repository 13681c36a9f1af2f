//! The activation in plain candle ops.

use super::check;
use crate::Result;
use candle_core::Tensor;

/// [`super::forward`] in plain candle ops; for tests and `gneiss check`.
///
/// # Errors
/// Returns an error if the number of columns is odd or a device operation fails.
pub fn reference(gate_up: &Tensor) -> Result<Tensor> {
    let (_, f) = check(gate_up)?;
    Ok((gate_up.narrow(1, 0, f)?.contiguous()?.silu()? * gate_up.narrow(1, f, f)?)?)
}
