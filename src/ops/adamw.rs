//! AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101, algorithm 2), as `torch.optim.AdamW` computes it:
//!
//! ```text
//! p  = p (1 - lr * weight_decay)
//! m  = beta1 m + (1 - beta1) g
//! v  = beta2 v + (1 - beta2) g²
//! p -= lr / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps)
//! ```
//!
//! `g` is the gradient times `clip`, the factor that brings its norm down to the limit.

use super::cpu::{self, Real, View, with_real};
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
    /// Factor on the gradient.
    pub clip: f64,
}

impl Parameter {
    /// A parameter with moments of zero. The value is copied.
    pub fn new(value: &Tensor) -> Result<Self> {
        Ok(Self { value: value.copy()?, m: value.zeros_like()?, v: value.zeros_like()? })
    }
}

impl AdamW {
    /// The parameter after one step.
    ///
    /// # Errors
    /// A gradient of another shape or dtype.
    pub fn forward(&self, parameter: &Parameter, gradient: &Tensor, step: Step) -> Result<Parameter> {
        let Parameter { value, .. } = parameter;
        if gradient.shape() != value.shape() || gradient.dtype() != value.dtype() {
            return Err(Error::Shape {
                op: "adamw",
                expected: format!("a gradient of {:?}, {:?}", value.shape(), value.dtype()),
                found: format!("{:?}, {:?}", gradient.shape(), gradient.dtype()),
            });
        }
        if !value.device().is_cpu() {
            return self.reference(parameter, gradient, step);
        }
        with_real!("adamw", value.dtype(), T => self.forward_cpu::<T>(parameter, gradient, step))
    }

    /// The formula in plain candle ops.
    pub fn reference(&self, parameter: &Parameter, gradient: &Tensor, step: Step) -> Result<Parameter> {
        let Self { beta1, beta2, eps, weight_decay } = *self;
        let g = (gradient * step.clip)?;
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
    ) -> Result<Parameter> {
        let of = |t| View::<T>::new("adamw", t);
        let (p, m, v, g) = (of(&parameter.value)?, of(&parameter.m)?, of(&parameter.v)?, of(gradient)?);
        let (rate, root) = self.corrected(step);
        let (b1, b2, eps) = (T::of(self.beta1), T::of(self.beta2), T::of(self.eps));
        let (rate, root, clip) = (T::of(rate), T::of(root), T::of(step.clip));
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

/// Euclidean norm over all elements of `gradients`, in f64.
///
/// # Errors
/// The device's.
pub fn norm<'a>(gradients: impl IntoIterator<Item = &'a Tensor>) -> Result<f64> {
    let mut square = 0.0;
    for g in gradients {
        square += g.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>()?;
    }
    Ok(square.sqrt())
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
                let at = Step { step, learning_rate: 0.01, clip: 0.5 };
                ours = ADAMW.forward(&ours, &gradient, at)?;
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
        let after = adamw.forward(&parameter, &gradient, Step { step: 1, learning_rate: 0.1, clip: 1.0 })?;
        assert_close(
            "moved",
            &after.value,
            &Tensor::new(&[0.9f64, -1.9], &candle_core::Device::Cpu)?,
            Tolerance::F64,
        );
        assert_eq!(norm([&gradient])?, 5.0);
        Ok(())
    }

    #[test]
    fn a_gradient_of_another_shape_is_an_error() -> Result<()> {
        let parameter = Parameter::new(&randn(1, (2, 3), DType::F32)?)?;
        let step = Step { step: 1, learning_rate: 0.1, clip: 1.0 };
        assert!(ADAMW.forward(&parameter, &randn(2, (3, 2), DType::F32)?, step).is_err());
        Ok(())
    }
}
