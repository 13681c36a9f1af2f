//! The update on the CPU, in f32 or f64.

use super::{AdamW, AdamWStep, Norm, NormValue, Parameter, Updated, norm};
use crate::Result;
use crate::ops::cpu::{self, Real, View, with_real};
use candle_core::Tensor;

pub(super) fn forward(
    adamw: &AdamW,
    parameter: &Parameter,
    gradient: &Tensor,
    step: AdamWStep,
) -> Result<Updated> {
    let grad_norm = norm(gradient)?;
    let clip = step.clip_factor(grad_norm);
    let parameter =
        with_real!("adamw", gradient.dtype(), T => update::<T>(adamw, parameter, gradient, (step, clip)))?;
    let value_norm = Norm(NormValue::Known(norm(&parameter.value)?));
    Ok(Updated { parameter, grad_norm: Norm(NormValue::Known(grad_norm)), value_norm })
}

fn update<T: Real>(
    adamw: &AdamW,
    parameter: &Parameter,
    gradient: &Tensor,
    (step, clip): (AdamWStep, f64),
) -> Result<Parameter> {
    let view = |t| View::<T>::new("adamw", t);
    let (p, m, v, g) = (view(&parameter.value)?, view(&parameter.m)?, view(&parameter.v)?, view(gradient)?);
    let (rate, root) = adamw.bias_corrected(step);
    let (b1, b2, eps) = (T::nearest(adamw.beta1), T::nearest(adamw.beta2), T::nearest(adamw.eps));
    let (rate, root, clip) = (T::nearest(rate), T::nearest(root), T::nearest(clip));
    let keep = T::nearest(1.0 - step.learning_rate * adamw.weight_decay);
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
