//! Launches of `kernels/cross_entropy.cu`.

use super::{LossWeights, Softmax, TokenLosses};
use crate::Result;
use crate::ops::IndexView;
use crate::ops::gpu::{self, Kernel};
use candle_core::{DType, Tensor};

gpu::parameters!(CrossEntropyParameters {
    rows: u32,
    vocab: u32,
    stride: u32,
    per_row: u32,
    scale: f32,
    dloss: f32
});

/// Threads of the block that reads a row.
const FORWARD_THREADS: usize = 512;

/// Threads of a block that writes a part of a row's gradient, and elements of each thread.
const BACKWARD_THREADS: usize = 256;
const BACKWARD_ELEMENTS: usize = 16;

pub(super) fn forward(logits: &Tensor, labels: IndexView, softmax: Softmax) -> Result<TokenLosses> {
    let rows = labels.host().len();
    let (nll, lse) = (gpu::empty(rows, DType::F32, logits)?, gpu::empty(rows, DType::F32, logits)?);
    let kernel = Kernel::new("cross_entropy", "cross_entropy_forward", rows, FORWARD_THREADS);
    let labels = labels.to_device(logits.device())?;
    let parameters = parameters(logits, softmax, Some(1.0))?;
    // SAFETY: `check` of the module has compared the logits with the labels; `nll` and `lse` have a value a row.
    unsafe { gpu::launch(&kernel, logits.dtype(), &[logits, &labels, &nll, &lse], &parameters) }?;
    Ok(TokenLosses { nll, lse })
}

/// Replaces the logits by their gradient.
pub(super) fn backward(
    logits: &Tensor,
    labels: IndexView,
    softmax: Softmax,
    losses: &TokenLosses,
    dloss: &LossWeights,
) -> Result<()> {
    let rows = labels.host().len();
    let mut kernel = Kernel::new("cross_entropy", "cross_entropy_backward", rows, BACKWARD_THREADS);
    // Rows need not begin at a multiple of 16 bytes: the first access covers up to 7 elements.
    kernel.grid[1] = (softmax.vocab + 7).div_ceil(BACKWARD_ELEMENTS * BACKWARD_THREADS);
    let labels = labels.to_device(logits.device())?;
    let (uniform, per_row) = dloss.for_kernel(&losses.lse);
    let parameters = parameters(logits, softmax, uniform)?;
    gpu::check_dtype("cross_entropy backward", &[&losses.lse, per_row], DType::F32)?;
    let arguments = [logits, &labels, &losses.lse, per_row];
    // SAFETY: the module has compared the logits with the labels, the log-sum-exp and the weights.
    unsafe { gpu::launch(&kernel, logits.dtype(), &arguments, &parameters) }
}

/// `dloss` is `None` if each row has its own.
fn parameters(logits: &Tensor, softmax: Softmax, dloss: Option<f64>) -> Result<CrossEntropyParameters> {
    let (rows, stride) = logits.dims2()?;
    Ok(CrossEntropyParameters {
        rows: gpu::uint(rows),
        vocab: gpu::uint(softmax.vocab),
        stride: gpu::uint(stride),
        per_row: u32::from(dloss.is_none()),
        scale: softmax.scale as f32,
        dloss: dloss.unwrap_or(0.0) as f32,
    })
}
