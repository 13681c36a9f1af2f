//! RMS norm, fused with the residual add before it (Zhang and Sennrich, 2019, arXiv:1910.07467;
//! transformers `modeling_granite.py`, `GraniteRMSNorm` and `GraniteDecoderLayer.forward`).
//!
//! ```text
//! r    = x + multiplier * delta
//! rstd = 1 / sqrt(mean(r²) + eps)
//! y    = w * r * rstd
//! dr   = dresidual + rstd * (w * dy - r * rstd² * mean(w * dy * r))
//! ```

use super::cpu::{self, Fma, PART, Real, Stored, View, with_real, with_stored};
use super::gpu::{self, Kernel, Route};
use super::profile;
use crate::{Error, Result};
use candle_core::{D, DType, Tensor};
use rayon::prelude::*;

gpu::parameters!(RmsNormParameters {
    rows: u32,
    width: u32,
    eps: f32,
    multiplier: f32,
    add: u32,
    aligned: u32,
});

/// Gain `[C]` and epsilon of one norm.
#[derive(Debug, Clone)]
pub struct RmsNorm {
    /// Gain `[C]`, in the dtype of the activations.
    pub weight: Tensor,
    /// Added to the mean square.
    pub eps: f64,
}

/// What a block adds to the residual stream, and its multiplier.
#[derive(Clone, Copy)]
pub struct Add<'a> {
    /// [T, C].
    pub delta: &'a Tensor,
    /// Granite's `residual_multiplier`.
    pub multiplier: f64,
}

/// Result of [`RmsNorm::forward`].
pub struct Normed {
    /// The residual stream `r` [T, C].
    pub residual: Tensor,
    /// `y` [T, C].
    pub normed: Tensor,
    /// Reciprocal RMS of each row `[T]`.
    pub rstd: Tensor,
}

impl RmsNorm {
    /// Adds to the residual stream `x` [T, C] and norms the sum; what is normed comes in dtype `out`: that of `x`, or
    /// on the CPU bf16 of f32.
    ///
    /// # Errors
    /// Shapes that do not fit; another `out`.
    pub fn forward(&self, x: &Tensor, add: Option<Add>, out: DType) -> Result<Normed> {
        let _timed = profile::scope("rms_norm", x.device());
        let (t, c) = x.dims2()?;
        if self.weight.dims() != [c] || add.is_some_and(|a| a.delta.dims() != [t, c]) {
            return Err(Error::Shape {
                op: "rms_norm",
                expected: format!("a gain of [{c}] and a delta of [{t}, {c}]"),
                found: format!("{:?} and {:?}", self.weight.dims(), add.map(|a| a.delta.dims())),
            });
        }
        if gpu::route(x) != Route::Cpu {
            cpu::same_dtype("rms_norm", x, out)?;
        }
        match gpu::route(x) {
            Route::Cpu => {
                with_stored!("rms_norm", x.dtype(), out, T, O => self.forward_cpu::<T, O>(x, add, t, c))
            }
            Route::Kernel => self.forward_kernel(x, add, t, c),
            Route::Reference => self.reference(x, add),
        }
    }

    /// Gradient of the residual stream [T, C]: what came through the norm (`dy`), and what went past it
    /// (`dresidual`).
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn backward(
        &self,
        dy: &Tensor,
        residual: &Tensor,
        rstd: &Tensor,
        past: Option<&Tensor>,
    ) -> Result<Tensor> {
        let _timed = profile::scope("rms_norm backward", residual.device());
        let (t, c) = residual.dims2()?;
        if dy.dims() != [t, c] || rstd.dims() != [t] || past.is_some_and(|d| d.dims() != [t, c]) {
            return Err(Error::Shape {
                op: "rms_norm backward",
                expected: format!("gradients of [{t}, {c}], rstd of [{t}]"),
                found: format!("{:?}, {:?}, rstd {:?}", dy.dims(), past.map(Tensor::dims), rstd.dims()),
            });
        }
        if gpu::route(dy) == Route::Kernel {
            return self.backward_kernel(dy, residual, rstd, past);
        }
        if !dy.device().is_cpu() {
            let through =
                super::autograd(&[residual], dy, |v| Ok(self.reference(v[0].as_tensor(), None)?.normed))?;
            return Ok(past.map_or_else(|| Ok(through[0].clone()), |d| d + &through[0])?);
        }
        with_real!("rms_norm backward", dy.dtype(), T => self.backward_cpu::<T>(dy, residual, rstd, past))
    }

    /// The formula in plain candle ops; norms in f32 where the activations are narrower.
    pub fn reference(&self, x: &Tensor, add: Option<Add>) -> Result<Normed> {
        let residual = match add {
            Some(Add { delta, multiplier }) => (x + (delta * multiplier)?)?,
            None => x.clone(),
        };
        let wide = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let r = residual.to_dtype(wide)?;
        let rstd = (r.sqr()?.mean_keepdim(D::Minus1)? + self.eps)?.sqrt()?.recip()?;
        let normed =
            r.broadcast_mul(&rstd)?.to_dtype(x.dtype())?.broadcast_mul(&self.weight.to_dtype(x.dtype())?)?;
        Ok(Normed { residual, normed, rstd: rstd.squeeze(D::Minus1)? })
    }

    fn parameters(
        &self,
        x: &Tensor,
        multiplier: Option<f64>,
        tensors: &[&Tensor],
    ) -> Result<RmsNormParameters> {
        let (rows, width) = x.dims2()?;
        Ok(RmsNormParameters {
            rows: gpu::uint(rows),
            width: gpu::uint(width),
            eps: self.eps as f32,
            multiplier: multiplier.unwrap_or(1.0) as f32,
            add: u32::from(multiplier.is_some()),
            aligned: gpu::aligned(&[width], tensors),
        })
    }

    fn forward_kernel(&self, x: &Tensor, add: Option<Add>, t: usize, c: usize) -> Result<Normed> {
        let (delta, residual) = match add {
            Some(Add { delta, .. }) => (delta, gpu::empty((t, c), x.dtype(), x)?),
            None => (x, x.clone()),
        };
        let (normed, rstd) = (gpu::empty((t, c), x.dtype(), x)?, gpu::empty(t, DType::F32, x)?);
        let parameters = self.parameters(x, add.map(|a| a.multiplier), &[x, delta, &self.weight])?;
        // Without a delta the kernel writes no residual stream: any buffer does.
        let out = if add.is_some() { &residual } else { &normed };
        let kernel = Kernel::new("rms_norm", "rms_norm_forward", t, row_threads(c));
        gpu::launch(&kernel, x.dtype(), &[x, delta, &self.weight, out, &normed, &rstd], &parameters)?;
        Ok(Normed { residual, normed, rstd })
    }

    fn backward_kernel(
        &self,
        dy: &Tensor,
        r: &Tensor,
        rstd: &Tensor,
        past: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (t, c) = r.dims2()?;
        let dx = gpu::empty((t, c), dy.dtype(), dy)?;
        let past_or_any = past.unwrap_or(dy);
        let parameters = self.parameters(dy, past.map(|_| 1.0), &[dy, r, &self.weight, past_or_any])?;
        let kernel = Kernel::new("rms_norm", "rms_norm_backward", t, row_threads(c));
        gpu::launch(&kernel, dy.dtype(), &[dy, r, rstd, &self.weight, past_or_any, &dx], &parameters)?;
        Ok(dx)
    }

    fn forward_cpu<T: Real, O: Stored<T>>(
        &self,
        x: &Tensor,
        add: Option<Add>,
        t: usize,
        c: usize,
    ) -> Result<Normed> {
        let delta = add.map(|a| View::<T>::new("rms_norm", a.delta)).transpose()?;
        let (delta, m) = (delta.as_deref(), T::of(add.map_or(0.0, |a| a.multiplier)));
        let (xs, w) = (View::<T>::new("rms_norm", x)?, View::<T>::new("rms_norm", &self.weight)?);
        let (xs, w): (&[T], &[T]) = (&xs, &w);
        let (mut residual, mut rstd) = (Vec::new(), Vec::new());
        let normed = cpu::overwrite::<O>(t * c, |normed| {
            let mut fill = |residual: &mut [T]| {
                rstd = cpu::overwrite::<T>(t, |rstd| {
                    let rows = cpu::rows_per_task(c);
                    let chunks = normed.par_chunks_mut(rows * c).zip(rstd.par_chunks_mut(rows)).enumerate();
                    // Without a delta the residual stream is the input itself, and nothing is copied.
                    if let Some(delta) = delta {
                        chunks.zip(residual.par_chunks_mut(rows * c)).for_each(|((i, (y, s)), r)| {
                            let at = i * rows * c;
                            cpu::simd(
                                #[inline(always)]
                                |fma| {
                                    for ((r, &x), &d) in r.iter_mut().zip(&xs[at..]).zip(&delta[at..]) {
                                        *r = fma.mul_add(m, d, x);
                                    }
                                    norm_rows(y, s, r, w, (T::of(self.eps), fma));
                                },
                            );
                        });
                    } else {
                        chunks.for_each(|(i, (y, s))| {
                            cpu::simd(
                                #[inline(always)]
                                |fma| norm_rows(y, s, &xs[i * rows * c..], w, (T::of(self.eps), fma)),
                            );
                        });
                    }
                });
            };
            match delta {
                Some(_) => residual = cpu::overwrite::<T>(t * c, fill),
                None => fill(&mut []),
            }
        });
        let residual = if add.is_some() { cpu::tensor(residual, (t, c))? } else { x.clone() };
        Ok(Normed { residual, normed: cpu::tensor(normed, (t, c))?, rstd: cpu::tensor(rstd, t)? })
    }

    fn backward_cpu<T: Real>(
        &self,
        dy: &Tensor,
        r: &Tensor,
        rstd: &Tensor,
        past: Option<&Tensor>,
    ) -> Result<Tensor> {
        const OP: &str = "rms_norm backward";
        let (t, c) = r.dims2()?;
        let past = past.map(|d| View::<T>::new(OP, d)).transpose()?;
        let past = past.as_deref();
        let (dy, r) = (View::<T>::new(OP, dy)?, View::<T>::new(OP, r)?);
        let (rstd, w) = (View::<T>::new(OP, rstd)?, View::<T>::new(OP, &self.weight)?);
        let (dy, r, rstd, w): (&[T], &[T], &[T], &[T]) = (&dy, &r, &rstd, &w);
        let inverse = T::one() / T::of(c as f64);
        let out = cpu::overwrite::<T>(t * c, |out| {
            cpu::par_rows(
                out,
                c,
                #[inline(always)]
                |first, rows, fma| {
                    for (i, row) in rows.chunks_exact_mut(c).enumerate() {
                        let at = (first + i) * c;
                        let (dy, r, s) = (&dy[at..at + c], &r[at..at + c], rstd[first + i]);
                        row.iter_mut().zip(w.iter().zip(dy)).for_each(|(y, (&w, &dy))| *y = w * dy);
                        let k = s * s * s * cpu::dot(row, r, fma) * inverse;
                        match past {
                            Some(past) => {
                                let past = &past[at..at + c];
                                for ((y, &r), &past) in row.iter_mut().zip(r).zip(past) {
                                    *y = fma.mul_add(-k, r, fma.mul_add(s, *y, past));
                                }
                            }
                            None => row.iter_mut().zip(r).for_each(|(y, &r)| *y = fma.mul_add(-k, r, s * *y)),
                        }
                    }
                },
            );
        });
        cpu::tensor(out, (t, c))
    }
}

/// Threads that work on a row: each keeps 16 elements of it in registers, and reads what is beyond 6,144 again.
fn row_threads(width: usize) -> usize {
    width.div_ceil(16).next_multiple_of(32).min(384)
}

#[inline(always)]
fn norm_rows<T: Real, O: Stored<T>>(y: &mut [O], rstd: &mut [T], r: &[T], w: &[T], (eps, fma): (T, Fma)) {
    let (c, mut scratch) = (w.len(), [T::zero(); PART]);
    for ((y, s), r) in y.chunks_exact_mut(c).zip(rstd).zip(r.chunks_exact(c)) {
        let square = cpu::dot(r, r, fma);
        *s = (square / T::of(c as f64) + eps).sqrt().recip();
        let s = *s;
        O::fill(
            y,
            &mut scratch,
            #[inline(always)]
            |part, y: &mut [T]| {
                for ((y, &w), &r) in y.iter_mut().zip(&w[part.clone()]).zip(&r[part]) {
                    *y = w * r * s;
                }
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{autograd, testing::*};

    #[test]
    fn forward_and_backward_agree_with_the_reference() -> Result<()> {
        for (t, c) in [(1, 1), (5, 123), (123, 40), (64, 576)] {
            for dtype in [DType::F32, DType::F64] {
                let norm = RmsNorm { weight: randn(1, c, dtype)?, eps: 1e-5 };
                let (x, delta) = (randn(2, (t, c), dtype)?, randn(3, (t, c), dtype)?);
                for add in [None, Some(Add { delta: &delta, multiplier: 0.22 })] {
                    let (ours, expected) = (norm.forward(&x, add, dtype)?, norm.reference(&x, add)?);
                    let tolerance = Tolerance::of(dtype);
                    assert_close("residual", &ours.residual, &expected.residual, tolerance);
                    assert_close("normed", &ours.normed, &expected.normed, tolerance);
                    assert_close("rstd", &ours.rstd, &expected.rstd, tolerance);
                    let (dy, past) = (randn(4, (t, c), dtype)?, randn(5, (t, c), dtype)?);
                    let through = autograd(&[&ours.residual], &dy, |v| {
                        Ok(norm.reference(v[0].as_tensor(), None)?.normed)
                    })?;
                    let dr = norm.backward(&dy, &ours.residual, &ours.rstd, None)?;
                    assert_close("backward", &dr, &through[0], tolerance);
                    let dr = norm.backward(&dy, &ours.residual, &ours.rstd, Some(&past))?;
                    assert_close("backward with the residual's", &dr, &(&through[0] + &past)?, tolerance);
                    assert!(max_abs(&dr)? > 0.0);
                }
            }
        }
        Ok(())
    }

    #[test]
    fn an_output_in_bf16_is_the_other_rounded() -> Result<()> {
        let norm = RmsNorm { weight: randn(1, 45, DType::F32)?, eps: 1e-5 };
        let x = randn(2, (7, 45), DType::F32)?;
        let add = Some(Add { delta: &x, multiplier: 0.22 });
        let (wide, narrow) = (norm.forward(&x, add, DType::F32)?, norm.forward(&x, add, DType::BF16)?);
        assert_close("residual", &narrow.residual, &wide.residual, Tolerance::F32);
        let rounded = wide.normed.to_dtype(DType::BF16)?.to_vec2::<half::bf16>()?;
        assert_eq!(narrow.normed.to_vec2::<half::bf16>()?, rounded);
        assert!(norm.forward(&x, add, DType::F64).is_err());
        Ok(())
    }

    #[test]
    fn a_gain_of_another_width_is_an_error() -> Result<()> {
        let norm = RmsNorm { weight: randn(1, 5, DType::F32)?, eps: 1e-5 };
        assert!(norm.forward(&randn(2, (3, 4), DType::F32)?, None, DType::F32).is_err());
        Ok(())
    }
}
