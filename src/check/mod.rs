//! Checks that a device computes the same as the CPU: every op of a tuning step, and a short run.
//!
//! The exact value of an op is the CPU's in f64, for inputs rounded to the dtype under test. An op may err by at most 2
//! times, a gradient by 3 times, the error of plain candle ops in that dtype on the CPU (the rule of flash-attention's
//! tests); f32 by 1e-5 of the largest exact value.

mod attention;
mod experts;
pub mod large;
mod mamba2;
mod ops;
mod rope;
mod run;

use crate::Result;
use candle_core::{DType, Device, Shape, Tensor};
use rand::SeedableRng;
use rand::distr::{Distribution, Uniform};
use serde::Serialize;

#[cfg(test)]
pub(crate) use attention::packed;
pub use large::large;
pub use ops::{OPS, ops};
pub use run::{Curves, RunSize, run};

/// One comparison.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// Name of the op, such as `rms_norm`.
    pub op: &'static str,
    /// Name of the result, such as `dx`.
    pub what: &'static str,
    /// Shape of the case.
    pub case: String,
    /// Largest error against the exact value; NaN if a value is not finite.
    pub error: f64,
    /// The largest allowed error.
    pub allowed: f64,
}

impl Comparison {
    /// Whether the error is allowed.
    pub fn holds(&self) -> bool {
        self.error <= self.allowed
    }
}

/// The device under test.
pub struct CheckTarget<'a> {
    /// The device of the tensors.
    pub device: &'a Device,
    /// dtype of the activations.
    pub dtype: DType,
    /// Runs an op: directly, or on the emulator.
    pub run: &'a dyn Fn(&mut dyn FnMut()),
}

impl CheckTarget<'_> {
    /// The result of `f` on the device.
    pub(crate) fn result<R>(&self, mut f: impl FnMut() -> Result<R>) -> Result<R> {
        let mut result = None;
        (self.run)(&mut || result = Some(f()));
        result.unwrap_or_else(|| Err(crate::Error::Invalid("the device under test ran nothing".into())))
    }
}

/// Comparisons so far, and the current case.
pub(crate) struct Checks<'a> {
    target: &'a CheckTarget<'a>,
    op: &'static str,
    case: String,
    seed: u64,
    /// Least magnitude to which an f32 error is compared, for exact values that are all smaller.
    pub(crate) unit: f64,
    found: Vec<Comparison>,
}

/// A tensor in three forms: on the device, the same values on the CPU, and those in f64.
pub(crate) struct Input {
    pub(crate) device: Tensor,
    pub(crate) cpu: Tensor,
    pub(crate) exact: Tensor,
}

/// The tolerance of a comparison.
#[derive(Clone, Copy)]
pub(crate) enum ResultKind {
    /// A result: 2 times the error of the plain computation.
    Value,
    /// A gradient: 3 times.
    Gradient,
}

impl<'a> Checks<'a> {
    pub(crate) fn new(target: &'a CheckTarget<'a>, op: &'static str) -> Self {
        Self { target, op, case: String::new(), seed: 0, unit: 1e-3, found: Vec::new() }
    }

    pub(crate) fn finish(self) -> Vec<Comparison> {
        self.found
    }

    /// Begins a case.
    pub(crate) fn case(&mut self, case: String) {
        self.seed = self.seed.wrapping_add(1000);
        self.case = case;
    }

    pub(crate) fn dtype(&self) -> DType {
        self.target.dtype
    }

    /// Uniform values of variance `scale²`, rounded to the dtype under test.
    pub(crate) fn random(&mut self, shape: impl Into<Shape>, scale: f64) -> Result<Input> {
        let dtype = self.target.dtype;
        self.random_in(shape, scale, dtype)
    }

    /// As [`Checks::random`], in another dtype.
    pub(crate) fn random_in(&mut self, shape: impl Into<Shape>, scale: f64, dtype: DType) -> Result<Input> {
        let shape: Shape = shape.into();
        self.seed += 1;
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(self.seed);
        let bound = scale * 3f64.sqrt();
        let values: Vec<f64> = match Uniform::new_inclusive(-bound, bound) {
            Ok(uniform) => uniform.sample_iter(&mut rng).take(shape.elem_count()).collect(),
            Err(_) => vec![0.0; shape.elem_count()],
        };
        self.input(&Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?)
    }

    /// A tensor of the CPU in its three forms.
    pub(crate) fn input(&self, cpu: &Tensor) -> Result<Input> {
        // A copy: kernels write some of their inputs in place. A driver allocates no tensor without elements.
        let device = match cpu.elem_count() {
            0 => crate::ops::no_rows(1, cpu.dtype(), self.target.device)?.reshape(cpu.shape())?,
            _ => cpu.copy()?.to_device(self.target.device)?,
        };
        Ok(Input { device, cpu: cpu.clone(), exact: cpu.to_dtype(DType::F64)? })
    }

    /// Runs `f` on the device under test.
    pub(crate) fn run<R>(&self, f: impl FnMut() -> Result<R>) -> Result<R> {
        self.target.result(f)
    }

    /// Compares a value with `exact`; `naive` is the result of plain ops in the same dtype.
    pub(crate) fn value(
        &mut self,
        what: &'static str,
        ours: &Tensor,
        exact: &Tensor,
        naive: &Tensor,
    ) -> Result<()> {
        self.compare((what, ResultKind::Value), ours, exact, naive)
    }

    /// Compares a gradient with `exact`, as [`Checks::value`] does.
    pub(crate) fn gradient(
        &mut self,
        what: &'static str,
        ours: &Tensor,
        exact: &Tensor,
        naive: &Tensor,
    ) -> Result<()> {
        self.compare((what, ResultKind::Gradient), ours, exact, naive)
    }

    fn compare(
        &mut self,
        (what, kind): (&'static str, ResultKind),
        ours: &Tensor,
        exact: &Tensor,
        naive: &Tensor,
    ) -> Result<()> {
        let exact = values(exact)?;
        let ours = values(ours)?;
        let error = if ours.len() == exact.len() { largest_difference(&ours, &exact) } else { f64::NAN };
        let largest = exact.iter().fold(self.unit, |a: f64, b| a.max(b.abs()));
        let allowed = match self.target.dtype {
            DType::F32 => 1e-5 * largest,
            dtype => {
                let factor = if let ResultKind::Value = kind { 2.0 } else { 3.0 };
                // With few values plain ops may be exact by chance: every result may err by its rounding.
                let rounding = largest * if dtype == DType::F16 { 2f64.powi(-11) } else { 2f64.powi(-8) };
                factor * largest_difference(&values(naive)?, &exact).max(rounding) + 1e-5 * largest
            }
        };
        self.found.push(Comparison { op: self.op, what, case: self.case.clone(), error, allowed });
        Ok(())
    }
}

fn values(t: &Tensor) -> Result<Vec<f64>> {
    Ok(t.to_device(&Device::Cpu)?.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?)
}

/// NaN if a difference is NaN.
fn largest_difference(a: &[f64], b: &[f64]) -> f64 {
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |most: f64, d| if most.is_nan() || d <= most { most } else { d })
}

#[cfg(test)]
mod tests;
