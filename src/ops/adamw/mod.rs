//! AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101, algorithm 2), as `torch.optim.AdamW` computes it:
//!
//! ```text
//! p  = p (1 - lr * weight_decay)
//! m  = beta1 m + (1 - beta1) g
//! v  = beta2 v + (1 - beta2) g²
//! p -= lr / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps)
//! ```
//!
//! `g` is the gradient, clipped as by `clip_grad_norm_`: multiplied by `min(1, max_grad_norm / (norm + 1e-6))`.

mod cpu;
mod gpu;
mod reference;
#[cfg(test)]
mod tests;

use super::backend::{Route, route};
use super::profile;
use crate::{Error, Result};
use candle_core::{DType, Tensor};

/// Constants of the update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Decay rate of the first moment.
    pub beta1: f64,
    /// Decay rate of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment for numerical stability.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// One parameter matrix with its moments, all of one shape and dtype.
#[derive(Debug, Clone)]
pub struct Parameter {
    /// The values.
    pub value: Tensor,
    /// First moment.
    pub m: Tensor,
    /// Second moment.
    pub v: Tensor,
}

/// The numbers that change from step to step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWStep {
    /// Number of the step, from 1.
    pub step: usize,
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Norm to which the gradient is clipped; 0 for no clipping.
    pub max_grad_norm: f64,
}

/// Result of [`AdamW::forward`].
#[derive(Debug, Clone)]
pub struct Updated {
    /// The parameter after the step.
    pub parameter: Parameter,
    /// Norm of the gradient before clipping.
    pub grad_norm: Norm,
    /// Norm of the new values.
    pub value_norm: Norm,
}

/// A Euclidean norm, which a GPU may still have to compute.
#[derive(Debug, Clone)]
pub struct Norm(NormValue);

#[derive(Debug, Clone)]
enum NormValue {
    Known(f64),
    /// Sums of squares of parts of the matrix, f32.
    Sums(Tensor),
}

impl Norm {
    /// The norm; waits for a device that still computes it.
    pub fn value(&self) -> Result<f64> {
        match &self.0 {
            NormValue::Known(norm) => Ok(*norm),
            NormValue::Sums(sums) => Ok(Self::from_sums(&sums.to_vec1()?)),
        }
    }

    /// Sums of squares f32 `[n]` for [`Norm::from_sums`]; `None` if the norm is already on the host.
    pub(crate) fn sums(&self) -> Option<&Tensor> {
        match &self.0 {
            NormValue::Known(_) => None,
            NormValue::Sums(sums) => Some(sums),
        }
    }

    /// The norm of a matrix from the sums of squares of its parts.
    pub(crate) fn from_sums(sums: &[f32]) -> f64 {
        sums.iter().copied().map(f64::from).sum::<f64>().sqrt()
    }
}

impl Parameter {
    /// A parameter with moments of zero. The value is copied.
    pub fn new(value: &Tensor) -> Result<Self> {
        Ok(Self { value: value.copy()?, m: value.zeros_like()?, v: value.zeros_like()? })
    }
}

impl AdamW {
    /// The parameter after one step; `parameter` itself does not change. On a GPU parameters are f32.
    ///
    /// # Errors
    /// Returns an error if the gradient or a moment has another shape or dtype than the value, or a device operation fails.
    pub fn forward(&self, parameter: &Parameter, gradient: &Tensor, step: AdamWStep) -> Result<Updated> {
        let _timed = profile::scope("adamw", gradient.device());
        let Parameter { value, m, v } = parameter;
        let kind = |tensor: &Tensor| (tensor.shape().clone(), tensor.dtype());
        for (name, tensor) in [("gradient", gradient), ("first moment", m), ("second moment", v)] {
            if kind(tensor) != kind(value) {
                return Err(Error::shape(
                    "adamw",
                    format!("a {name} of {:?}, {:?}", value.shape(), value.dtype()),
                    format!("{:?}, {:?}", tensor.shape(), tensor.dtype()),
                ));
            }
        }
        match route(value) {
            Route::Cpu => cpu::forward(self, parameter, gradient, step),
            Route::Kernel => gpu::forward(self, parameter, gradient, step),
        }
    }

    /// Step size with the first moment's bias correction, and the root of the second moment's.
    fn bias_corrected(&self, step: AdamWStep) -> (f64, f64) {
        let n = step.step as i32;
        (step.learning_rate / (1.0 - self.beta1.powi(n)), (1.0 - self.beta2.powi(n)).sqrt())
    }
}

impl AdamWStep {
    /// The factor by which a gradient of this norm is clipped.
    fn clip_factor(&self, grad_norm: f64) -> f64 {
        if self.max_grad_norm > 0.0 { (self.max_grad_norm / (grad_norm + 1e-6)).min(1.0) } else { 1.0 }
    }
}

/// Euclidean norm over all elements, in f64.
fn norm(x: &Tensor) -> Result<f64> {
    Ok(x.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt())
}
