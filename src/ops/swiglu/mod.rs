//! SwiGLU (Shazeer, 2020, arXiv:2002.05202; transformers `modeling_granite.py`, `GraniteMLP`), on gate and
//! up side by side in one matrix:
//!
//! ```text
//! a     = silu(gate) * up                   silu(g) = g * sigmoid(g)
//! dgate = da * up * sigmoid(g) * (1 + g * (1 - sigmoid(g)))
//! dup   = da * silu(g)
//! ```

use super::cpu::{self, Fma, PART, Real, Stored, View, with_stored};
use super::gpu::{self, Kernel, Route};
use super::profile;
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use num_traits::Zero;

gpu::parameters!(SwigluParameters { rows: u32, width: u32, aligned: u32 });

/// `silu(gate) * up` [T, F] of `gate_up` [T, 2F], in its dtype; on the CPU computed in f32 where that is bf16.
///
/// # Errors
/// An odd number of columns.
pub fn forward(gate_up: &Tensor) -> Result<Tensor> {
    let _timed = profile::scope("swiglu", gate_up.device());
    let (t, f) = half(gate_up)?;
    match gpu::route(gate_up) {
        Route::Cpu => {}
        Route::Kernel => {
            let a = gpu::empty((t, f), gate_up.dtype(), gate_up)?;
            launch("swiglu_forward", t, f, &[gate_up, &a])?;
            return Ok(a);
        }
        Route::Reference => return reference(gate_up),
    }
    let dtype = gate_up.dtype();
    let computed = if dtype == DType::BF16 { DType::F32 } else { dtype };
    with_stored!("swiglu", computed, dtype, T, O => {
        let x = View::<O>::new("swiglu", gate_up)?;
        let x: &[O] = &x;
        let out = cpu::overwrite::<O>(t * f, |out| {
            cpu::par_rows(out, f, #[inline(always)] |first, rows, fma| {
                let mut scratch = [T::zero(); PART];
                for (row, x) in rows.chunks_exact_mut(f).zip(x[first * 2 * f..].chunks_exact(2 * f)) {
                    let (gate, up) = x.split_at(f);
                    O::fill(row, &mut scratch, #[inline(always)] |part, row: &mut [T]| {
                        for ((y, &g), &u) in row.iter_mut().zip(&gate[part.clone()]).zip(&up[part]) {
                            let (g, u): (T, T) = (g.loaded(), u.loaded());
                            *y = g * sigmoid(g, fma) * u;
                        }
                    });
                }
            });
        });
        cpu::tensor(out, (t, f))
    })
}

/// Gradient of `gate_up` [T, 2F] from `da` [T, F], in the dtype of `gate_up`: that of `da`, or on the CPU bf16 of f32.
///
/// # Errors
/// Shapes that do not fit; other dtypes.
pub fn backward(da: &Tensor, gate_up: &Tensor) -> Result<Tensor> {
    let _timed = profile::scope("swiglu backward", gate_up.device());
    let (t, f) = half(gate_up)?;
    if da.dims() != [t, f] {
        return Err(Error::Shape {
            op: "swiglu backward",
            expected: format!("a gradient of [{t}, {f}]"),
            found: format!("{:?}", da.dims()),
        });
    }
    if gpu::route(da) != Route::Cpu {
        cpu::same_dtype("swiglu backward", da, gate_up.dtype())?;
    }
    if gpu::route(da) == Route::Kernel {
        let dgate_up = gpu::empty((t, 2 * f), da.dtype(), da)?;
        launch("swiglu_backward", t, f, &[da, gate_up, &dgate_up])?;
        return Ok(dgate_up);
    }
    if !da.device().is_cpu() {
        return Ok(super::autograd(&[gate_up], da, |v| reference(v[0].as_tensor()))?.remove(0));
    }
    with_stored!("swiglu backward", da.dtype(), gate_up.dtype(), T, O => {
        let (da, x) = (View::<T>::new("swiglu backward", da)?, View::<O>::new("swiglu backward", gate_up)?);
        let (da, x): (&[T], &[O]) = (&da, &x);
        let out = cpu::overwrite::<O>(t * 2 * f, |out| {
            cpu::par_rows(out, 2 * f, #[inline(always)] |first, rows, fma| {
                let mut scratch = [[T::zero(); PART]; 2];
                let (da, x) = (&da[first * f..], &x[first * 2 * f..]);
                for ((row, da), x) in rows.chunks_exact_mut(2 * f).zip(da.chunks_exact(f)).zip(x.chunks_exact(2 * f)) {
                    let ((gate, up), (dgate, dup)) = (x.split_at(f), row.split_at_mut(f));
                    let parts = dgate.chunks_mut(PART).zip(dup.chunks_mut(PART));
                    let read = da.chunks(PART).zip(gate.chunks(PART)).zip(up.chunks(PART));
                    for ((dgate, dup), ((da, gate), up)) in parts.zip(read) {
                        let part = Part { da, gate, up, scratch: &mut scratch };
                        part.backward([dgate, dup], fma);
                    }
                }
            });
        });
        cpu::tensor(out, (t, 2 * f))
    })
}

/// The formula in plain candle ops.
pub fn reference(gate_up: &Tensor) -> Result<Tensor> {
    let (_, f) = half(gate_up)?;
    Ok((gate_up.narrow(1, 0, f)?.contiguous()?.silu()? * gate_up.narrow(1, f, f)?)?)
}

#[inline(always)]
fn sigmoid<T: Real>(x: T, fma: Fma) -> T {
    T::one() / (T::one() + (-x).exp_(fma))
}

/// Up to [`PART`] gates and ups, the gradients of their activations, and room for their own.
struct Part<'a, T, O> {
    da: &'a [T],
    gate: &'a [O],
    up: &'a [O],
    scratch: &'a mut [[T; PART]; 2],
}

impl<T: Real, O: Stored<T>> Part<'_, T, O> {
    /// Writes the gradients of both, from one sigmoid.
    #[inline(always)]
    fn backward(self, [gate_out, up_out]: [&mut [O]; 2], fma: Fma) {
        let [dgate, dup] = self.scratch;
        let (dgate, dup) = (&mut dgate[..self.da.len()], &mut dup[..self.da.len()]);
        let read = self.da.iter().zip(self.gate).zip(self.up);
        for ((x, y), ((&d, &g), &u)) in dgate.iter_mut().zip(dup.iter_mut()).zip(read) {
            let (g, u): (T, T) = (g.loaded(), u.loaded());
            let s = sigmoid(g, fma);
            *x = d * u * s * fma.mul_add(g, T::one() - s, T::one());
            *y = d * g * s;
        }
        O::store_slice(dgate, gate_out);
        O::store_slice(dup, up_out);
    }
}

fn launch(name: &'static str, rows: usize, width: usize, buffers: &[&Tensor]) -> Result<()> {
    let aligned = gpu::aligned(&[width], buffers);
    let parameters = SwigluParameters { rows: gpu::uint(rows), width: gpu::uint(width), aligned };
    // Each thread makes 8 elements of a row of the activation.
    let threads = gpu::balanced_threads(width.div_ceil(8));
    let mut kernel = Kernel::new("swiglu", name, rows, threads);
    kernel.grid[1] = width.div_ceil(8 * threads);
    gpu::launch(&kernel, buffers[0].dtype(), buffers, &parameters)
}

fn half(gate_up: &Tensor) -> Result<(usize, usize)> {
    match gate_up.dims() {
        [t, width] if width % 2 == 0 => Ok((*t, width / 2)),
        found => Err(Error::Shape {
            op: "swiglu",
            expected: "gate and up side by side, [T, 2F]".into(),
            found: format!("{found:?}"),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{autograd, testing::*};

    #[test]
    fn forward_and_backward_agree_with_the_reference() -> Result<()> {
        for (t, f) in [(1, 1), (5, 123), (123, 56)] {
            for dtype in [DType::F32, DType::F64] {
                let x = (randn(1, (t, 2 * f), dtype)? * 4.0)?;
                let da = randn(2, (t, f), dtype)?;
                assert_close("swiglu", &forward(&x)?, &reference(&x)?, Tolerance::of(dtype));
                let dx = autograd(&[&x], &da, |v| reference(v[0].as_tensor()))?;
                let ours = backward(&da, &x)?;
                assert_close("swiglu backward", &ours, &dx[0], Tolerance::of(dtype));
                assert!(max_abs(&ours)? > 0.0);
            }
        }
        Ok(())
    }

    #[test]
    fn of_bf16_it_is_that_of_f32_rounded() -> Result<()> {
        let values = |t: &Tensor| t.to_dtype(DType::BF16)?.flatten_all()?.to_vec1::<half::bf16>();
        for (t, f) in [(7, 45), (300, 100), (0, 5)] {
            let narrow = randn(1, (t, 2 * f), DType::F32)?.to_dtype(DType::BF16)?;
            let (wide, da) = (narrow.to_dtype(DType::F32)?, randn(2, (t, f), DType::F32)?);
            for (wide, narrow) in
                [(forward(&wide)?, forward(&narrow)?), (backward(&da, &wide)?, backward(&da, &narrow)?)]
            {
                assert_eq!((values(&narrow)?, narrow.dtype()), (values(&wide)?, DType::BF16));
            }
        }
        Ok(())
    }

    #[test]
    fn far_gates_stay_finite() -> Result<()> {
        let x = Tensor::new(&[[-1e4f32, 1e4, 2.0, 3.0]], &candle_core::Device::Cpu)?;
        let expected = Tensor::new(&[[0f32, 3e4]], &candle_core::Device::Cpu)?;
        assert_close("far gates", &forward(&x)?, &expected, Tolerance::F32);
        Ok(())
    }
}
