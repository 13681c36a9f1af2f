//! Launches of `kernels/conv.cu`.

use super::lists::ConvLists;
use super::{ConvGradients, ConvInputs, ConvWeights};
use crate::Result;
use crate::ops::cpu::check_same_dtype;
use crate::ops::gpu::{self, Kernel};
use candle_core::{DType, Tensor};
use std::sync::Arc;

gpu::parameters!(ConvParameters { rows: u32, channels: u32, taps: u32, aligned: u32 });

/// The lists of the inputs' segments.
fn lists(inputs: &ConvInputs, taps: usize) -> Arc<ConvLists> {
    let states = inputs.tails.map_or(0, |tails| tails.dims()[0]);
    inputs.plan.conv_lists((taps, states), || ConvLists::new(inputs.plan, taps))
}

fn parameters(inputs: &ConvInputs, taps: usize, tensors: &[&Tensor]) -> Result<ConvParameters> {
    let (rows, channels) = inputs.x.dims2()?;
    let aligned = gpu::aligned(&[channels], tensors);
    Ok(ConvParameters {
        rows: gpu::uint(rows),
        channels: gpu::uint(channels),
        taps: gpu::uint(taps),
        aligned,
    })
}

/// A launch for `rows` rows of `channels` channels, 8 channels a thread.
fn kernel(name: &'static str, rows: usize, channels: usize) -> Kernel {
    let threads = gpu::balanced_threads(channels.div_ceil(8));
    let mut kernel = Kernel::new("conv", name, rows, threads);
    kernel.grid[1] = channels.div_ceil(8 * threads);
    kernel
}

pub(super) fn forward(inputs: ConvInputs, conv: &ConvWeights, out: DType) -> Result<Tensor> {
    check_same_dtype("conv", inputs.x, out)?;
    gpu::check_dtype("conv", &[&conv.weight, &conv.bias], DType::F32)?;
    let ((rows, channels), (_, taps)) = (inputs.x.dims2()?, conv.weight.dims2()?);
    let x = inputs.x;
    // Without tails the kernel reads none: any buffer can stand for them.
    let tails = inputs.tails.unwrap_or(x);
    let sources = lists(&inputs, taps).sources.to_device(x.device())?;
    let y = gpu::empty((rows, channels), x.dtype(), x)?;
    let parameters = parameters(&inputs, taps, &[x, tails, &conv.bias])?;
    let buffers = [x, tails, &conv.weight, &conv.bias, &sources, &y];
    // SAFETY: the module has checked the shapes and the plan; the dtypes were checked above.
    unsafe { gpu::launch(&kernel("conv_forward", rows, channels), x.dtype(), &buffers, &parameters) }?;
    Ok(y)
}

pub(super) fn ends(inputs: ConvInputs, taps: usize) -> Result<Tensor> {
    let (x, channels, n) = (inputs.x, inputs.x.dims()[1], inputs.plan.ends());
    let tails = inputs.tails.unwrap_or(x);
    let sources = lists(&inputs, taps).ends.to_device(x.device())?;
    let ends = gpu::empty((n, taps - 1, channels), x.dtype(), x)?;
    let parameters = parameters(&inputs, taps, &[x, tails])?;
    let kernel = kernel("conv_ends", n * (taps - 1), channels);
    // SAFETY: the module has checked the shapes and the plan; the dtypes were checked above.
    unsafe { gpu::launch(&kernel, x.dtype(), &[x, tails, &sources, &ends], &parameters) }?;
    Ok(ends)
}

pub(super) fn backward(
    (dy, dends): (&Tensor, Option<&Tensor>),
    inputs: ConvInputs,
    conv: &ConvWeights,
) -> Result<ConvGradients> {
    const OP: &str = "conv backward";
    check_same_dtype(OP, dy, inputs.x.dtype())?;
    gpu::check_dtype(OP, &[&conv.weight, &conv.bias], DType::F32)?;
    gpu::check_dtype(OP, dends.as_slice(), DType::F32)?;
    let ((rows, channels), (_, taps)) = (inputs.x.dims2()?, conv.weight.dims2()?);
    let (x, device) = (inputs.x, inputs.x.device());
    let states = inputs.tails.map_or(0, |tails| tails.dims()[0]);
    let tails = inputs.tails.unwrap_or(x);
    let lists = lists(&inputs, taps);
    let sources = lists.sources.to_device(device)?;
    let dv = gpu::empty((rows, channels), DType::F32, x)?;
    let parameters = parameters(&inputs, taps, &[dy, x, tails, &conv.bias, dends.unwrap_or(x)])?;
    let buffers = [dy, x, tails, &conv.weight, &conv.bias, &sources, &dv];
    // SAFETY: the module has checked the shapes and the plan; the dtypes were checked above.
    unsafe { gpu::launch(&kernel("conv_backward_silu", rows, channels), x.dtype(), &buffers, &parameters) }?;
    let terms = lists.terms(inputs.plan, (taps, states), dends.is_some());
    let (offsets, terms) = (terms.offsets.to_device(device)?, terms.terms.to_device(device)?);
    let dx = gpu::empty((rows, channels), x.dtype(), x)?;
    // A driver allocates no tensor without elements.
    let dtails = gpu::empty((states.max(1), taps - 1, channels), DType::F32, x)?;
    let kernel = kernel("conv_backward", rows + states * (taps - 1), channels);
    let buffers = [&dv, dends.unwrap_or(&dv), &conv.weight, &offsets, &terms, &dx, &dtails];
    // SAFETY: the module has checked the shapes and the plan; the dtypes were checked above.
    unsafe { gpu::launch(&kernel, x.dtype(), &buffers, &parameters) }?;
    Ok(ConvGradients { x: dx, tails: inputs.tails.map(|_| dtails) })
}
