//! The layer in plain candle ops.

use super::Linear;
use crate::Result;
use candle_core::Tensor;

impl Linear {
    /// [`Linear::forward`] in plain candle ops; for tests and `gneiss check`.
    ///
    /// # Errors
    /// Returns an error if shapes do not match or a device operation fails.
    pub fn reference(&self, x: &Tensor) -> Result<Tensor> {
        let y = x.matmul(&self.weight()?.to_dtype(x.dtype())?.t()?)?;
        Ok(match &self.bias {
            Some(bias) => y.broadcast_add(&bias.to_dtype(x.dtype())?)?,
            None => y,
        })
    }
}
