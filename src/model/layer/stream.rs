//! The residual stream between two norms.

use crate::Result;
use crate::ops::Linear;
use crate::ops::rms_norm::{Normed, ResidualAdd, RmsNorm};
use candle_core::{DType, Tensor};

/// The residual stream `x + residual_multiplier * delta`, [rows, C] each. Where no product can add to its output, the sum is
/// left to the next norm, which reads both anyway.
pub(in crate::model) struct Stream {
    x: Tensor,
    delta: Option<Tensor>,
}

impl Stream {
    /// A stream to which nothing is to be added.
    pub(in crate::model) fn new(x: Tensor) -> Self {
        Self { x, delta: None }
    }

    /// The stream `x` with a projection of `input` on top.
    pub(super) fn project(x: Tensor, projection: &Linear, input: &Tensor, multiplier: f64) -> Result<Self> {
        match projection.forward_add(input, &x, multiplier)? {
            Some(sum) => Ok(Self::new(sum)),
            None => Ok(Self { x, delta: Some(projection.forward(input)?) }),
        }
    }

    /// The stream with `delta` [rows, C] on top, times the residual multiplier.
    pub(super) fn plus(self, delta: Tensor) -> Result<Self> {
        let delta = match self.delta {
            None => delta,
            Some(other) => (other + delta)?,
        };
        Ok(Self { x: self.x, delta: Some(delta) })
    }

    /// The sum, normed in `dtype`.
    pub(in crate::model) fn normed(&self, norm: &RmsNorm, multiplier: f64, dtype: DType) -> Result<Normed> {
        let add = self.delta.as_ref().map(|delta| ResidualAdd { delta, multiplier });
        norm.forward(&self.x, add, dtype)
    }
}
