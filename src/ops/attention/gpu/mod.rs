//! Attention on a GPU: the kernels of `kernels/attention.cu` and, on tensor cores, of `kernels/attention_mma.cu`. Heads that are
//! larger than the kernels' largest size run as candle's ops.

mod backward;
mod kernels;
pub(super) mod plan;
#[cfg(test)]
mod tests;

pub(super) use kernels::{MAX_HEAD_DIM, tiling};

use super::{
    AttentionOutput, AttentionOutputSaved, AttentionShape, GradTargets, Gradients, Inputs, Qkv, Rotation,
};
use crate::ops::gpu::{self, Kernel};
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use kernels::{AttentionKernel, KernelSet, kernel_set};

/// Threads of every block.
const THREADS: usize = 128;

gpu::parameters!(AttentionParameters {
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    q_width: u32,
    kv_width: u32,
    kv_column: u32,
    prefix_width: u32,
    prefix_column: u32,
    queries: u32,
    scale: f32,
    dq_width: u32,
    dkv_width: u32,
    dkv_column: u32,
    aligned: u32,
    rotated: u32,
});

gpu::parameters!(AttentionReduceParameters {
    key_tile: u32,
    width: u32,
    dkv_width: u32,
    dkv_column: u32,
    to_prefix: u32,
    aligned: u32,
    rotated: u32,
    head_dim: u32,
});

/// One call: its matrices, its kernels, and their parameters.
struct AttentionCall<'a> {
    q: &'a Tensor,
    kv: &'a Tensor,
    prefix: &'a Tensor,
    kernels: &'static KernelSet,
    parameters: AttentionParameters,
}

impl<'a> AttentionCall<'a> {
    /// `others` are the other matrices [queries, H D] that the kernels read 16 bytes at a time.
    fn new(shape: &AttentionShape, inputs: Inputs<'a>, others: &[&Tensor]) -> Result<Self> {
        let (q, kv) = (inputs.qkv.queries(), inputs.qkv.keys_values());
        let prefix = inputs.prefix.unwrap_or(kv);
        let (queries, q_width) = q.dims2()?;
        let (kv_width, prefix_width) = (kv.dims2()?.1, prefix.dims2()?.1);
        let (kv_column, prefix_column) = (kv_width - shape.kv_width(), prefix_width - shape.kv_width());
        let widths = [shape.head_dim, q_width, kv_width, prefix_width];
        let aligned = gpu::aligned(&widths, &[&[q, kv, prefix], others].concat());
        gpu::check_dtype("attention", &[&[kv, prefix], others].concat(), q.dtype())?;
        let fused = matches!(inputs.qkv, Qkv::Fused(_));
        let parameters = AttentionParameters {
            heads: gpu::uint(shape.heads),
            kv_heads: gpu::uint(shape.kv_heads),
            head_dim: gpu::uint(shape.head_dim),
            q_width: gpu::uint(q_width),
            kv_width: gpu::uint(kv_width),
            kv_column: gpu::uint(kv_column),
            prefix_width: gpu::uint(prefix_width),
            prefix_column: gpu::uint(prefix_column),
            queries: gpu::uint(queries),
            scale: shape.scale as f32,
            dq_width: gpu::uint(q_width),
            dkv_width: gpu::uint(if fused { q_width } else { shape.kv_width() }),
            dkv_column: gpu::uint(if fused { shape.q_width() } else { 0 }),
            aligned,
            rotated: 0,
        };
        Ok(Self { q, kv, prefix, kernels: kernel_set(shape, aligned == 1, q), parameters })
    }

    /// A launch of `kernel` over `heads` heads.
    fn kernel(&self, kernel: AttentionKernel, blocks: usize, heads: usize) -> Kernel {
        let AttentionKernel { name, shared, heads: heads_of_block } = kernel;
        Kernel {
            file: self.kernels.file,
            name,
            grid: [blocks, heads / heads_of_block, 1],
            threads: THREADS,
            shared,
        }
    }

    fn on_tensor_cores(&self) -> bool {
        self.kernels.file == "attention_mma"
    }

    /// # Safety
    /// As for [`gpu::launch`].
    unsafe fn launch(&self, kernel: &Kernel, buffers: &[&Tensor]) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { gpu::launch(kernel, self.q.dtype(), buffers, &self.parameters) }
    }
}

pub(super) fn forward(shape: &AttentionShape, inputs: Inputs) -> Result<AttentionOutput> {
    if shape.head_dim > MAX_HEAD_DIM {
        return shape.reference(inputs);
    }
    let call = AttentionCall::new(shape, inputs, &[])?;
    let (queries, q) = (call.q.dims()[0], call.q);
    let out = gpu::empty((queries, shape.q_width()), q.dtype(), q)?;
    let lse = gpu::empty((queries, shape.heads), DType::F32, q)?;
    let plan = inputs.segments.query_plan(&call.kernels.tiling, queries);
    let visible = inputs.segments.visible().to_device(q.device())?;
    let tiles = plan.to_device(q.device())?;
    let kernel = call.kernel(call.kernels.forward, plan.len() / 6, shape.heads);
    // SAFETY: the module has checked widths and segments, of whose rows the plan consists; the call has checked the dtypes.
    unsafe { call.launch(&kernel, &[q, call.kv, call.prefix, &visible, &tiles, &out, &lse]) }?;
    Ok(AttentionOutput { out, lse, out_is_needed: true })
}

/// Gradients of the inputs.
pub(super) fn backward(
    shape: &AttentionShape,
    inputs: Inputs,
    saved: &AttentionOutputSaved,
    (dout, rotation): (&Tensor, Option<Rotation>),
    targets: GradTargets,
) -> Result<Gradients> {
    if shape.head_dim > MAX_HEAD_DIM {
        return shape.reference_backward(inputs, dout, targets);
    }
    let Some(out) = &saved.out else {
        let problem = "attention backward: expected the values of a forward pass on a GPU, found those of one on the CPU";
        return Err(Error::Invalid(problem.into()));
    };
    if out.dims() != dout.dims() || saved.lse.dims() != [dout.dims()[0], shape.heads] {
        return Err(Error::shape(
            "attention backward",
            format!("the values of a forward pass of {:?}", dout.dims()),
            format!("{:?} and {:?}", out.dims(), saved.lse.dims()),
        ));
    }
    backward::run(shape, inputs, (out, &saved.lse), (dout, rotation), targets)
}
