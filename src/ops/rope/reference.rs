//! The rotation in plain candle ops.

use super::RopeTable;
use crate::Result;
use crate::ops::IndexView;
use candle_core::Tensor;

impl RopeTable {
    /// [`RopeTable::forward`] in plain candle ops (`sign` 1), or [`RopeTable::backward`] (`sign` -1); for tests and `gneiss check`.
    ///
    /// # Errors
    /// Returns an error if shapes do not match or a device operation fails.
    pub fn reference(&self, x: &Tensor, heads: usize, position_ids: IndexView, sign: f64) -> Result<Tensor> {
        let (t, width) = x.dims2()?;
        let (d, half) = (self.head_dim, self.head_dim / 2);
        let positions = position_ids.to_device(x.device())?;
        let pick = |table: &Tensor| table.index_select(&positions, 0)?.to_dtype(x.dtype())?.unsqueeze(1);
        let (cos, sin) = (pick(&self.cos)?, (pick(&self.sin)? * sign)?);
        let rotated = x.narrow(1, 0, heads * d)?.reshape((t, heads, d))?;
        let (a, b) = (rotated.narrow(2, 0, half)?, rotated.narrow(2, half, half)?);
        let low = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let high = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        let rotated = Tensor::cat(&[low, high], 2)?.reshape((t, heads * d))?;
        Ok(Tensor::cat(&[&rotated, &x.narrow(1, heads * d, width - heads * d)?], 1)?)
    }
}
