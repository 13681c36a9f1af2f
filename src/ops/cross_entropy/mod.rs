//! Softmax cross-entropy over the vocabulary, for rows that predict a target token. The logits are turned
//! into their gradient in place, so that a chunk of rows needs one [rows, V] buffer. Rows may be wider than the
//! vocabulary, as a padded head makes them ([`super::Linear`]): columns beyond it are no tokens, and their gradient is 0.
//!
//! ```text
//! z       = scale * logits                  scale = 1 / logits_scaling
//! lse     = log(sum(exp(z)))
//! nll     = lse - z[label]
//! dlogits = dloss * scale * (exp(z - lse) - onehot(label))
//! ```

use super::IndexView;
use super::cpu::{self, Real, View, with_real};
use super::gpu::{self, Kernel, Route};
use super::profile;
use crate::{Error, Result};
use candle_core::{D, DType, Tensor};
use num_traits::Zero;
use rayon::prelude::*;

/// What a row of logits says of its label.
#[derive(Debug, Clone)]
pub struct Losses {
    /// Negative log-likelihood of each row's label, nats; `[rows]`, f64 on the CPU and f32 on a GPU.
    pub nll: Tensor,
    /// Log-sum-exp of each row's scaled logits; as `nll`.
    pub lse: Tensor,
}

/// What a row of logits means.
#[derive(Debug, Clone, Copy)]
pub struct Softmax {
    /// V: the first columns of a row, one a token.
    pub vocab: usize,
    /// What logits are multiplied by, 1 / `logits_scaling`.
    pub scale: f64,
}

gpu::parameters!(CrossEntropyParameters { rows: u32, vocab: u32, stride: u32, scale: f32, dloss: f32 });

/// Threads of the block that reads a row.
const FORWARD_THREADS: usize = 512;

/// Threads of a block that writes a part of a row's gradient, and the elements that each takes.
const BACKWARD_THREADS: usize = 256;
const BACKWARD_ELEMENTS: usize = 16;

/// Losses of `logits` [rows, V or more] for one label a row.
///
/// # Errors
/// A label beyond the vocabulary, rows narrower than it, or another number of labels than rows.
pub fn forward(logits: &Tensor, labels: IndexView, softmax: Softmax) -> Result<Losses> {
    let _timed = profile::scope("cross_entropy", logits.device());
    let width = check(logits, labels, softmax)?;
    let Softmax { vocab, scale } = softmax;
    let rows = labels.host().len();
    match gpu::route(logits) {
        Route::Cpu => {}
        Route::Kernel => {
            let (nll, lse) = (gpu::empty(rows, DType::F32, logits)?, gpu::empty(rows, DType::F32, logits)?);
            let kernel = Kernel::new("cross_entropy", "cross_entropy_forward", rows, FORWARD_THREADS);
            launch(&kernel, logits, labels, [&nll, &lse], softmax, 1.0)?;
            return Ok(Losses { nll, lse });
        }
        Route::Reference => {
            let lse = (logits.narrow(1, 0, vocab)? * scale)?.log_sum_exp(D::Minus1)?;
            return Ok(Losses { nll: reference(logits, labels, softmax)?, lse });
        }
    }
    with_real!("cross_entropy", logits.dtype(), T => {
        let z = View::<T>::new("cross_entropy", logits)?;
        let z: &[T] = &z;
        let of_row = |(row, &label): (&[T], &u32)| cpu::simd(#[inline(always)] |fma| {
            let lse = log_sum_exp(&row[..vocab], T::of(scale), fma);
            (lse - scale * row[label as usize].wide(), lse)
        });
        let (nll, lse): (Vec<f64>, Vec<f64>) = z.par_chunks(width).zip(labels.host()).map(of_row).unzip();
        Ok(Losses { nll: cpu::tensor(nll, rows)?, lse: cpu::tensor(lse, rows)? })
    })
}

/// Gradient of `dloss * sum(nll)` in the logits [rows, V or more]; made in place where the device has a kernel.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    logits: Tensor,
    labels: IndexView,
    softmax: Softmax,
    losses: &Losses,
    dloss: f64,
) -> Result<Tensor> {
    let _timed = profile::scope("cross_entropy backward", logits.device());
    let width = check(&logits, labels, softmax)?;
    let Softmax { vocab, scale } = softmax;
    if gpu::route(&logits) == Route::Kernel {
        let rows = labels.host().len();
        let mut kernel = Kernel::new("cross_entropy", "cross_entropy_backward", rows, BACKWARD_THREADS);
        // Rows need not begin at 16 bytes: the first access takes up to 7 elements.
        kernel.grid[1] = (vocab + 7).div_ceil(BACKWARD_ELEMENTS * BACKWARD_THREADS);
        launch(&kernel, &logits, labels, [&losses.lse], softmax, dloss)?;
        return Ok(logits);
    }
    if !logits.device().is_cpu() {
        let ones = losses.nll.affine(0.0, dloss)?;
        return Ok(
            super::autograd(&[&logits], &ones, |v| reference(v[0].as_tensor(), labels, softmax))?.remove(0)
        );
    }
    with_real!("cross_entropy backward", logits.dtype(), T => {
        let (s, d) = (T::of(scale), T::of(scale * dloss));
        let lse = View::<f64>::new("cross_entropy backward", &losses.lse)?;
        let lse: &[f64] = &lse;
        cpu::in_place::<T>(&logits, |z| {
            let rows = z.par_chunks_mut(width).zip(labels.host()).zip(lse);
            rows.for_each(|((row, &label), &lse)| {
                let lse = T::of(lse);
                let (row, padding) = row.split_at_mut(vocab);
                padding.fill(T::zero());
                cpu::simd(#[inline(always)] |fma| {
                    row.iter_mut().for_each(|z| *z = d * fma.mul_add(*z, s, -lse).exp_(fma));
                });
                row[label as usize] -= d;
            });
        })
    })?;
    Ok(logits)
}

fn launch<const N: usize>(
    kernel: &Kernel,
    logits: &Tensor,
    labels: IndexView,
    others: [&Tensor; N],
    softmax: Softmax,
    dloss: f64,
) -> Result<()> {
    let (rows, stride) = logits.dims2()?;
    let labels = labels.on(logits.device())?;
    let mut buffers = vec![logits, &labels];
    buffers.extend(others);
    let parameters = CrossEntropyParameters {
        rows: gpu::uint(rows),
        vocab: gpu::uint(softmax.vocab),
        stride: gpu::uint(stride),
        scale: softmax.scale as f32,
        dloss: dloss as f32,
    };
    gpu::launch(kernel, logits.dtype(), &buffers, &parameters)
}

/// The formula in plain candle ops, in f32 where the logits are narrower: nll of each row.
pub fn reference(logits: &Tensor, labels: IndexView, softmax: Softmax) -> Result<Tensor> {
    let wide = if logits.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let z = (logits.narrow(1, 0, softmax.vocab)?.to_dtype(wide)? * softmax.scale)?;
    let lse = z.log_sum_exp(D::Minus1)?;
    let labels = labels.on(logits.device())?.unsqueeze(1)?;
    Ok((lse - z.gather(&labels, 1)?.squeeze(1)?)?)
}

/// The width of a row of logits.
fn check(logits: &Tensor, labels: IndexView, Softmax { vocab, .. }: Softmax) -> Result<usize> {
    let (rows, width) = logits.dims2()?;
    let labels = labels.host();
    if width < vocab {
        return Err(Error::Shape {
            op: "cross_entropy",
            expected: format!("logits of a vocabulary of {vocab}"),
            found: format!("{:?}", logits.dims()),
        });
    }
    match labels.iter().find(|label| **label as usize >= vocab) {
        None if rows == labels.len() => Ok(width),
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
fn log_sum_exp<T: Real>(row: &[T], scale: T, fma: cpu::Fma) -> f64 {
    let largest = cpu::largest(row) * scale;
    let mut sum = 0.0;
    for block in row.chunks(4096) {
        let mut lanes = [T::zero(); 32];
        let mut parts = block.chunks_exact(32);
        for part in &mut parts {
            lanes
                .iter_mut()
                .zip(part)
                .for_each(|(lane, &z)| *lane += fma.mul_add(z, scale, -largest).exp_(fma));
        }
        let tail: T = parts.remainder().iter().map(|&z| fma.mul_add(z, scale, -largest).exp_(fma)).sum();
        sum += (lanes.into_iter().sum::<T>() + tail).wide();
    }
    largest.wide() + sum.ln()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{Indices, autograd, testing::*};

    #[test]
    fn forward_and_backward_agree_with_the_reference() -> Result<()> {
        for (rows, vocab, width) in [(1, 2, 2), (5, 123, 123), (5, 123, 128), (3, 2, 64), (123, 5000, 5000)] {
            let softmax = Softmax { vocab, scale: 0.125 };
            for dtype in [DType::F32, DType::F64] {
                let logits = (randn(1, (rows, width), dtype)? * 9.0)?;
                let labels =
                    Indices::from((0..rows as u32).map(|i| (i * 31) % vocab as u32).collect::<Vec<_>>());
                let labels: IndexView = (&labels).into();
                let losses = forward(&logits, labels, softmax)?;
                let expected = reference(&logits, labels, softmax)?;
                assert_close("nll", &losses.nll, &expected, Tolerance::of(dtype));
                let dy = (expected.ones_like()? * 0.7)?;
                // In f64: candle's own log_sum_exp gradient is off by 5e-4 in f32.
                let wide = [&logits.to_dtype(DType::F64)?];
                let d = autograd(&wide, &dy.to_dtype(DType::F64)?, |v| {
                    reference(v[0].as_tensor(), labels, softmax)
                })?;
                let ours = backward(logits.copy()?, labels, softmax, &losses, 0.7)?;
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
        let losses = forward(&logits, (&Indices::from(vec![1])).into(), Softmax { vocab: 3, scale: 1.0 })?;
        assert_eq!(losses.nll.to_vec1::<f64>()?, [6e4]);
        Ok(())
    }

    #[test]
    fn a_label_beyond_the_vocabulary_is_an_error() -> Result<()> {
        let labels = Indices::from(vec![1, 5]);
        let error =
            forward(&randn(1, (2, 6), DType::F32)?, (&labels).into(), Softmax { vocab: 5, scale: 1.0 })
                .unwrap_err();
        assert_eq!(error.to_string(), "cross_entropy: expected 2 labels under 5, found 2 labels, one is 5");
        Ok(())
    }

    #[test]
    fn rows_narrower_than_the_vocabulary_are_an_error() -> Result<()> {
        let labels = Indices::from(vec![1]);
        let softmax = Softmax { vocab: 7, scale: 1.0 };
        let error = forward(&randn(1, (1, 6), DType::F32)?, (&labels).into(), softmax).unwrap_err();
        assert_eq!(error.to_string(), "cross_entropy: expected logits of a vocabulary of 7, found [1, 6]");
        Ok(())
    }
}
