//! The update in plain candle ops.

use super::{AdamW, AdamWStep, Parameter, norm};
use crate::Result;
use candle_core::Tensor;

impl AdamW {
    /// The parameter after one step, in plain candle ops; for tests and `gneiss check`.
    ///
    /// # Errors
    /// Returns an error if shapes do not match or a device operation fails.
    pub fn reference(&self, parameter: &Parameter, gradient: &Tensor, step: AdamWStep) -> Result<Parameter> {
        let Self { beta1, beta2, eps, weight_decay } = *self;
        let g = (gradient * step.clip_factor(norm(gradient)?))?;
        let m = ((&parameter.m * beta1)? + (&g * (1.0 - beta1))?)?;
        let v = ((&parameter.v * beta2)? + (g.sqr()? * (1.0 - beta2))?)?;
        let (rate, root) = self.bias_corrected(step);
        let change = (&m / ((v.sqrt()? / root)? + eps)?)?;
        let value = ((&parameter.value * (1.0 - step.learning_rate * weight_decay))? - (change * rate)?)?;
        Ok(Parameter { value, m, v })
    }
}
