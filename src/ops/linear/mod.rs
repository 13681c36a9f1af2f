//! A frozen linear layer: `y = x Wᵀ + b`, and `dx = scale * dy W`. A weight gradient is never computed.
//!
//! On the CPU a weight may be stored in f16 or bf16. If the CPU has AVX-512 or AMX, a weight in bf16 is packed for the
//! products of `backend/bf16`: inputs are rounded to bf16, sums and outputs are f32. Otherwise weights in f16 and bf16 are
//! widened to f32 block by block during the product, and activations are f32.

mod bf16;
mod cpu;
mod gpu;
mod grouped;
mod reference;
#[cfg(test)]
mod tests;

pub(crate) use grouped::GroupedLinear;

use super::backend::{Route, route};
use super::bf16::PackedWeight;
use super::cpu::{View, unsupported_dtype};
use super::gpu::to_device;
use super::profile;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::ops::Range;

/// Weight [out, in] and bias `[out]` of a frozen layer; several layers over one input are stacked in `out`.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
}

#[derive(Debug, Clone)]
enum Weight {
    Tensor(Tensor),
    Packed(PackedWeight),
}

impl Weight {
    fn dims(&self) -> Result<(usize, usize)> {
        match self {
            Self::Tensor(weight) => Ok(weight.dims2()?),
            Self::Packed(weight) => Ok(weight.dims()),
        }
    }
}

/// Constructors.
impl Linear {
    /// A layer of a weight [out, in], which is not converted, and a bias `[out]`.
    ///
    /// # Errors
    /// Returns an error if the bias has another length than the weight has rows.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        Self::checked(Weight::Tensor(weight.contiguous()?), bias)
    }

    /// A layer of a packed weight [out, in] and a bias `[out]` in f32.
    ///
    /// # Errors
    /// Returns an error if the bias has another length than the weight has rows.
    pub(crate) fn packed(weight: PackedWeight, bias: Option<Tensor>) -> Result<Self> {
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

    /// The layer with a packed weight, if the weight is bf16, `activations` are f32 and the CPU has products of bf16; the
    /// layer unchanged otherwise.
    ///
    /// # Errors
    /// Returns an error if the weight is not contiguous.
    pub fn pack(self, activations: DType) -> Result<Self> {
        let Weight::Tensor(weight) = &self.weight else { return Ok(self) };
        let Some(isa) = bf16::isa_of(weight).filter(|_| activations == DType::F32) else {
            return Ok(self);
        };
        let (n, k) = weight.dims2()?;
        let values = View::<half::bf16>::new("linear", weight)?;
        let values: &[half::bf16] = &values;
        let packed = PackedWeight::pack(isa, (n, k), |rows, out| -> Result<()> {
            out.copy_from_slice(&values[rows.start * k..rows.end * k]);
            Ok(())
        })?;
        Self::packed(packed, self.bias.clone())
    }

    /// Packs the transpose of a packed weight too, for [`Linear::backward`] and for all layers of [`Linear::rows`]; does
    /// nothing if the weight is not packed.
    pub(crate) fn pack_transpose(&self) {
        if let Weight::Packed(weight) = &self.weight {
            weight.pack_transpose();
        }
    }

    /// Packs the transpose too if it makes [`Linear::backward`] faster on this CPU, as with AMX. It is a second copy of the
    /// weight.
    pub fn pack_backward(&self) {
        if let Weight::Packed(weight) = &self.weight
            && weight.isa().reads_packed_transposes()
        {
            weight.pack_transpose();
        }
    }

    /// The layer with output features of zeros after its own, so that their number is a multiple of `multiple`. On the CPU,
    /// where products are equally fast at any width, the layer is unchanged.
    pub(crate) fn padded(self, multiple: usize) -> Result<Self> {
        let Weight::Tensor(weight) = &self.weight else { return Ok(self) };
        let (n, k) = weight.dims2()?;
        let missing = n.next_multiple_of(multiple) - n;
        if missing == 0 || route(weight) == Route::Cpu {
            return Ok(self);
        }
        let zeros = |shape: &[usize]| Tensor::zeros(shape, weight.dtype(), weight.device());
        let bias = self.bias.as_ref().map(|b| Tensor::cat(&[b, &zeros(&[missing])?.to_dtype(b.dtype())?], 0));
        Self::new(Tensor::cat(&[weight, &zeros(&[missing, k])?], 0)?, bias.transpose()?)
    }

    /// The layer with the output features of `range` only.
    ///
    /// # Errors
    /// Returns an error if `range` is not inside the layer's output features.
    pub fn rows(&self, range: Range<usize>) -> Result<Self> {
        let bias = self.bias.as_ref().map(|b| b.narrow(0, range.start, range.len())).transpose()?;
        match &self.weight {
            Weight::Tensor(weight) => Self::new(weight.narrow(0, range.start, range.len())?, bias),
            Weight::Packed(packed) => match packed.rows(range.clone()) {
                Some(packed) => Self::packed(packed, bias),
                None => {
                    Self::new(self.weight()?.narrow(0, range.start, range.len())?, bias)?.pack(DType::F32)
                }
            },
        }
    }

    /// The layer with its weight in dtype `weight`, for inputs in dtype `activations`, on `device`.
    pub(crate) fn converted(&self, weight: DType, activations: DType, device: &Device) -> Result<Self> {
        let convert = |t: &Tensor, dtype| to_device(&t.to_dtype(dtype)?, device);
        let bias = self.bias.as_ref().map(|b| convert(b, activations)).transpose()?;
        Self::new(convert(&self.weight()?, weight)?, bias)?.pack(activations)
    }
}

/// Properties.
impl Linear {
    /// Output and input features.
    ///
    /// # Errors
    /// Returns an error if the weight is not a matrix.
    pub fn dims(&self) -> Result<(usize, usize)> {
        self.weight.dims()
    }

    /// The weight [out, in]; a packed weight is unpacked into a new tensor.
    ///
    /// # Errors
    /// Returns an error if the tensor cannot be made.
    pub fn weight(&self) -> Result<Tensor> {
        match &self.weight {
            Weight::Tensor(weight) => Ok(weight.clone()),
            Weight::Packed(weight) => Ok(Tensor::from_vec(weight.unpack(), weight.dims(), &Device::Cpu)?),
        }
    }

    /// Whether the transpose is packed.
    pub(crate) fn has_transpose(&self) -> bool {
        matches!(&self.weight, Weight::Packed(weight) if weight.has_transpose())
    }

    /// The dtype in which the product reads inputs if activations have dtype `activations`: inputs of this dtype are not
    /// converted first.
    pub fn gemm_dtype(&self, activations: DType) -> DType {
        let is_bf16 = match &self.weight {
            Weight::Tensor(weight) => bf16::isa_of(weight).is_some(),
            Weight::Packed(_) => true,
        };
        if is_bf16 && activations == DType::F32 { DType::BF16 } else { activations }
    }

    /// Bytes of weight and bias, and of the weight's transpose if it is packed.
    pub fn bytes(&self) -> usize {
        let tensor_bytes = |t: &Tensor| t.elem_count() * t.dtype().size_in_bytes();
        let weight = match &self.weight {
            Weight::Tensor(weight) => tensor_bytes(weight),
            Weight::Packed(weight) => weight.bytes(),
        };
        weight + self.bias.as_ref().map_or(0, tensor_bytes)
    }
}

/// Forward and backward pass.
impl Linear {
    /// `x Wᵀ + b` of `x` [T, in]: [T, out] in the dtype of `x`, or in f32 if `x` is bf16 on the CPU.
    ///
    /// # Errors
    /// Returns an error if `x` has another width, the device has no product in its dtype, or a device operation fails.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let rounded = x.dtype() == DType::BF16 && route(x) == Route::Cpu;
        self.forward_to(x, if rounded { DType::F32 } else { x.dtype() })
    }

    /// As [`Linear::forward`], in dtype `out`: that of [`Linear::forward`], or bf16 if the CPU has products of bf16.
    ///
    /// # Errors
    /// As [`Linear::forward`]; also for another `out`.
    pub fn forward_to(&self, x: &Tensor, out: DType) -> Result<Tensor> {
        let _timed = profile::scope("linear", x.device());
        let rows = self.check("linear", x, self.dims()?.1)?;
        match route(x) {
            Route::Cpu => self.grouped(&[0, rows]).forward_to(x, out),
            Route::Kernel => gpu::forward(self, x, out),
        }
    }

    /// `residual + multiplier * (x Wᵀ + b)` as one product, dtypes as in [`Linear::forward`]; `None` if the device has no
    /// product that adds a matrix, or none that adds this bias.
    ///
    /// # Errors
    /// As [`Linear::forward`]; also if `residual` is not [T, out].
    pub(crate) fn forward_add(
        &self,
        x: &Tensor,
        residual: &Tensor,
        multiplier: f64,
    ) -> Result<Option<Tensor>> {
        match route(x) {
            Route::Cpu => Ok(None),
            Route::Kernel => gpu::forward_add(self, x, residual, multiplier),
        }
    }

    /// `(x Wᵀ + b) / divisor`, dtypes as in [`Linear::forward`]. On a GPU a layer without a bias divides inside the product.
    ///
    /// # Errors
    /// As [`Linear::forward`].
    pub fn forward_divided(&self, x: &Tensor, divisor: f64) -> Result<Tensor> {
        match route(x) {
            Route::Cpu => Ok((self.forward(x)? / divisor)?),
            Route::Kernel => gpu::forward_divided(self, x, divisor),
        }
    }

    /// `scale * dy W` of `dy` [T, out]: the gradient of the input, [T, in]; dtypes as in [`Linear::forward`].
    ///
    /// # Errors
    /// As [`Linear::forward`].
    pub fn backward(&self, dy: &Tensor, scale: f64) -> Result<Tensor> {
        let _timed = profile::scope("linear backward", dy.device());
        let rows = self.check("linear backward", dy, self.dims()?.0)?;
        match route(dy) {
            Route::Cpu => self.grouped(&[0, rows]).backward(dy, scale),
            Route::Kernel => gpu::backward(self, dy, scale),
        }
    }

    /// The rows of `x`; an error if it does not have `width` columns.
    fn check(&self, op: &'static str, x: &Tensor, width: usize) -> Result<usize> {
        match x.dims() {
            [rows, columns] if *columns == width => Ok(*rows),
            dims => Err(Error::Shape { op, expected: format!("[T, {width}]"), found: format!("{dims:?}") }),
        }
    }

    /// The weight as a tensor, for a product of `x`, which is not one of bf16.
    fn tensor_weight(&self, op: &'static str, x: &Tensor) -> Result<&Tensor> {
        match &self.weight {
            Weight::Tensor(weight) => Ok(weight),
            Weight::Packed(_) => Err(unsupported_dtype(op, x.dtype())),
        }
    }
}
