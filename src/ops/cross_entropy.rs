//! Softmax cross-entropy over the vocabulary, for rows that predict a target token. The logits are turned
//! into their gradient in place, so that a chunk of rows needs one [rows, V] buffer.
//!
//! ```text
//! z       = scale * logits                  scale = 1 / logits_scaling
//! lse     = log(sum(exp(z)))
//! nll     = lse - z[label]
//! dlogits = dloss * scale * (exp(z - lse) - onehot(label))
//! ```

use super::cpu::{self, Real, View, with_real};
use crate::{Error, Result};
use candle_core::{D, DType, Tensor};
use rayon::prelude::*;

/// What a row of logits says of its label.
#[derive(Debug, Clone, PartialEq)]
pub struct Losses {
    /// Negative log-likelihood of each row's label, nats.
    pub nll: Vec<f64>,
    /// Log-sum-exp of each row's scaled logits.
    pub lse: Vec<f64>,
}

/// Losses of `logits` [rows, V] for one label a row.
///
/// # Errors
/// A label beyond the vocabulary, or another number of labels than rows.
pub fn forward(logits: &Tensor, labels: &[u32], scale: f64) -> Result<Losses> {
    let vocab = check(logits, labels)?;
    if !logits.device().is_cpu() {
        let wide = (logits.to_dtype(DType::F32)? * scale)?;
        let lse = wide.log_sum_exp(D::Minus1)?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        let nll = reference(logits, labels, scale)?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        return Ok(Losses { nll, lse });
    }
    with_real!("cross_entropy", logits.dtype(), T => {
        let z = View::<T>::new("cross_entropy", logits)?;
        let z: &[T] = &z;
        let of_row = |(row, &label): (&[T], &u32)| cpu::simd(|| {
            let lse = log_sum_exp(row, T::of(scale));
            (lse - scale * row[label as usize].wide(), lse)
        });
        let (nll, lse) = z.par_chunks(vocab).zip(labels).map(of_row).unzip();
        Ok(Losses { nll, lse })
    })
}

/// Gradient of `dloss * sum(nll)` in the logits [rows, V]; made in place where the device has a kernel.
///
/// # Errors
/// As [`forward`].
pub fn backward(logits: Tensor, labels: &[u32], scale: f64, losses: &Losses, dloss: f64) -> Result<Tensor> {
    let vocab = check(&logits, labels)?;
    if !logits.device().is_cpu() {
        let ones = Tensor::full(dloss as f32, labels.len(), logits.device())?;
        return Ok(
            super::autograd(&[&logits], &ones, |v| reference(v[0].as_tensor(), labels, scale))?.remove(0)
        );
    }
    with_real!("cross_entropy backward", logits.dtype(), T => {
        let (s, d) = (T::of(scale), T::of(scale * dloss));
        cpu::in_place::<T>(&logits, |z| {
            let rows = z.par_chunks_mut(vocab).zip(labels).zip(&losses.lse);
            rows.for_each(|((row, &label), &lse)| {
                let lse = T::of(lse);
                cpu::simd(|| row.iter_mut().for_each(|z| *z = d * (*z * s - lse).exp_()));
                row[label as usize] -= d;
            });
        })
    })?;
    Ok(logits)
}

/// The formula in plain candle ops, in f32 where the logits are narrower: nll of each row.
pub fn reference(logits: &Tensor, labels: &[u32], scale: f64) -> Result<Tensor> {
    let wide = if logits.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let z = (logits.to_dtype(wide)? * scale)?;
    let lse = z.log_sum_exp(D::Minus1)?;
    let labels = Tensor::new(labels, logits.device())?.unsqueeze(1)?;
    Ok((lse - z.gather(&labels, 1)?.squeeze(1)?)?)
}

fn check(logits: &Tensor, labels: &[u32]) -> Result<usize> {
    let (rows, vocab) = logits.dims2()?;
    match labels.iter().find(|label| **label as usize >= vocab) {
        None if rows == labels.len() => Ok(vocab),
        found => Err(Error::Shape {
            op: "cross_entropy",
            expected: format!("{rows} labels under {vocab}"),
            found: format!(
                "{} labels{}",
                labels.len(),
                found.map_or(String::new(), |l| format!(", one is {l}"))
            ),
        }),
    }
}

/// In f64 beyond the exponentials, whose sum runs in 32 lanes over blocks of 4,096.
#[inline(always)]
fn log_sum_exp<T: Real>(row: &[T], scale: T) -> f64 {
    let largest = cpu::largest(row) * scale;
    let mut sum = 0.0;
    for block in row.chunks(4096) {
        let mut lanes = [T::zero(); 32];
        let mut parts = block.chunks_exact(32);
        for part in &mut parts {
            lanes.iter_mut().zip(part).for_each(|(lane, &z)| *lane += (z * scale - largest).exp_());
        }
        let tail: T = parts.remainder().iter().map(|&z| (z * scale - largest).exp_()).sum();
        sum += (lanes.into_iter().sum::<T>() + tail).wide();
    }
    largest.wide() + sum.ln()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{autograd, testing::*};

    #[test]
    fn forward_and_backward_agree_with_the_reference() -> Result<()> {
        for (rows, vocab) in [(1, 2), (5, 123), (123, 5000)] {
            for dtype in [DType::F32, DType::F64] {
                let logits = (randn(1, (rows, vocab), dtype)? * 9.0)?;
                let labels: Vec<u32> = (0..rows as u32).map(|i| (i * 31) % vocab as u32).collect();
                let losses = forward(&logits, &labels, 0.125)?;
                let nll = Tensor::new(losses.nll.clone(), logits.device())?;
                let expected = reference(&logits, &labels, 0.125)?;
                assert_close("nll", &nll, &expected, Tolerance::of(dtype));
                let dy = (expected.ones_like()? * 0.7)?;
                // In f64: candle's own log_sum_exp gradient is off by 5e-4 in f32.
                let wide = [&logits.to_dtype(DType::F64)?];
                let d = autograd(&wide, &dy.to_dtype(DType::F64)?, |v| {
                    reference(v[0].as_tensor(), &labels, 0.125)
                })?;
                let ours = backward(logits.copy()?, &labels, 0.125, &losses, 0.7)?;
                let tolerance = Tolerance { absolute: 1e-8, ..Tolerance::of(dtype) };
                assert_close("dlogits", &ours, &d[0], tolerance);
                assert!(max_abs(&ours)? > 0.0);
            }
        }
        Ok(())
    }

    #[test]
    fn large_logits_do_not_overflow() -> Result<()> {
        let logits = Tensor::new(&[[3e4f32, -3e4, 0.0]], &candle_core::Device::Cpu)?;
        let losses = forward(&logits, &[1], 1.0)?;
        assert_eq!(losses.nll, [6e4]);
        Ok(())
    }

    #[test]
    fn a_label_beyond_the_vocabulary_is_an_error() -> Result<()> {
        let error = forward(&randn(1, (2, 5), DType::F32)?, &[1, 5], 1.0).unwrap_err();
        assert_eq!(error.to_string(), "cross_entropy: expected 2 labels under 5, found 2 labels, one is 5");
        Ok(())
    }
}
