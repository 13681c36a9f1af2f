//! A frozen linear layer: `y = x Wᵀ + b`, and `dx = scale * dy W`. No weight gradient exists.
//!
//! On the CPU a weight may be held in f16 or bf16. Where there are kernels for bf16 (AVX-512, AMX), a weight in bf16 is
//! packed for them (`src/ops/packed`): inputs are rounded to bf16, sums and outputs are f32. Elsewhere it is widened to f32
//! block by block as the product goes, and so is f16 everywhere. Activations are f32 all the same.

use super::bf16::{
    Element, Isa, Panels, Right, Then, backward as multiply_backward, forward as multiply_forward,
};
use super::cpu::{self, Disjoint, Mat, Real, View, with_real};
use super::gpu::{self, Product, Route};
use super::profile;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use half::bf16;
use rayon::prelude::*;
use std::ops::Range;

/// Output features of a half-precision weight that are widened at a time: 128 rows of 2,048 are 1 MB of
/// f32, which stays in the second-level cache of one core.
const WIDENED_ROWS: usize = 128;

/// Weight [out, in] and bias `[out]` of a frozen layer; several layers over one input are stacked in `out`.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
}

#[derive(Debug, Clone)]
enum Weight {
    Tensor(Tensor),
    Packed(Panels),
}

impl Weight {
    fn dims(&self) -> Result<(usize, usize)> {
        match self {
            Self::Tensor(weight) => Ok(weight.dims2()?),
            Self::Packed(panels) => Ok(panels.dims()),
        }
    }
}

impl Linear {
    /// From a weight [out, in], which is kept as it is, and a bias `[out]`.
    ///
    /// # Errors
    /// A bias that does not fit the weight.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        Self::checked(Weight::Tensor(weight.contiguous()?), bias)
    }

    /// From a packed weight [out, in] and a bias `[out]` in f32.
    ///
    /// # Errors
    /// A bias that does not fit the weight.
    pub(crate) fn packed(weight: Panels, bias: Option<Tensor>) -> Result<Self> {
        Self::checked(Weight::Packed(weight), bias)
    }

    fn checked(weight: Weight, bias: Option<Tensor>) -> Result<Self> {
        let (n, _) = weight.dims()?;
        if let Some(bias) = &bias
            && bias.dims() != [n]
        {
            return Err(Error::Shape {
                op: "linear",
                expected: format!("a bias of [{n}]"),
                found: format!("{:?}", bias.dims()),
            });
        }
        Ok(Self { weight, bias })
    }

    /// The layer with its weight packed, where it is bf16 behind activations in f32 on a CPU with kernels for bf16; as
    /// it is elsewhere.
    pub fn pack(self, activations: DType) -> Result<Self> {
        let Weight::Tensor(weight) = &self.weight else { return Ok(self) };
        let Some(isa) = multiplies_bf16(weight).filter(|_| activations == DType::F32) else {
            return Ok(self);
        };
        let (n, k) = weight.dims2()?;
        let values = View::<bf16>::new("linear", weight)?;
        let values: &[bf16] = &values;
        let panels = Panels::pack(isa, (n, k), |rows, out| -> Result<()> {
            out.copy_from_slice(&values[rows.start * k..rows.end * k]);
            Ok(())
        })?;
        Self::packed(panels, self.bias.clone())
    }

    /// Packs the transpose of a packed weight too, for [`Linear::backward`] and for all layers of [`Linear::rows`]; nothing if the
    /// weight is not packed.
    pub(crate) fn pack_transpose(&self) {
        if let Weight::Packed(panels) = &self.weight {
            panels.pack_transpose();
        }
    }

    /// Packs the transpose too if [`Linear::backward`] is faster by it on this CPU, as with AMX: a second copy of the weight.
    pub fn pack_backward(&self) {
        if let Weight::Packed(panels) = &self.weight
            && panels.isa().reads_packed_transposes()
        {
            panels.pack_transpose();
        }
    }

    /// Whether the transpose is packed.
    pub(crate) fn has_transpose(&self) -> bool {
        matches!(&self.weight, Weight::Packed(panels) if panels.has_transpose())
    }

    /// The layer with output features of zeros behind its own, so that their number is a multiple of `multiple`; as it
    /// is where the CPU computes, whose products take any width alike.
    pub(crate) fn padded(self, multiple: usize) -> Result<Self> {
        let Weight::Tensor(weight) = &self.weight else { return Ok(self) };
        let (n, k) = weight.dims2()?;
        let missing = n.next_multiple_of(multiple) - n;
        if missing == 0 || gpu::route(weight) != Route::Kernel {
            return Ok(self);
        }
        let zeros = |shape: &[usize]| Tensor::zeros(shape, weight.dtype(), weight.device());
        let bias = self.bias.as_ref().map(|b| Tensor::cat(&[b, &zeros(&[missing])?.to_dtype(b.dtype())?], 0));
        Self::new(Tensor::cat(&[weight, &zeros(&[missing, k])?], 0)?, bias.transpose()?)
    }

    /// The layer that makes only the output features of `range`.
    pub fn rows(&self, range: Range<usize>) -> Result<Self> {
        let bias = self.bias.as_ref().map(|b| b.narrow(0, range.start, range.len())).transpose()?;
        match &self.weight {
            Weight::Tensor(weight) => Self::new(weight.narrow(0, range.start, range.len())?, bias),
            Weight::Packed(panels) => match panels.rows(range.clone()) {
                Some(panels) => Self::packed(panels, bias),
                None => {
                    Self::new(self.weight()?.narrow(0, range.start, range.len())?, bias)?.pack(DType::F32)
                }
            },
        }
    }

    /// The layer with its weight in another dtype, for other activations, on another device.
    pub(crate) fn on(&self, weight: DType, activations: DType, device: &Device) -> Result<Self> {
        let moved = |t: &Tensor, dtype| gpu::to_device(&t.to_dtype(dtype)?, device);
        let bias = self.bias.as_ref().map(|b| moved(b, activations)).transpose()?;
        Self::new(moved(&self.weight()?, weight)?, bias)?.pack(activations)
    }

    /// Output and input features.
    pub fn dims(&self) -> Result<(usize, usize)> {
        self.weight.dims()
    }

    /// The weight [out, in]; unpacked into a new tensor where it is packed.
    pub fn weight(&self) -> Result<Tensor> {
        match &self.weight {
            Weight::Tensor(weight) => Ok(weight.clone()),
            Weight::Packed(panels) => Ok(Tensor::from_vec(panels.unpack(), panels.dims(), &Device::Cpu)?),
        }
    }

    /// The dtype in which the product reads inputs of dtype `activations`: an input that comes in it is not
    /// converted first.
    pub fn input_dtype(&self, activations: DType) -> DType {
        let bf16 = match &self.weight {
            Weight::Tensor(weight) => multiplies_bf16(weight).is_some(),
            Weight::Packed(_) => true,
        };
        if bf16 && activations == DType::F32 { DType::BF16 } else { activations }
    }

    /// Bytes that weight and bias take, and the weight's transpose if it is packed.
    pub fn bytes(&self) -> usize {
        let of = |t: &Tensor| t.elem_count() * t.dtype().size_in_bytes();
        let weight = match &self.weight {
            Weight::Tensor(weight) => of(weight),
            Weight::Packed(panels) => panels.bytes(),
        };
        weight + self.bias.as_ref().map_or(0, of)
    }

    /// `x Wᵀ + b` of `x` [T, in]: [T, out], in f32 where `x` is bf16 on the CPU, in `x`'s dtype otherwise.
    ///
    /// # Errors
    /// A width that is not the layer's, or a dtype that the device's kernels do not know.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let wide = x.dtype() == DType::BF16 && gpu::route(x) == Route::Cpu;
        let out = if wide { DType::F32 } else { x.dtype() };
        self.forward_in(x, out)
    }

    /// As [`Linear::forward`], in dtype `out`: that, or bf16 where the CPU has kernels for bf16.
    ///
    /// # Errors
    /// As [`Linear::forward`]; another `out`.
    pub fn forward_in(&self, x: &Tensor, out: DType) -> Result<Tensor> {
        let _timed = profile::scope("linear", x.device());
        let (n, k) = self.dims()?;
        self.check("linear", x, k)?;
        if let Some(out) = match out {
            DType::BF16 => self.in_bf16::<bf16>("linear", x, 1.0, true)?,
            _ => self.in_bf16::<f32>("linear", x, 1.0, true)?,
        } {
            return Ok(out);
        }
        let Weight::Tensor(weight) = &self.weight else { return Err(cpu::not_real("linear", x.dtype())) };
        cpu::same_dtype("linear", x, out)?;
        match gpu::route(x) {
            Route::Cpu => with_real!("linear", x.dtype(), T => self.forward_cpu::<T>(weight, x, n, k)),
            Route::Kernel => gpu::matmul(&Product {
                a: x,
                b: weight,
                transposed: true,
                scale: 1.0,
                bias: self.bias.as_ref(),
                add: None,
            }),
            Route::Reference => self.reference(x),
        }
    }

    /// `residual + multiplier * (x Wᵀ + b)` as one product, dtypes as in [`Linear::forward`]; `None` where the device's
    /// products add no matrix, or not this bias.
    ///
    /// # Errors
    /// As [`Linear::forward`]; another shape of `residual` than [T, out].
    pub(crate) fn forward_add(
        &self,
        x: &Tensor,
        residual: &Tensor,
        multiplier: f64,
    ) -> Result<Option<Tensor>> {
        let Weight::Tensor(weight) = &self.weight else { return Ok(None) };
        // A product is scaled before its bias is added.
        if !gpu::adds_in_products(x) || (self.bias.is_some() && multiplier != 1.0) {
            return Ok(None);
        }
        let _timed = profile::scope("linear", x.device());
        let (n, k) = weight.dims2()?;
        self.check("linear", x, k)?;
        self.check("linear", residual, n)?;
        if residual.dims()[0] != x.dims()[0] {
            return Err(Error::Shape {
                op: "linear",
                expected: format!("a residual stream of [{}, {n}]", x.dims()[0]),
                found: format!("{:?}", residual.dims()),
            });
        }
        let bias = self.bias.as_ref();
        let product =
            Product { a: x, b: weight, transposed: true, scale: multiplier, bias, add: Some(residual) };
        gpu::matmul(&product).map(Some)
    }

    /// `(x Wᵀ + b) / divisor`, dtypes as in [`Linear::forward`]; without a bias a GPU's product divides its own sums.
    ///
    /// # Errors
    /// As [`Linear::forward`].
    pub fn forward_divided(&self, x: &Tensor, divisor: f64) -> Result<Tensor> {
        let Weight::Tensor(weight) = &self.weight else { return Ok((self.forward(x)? / divisor)?) };
        if self.bias.is_some() || gpu::route(x) != Route::Kernel {
            return Ok((self.forward(x)? / divisor)?);
        }
        let _timed = profile::scope("linear", x.device());
        self.check("linear", x, weight.dims2()?.1)?;
        gpu::matmul(&Product {
            a: x,
            b: weight,
            transposed: true,
            scale: 1.0 / divisor,
            bias: None,
            add: None,
        })
    }

    /// `scale * dy W` of `dy` [T, out]: the gradient of the input, [T, in]; dtypes as in [`Linear::forward`].
    ///
    /// # Errors
    /// As [`Linear::forward`].
    pub fn backward(&self, dy: &Tensor, scale: f64) -> Result<Tensor> {
        let _timed = profile::scope("linear backward", dy.device());
        let (n, k) = self.dims()?;
        self.check("linear backward", dy, n)?;
        if let Some(out) = self.in_bf16::<f32>("linear backward", dy, scale, false)? {
            return Ok(out);
        }
        let Weight::Tensor(weight) = &self.weight else {
            return Err(cpu::not_real("linear backward", dy.dtype()));
        };
        match gpu::route(dy) {
            Route::Cpu => {
                with_real!("linear backward", dy.dtype(), T => backward_cpu::<T>(weight, dy, scale, n, k))
            }
            Route::Kernel => {
                gpu::matmul(&Product { a: dy, b: weight, transposed: false, scale, bias: None, add: None })
            }
            Route::Reference => Ok((dy.matmul(&weight.to_dtype(dy.dtype())?)? * scale)?),
        }
    }

    /// The formula in plain candle ops.
    pub fn reference(&self, x: &Tensor) -> Result<Tensor> {
        let y = x.matmul(&self.weight()?.to_dtype(x.dtype())?.t()?)?;
        Ok(match &self.bias {
            Some(bias) => y.broadcast_add(&bias.to_dtype(x.dtype())?)?,
            None => y,
        })
    }

    /// The product by the CPU's own bf16 instructions, forward or backward; `None` where they do not apply.
    fn in_bf16<O: Element>(
        &self,
        op: &'static str,
        x: &Tensor,
        scale: f64,
        forward: bool,
    ) -> Result<Option<Tensor>> {
        if !matches!(x.dtype(), DType::F32 | DType::BF16) || gpu::route(x) != Route::Cpu {
            return Ok(None);
        }
        let (n, k) = self.dims()?;
        let view;
        let (isa, right) = match &self.weight {
            Weight::Packed(panels) => (panels.isa(), Right::Panels(panels)),
            Weight::Tensor(weight) => match multiplies_bf16(weight) {
                Some(isa) => {
                    view = View::<bf16>::new(op, weight)?;
                    (isa, Right::Rows(&view, k))
                }
                None => return Ok(None),
            },
        };
        let m = x.dims()[0];
        let rounded = if x.dtype() == DType::F32 { Some(cpu::round(op, x)?) } else { None };
        let x = View::<bf16>::new(op, rounded.as_ref().unwrap_or(x))?;
        let bias = self.bias.as_ref().filter(|_| forward).map(|b| View::<f32>::new(op, b)).transpose()?;
        let width = if forward { n } else { k };
        let out = cpu::overwrite::<O>(m * width, |out| {
            if let Some(bias) = &bias {
                let bias: &[f32] = bias;
                cpu::par_rows(
                    out,
                    n,
                    #[inline(always)]
                    |_, rows, _| {
                        for row in rows.chunks_exact_mut(n) {
                            row.iter_mut().zip(bias).for_each(|(y, &b)| *y = O::stored(b));
                        }
                    },
                );
            }
            let then = Then { scale: scale as f32, add: bias.is_some() };
            match forward {
                true => multiply_forward(isa, &x, right, out, then),
                false => multiply_backward(isa, &x, right, out, then),
            }
        });
        Ok(Some(cpu::tensor(out, (m, width))?))
    }

    fn check(&self, op: &'static str, x: &Tensor, width: usize) -> Result<()> {
        match x.dims() {
            [_, found] if *found == width => Ok(()),
            found => Err(Error::Shape { op, expected: format!("[T, {width}]"), found: format!("{found:?}") }),
        }
    }

    fn forward_cpu<T: Real>(&self, weight: &Tensor, x: &Tensor, n: usize, k: usize) -> Result<Tensor> {
        let m = x.dims()[0];
        let x = View::<T>::new("linear", x)?;
        let bias = self.bias.as_ref().map(|b| b.to_dtype(T::DTYPE)).transpose()?;
        let bias = bias.as_ref().map(|b| View::<T>::new("linear", b)).transpose()?;
        let weight = Operand::<T>::new(weight)?;
        let out = cpu::overwrite::<T>(m * n, |out| {
            if let Some(bias) = &bias {
                cpu::par_rows(
                    out,
                    n,
                    #[inline(always)]
                    |_, rows, _| rows.chunks_exact_mut(n).for_each(|row| row.copy_from_slice(bias)),
                );
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
                Operand::Plain(w) => product(0..n, w.as_ptr(), true),
                Operand::Half(w) => (0..n.div_ceil(WIDENED_ROWS)).into_par_iter().for_each(|i| {
                    let block = i * WIDENED_ROWS..((i + 1) * WIDENED_ROWS).min(n);
                    product(block.clone(), w.widen::<T>(block.start * k..block.end * k).as_ptr(), false);
                }),
            }
        });
        cpu::tensor(out, (m, n))
    }
}

fn backward_cpu<T: Real>(weight: &Tensor, dy: &Tensor, scale: f64, n: usize, k: usize) -> Result<Tensor> {
    let m = dy.dims()[0];
    let dy = View::<T>::new("linear backward", dy)?;
    let (scale, dy) = (T::of(scale), Mat::rows(dy.as_ptr(), n));
    let out = match &Operand::<T>::new(weight)? {
        Operand::Plain(w) => cpu::overwrite::<T>(m * k, |out| {
            // SAFETY: the views live and their sizes were checked.
            unsafe {
                let (dx, w) = (Mat::rows(out.as_mut_ptr(), k), Mat::rows(w.as_ptr(), k));
                cpu::gemm((m, k, n), dx, false, dy, w, scale, true);
            }
        }),
        Operand::Half(w) => {
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

/// The instructions that multiply a weight in bf16 on this CPU.
fn multiplies_bf16(weight: &Tensor) -> Option<Isa> {
    if weight.dtype() == DType::BF16 && weight.device().is_cpu() { Isa::best() } else { None }
}

/// A weight as the product of floats reads it.
enum Operand<'a, T> {
    Plain(View<'a, T>),
    Half(HalfWeight<'a>),
}

/// A weight in half precision.
enum HalfWeight<'a> {
    F16(View<'a, half::f16>),
    Bf16(View<'a, half::bf16>),
}

impl<'a, T: Real> Operand<'a, T> {
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
            cpu::par_rows(
                out,
                1024,
                #[inline(always)]
                |first, part, _| self.widen_into(range.start + first * 1024, part),
            );
        })
    }

    fn widen_into<T: Real>(&self, start: usize, out: &mut [T]) {
        cpu::simd(
            #[inline(always)]
            |_| match self {
                Self::F16(w) => out.iter_mut().zip(&w[start..]).for_each(|(y, x)| *y = T::of(x.to_f64())),
                Self::Bf16(w) => out.iter_mut().zip(&w[start..]).for_each(|(y, x)| *y = T::of(x.to_f64())),
            },
        );
    }
}

#[cfg(test)]
mod tests;
