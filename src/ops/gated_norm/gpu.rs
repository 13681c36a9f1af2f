//! The gated norm on a GPU: no kernel yet.

use super::{GatedNorm, GatedNormGradients, GatedNormed};
use crate::{Error, Result};
use candle_core::{DType, Tensor};

pub(super) fn forward(_: &GatedNorm, _: (&Tensor, &Tensor), _: DType) -> Result<GatedNormed> {
    Err(no_kernel())
}

pub(super) fn backward(
    _: &GatedNorm,
    _: &Tensor,
    _: (&Tensor, &Tensor),
    _: &Tensor,
) -> Result<GatedNormGradients> {
    Err(no_kernel())
}

fn no_kernel() -> Error {
    Error::Invalid("gated norm: Mamba2 layers have no GPU kernel yet; expected a CPU".into())
}
