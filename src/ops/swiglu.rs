//! SwiGLU (Shazeer, 2020, arXiv:2002.05202; transformers `modeling_granite.py`, `GraniteMLP`), on gate and
//! up side by side in one matrix:
//!
//! ```text
//! a     = silu(gate) * up                   silu(g) = g * sigmoid(g)
//! dgate = da * up * sigmoid(g) * (1 + g * (1 - sigmoid(g)))
//! dup   = da * silu(g)
//! ```

use super::cpu::{self, Real, Stored, View, with_stored};
use super::gpu::{self, Kernel, Route};
use super::profile;
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use num_traits::One;
use rayon::prelude::*;

/// Most threads of a block; each makes 8 elements of a row of the activation.
const THREADS: usize = 256;

gpu::parameters!(SwigluParameters { rows: u32, width: u32, aligned: u32 });

/// `silu(gate) * up` [T, F] of `gate_up` [T, 2F], in dtype `out`: that of `gate_up`, or on the CPU bf16 of f32.
///
/// # Errors
/// An odd number of columns; another `out`.
pub fn forward(gate_up: &Tensor, out: DType) -> Result<Tensor> {
    let _timed = profile::scope("swiglu", gate_up.device());
    let (t, f) = half(gate_up)?;
    if gpu::route(gate_up) != Route::Cpu {
        cpu::same_dtype("swiglu", gate_up, out)?;
    }
    match gpu::route(gate_up) {
        Route::Cpu => {}
        Route::Kernel => {
            let a = gpu::empty((t, f), gate_up.dtype(), gate_up)?;
            launch("swiglu_forward", t, f, &[gate_up, &a])?;
            return Ok(a);
        }
        Route::Reference => return reference(gate_up),
    }
    with_stored!("swiglu", gate_up.dtype(), out, T, O => {
        let x = View::<T>::new("swiglu", gate_up)?;
        let x: &[T] = &x;
        let out = cpu::overwrite::<O>(t * f, |out| {
            cpu::par_rows(out, f, #[inline(always)] |first, rows| {
                let x = x[first * 2 * f..].chunks_exact(2 * f);
                rows.chunks_exact_mut(f).zip(x).for_each(|(row, x)| activate(x, row));
            });
        });
        cpu::tensor(out, (t, f))
    })
}

/// As [`forward`], and `gate_up` in dtype `out` for [`backward`], in one pass.
///
/// # Errors
/// As [`forward`].
pub fn forward_kept(gate_up: Tensor, out: DType) -> Result<(Tensor, Tensor)> {
    if gate_up.dtype() == out {
        return Ok((forward(&gate_up, out)?, gate_up));
    }
    let _timed = profile::scope("swiglu", gate_up.device());
    let (t, f) = half(&gate_up)?;
    if gpu::route(&gate_up) != Route::Cpu {
        cpu::same_dtype("swiglu", &gate_up, out)?;
    }
    with_stored!("swiglu", gate_up.dtype(), out, T, O => {
        let x = View::<T>::new("swiglu", &gate_up)?;
        let (x, rows): (&[T], _) = (&x, cpu::rows_per_task(f));
        let mut kept = Vec::new();
        let a = cpu::overwrite::<O>(t * f, |a| {
            kept = cpu::overwrite::<O>(t * 2 * f, |kept| {
                let to = a.par_chunks_mut(rows * f.max(1)).zip(kept.par_chunks_mut(rows * 2 * f.max(1)));
                to.zip(x.par_chunks(rows * 2 * f.max(1))).for_each(|((a, kept), x)| cpu::simd(
                    #[inline(always)]
                    || {
                        let to = a.chunks_exact_mut(f).zip(kept.chunks_exact_mut(2 * f));
                        for ((a, kept), x) in to.zip(x.chunks_exact(2 * f)) {
                            activate(x, a);
                            kept.iter_mut().zip(x).for_each(|(y, &x)| *y = O::stored(x));
                        }
                    },
                ));
            });
        });
        Ok((cpu::tensor(a, (t, f))?, cpu::tensor(kept, (t, 2 * f))?))
    })
}

/// `silu(gate) * up` of one row.
#[inline(always)]
fn activate<T: Real, O: Stored<T>>(gate_up: &[T], a: &mut [O]) {
    let (gate, up) = gate_up.split_at(a.len());
    for ((y, &g), &u) in a.iter_mut().zip(gate).zip(up) {
        *y = O::stored(g * sigmoid(g) * u);
    }
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
            cpu::par_rows(out, 2 * f, #[inline(always)] |first, rows| {
                let (da, x) = (&da[first * f..], &x[first * 2 * f..]);
                for ((row, da), x) in rows.chunks_exact_mut(2 * f).zip(da.chunks_exact(f)).zip(x.chunks_exact(2 * f)) {
                    let ((gate, up), (dgate, dup)) = (x.split_at(f), row.split_at_mut(f));
                    for j in 0..f {
                        let (g, u, d) = (gate[j].loaded(), up[j].loaded(), da[j]);
                        let s = sigmoid(g);
                        dgate[j] = O::stored(d * u * s * (T::one() + g * (T::one() - s)));
                        dup[j] = O::stored(d * g * s);
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
fn sigmoid<T: Real>(x: T) -> T {
    T::one() / (T::one() + (-x).exp_())
}

fn launch(name: &'static str, rows: usize, width: usize, buffers: &[&Tensor]) -> Result<()> {
    let aligned = gpu::aligned(&[width], buffers);
    let parameters = SwigluParameters { rows: gpu::uint(rows), width: gpu::uint(width), aligned };
    let threads = width.div_ceil(8).next_multiple_of(32).min(THREADS);
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
                assert_close("swiglu", &forward(&x, dtype)?, &reference(&x)?, Tolerance::of(dtype));
                let dx = autograd(&[&x], &da, |v| reference(v[0].as_tensor()))?;
                let ours = backward(&da, &x)?;
                assert_close("swiglu backward", &ours, &dx[0], Tolerance::of(dtype));
                assert!(max_abs(&ours)? > 0.0);
            }
        }
        Ok(())
    }

    #[test]
    fn an_output_in_bf16_is_the_other_rounded() -> Result<()> {
        let values = |t: &Tensor| t.to_dtype(DType::BF16)?.flatten_all()?.to_vec1::<half::bf16>();
        for (t, f) in [(7, 45), (300, 100), (0, 5)] {
            let (x, da) = (randn(1, (t, 2 * f), DType::F32)?, randn(2, (t, f), DType::F32)?);
            let (a, kept) = forward_kept(x.clone(), DType::BF16)?;
            let seen = kept.to_dtype(DType::F32)?;
            for (wide, narrow) in [
                (&forward(&x, DType::F32)?, &a),
                (&a, &forward(&x, DType::BF16)?),
                (&x, &kept),
                (&backward(&da, &seen)?, &backward(&da, &kept)?),
            ] {
                assert_eq!((values(narrow)?, narrow.dtype()), (values(wide)?, DType::BF16));
            }
            let (a, kept) = forward_kept(x.clone(), DType::F32)?;
            assert_eq!((a.dtype(), kept.dtype()), (DType::F32, DType::F32));
            assert!(forward(&x, DType::F64).is_err() && forward_kept(x, DType::F64).is_err());
        }
        Ok(())
    }

    #[test]
    fn far_gates_stay_finite() -> Result<()> {
        let x = Tensor::new(&[[-1e4f32, 1e4, 2.0, 3.0]], &candle_core::Device::Cpu)?;
        let expected = Tensor::new(&[[0f32, 3e4]], &candle_core::Device::Cpu)?;
        assert_close("far gates", &forward(&x, DType::F32)?, &expected, Tolerance::F32);
        Ok(())
    }
}
