//! AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101, algorithm 2), as `torch.optim.AdamW` computes it:
//!
//! ```text
//! p  = p (1 - lr * weight_decay)
//! m  = beta1 m + (1 - beta1) g
//! v  = beta2 v + (1 - beta2) g²
//! p -= lr / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps)
//! ```
//!
//! `g` is the gradient times the factor that brings its norm down to the limit, as `clip_grad_norm_` has it:
//! `min(1, limit / (norm + 1e-6))`.

use super::cpu::{self, Real, View, with_real};
use super::gpu::{self, Kernel, Route};
use super::profile;
use crate::{Error, Result};
use candle_core::{DType, Tensor};

/// Constants of the update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
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

/// What changes from step to step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// Counted from 1.
    pub step: usize,
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Norm that the gradient is clipped to; 0 for no clipping.
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

/// A Euclidean norm that may still be on its way from the device.
#[derive(Debug, Clone)]
pub struct Norm(Partial);

#[derive(Debug, Clone)]
enum Partial {
    Known(f64),
    /// Sums of squares, f32.
    Sums(Tensor),
}

impl Norm {
    /// The norm; waits for the device where it must.
    ///
    /// # Errors
    /// The device's.
    pub fn value(&self) -> Result<f64> {
        match &self.0 {
            Partial::Known(norm) => Ok(*norm),
            Partial::Sums(sums) => Ok(Self::of_sums(&sums.to_vec1()?)),
        }
    }

    /// Sums of squares f32 `[n]` that [`Norm::of_sums`] takes, where the norm is not on the host yet.
    pub(crate) fn sums(&self) -> Option<&Tensor> {
        match &self.0 {
            Partial::Known(_) => None,
            Partial::Sums(sums) => Some(sums),
        }
    }

    /// The norm of a whole, by sums of squares of its parts.
    pub(crate) fn of_sums(sums: &[f32]) -> f64 {
        sums.iter().copied().map(f64::from).sum::<f64>().sqrt()
    }
}

gpu::parameters!(AdamWParameters {
    count: u32,
    partials: u32,
    keep: f32,
    beta1: f32,
    beta2: f32,
    eps: f32,
    rate: f32,
    root: f32,
    max_norm: f32,
});

/// Threads of a block, and the most blocks: each later adds up one number a block.
const THREADS: usize = 256;
const MAX_BLOCKS: usize = 256;

impl Parameter {
    /// A parameter with moments of zero. The value is copied.
    pub fn new(value: &Tensor) -> Result<Self> {
        Ok(Self { value: value.copy()?, m: value.zeros_like()?, v: value.zeros_like()? })
    }
}

impl AdamW {
    /// The parameter after one step; the one given stays as it is.
    ///
    /// # Errors
    /// A gradient of another shape or dtype.
    pub fn forward(&self, parameter: &Parameter, gradient: &Tensor, step: Step) -> Result<Updated> {
        let _timed = profile::scope("adamw", gradient.device());
        let Parameter { value, .. } = parameter;
        if gradient.shape() != value.shape() || gradient.dtype() != value.dtype() {
            return Err(Error::Shape {
                op: "adamw",
                expected: format!("a gradient of {:?}, {:?}", value.shape(), value.dtype()),
                found: format!("{:?}, {:?}", gradient.shape(), gradient.dtype()),
            });
        }
        if gpu::route(value) == Route::Kernel && value.dtype() == DType::F32 {
            return self.forward_kernel(parameter, gradient, step);
        }
        let grad_norm = norm(gradient)?;
        let parameter = if value.device().is_cpu() {
            let clip = step.clip(grad_norm);
            with_real!("adamw", value.dtype(), T => self.forward_cpu::<T>(parameter, gradient, step, clip))?
        } else {
            self.reference(parameter, gradient, step)?
        };
        let value_norm = Norm(Partial::Known(norm(&parameter.value)?));
        Ok(Updated { parameter, grad_norm: Norm(Partial::Known(grad_norm)), value_norm })
    }

    fn forward_kernel(&self, parameter: &Parameter, gradient: &Tensor, step: Step) -> Result<Updated> {
        let Parameter { value, m, v } = parameter;
        let count = value.elem_count();
        let blocks = count.div_ceil(8 * THREADS).min(MAX_BLOCKS);
        let (rate, root) = self.corrected(step);
        let parameters = AdamWParameters {
            count: gpu::uint(count),
            partials: gpu::uint(blocks),
            keep: (1.0 - step.learning_rate * self.weight_decay) as f32,
            beta1: self.beta1 as f32,
            beta2: self.beta2 as f32,
            eps: self.eps as f32,
            rate: rate as f32,
            root: root as f32,
            max_norm: step.max_grad_norm as f32,
        };
        let like = || gpu::empty(value.shape(), DType::F32, value);
        let sums = || gpu::empty(blocks, DType::F32, value);
        let (new, grad_sums, value_sums) =
            (Parameter { value: like()?, m: like()?, v: like()? }, sums()?, sums()?);
        let kernel = |name| Kernel::new("adamw", name, blocks, THREADS);
        gpu::launch(&kernel("adamw_norm"), DType::F32, &[gradient, &grad_sums], &parameters)?;
        let buffers = [value, m, v, gradient, &grad_sums, &new.value, &new.m, &new.v, &value_sums];
        gpu::launch(&kernel("adamw_step"), DType::F32, &buffers, &parameters)?;
        let of = |sums| Norm(Partial::Sums(sums));
        Ok(Updated { parameter: new, grad_norm: of(grad_sums), value_norm: of(value_sums) })
    }

    /// The formula in plain candle ops.
    pub fn reference(&self, parameter: &Parameter, gradient: &Tensor, step: Step) -> Result<Parameter> {
        let Self { beta1, beta2, eps, weight_decay } = *self;
        let g = (gradient * step.clip(norm(gradient)?))?;
        let m = ((&parameter.m * beta1)? + (&g * (1.0 - beta1))?)?;
        let v = ((&parameter.v * beta2)? + (g.sqr()? * (1.0 - beta2))?)?;
        let (rate, root) = self.corrected(step);
        let change = (&m / ((v.sqrt()? / root)? + eps)?)?;
        let value = ((&parameter.value * (1.0 - step.learning_rate * weight_decay))? - (change * rate)?)?;
        Ok(Parameter { value, m, v })
    }

    /// Step size and root of the second moment's bias correction.
    fn corrected(&self, step: Step) -> (f64, f64) {
        let n = step.step as i32;
        (step.learning_rate / (1.0 - self.beta1.powi(n)), (1.0 - self.beta2.powi(n)).sqrt())
    }

    fn forward_cpu<T: Real>(
        &self,
        parameter: &Parameter,
        gradient: &Tensor,
        step: Step,
        clip: f64,
    ) -> Result<Parameter> {
        let of = |t| View::<T>::new("adamw", t);
        let (p, m, v, g) = (of(&parameter.value)?, of(&parameter.m)?, of(&parameter.v)?, of(gradient)?);
        let (rate, root) = self.corrected(step);
        let (b1, b2, eps) = (T::of(self.beta1), T::of(self.beta2), T::of(self.eps));
        let (rate, root, clip) = (T::of(rate), T::of(root), T::of(clip));
        let keep = T::of(1.0 - step.learning_rate * self.weight_decay);
        let mut new = [p.to_vec(), m.to_vec(), v.to_vec()];
        let [p, m, v] = &mut new;
        for (((p, m), v), &g) in p.iter_mut().zip(m).zip(v).zip(g.iter()) {
            let g = g * clip;
            *m = b1 * *m + (T::one() - b1) * g;
            *v = b2 * *v + (T::one() - b2) * g * g;
            *p = *p * keep - rate * *m / (v.sqrt() / root + eps);
        }
        let shape = parameter.value.shape();
        let [value, m, v] = new.map(|buffer| cpu::tensor(buffer, shape.clone()));
        Ok(Parameter { value: value?, m: m?, v: v? })
    }
}

impl Step {
    /// Factor on a gradient of this norm.
    fn clip(&self, grad_norm: f64) -> f64 {
        if self.max_grad_norm > 0.0 { (self.max_grad_norm / (grad_norm + 1e-6)).min(1.0) } else { 1.0 }
    }
}

/// Euclidean norm over all elements, in f64.
fn norm(x: &Tensor) -> Result<f64> {
    Ok(x.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;

    const ADAMW: AdamW = AdamW { beta1: 0.9, beta2: 0.98, eps: 1e-7, weight_decay: 0.03 };

    #[test]
    fn steps_agree_with_the_reference() -> Result<()> {
        for dtype in [DType::F32, DType::F64] {
            let mut ours = Parameter::new(&randn(1, (5, 123), dtype)?)?;
            let mut expected = ours.clone();
            for step in 1..=5 {
                let gradient = randn(step as u64 + 7, (5, 123), dtype)?;
                let at = Step { step, learning_rate: 0.01, max_grad_norm: 0.5 };
                let updated = ADAMW.forward(&ours, &gradient, at)?;
                assert!((updated.grad_norm.value()? - norm(&gradient)?).abs() < 1e-4);
                ours = updated.parameter;
                assert!((updated.value_norm.value()? - norm(&ours.value)?).abs() < 1e-4);
                expected = ADAMW.reference(&expected, &gradient, at)?;
            }
            assert_close("value", &ours.value, &expected.value, Tolerance::of(dtype));
            assert_close("m", &ours.m, &expected.m, Tolerance::of(dtype));
            assert_close("v", &ours.v, &expected.v, Tolerance::of(dtype));
        }
        Ok(())
    }

    #[test]
    fn the_first_step_moves_by_the_learning_rate() -> Result<()> {
        let parameter = Parameter::new(&Tensor::new(&[1f64, -2.0], &candle_core::Device::Cpu)?)?;
        let gradient = Tensor::new(&[3f64, -4.0], &candle_core::Device::Cpu)?;
        let adamw = AdamW { weight_decay: 0.0, eps: 0.0, ..ADAMW };
        let step = Step { step: 1, learning_rate: 0.1, max_grad_norm: 0.0 };
        let after = adamw.forward(&parameter, &gradient, step)?;
        assert_close(
            "moved",
            &after.parameter.value,
            &Tensor::new(&[0.9f64, -1.9], &candle_core::Device::Cpu)?,
            Tolerance::F64,
        );
        assert_eq!(after.grad_norm.value()?, 5.0);
        Ok(())
    }

    #[test]
    fn a_gradient_of_another_shape_is_an_error() -> Result<()> {
        let parameter = Parameter::new(&randn(1, (2, 3), DType::F32)?)?;
        let step = Step { step: 1, learning_rate: 0.1, max_grad_norm: 1.0 };
        assert!(ADAMW.forward(&parameter, &randn(2, (3, 2), DType::F32)?, step).is_err());
        Ok(())
    }
}
