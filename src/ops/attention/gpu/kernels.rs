//! The attention kernels, and which of them runs a call.

use super::plan::Tiling;
use crate::ops::{AttentionShape, gpu};
use candle_core::{DType, Tensor};

/// A kernel, the shared memory that it needs beyond its declarations, and the heads that a block processes at a time.
#[derive(Clone, Copy)]
pub(super) struct AttentionKernel {
    pub(super) name: &'static str,
    pub(super) shared: usize,
    pub(super) heads: usize,
}

/// The kernels of one head size: for the forward pass, for dQ, for dK and dV.
pub(super) struct KernelSet {
    pub(super) file: &'static str,
    pub(super) forward: AttentionKernel,
    pub(super) dq: AttentionKernel,
    pub(super) dkv: AttentionKernel,
    pub(super) tiling: Tiling,
}

/// Queries of a prefix's item, unless that makes too many slots (plan.rs): with 256 a step of 8,192 rows after 100 virtual
/// tokens has 66 items a key head, more blocks than a GPU has multiprocessors, and partial sums of 34 MB at 8
/// key heads of 128.
const QUERY_CHUNK: usize = 256;

const fn portable_kernel(name: &'static str) -> AttentionKernel {
    AttentionKernel { name, shared: 0, heads: 1 }
}

const fn portable(names: [&'static str; 3], tile: usize) -> KernelSet {
    let tiling = Tiling { query_tile: tile, key_tile: tile, query_chunk: QUERY_CHUNK };
    let [forward, dq, dkv] = names;
    KernelSet {
        file: "attention",
        forward: portable_kernel(forward),
        dq: portable_kernel(dq),
        dkv: portable_kernel(dkv),
        tiling,
    }
}

/// Tiles of 64 rows of 16-bit elements. The forward kernels hold one for each of `heads` query heads, the dQ kernels two; the
/// dK and dV kernels hold two tiles of keys. The backward kernels have two stages of `stage` rows of two matrices each, and 2
/// floats a row of a tile (dQ), or 4 a row of a stage (dK and dV).
const fn tensor_cores(names: [&'static str; 3], size: (usize, usize), heads: usize) -> KernelSet {
    let tiling = Tiling { query_tile: 64, key_tile: 64, query_chunk: QUERY_CHUNK };
    let (head_dim, stage) = size;
    let tile = 64 * 2 * head_dim;
    let stages = 4 * stage * 2 * head_dim;
    let [forward, dq, dkv] = names;
    KernelSet {
        file: "attention_mma",
        forward: AttentionKernel { name: forward, shared: (2 + heads) * tile, heads },
        dq: AttentionKernel { name: dq, shared: heads * (2 * tile + 64 * 8) + stages, heads },
        dkv: AttentionKernel { name: dkv, shared: 2 * tile + stages + 16 * stage, heads: 1 },
        tiling,
    }
}

static PORTABLE: [(usize, KernelSet); 3] = [
    (64, portable(["attention_forward_64", "attention_dq_64", "attention_dkv_64"], 32)),
    (128, portable(["attention_forward_128", "attention_dq_128", "attention_dkv_128"], 16)),
    (256, portable(["attention_forward_256", "attention_dq_256", "attention_dkv_256"], 8)),
];
/// Largest head size, and the kernels that process one query head at a time and two.
static TENSOR_CORES: [(usize, [KernelSet; 2]); 2] = [
    (
        64,
        [
            tensor_cores(
                ["attention_mma_forward_64", "attention_mma_dq_64", "attention_mma_dkv_64"],
                (64, 64),
                1,
            ),
            tensor_cores(
                ["attention_mma_forward_pair_64", "attention_mma_dq_pair_64", "attention_mma_dkv_64"],
                (64, 64),
                2,
            ),
        ],
    ),
    (
        128,
        [
            tensor_cores(
                ["attention_mma_forward_128", "attention_mma_dq_128", "attention_mma_dkv_128"],
                (128, 32),
                1,
            ),
            tensor_cores(
                ["attention_mma_forward_pair_128", "attention_mma_dq_pair_128", "attention_mma_dkv_128"],
                (128, 32),
                2,
            ),
        ],
    ),
];

/// Largest head size for which there are kernels.
pub(in crate::ops::attention) const MAX_HEAD_DIM: usize = 256;

/// The kernels of a call. This is the one place that chooses them.
///
/// | head_dim | bf16, f16 on tensor cores | else |
/// |---|---|---|
/// | a multiple of 8 up to 64 | `attention_mma`, size 64 | `attention`, size 64 |
/// | a multiple of 8 up to 128 | `attention_mma`, size 128 | `attention`, size 128 |
/// | another up to 256 | `attention`, the next of 64, 128, 256 | the same |
/// | more than 256 | candle's ops (`reference.rs`) | the same |
///
/// `aligned`: every matrix that the kernels read or write begins, in each of its rows and heads, at a multiple of 16
/// bytes, which the tensor cores' kernels copy at a time; otherwise the portable kernels run. Columns that a head has fewer
/// than the kernel's size are zeros, so that a head of 80 costs as much as one of 128: still about 5 times less than the
/// portable kernel's products without tensor cores. The tensor cores' kernels compare scores before they are scaled, and the
/// scale must not reverse their order: a scale of 0 or less runs on the portable kernels. If an even number of query heads
/// shares a key head, the forward and dQ kernels process two of them at a time.
pub(super) fn kernel_set(shape: &AttentionShape, aligned: bool, like: &Tensor) -> &'static KernelSet {
    let head_dim = shape.head_dim;
    let is_16_bit = matches!(like.dtype(), DType::BF16 | DType::F16);
    let on_cores = TENSOR_CORES.iter().find(|(d, _)| head_dim <= *d && head_dim.is_multiple_of(8));
    match on_cores.filter(|_| is_16_bit && aligned && shape.scale > 0.0 && gpu::has_tensor_cores(like)) {
        Some((_, [one, two])) => {
            if (shape.heads / shape.kv_heads).is_multiple_of(2) {
                two
            } else {
                one
            }
        }
        None => PORTABLE.iter().find(|(d, _)| head_dim <= *d).map_or(&PORTABLE[2].1, |(_, kernels)| kernels),
    }
}

/// The tiling of a pass whose matrices begin at multiples of 16 bytes if the heads do.
pub(in crate::ops::attention) fn tiling(shape: &AttentionShape, like: &Tensor) -> Tiling {
    kernel_set(shape, shape.head_dim.is_multiple_of(8), like).tiling
}
