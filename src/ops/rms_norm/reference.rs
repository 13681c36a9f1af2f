//! The norm in plain candle ops.

use super::{Normed, ResidualAdd, RmsNorm};
use crate::Result;
use candle_core::{D, DType, Tensor};

impl RmsNorm {
    /// [`RmsNorm::forward`] in plain candle ops; it norms 16-bit activations in f32. For tests and `gneiss check`.
    ///
    /// # Errors
    /// Returns an error if shapes do not match or a device operation fails.
    pub fn reference(&self, x: &Tensor, add: Option<ResidualAdd>) -> Result<Normed> {
        let residual = match add {
            Some(ResidualAdd { delta, multiplier }) => (x + (delta * multiplier)?)?,
            None => x.clone(),
        };
        let computed = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let r = residual.to_dtype(computed)?;
        let rstd = (r.sqr()?.mean_keepdim(D::Minus1)? + self.eps)?.sqrt()?.recip()?;
        let normed = r.broadcast_mul(&rstd)?.to_dtype(x.dtype())?;
        let normed = normed.broadcast_mul(&self.weight.to_dtype(x.dtype())?)?;
        Ok(Normed { residual, normed, rstd: rstd.squeeze(D::Minus1)? })
    }
}
