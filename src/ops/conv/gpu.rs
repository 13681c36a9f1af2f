//! The convolution on a GPU: no kernel yet.

use super::{ConvGradients, ConvInputs, ConvWeights};
use crate::{Error, Result};
use candle_core::{DType, Tensor};

pub(super) fn forward(_: ConvInputs, _: &ConvWeights, _: DType) -> Result<Tensor> {
    Err(no_kernel())
}

pub(super) fn ends(_: ConvInputs, _: usize) -> Result<Tensor> {
    Err(no_kernel())
}

pub(super) fn backward(
    _: (&Tensor, Option<&Tensor>),
    _: ConvInputs,
    _: &ConvWeights,
) -> Result<ConvGradients> {
    Err(no_kernel())
}

fn no_kernel() -> Error {
    Error::Invalid("conv: Mamba2 layers have no GPU kernel yet; expected a CPU".into())
}
