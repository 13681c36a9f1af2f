//! RMS norm, fused with the residual add before it (Zhang and Sennrich, 2019, arXiv:1910.07467;
//! transformers `modeling_granite.py`, `GraniteRMSNorm` and `GraniteDecoderLayer.forward`).
//!
//! ```text
//! r    = x + multiplier * delta
//! rstd = 1 / sqrt(mean(r²) + eps)
//! y    = w * r * rstd
//! dr   = dresidual + rstd * (w * dy - r * rstd² * mean(w * dy * r))
//! ```

mod cpu;
mod gpu;
mod reference;
#[cfg(test)]
mod tests;

use super::backend::{Route, route};
use super::profile;
use crate::{Error, Result};
use candle_core::{DType, Tensor};

/// Gain `[C]` and epsilon of one norm.
#[derive(Debug, Clone)]
pub struct RmsNorm {
    /// Gain `[C]`, in the dtype of the activations.
    pub weight: Tensor,
    /// Added to the mean square.
    pub eps: f64,
}

/// The output of a layer's part that is added to the residual stream before the norm, and its multiplier.
#[derive(Clone, Copy)]
pub struct ResidualAdd<'a> {
    /// [T, C].
    pub delta: &'a Tensor,
    /// Granite's `residual_multiplier`.
    pub multiplier: f64,
}

/// Result of [`RmsNorm::forward`].
pub struct Normed {
    /// The residual stream `r` [T, C].
    pub residual: Tensor,
    /// `y` [T, C].
    pub normed: Tensor,
    /// Reciprocal root mean square of each row, `[T]`.
    pub rstd: Tensor,
}

/// Inputs of [`RmsNorm::backward`].
#[derive(Clone, Copy)]
struct BackwardInputs<'a> {
    dy: &'a Tensor,
    residual: &'a Tensor,
    rstd: &'a Tensor,
    dresidual: Option<&'a Tensor>,
}

impl RmsNorm {
    /// Adds `add` to the residual stream `x` [T, C] and norms the sum. [`Normed::normed`] has dtype `out`: that of `x`, or
    /// on the CPU bf16 if `x` is f32.
    ///
    /// # Errors
    /// Returns an error if shapes do not match, `out` is another dtype, or a device operation fails.
    pub fn forward(&self, x: &Tensor, add: Option<ResidualAdd>, out: DType) -> Result<Normed> {
        let _timed = profile::scope("rms_norm", x.device());
        let (t, c) = x.dims2()?;
        if self.weight.dims() != [c] || add.is_some_and(|a| a.delta.dims() != [t, c]) {
            return Err(Error::shape(
                "rms_norm",
                format!("a gain of [{c}] and a delta of [{t}, {c}]"),
                format!("{:?} and {:?}", self.weight.dims(), add.map(|a| a.delta.dims())),
            ));
        }
        match route(x) {
            Route::Cpu => cpu::forward(self, x, add, out),
            Route::Kernel => gpu::forward(self, x, add, out),
        }
    }

    /// Gradient of the residual stream [T, C]: the sum of the gradient through the norm, from `dy`, and of `dresidual`, the
    /// gradient through the skip connection.
    ///
    /// # Errors
    /// Returns an error if shapes do not match or a device operation fails.
    pub fn backward(
        &self,
        dy: &Tensor,
        residual: &Tensor,
        rstd: &Tensor,
        dresidual: Option<&Tensor>,
    ) -> Result<Tensor> {
        let _timed = profile::scope("rms_norm backward", residual.device());
        let (t, c) = residual.dims2()?;
        let gradients_fit = dy.dims() == [t, c] && dresidual.is_none_or(|d| d.dims() == [t, c]);
        if !gradients_fit || rstd.dims() != [t] || self.weight.dims() != [c] {
            let gradients = (dy.dims(), dresidual.map(Tensor::dims));
            return Err(Error::shape(
                "rms_norm backward",
                format!("gradients of [{t}, {c}], rstd of [{t}], a gain of [{c}]"),
                format!("{gradients:?}, rstd {:?}, gain {:?}", rstd.dims(), self.weight.dims()),
            ));
        }
        let inputs = BackwardInputs { dy, residual, rstd, dresidual };
        match route(dy) {
            Route::Cpu => cpu::backward(self, inputs),
            Route::Kernel => gpu::backward(self, inputs),
        }
    }
}
