//! The layer by the CPU's products of bf16.

use super::{Linear, Weight};
use crate::Result;
use crate::ops::bf16::{
    Isa, OutputElement, PackedWeight, ProductOutput, Right, backward as multiply_backward,
    forward as multiply_forward,
};
use crate::ops::cpu::{self, UninitBuffer, View};
use candle_core::{DType, Tensor};
use half::bf16;

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
    /// The weight of `layer` and its instructions; `None` if inputs `x` do not multiply with it in bf16.
    fn new(op: &'static str, layer: &'a Linear, x: &Tensor) -> Result<Option<(Isa, Self)>> {
        if !matches!(x.dtype(), DType::F32 | DType::BF16) {
            return Ok(None);
        }
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

/// `x` in bf16.
fn rounded(op: &'static str, x: &Tensor) -> Result<Tensor> {
    if x.dtype() == DType::F32 { cpu::round(op, x) } else { Ok(x.clone()) }
}

/// The layer's output in bf16 if `out` is that, in f32 otherwise; `None` if the product is not one of bf16.
pub(super) fn try_forward(layer: &Linear, x: &Tensor, out: DType) -> Result<Option<Tensor>> {
    match out {
        DType::BF16 => try_forward_to::<bf16>(layer, x),
        _ => try_forward_to::<f32>(layer, x),
    }
}

fn try_forward_to<O: OutputElement>(layer: &Linear, x: &Tensor) -> Result<Option<Tensor>> {
    const OP: &str = "linear";
    let Some((isa, weight)) = Bf16Weight::new(OP, layer, x)? else { return Ok(None) };
    let (m, n) = (x.dims2()?.0, layer.dims()?.0);
    let x = rounded(OP, x)?;
    let x = View::<bf16>::new(OP, &x)?;
    let bias = layer.bias.as_ref().map(|b| View::<f32>::new(OP, b)).transpose()?;
    let mut out = UninitBuffer::<O>::new(m * n);
    let output = match &bias {
        Some(bias) => {
            let bias: &[f32] = bias;
            cpu::par_rows(
                out.as_slice(),
                n,
                #[inline(always)]
                |_, rows, _| {
                    for row in rows.chunks_exact_mut(n) {
                        row.iter_mut().zip(bias).for_each(|(y, &b)| _ = y.write(O::store(b)));
                    }
                },
            );
            // SAFETY: the bias has as many elements as a row, so that every row was written.
            ProductOutput::Accumulate(unsafe { cpu::assume_init(out.as_slice()) })
        }
        None => ProductOutput::Write(out.as_slice()),
    };
    multiply_forward(isa, &x, weight.right(), 1.0, output);
    // SAFETY: the product writes every element.
    unsafe { out.into_tensor((m, n)) }.map(Some)
}

/// The gradient of the input in f32; `None` if the product is not one of bf16.
pub(super) fn try_backward(layer: &Linear, dy: &Tensor, scale: f64) -> Result<Option<Tensor>> {
    const OP: &str = "linear backward";
    let Some((isa, weight)) = Bf16Weight::new(OP, layer, dy)? else { return Ok(None) };
    let (m, k) = (dy.dims2()?.0, layer.dims()?.1);
    let dy = rounded(OP, dy)?;
    let dy = View::<bf16>::new(OP, &dy)?;
    let mut dx = UninitBuffer::<f32>::new(m * k);
    multiply_backward(isa, &dy, weight.right(), scale as f32, ProductOutput::Write(dx.as_slice()));
    // SAFETY: the product writes every element.
    unsafe { dx.into_tensor((m, k)) }.map(Some)
}
