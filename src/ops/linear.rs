//! A frozen linear layer: `y = x Wᵀ + b`, and `dx = scale * dy W`. No weight gradient exists.
//!
//! On the CPU a weight may be held in f16 or bf16 to save memory; it is widened to f32 block by block
//! as the product goes, and activations are f32 all the same.

use super::cpu::{self, Disjoint, Mat, Real, View, with_real};
use super::gpu::{self, Route};
use super::profile;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use std::ops::Range;

/// Output features of a half-precision weight that are widened at a time: 128 rows of 2,048 are 1 MB of
/// f32, which stays in the second-level cache of one core.
const WIDENED_ROWS: usize = 128;

/// Weight [out, in] and bias `[out]` of a frozen layer; several layers over one input are stacked in `out`.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    /// From a weight [out, in] and a bias `[out]`.
    ///
    /// # Errors
    /// A bias that does not fit the weight.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        let (n, _) = weight.dims2()?;
        if let Some(bias) = &bias
            && bias.dims() != [n]
        {
            return Err(Error::Shape {
                op: "linear",
                expected: format!("a bias of [{n}]"),
                found: format!("{:?}", bias.dims()),
            });
        }
        Ok(Self { weight: weight.contiguous()?, bias })
    }

    /// The layer that makes only the output features of `range`.
    pub fn rows(&self, range: Range<usize>) -> Result<Self> {
        let bias = self.bias.as_ref().map(|b| b.narrow(0, range.start, range.len())).transpose()?;
        Ok(Self { weight: self.weight.narrow(0, range.start, range.len())?, bias })
    }

    /// The layer with its weight and its bias in other dtypes on another device.
    pub(crate) fn on(&self, weight: DType, bias: DType, device: &Device) -> Result<Self> {
        let moved = |t: &Tensor, dtype| t.to_dtype(dtype)?.to_device(device);
        Self::new(moved(&self.weight, weight)?, self.bias.as_ref().map(|b| moved(b, bias)).transpose()?)
    }

    /// Output and input features.
    pub fn dims(&self) -> Result<(usize, usize)> {
        Ok(self.weight.dims2()?)
    }

    /// The weight [out, in].
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// Bytes that weight and bias take.
    pub fn bytes(&self) -> usize {
        let of = |t: &Tensor| t.elem_count() * t.dtype().size_in_bytes();
        of(&self.weight) + self.bias.as_ref().map_or(0, of)
    }

    /// `x Wᵀ + b` of `x` [T, in]: [T, out] in `x`'s dtype.
    ///
    /// # Errors
    /// A width that is not the layer's, or a dtype that the device's kernels do not know.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let _timed = profile::scope("linear", x.device());
        let (n, k) = self.dims()?;
        self.check("linear", x, k)?;
        match gpu::route(x) {
            Route::Cpu => with_real!("linear", x.dtype(), T => self.forward_cpu::<T>(x, n, k)),
            Route::Kernel => {
                let y = gpu::matmul(x, &self.weight, true, 1.0)?;
                Ok(match &self.bias {
                    Some(bias) if y.dims()[0] > 0 => y.broadcast_add(bias)?,
                    _ => y,
                })
            }
            Route::Reference => self.reference(x),
        }
    }

    /// `scale * dy W` of `dy` [T, out]: the gradient of the input, [T, in].
    ///
    /// # Errors
    /// As [`Linear::forward`].
    pub fn backward(&self, dy: &Tensor, scale: f64) -> Result<Tensor> {
        let _timed = profile::scope("linear backward", dy.device());
        let (n, k) = self.dims()?;
        self.check("linear backward", dy, n)?;
        match gpu::route(dy) {
            Route::Cpu => {
                with_real!("linear backward", dy.dtype(), T => self.backward_cpu::<T>(dy, scale, n, k))
            }
            Route::Kernel => gpu::matmul(dy, &self.weight, false, scale),
            Route::Reference => Ok((dy.matmul(&self.weight.to_dtype(dy.dtype())?)? * scale)?),
        }
    }

    /// The formula in plain candle ops.
    pub fn reference(&self, x: &Tensor) -> Result<Tensor> {
        let y = x.matmul(&self.weight.to_dtype(x.dtype())?.t()?)?;
        Ok(match &self.bias {
            Some(bias) => y.broadcast_add(&bias.to_dtype(x.dtype())?)?,
            None => y,
        })
    }

    fn check(&self, op: &'static str, x: &Tensor, width: usize) -> Result<()> {
        match x.dims() {
            [_, found] if *found == width => Ok(()),
            found => Err(Error::Shape { op, expected: format!("[T, {width}]"), found: format!("{found:?}") }),
        }
    }

    fn forward_cpu<T: Real>(&self, x: &Tensor, n: usize, k: usize) -> Result<Tensor> {
        let m = x.dims()[0];
        let x = View::<T>::new("linear", x)?;
        let bias = self.bias.as_ref().map(|b| b.to_dtype(T::DTYPE)).transpose()?;
        let bias = bias.as_ref().map(|b| View::<T>::new("linear", b)).transpose()?;
        let weight = Weight::<T>::new(&self.weight)?;
        let out = cpu::overwrite::<T>(m * n, |out| {
            if let Some(bias) = &bias {
                cpu::par_rows(out, n, |_, rows| {
                    rows.chunks_exact_mut(n).for_each(|row| row.copy_from_slice(bias))
                });
            }
            let (add, x, y): (_, &[T], _) = (bias.is_some(), &x, Disjoint(out.as_mut_ptr()));
            let product = |block: Range<usize>, w: *const T, parallel| {
                // SAFETY: the views live, their sizes were checked, and blocks are disjoint columns of `out`.
                unsafe {
                    let y = Mat::rows(y.at(block.start), n);
                    let x = Mat::rows(x.as_ptr(), k);
                    cpu::gemm((m, block.len(), k), y, add, x, Mat::rows(w, k).t(), T::one(), parallel);
                }
            };
            match &weight {
                Weight::Plain(w) => product(0..n, w.as_ptr(), true),
                Weight::Half(w) => (0..n.div_ceil(WIDENED_ROWS)).into_par_iter().for_each(|i| {
                    let block = i * WIDENED_ROWS..((i + 1) * WIDENED_ROWS).min(n);
                    product(block.clone(), w.widen::<T>(block.start * k..block.end * k).as_ptr(), false);
                }),
            }
        });
        cpu::tensor(out, (m, n))
    }

    fn backward_cpu<T: Real>(&self, dy: &Tensor, scale: f64, n: usize, k: usize) -> Result<Tensor> {
        let m = dy.dims()[0];
        let dy = View::<T>::new("linear backward", dy)?;
        let (scale, dy) = (T::of(scale), Mat::rows(dy.as_ptr(), n));
        let out = match &Weight::<T>::new(&self.weight)? {
            Weight::Plain(w) => cpu::overwrite::<T>(m * k, |out| {
                // SAFETY: the views live and their sizes were checked.
                unsafe {
                    let (dx, w) = (Mat::rows(out.as_mut_ptr(), k), Mat::rows(w.as_ptr(), k));
                    cpu::gemm((m, k, n), dx, false, dy, w, scale, true);
                }
            }),
            Weight::Half(w) => {
                let mut out = vec![T::zero(); m * k];
                for start in (0..n).step_by(4 * WIDENED_ROWS) {
                    let block = start..(start + 4 * WIDENED_ROWS).min(n);
                    let wide = w.widen_parallel::<T>(block.start * k..block.end * k);
                    // SAFETY: as above; `block` are columns of dy.
                    unsafe {
                        let dy = Mat { ptr: dy.ptr.add(block.start), ..dy };
                        let (dx, w) = (Mat::rows(out.as_mut_ptr(), k), Mat::rows(wide.as_ptr(), k));
                        cpu::gemm((m, k, block.len()), dx, true, dy, w, scale, true);
                    }
                }
                out
            }
        };
        cpu::tensor(out, (m, k))
    }
}

/// A weight as the product reads it.
enum Weight<'a, T> {
    Plain(View<'a, T>),
    Half(HalfWeight<'a>),
}

/// A weight in half precision.
enum HalfWeight<'a> {
    F16(View<'a, half::f16>),
    Bf16(View<'a, half::bf16>),
}

impl<'a, T: Real> Weight<'a, T> {
    fn new(weight: &'a Tensor) -> Result<Self> {
        Ok(match weight.dtype() {
            DType::F16 => Self::Half(HalfWeight::F16(View::new("linear", weight)?)),
            DType::BF16 => Self::Half(HalfWeight::Bf16(View::new("linear", weight)?)),
            _ => Self::Plain(View::new("linear", weight)?),
        })
    }
}

impl HalfWeight<'_> {
    fn widen<T: Real>(&self, range: Range<usize>) -> Vec<T> {
        cpu::overwrite::<T>(range.len(), |out| self.widen_into(range.start, out))
    }

    fn widen_parallel<T: Real>(&self, range: Range<usize>) -> Vec<T> {
        cpu::overwrite::<T>(range.len(), |out| {
            cpu::par_rows(out, 1024, |first, part| self.widen_into(range.start + first * 1024, part));
        })
    }

    fn widen_into<T: Real>(&self, start: usize, out: &mut [T]) {
        cpu::simd(|| match self {
            Self::F16(w) => out.iter_mut().zip(&w[start..]).for_each(|(y, x)| *y = T::of(x.to_f64())),
            Self::Bf16(w) => out.iter_mut().zip(&w[start..]).for_each(|(y, x)| *y = T::of(x.to_f64())),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{autograd, testing::*};

    #[test]
    fn forward_and_backward_agree_with_the_reference() -> Result<()> {
        for (t, n, k) in [(1, 1, 1), (5, 123, 31), (123, 300, 64), (7, 1, 129)] {
            for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
                let act = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
                for bias in [None, Some(randn(3, n, act)?)] {
                    let layer = Linear::new(randn(1, (n, k), act)?.to_dtype(dtype)?, bias)?;
                    let (x, dy) = (randn(2, (t, k), act)?, randn(4, (t, n), act)?);
                    assert_close("linear", &layer.forward(&x)?, &layer.reference(&x)?, Tolerance::of(act));
                    let expected = autograd(&[&x], &dy, |v| layer.reference(v[0].as_tensor()))?;
                    let dx = (layer.backward(&dy, 0.5)? * 2.0)?;
                    assert_close("linear backward", &dx, &expected[0], Tolerance::of(act));
                    assert!(max_abs(&dx)? > 0.0);
                }
            }
        }
        Ok(())
    }

    #[test]
    fn rows_make_a_part_of_the_output() -> Result<()> {
        let layer = Linear::new(randn(1, (10, 6), DType::F32)?, Some(randn(2, 10, DType::F32)?))?;
        let x = randn(3, (4, 6), DType::F32)?;
        let (part, whole) = (layer.rows(3..8)?.forward(&x)?, layer.forward(&x)?.narrow(1, 3, 5)?);
        assert_close("rows", &part, &whole, Tolerance::F32);
        Ok(())
    }

    #[test]
    fn no_rows_give_no_rows() -> Result<()> {
        let layer = Linear::new(randn(1, (10, 6), DType::F32)?, None)?;
        assert_eq!(layer.forward(&Tensor::zeros((0, 6), DType::F32, &Device::Cpu)?)?.dims(), [0, 10]);
        Ok(())
    }

    #[test]
    fn a_wrong_width_is_an_error() -> Result<()> {
        let layer = Linear::new(randn(1, (10, 6), DType::F32)?, None)?;
        let error = layer.forward(&randn(1, (2, 5), DType::F32)?).unwrap_err();
        assert_eq!(error.to_string(), "linear: expected [T, 6], found [2, 5]");
        Ok(())
    }
}
