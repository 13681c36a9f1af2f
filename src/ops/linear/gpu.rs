//! The layer on a GPU, by the products of a library: cuBLAS on CUDA, candle's on Metal.

use super::{Linear, Weight};
use crate::ops::cpu::check_same_dtype;
use crate::ops::gpu::{self, MatrixProduct};
use crate::ops::profile;
use crate::{Error, Result};
use candle_core::{DType, Tensor};

impl Linear {
    /// `x Wᵀ`.
    fn product<'a>(&'a self, x: &'a Tensor) -> Result<MatrixProduct<'a>> {
        let weight = self.tensor_weight("linear", x)?;
        Ok(MatrixProduct { a: x, b: weight, transposed: true, scale: 1.0, bias: None, add: None })
    }
}

pub(super) fn forward(layer: &Linear, x: &Tensor, out: DType) -> Result<Tensor> {
    check_same_dtype("linear", x, out)?;
    gpu::matmul(&MatrixProduct { bias: layer.bias.as_ref(), ..layer.product(x)? })
}

pub(super) fn forward_add(
    layer: &Linear,
    x: &Tensor,
    residual: &Tensor,
    multiplier: f64,
) -> Result<Option<Tensor>> {
    let Weight::Tensor(weight) = &layer.weight else { return Ok(None) };
    // A product is scaled before its bias is added.
    if !gpu::adds_in_products(x) || (layer.bias.is_some() && multiplier != 1.0) {
        return Ok(None);
    }
    let _timed = profile::scope("linear", x.device());
    let (n, k) = weight.dims2()?;
    layer.check("linear", x, k)?;
    layer.check("linear", residual, n)?;
    if residual.dims()[0] != x.dims()[0] {
        return Err(Error::Shape {
            op: "linear",
            expected: format!("a residual stream of [{}, {n}]", x.dims()[0]),
            found: format!("{:?}", residual.dims()),
        });
    }
    let (bias, add) = (layer.bias.as_ref(), Some(residual));
    gpu::matmul(&MatrixProduct { scale: multiplier, bias, add, ..layer.product(x)? }).map(Some)
}

pub(super) fn forward_divided(layer: &Linear, x: &Tensor, divisor: f64) -> Result<Tensor> {
    if layer.bias.is_some() {
        return Ok((layer.forward(x)? / divisor)?);
    }
    let _timed = profile::scope("linear", x.device());
    layer.check("linear", x, layer.dims()?.1)?;
    gpu::matmul(&MatrixProduct { scale: 1.0 / divisor, ..layer.product(x)? })
}

pub(super) fn backward(layer: &Linear, dy: &Tensor, scale: f64) -> Result<Tensor> {
    let weight = layer.tensor_weight("linear backward", dy)?;
    gpu::matmul(&MatrixProduct { a: dy, b: weight, transposed: false, scale, bias: None, add: None })
}
