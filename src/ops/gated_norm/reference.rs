//! The gated norm in candle's ops.

use super::{GatedNorm, GatedNormed};
use crate::Result;
use candle_core::{D, Tensor};

impl GatedNorm {
    /// [`GatedNorm::forward`] in candle's ops, in the dtype of the gain; for tests and `gneiss check`.
    ///
    /// # Errors
    /// Returns an error if shapes do not match or a device operation fails.
    pub fn reference(&self, y: &Tensor, z: &Tensor) -> Result<GatedNormed> {
        let rows = self.check("gated norm", &[y, z])?;
        let (width, dtype) = (self.weight.dims()[0], self.weight.dtype());
        let g = (y.to_dtype(dtype)? * z.to_dtype(dtype)?.silu()?)?;
        let g = g.reshape((rows, self.groups, width / self.groups))?;
        let rstd = (g.sqr()?.mean_keepdim(D::Minus1)? + self.eps)?.sqrt()?.recip()?;
        let normed = g.broadcast_mul(&rstd)?.reshape((rows, width))?.broadcast_mul(&self.weight)?;
        Ok(GatedNormed { normed, rstd: rstd.squeeze(D::Minus1)? })
    }
}
