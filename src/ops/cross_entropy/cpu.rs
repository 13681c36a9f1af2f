//! The losses on the CPU, in f32 or f64.

use super::{LossWeights, Softmax, TokenLosses};
use crate::Result;
use crate::ops::IndexView;
use crate::ops::cpu::{self, Fma, Real, View, with_real};
use candle_core::Tensor;
use num_traits::Zero;
use rayon::prelude::*;

pub(super) fn forward(logits: &Tensor, labels: IndexView, softmax: Softmax) -> Result<TokenLosses> {
    let Softmax { vocab, scale } = softmax;
    let (rows, width) = logits.dims2()?;
    with_real!("cross_entropy", logits.dtype(), T => {
        let z = View::<T>::new("cross_entropy", logits)?;
        let z: &[T] = &z;
        let losses = |(row, &label): (&[T], &u32)| cpu::simd(#[inline(always)] |fma| {
            let lse = log_sum_exp(&row[..vocab], T::nearest(scale), fma);
            (lse - scale * row[label as usize].as_f64(), lse)
        });
        let losses: Vec<_> = z.par_chunks(width).zip(labels.host()).map(losses).collect();
        let (nll, lse): (Vec<f64>, Vec<f64>) = losses.into_iter().unzip();
        Ok(TokenLosses { nll: cpu::tensor(nll, rows)?, lse: cpu::tensor(lse, rows)? })
    })
}

/// Replaces the logits by their gradient.
pub(super) fn backward(
    logits: &Tensor,
    labels: IndexView,
    softmax: Softmax,
    losses: &TokenLosses,
    dloss: &LossWeights,
) -> Result<()> {
    const OP: &str = "cross_entropy backward";
    let Softmax { vocab, scale } = softmax;
    let (rows, width) = logits.dims2()?;
    let dloss = dloss.on_host(rows)?;
    with_real!(OP, logits.dtype(), T => {
        let s = T::nearest(scale);
        let lse = View::<f64>::new(OP, &losses.lse)?;
        let lse: &[f64] = &lse;
        cpu::in_place::<T>(logits, |z| {
            let rows = z.par_chunks_mut(width).zip(labels.host()).zip(lse.par_iter().zip(&dloss));
            rows.for_each(|((row, &label), (&lse, &dloss))| {
                let (lse, d) = (T::nearest(lse), T::nearest(scale * dloss));
                let (row, padding) = row.split_at_mut(vocab);
                padding.fill(T::zero());
                cpu::simd(#[inline(always)] |fma| {
                    row.iter_mut().for_each(|z| *z = d * fma.mul_add(*z, s, -lse).fast_exp(fma));
                });
                row[label as usize] -= d;
            });
        })
    })
}

/// Log-sum-exp of `scale * row`. The exponentials are summed in 32 lanes over blocks of 4,096, the blocks' sums in f64.
#[inline(always)]
pub(in crate::ops) fn log_sum_exp<T: Real>(row: &[T], scale: T, fma: Fma) -> f64 {
    let largest = cpu::largest(row) * scale;
    let mut sum = 0.0;
    for block in row.chunks(4096) {
        let mut lanes = [T::zero(); 32];
        let mut parts = block.chunks_exact(32);
        for part in &mut parts {
            lanes
                .iter_mut()
                .zip(part)
                .for_each(|(lane, &z)| *lane += fma.mul_add(z, scale, -largest).fast_exp(fma));
        }
        let tail: T = parts.remainder().iter().map(|&z| fma.mul_add(z, scale, -largest).fast_exp(fma)).sum();
        sum += (lanes.into_iter().sum::<T>() + tail).as_f64();
    }
    largest.as_f64() + sum.ln()
}
