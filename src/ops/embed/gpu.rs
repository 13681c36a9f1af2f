//! Launches of `kernels/embed.cu`.

use super::EmbedLookup;
use crate::Result;
use crate::ops::gpu::{self, Kernel};
use candle_core::{DType, Tensor};

gpu::parameters!(EmbedParameters { rows: u32, width: u32, multiplier: f32, aligned: u32 });

/// Threads of a block that computes a part of a virtual token's gradient, 8 elements each.
const BACKWARD_THREADS: usize = 128;

/// Threads for a row, 8 elements each at a time.
fn row_threads(width: usize) -> usize {
    width.div_ceil(8).next_multiple_of(32).min(256)
}

impl EmbedLookup<'_> {
    fn parameters(&self, rows: usize, width: usize, tensors: &[&Tensor]) -> EmbedParameters {
        EmbedParameters {
            rows: gpu::uint(rows),
            width: gpu::uint(width),
            multiplier: self.multiplier as f32,
            aligned: gpu::aligned(&[width], tensors),
        }
    }
}

pub(super) fn forward(embedding: &Tensor, prompts: &Tensor, lookup: &EmbedLookup) -> Result<Tensor> {
    let (rows, width) = (lookup.ids.host().len(), embedding.dims2()?.1);
    gpu::check_dtype("embed", &[prompts], DType::F32)?;
    let x = gpu::empty((rows, width), embedding.dtype(), embedding)?;
    let parameters = lookup.parameters(rows, width, &[embedding, prompts]);
    let kernel = Kernel::new("embed", "embed_forward", rows, row_threads(width));
    let ids = lookup.ids.to_device(embedding.device())?;
    // SAFETY: the module has checked the ids and the widths of both matrices.
    unsafe { gpu::launch(&kernel, embedding.dtype(), &[embedding, prompts, &ids, &x], &parameters) }?;
    Ok(x)
}

pub(super) fn backward(dx: &Tensor, virtual_tokens: usize, lookup: &EmbedLookup) -> Result<Tensor> {
    let (rows, c) = dx.dims2()?;
    let dprompts = gpu::empty((virtual_tokens, c), DType::F32, dx)?;
    let parameters = lookup.parameters(rows, c, &[dx]);
    let mut kernel = Kernel::new("embed", "embed_backward", virtual_tokens, BACKWARD_THREADS);
    kernel.grid[1] = c.div_ceil(8 * BACKWARD_THREADS);
    let ids = lookup.ids.to_device(dx.device())?;
    // SAFETY: the module has checked that `dx` has a row for each id.
    unsafe { gpu::launch(&kernel, dx.dtype(), &[dx, &ids, &dprompts], &parameters) }?;
    Ok(dprompts)
}
