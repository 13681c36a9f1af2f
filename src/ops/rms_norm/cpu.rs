//! The norm on the CPU, in f32 or f64; outputs may be bf16.

use super::{BackwardInputs, Normed, ResidualAdd, RmsNorm};
use crate::Result;
use crate::ops::cpu::{
    self, Fma, PART, Real, StorageFloat, UninitBuffer, View, assume_init, with_real, with_storage,
};
use candle_core::{DType, Tensor};
use rayon::prelude::*;
use std::mem::MaybeUninit;

pub(super) fn forward(norm: &RmsNorm, x: &Tensor, add: Option<ResidualAdd>, out: DType) -> Result<Normed> {
    with_storage!("rms_norm", x.dtype(), out, T, O => match add {
        Some(add) => norm_sum::<T, O>(norm, x, add),
        None => norm_input::<T, O>(norm, x),
    })
}

/// Norms `x`, which is the residual stream; nothing is copied.
fn norm_input<T: Real, O: StorageFloat<T>>(norm: &RmsNorm, x: &Tensor) -> Result<Normed> {
    let (t, c) = x.dims2()?;
    let (xs, w) = (View::<T>::new("rms_norm", x)?, View::<T>::new("rms_norm", &norm.weight)?);
    let (xs, w): (&[T], &[T]) = (&xs, &w);
    let (mut normed, mut rstd) = (UninitBuffer::<O>::new(t * c), UninitBuffer::<T>::new(t));
    let rows = cpu::rows_per_task(c);
    let tasks = normed.as_slice().par_chunks_mut(rows * c).zip(rstd.as_slice().par_chunks_mut(rows));
    tasks.enumerate().for_each(|(i, (y, s))| {
        cpu::simd(
            #[inline(always)]
            |fma| norm_rows(y, s, &xs[i * rows * c..], w, (T::nearest(norm.eps), fma)),
        );
    });
    // SAFETY: every row was normed.
    unsafe {
        Ok(Normed { residual: x.clone(), normed: normed.into_tensor((t, c))?, rstd: rstd.into_tensor(t)? })
    }
}

/// Norms `x + multiplier * delta`.
fn norm_sum<T: Real, O: StorageFloat<T>>(norm: &RmsNorm, x: &Tensor, add: ResidualAdd) -> Result<Normed> {
    let (t, c) = x.dims2()?;
    let (delta, m) = (View::<T>::new("rms_norm", add.delta)?, T::nearest(add.multiplier));
    let (xs, w) = (View::<T>::new("rms_norm", x)?, View::<T>::new("rms_norm", &norm.weight)?);
    let (xs, delta, w): (&[T], &[T], &[T]) = (&xs, &delta, &w);
    let (mut normed, mut rstd) = (UninitBuffer::<O>::new(t * c), UninitBuffer::<T>::new(t));
    let mut residual = UninitBuffer::<T>::new(t * c);
    let rows = cpu::rows_per_task(c);
    let tasks = normed.as_slice().par_chunks_mut(rows * c).zip(rstd.as_slice().par_chunks_mut(rows));
    let tasks = tasks.enumerate().zip(residual.as_slice().par_chunks_mut(rows * c));
    tasks.for_each(|((i, (y, s)), r)| {
        let first = i * rows * c;
        let (xs, delta) = (&xs[first..first + r.len()], &delta[first..first + r.len()]);
        cpu::simd(
            #[inline(always)]
            |fma| {
                for ((r, &x), &d) in r.iter_mut().zip(xs).zip(delta) {
                    r.write(fma.mul_add(m, d, x));
                }
                // SAFETY: `xs` and `delta` have the length of `r`, so that every element was written.
                let r = unsafe { assume_init(r) };
                norm_rows(y, s, r, w, (T::nearest(norm.eps), fma));
            },
        );
    });
    // SAFETY: every row was summed and normed.
    unsafe {
        Ok(Normed {
            residual: residual.into_tensor((t, c))?,
            normed: normed.into_tensor((t, c))?,
            rstd: rstd.into_tensor(t)?,
        })
    }
}

/// Writes the normed rows of `r` to `y`, and their rstd.
#[inline(always)]
fn norm_rows<T: Real, O: StorageFloat<T>>(
    y: &mut [MaybeUninit<O>],
    rstd: &mut [MaybeUninit<T>],
    r: &[T],
    w: &[T],
    (eps, fma): (T, Fma),
) {
    let (c, mut scratch) = (w.len(), [MaybeUninit::uninit(); PART]);
    for ((y, s), r) in y.chunks_exact_mut(c).zip(rstd).zip(r.chunks_exact(c)) {
        let square = cpu::dot(r, r, fma);
        let s = *s.write((square / T::nearest(c as f64) + eps).sqrt().recip());
        // SAFETY: `w` and `r` have the elements of every part, so that each is written.
        unsafe {
            O::fill(
                y,
                &mut scratch,
                #[inline(always)]
                |part, y: &mut [MaybeUninit<T>]| {
                    for ((y, &w), &r) in y.iter_mut().zip(&w[part.clone()]).zip(&r[part]) {
                        y.write(w * r * s);
                    }
                },
            );
        }
    }
}

pub(super) fn backward(norm: &RmsNorm, inputs: BackwardInputs) -> Result<Tensor> {
    with_real!("rms_norm backward", inputs.dy.dtype(), T => backward_rows::<T>(norm, inputs))
}

fn backward_rows<T: Real>(norm: &RmsNorm, inputs: BackwardInputs) -> Result<Tensor> {
    const OP: &str = "rms_norm backward";
    let (t, c) = inputs.residual.dims2()?;
    let dresidual = inputs.dresidual.map(|d| View::<T>::new(OP, d)).transpose()?;
    let dresidual = dresidual.as_deref();
    let (dy, r) = (View::<T>::new(OP, inputs.dy)?, View::<T>::new(OP, inputs.residual)?);
    let (rstd, w) = (View::<T>::new(OP, inputs.rstd)?, View::<T>::new(OP, &norm.weight)?);
    let (dy, r, rstd, w): (&[T], &[T], &[T], &[T]) = (&dy, &r, &rstd, &w);
    let inverse = T::one() / T::nearest(c as f64);
    let mut out = UninitBuffer::<T>::new(t * c);
    cpu::par_rows(
        out.as_slice(),
        c,
        #[inline(always)]
        |first, rows, fma| {
            for (i, row) in rows.chunks_exact_mut(c).enumerate() {
                let start = (first + i) * c;
                let (dy, r, s) = (&dy[start..start + c], &r[start..start + c], rstd[first + i]);
                row.iter_mut().zip(w[..c].iter().zip(dy)).for_each(|(y, (&w, &dy))| _ = y.write(w * dy));
                // SAFETY: `w` and `dy` have C elements, so that every element of the row was written.
                let row = unsafe { assume_init(row) };
                let k = s * s * s * cpu::dot(row, r, fma) * inverse;
                match dresidual {
                    Some(dresidual) => {
                        let dresidual = &dresidual[start..start + c];
                        for ((y, &r), &d) in row.iter_mut().zip(r).zip(dresidual) {
                            *y = fma.mul_add(-k, r, fma.mul_add(s, *y, d));
                        }
                    }
                    None => row.iter_mut().zip(r).for_each(|(y, &r)| *y = fma.mul_add(-k, r, s * *y)),
                }
            }
        },
    );
    // SAFETY: every row was written.
    unsafe { out.into_tensor((t, c)) }
}
