//! Rows by number in plain candle ops.

use crate::Result;
use crate::ops::IndexView;
use candle_core::Tensor;

/// [`super::forward`] in plain candle ops; for tests, `gneiss check` and the CPU.
///
/// # Errors
/// Returns an error if a number is not under T or a device operation fails.
pub fn reference(x: &Tensor, rows: IndexView) -> Result<Tensor> {
    Ok(x.index_select(&rows.to_device(x.device())?, 0)?)
}
