//! The scan on a GPU: no kernel yet.

use super::{SsdGradients, SsdInputs, SsdOutput, SsdShape, SsdWeights};
use crate::{Error, Result};
use candle_core::Tensor;

pub(super) fn forward(_: SsdInputs, _: &SsdShape, _: &SsdWeights) -> Result<SsdOutput> {
    Err(no_kernel())
}

pub(super) fn backward(
    _: (&Tensor, Option<&Tensor>),
    _: SsdInputs,
    _: &SsdShape,
    _: &SsdWeights,
) -> Result<SsdGradients> {
    Err(no_kernel())
}

fn no_kernel() -> Error {
    Error::Invalid("scan: Mamba2 layers have no GPU kernel yet; expected a CPU".into())
}
