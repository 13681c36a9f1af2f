//! Experts on a GPU: there are no kernels yet.

use super::{ExpertLinear, Routing};
use crate::{Error, Result};
use candle_core::{DType, Tensor};

fn unsupported<T>(op: &'static str) -> Result<T> {
    Err(Error::Invalid(format!("{op}: a GPU has no kernel for experts yet; use device = \"cpu\"")))
}

pub(super) fn routing(_: &Tensor, _: usize) -> Result<Routing> {
    unsupported("routing")
}

pub(super) fn routing_backward(_: &Tensor, _: &Routing) -> Result<Tensor> {
    unsupported("routing backward")
}

pub(super) fn gather(_: &Tensor, _: &Routing) -> Result<Tensor> {
    unsupported("experts gather")
}

pub(super) fn combine(_: &Tensor, _: &Routing) -> Result<Tensor> {
    unsupported("experts combine")
}

pub(super) fn forward(_: &ExpertLinear, _: &Tensor, _: &Routing, _: DType) -> Result<Tensor> {
    unsupported("experts")
}

pub(super) fn backward(_: &ExpertLinear, _: &Tensor, _: &Routing, _: f64) -> Result<Tensor> {
    unsupported("experts backward")
}

pub(super) fn activation_forward(_: &Tensor, _: &Routing) -> Result<Tensor> {
    unsupported("experts activation")
}

pub(super) fn activation_backward(_: &Tensor, _: &Tensor, _: &Routing) -> Result<(Tensor, Tensor)> {
    unsupported("experts activation backward")
}
