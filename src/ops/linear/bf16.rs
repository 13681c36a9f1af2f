//! The layer by the CPU's products of bf16.

use super::{GroupedLinear, Linear, Weight};
use crate::Result;
use crate::ops::bf16::{
    Isa, OutputElement, PackedWeight, ProductOutput, Right, backward as multiply_backward,
    forward as multiply_forward,
};
use crate::ops::cpu::{self, UninitBuffer, View, unsupported_dtype};
use candle_core::{DType, Tensor};
use half::bf16;
use std::mem::MaybeUninit;

/// The instructions that multiply this weight in bf16 on this CPU; `None` if it is not bf16 on a CPU that has them.
pub(super) fn isa_of(weight: &Tensor) -> Option<Isa> {
    if weight.dtype() == DType::BF16 && weight.device().is_cpu() { Isa::best() } else { None }
}

/// A bf16 weight as the product reads it.
enum Bf16Weight<'a> {
    Packed(&'a PackedWeight),
    Rows(View<'a, bf16>, usize),
}

impl<'a> Bf16Weight<'a> {
    /// The weight of `layer` and its instructions; `None` if the product is not one of bf16.
    fn new(op: &'static str, layer: &'a Linear) -> Result<Option<(Isa, Self)>> {
        match &layer.weight {
            Weight::Packed(weight) => Ok(Some((weight.isa(), Self::Packed(weight)))),
            Weight::Tensor(weight) => match isa_of(weight) {
                Some(isa) => Ok(Some((isa, Self::Rows(View::new(op, weight)?, weight.dims2()?.1)))),
                None => Ok(None),
            },
        }
    }

    fn right(&self) -> Right<'_> {
        match self {
            Self::Packed(weight) => Right::Packed(weight),
            Self::Rows(values, k) => Right::Rows(values, *k),
        }
    }
}

/// Whether inputs `x` multiply with the weight of `layer` in bf16.
fn is_in_bf16(layer: &Linear, x: &Tensor) -> bool {
    matches!(x.dtype(), DType::F32 | DType::BF16) && layer.gemm_dtype(DType::F32) == DType::BF16
}

/// `x` in bf16.
fn rounded(op: &'static str, x: &Tensor) -> Result<Tensor> {
    if x.dtype() == DType::F32 { cpu::round(op, x) } else { Ok(x.clone()) }
}

/// The layers' output in bf16 if `out` is that, in f32 otherwise; `None` if the product is not one of bf16.
pub(super) fn try_forward(layers: GroupedLinear, x: &Tensor, out: DType) -> Result<Option<Tensor>> {
    if !is_in_bf16(layers.first(), x) {
        return Ok(None);
    }
    match out {
        DType::BF16 => forward_to::<bf16>(layers, x),
        _ => forward_to::<f32>(layers, x),
    }
    .map(Some)
}

fn forward_to<O: OutputElement>(layers: GroupedLinear, x: &Tensor) -> Result<Tensor> {
    const OP: &str = "linear";
    let ((n, k), m) = (layers.first().dims()?, x.dims2()?.0);
    let x = rounded(OP, x)?;
    let x = View::<bf16>::new(OP, &x)?;
    let mut out = UninitBuffer::<O>::new(m * n);
    layers.for_each_layer((&x, k), (out.as_slice(), n), forward_into::<O>)?;
    // SAFETY: every layer wrote its rows, which are all rows.
    unsafe { out.into_tensor((m, n)) }
}

/// Writes every element of `out`, the layer's output for `x`.
fn forward_into<O: OutputElement>(layer: &Linear, x: &[bf16], out: &mut [MaybeUninit<O>]) -> Result<()> {
    const OP: &str = "linear";
    let (isa, weight) = Bf16Weight::new(OP, layer)?.ok_or_else(|| unsupported_dtype(OP, DType::BF16))?;
    let (n, bias) = (layer.dims()?.0, layer.bias.as_ref());
    let bias = bias.map(|b| View::<f32>::new(OP, b)).transpose()?;
    let output = match &bias {
        Some(bias) => {
            let bias: &[f32] = bias;
            cpu::par_rows(
                out,
                n,
                #[inline(always)]
                |_, rows, _| {
                    for row in rows.chunks_exact_mut(n) {
                        row.iter_mut().zip(bias).for_each(|(y, &b)| _ = y.write(O::store(b)));
                    }
                },
            );
            // SAFETY: the bias has as many elements as a row, so that every row was written.
            ProductOutput::Accumulate(unsafe { cpu::assume_init(out) })
        }
        None => ProductOutput::Write(out),
    };
    multiply_forward(isa, x, weight.right(), 1.0, output);
    Ok(())
}

/// The gradient of the input in f32; `None` if the product is not one of bf16.
pub(super) fn try_backward(layers: GroupedLinear, dy: &Tensor, scale: f64) -> Result<Option<Tensor>> {
    const OP: &str = "linear backward";
    if !is_in_bf16(layers.first(), dy) {
        return Ok(None);
    }
    let ((n, k), m) = (layers.first().dims()?, dy.dims2()?.0);
    let dy = rounded(OP, dy)?;
    let dy = View::<bf16>::new(OP, &dy)?;
    let mut dx = UninitBuffer::<f32>::new(m * k);
    layers.for_each_layer((&dy, n), (dx.as_slice(), k), |layer, dy, dx| {
        let (isa, weight) = Bf16Weight::new(OP, layer)?.ok_or_else(|| unsupported_dtype(OP, DType::BF16))?;
        multiply_backward(isa, dy, weight.right(), scale as f32, ProductOutput::Write(dx));
        Ok(())
    })?;
    // SAFETY: every layer wrote its rows, which are all rows.
    unsafe { dx.into_tensor((m, k)) }.map(Some)
}
