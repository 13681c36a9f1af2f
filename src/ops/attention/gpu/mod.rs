//! The kernels of `kernels/attention.cu` and, on tensor cores, of `kernels/attention_mma.cu`.

use super::plan::{Tiling, Wanted};
use super::{Attended, AttentionShape, Gradients, Inputs, Needs, Qkv, Rotation};
use crate::Result;
use crate::ops::gpu::{self, Kernel};
use candle_core::{DType, Tensor};

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

/// A kernel with its shared memory beyond what it declares, and the heads that a block takes at a time.
#[derive(Clone, Copy)]
struct Sized {
    name: &'static str,
    shared: usize,
    heads: usize,
}

/// One size of the kernels: of the forward pass, of dQ, of dK and dV.
struct Form {
    file: &'static str,
    forward: Sized,
    dq: Sized,
    dkv: Sized,
    tiling: Tiling,
}

/// Queries of a prefix's item, unless that makes too many slots (plan.rs): with 256 a step of 8,192 rows behind 100
/// virtual tokens has 66 items a key head, more blocks than a GPU has multiprocessors, and partial sums of 34 MB at 8
/// key heads of 128.
const QUERY_CHUNK: usize = 256;

const fn plain(name: &'static str) -> Sized {
    Sized { name, shared: 0, heads: 1 }
}

const fn portable(names: [&'static str; 3], tile: usize) -> Form {
    let tiling = Tiling { query_tile: tile, key_tile: tile, query_chunk: QUERY_CHUNK };
    let [forward, dq, dkv] = names;
    Form { file: "attention", forward: plain(forward), dq: plain(dq), dkv: plain(dkv), tiling }
}

/// Tiles of 64 rows of 16-bit elements. The kernels by queries hold one for each of `heads` query heads, dQ two; dK and
/// dV hold two of keys. The backward kernels have two stages of `stage` rows of two matrices each, and 2 floats a row of
/// a tile (dQ), 4 of a stage (dK and dV).
const fn tensor_cores(names: [&'static str; 3], size: (usize, usize), heads: usize) -> Form {
    let tiling = Tiling { query_tile: 64, key_tile: 64, query_chunk: QUERY_CHUNK };
    let (head_dim, stage) = size;
    let tile = 64 * 2 * head_dim;
    let stages = 4 * stage * 2 * head_dim;
    let [forward, dq, dkv] = names;
    Form {
        file: "attention_mma",
        forward: Sized { name: forward, shared: (2 + heads) * tile, heads },
        dq: Sized { name: dq, shared: heads * (2 * tile + 64 * 8) + stages, heads },
        dkv: Sized { name: dkv, shared: 2 * tile + stages + 16 * stage, heads: 1 },
        tiling,
    }
}

static PORTABLE: [(usize, Form); 3] = [
    (64, portable(["attention_forward_64", "attention_dq_64", "attention_dkv_64"], 32)),
    (128, portable(["attention_forward_128", "attention_dq_128", "attention_dkv_128"], 16)),
    (256, portable(["attention_forward_256", "attention_dq_256", "attention_dkv_256"], 8)),
];
/// Largest head, and the kernels that take one query head at a time and two.
static TENSOR_CORES: [(usize, [Form; 2]); 2] = [
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

/// Largest head that the kernels have a size for.
pub(super) const MAX_HEAD_DIM: usize = 256;

/// Which kernels a call runs on; the one place that decides.
///
/// | head_dim | bf16, f16 on tensor cores | else |
/// |---|---|---|
/// | a multiple of 8 up to 64 | `attention_mma`, size 64 | `attention`, size 64 |
/// | a multiple of 8 up to 128 | `attention_mma`, size 128 | `attention`, size 128 |
/// | another up to 256 | `attention`, the next of 64, 128, 256 | the same |
/// | more than 256 | plain ops (`mod.rs`) | the same |
///
/// `aligned`: every matrix that the kernels read or write begins, in each of its rows and heads, at a multiple of 16
/// bytes, which the tensor cores' kernels copy at a time; else the portable kernels run. A size takes the columns
/// that a smaller head lacks as zeros, so that a head of 80 costs what one of 128 does: still about 5 times less than
/// the portable kernel's products without tensor cores. The running maximum there is of scores before their scale,
/// which must not turn their order: a scale of 0 or less runs on the portable kernels. Where an even number of query
/// heads shares a key head, the kernels by queries take two of them at a time.
fn form(shape: &AttentionShape, aligned: bool, like: &Tensor) -> &'static Form {
    let head_dim = shape.head_dim;
    let narrow = matches!(like.dtype(), DType::BF16 | DType::F16);
    let on_cores = TENSOR_CORES.iter().find(|(d, _)| head_dim <= *d && head_dim.is_multiple_of(8));
    match on_cores.filter(|_| narrow && aligned && shape.scale > 0.0 && gpu::has_tensor_cores(like)) {
        Some((_, [one, two])) => {
            if (shape.heads / shape.kv_heads).is_multiple_of(2) {
                two
            } else {
                one
            }
        }
        None => PORTABLE.iter().find(|(d, _)| head_dim <= *d).map_or(&PORTABLE[2].1, |(_, form)| form),
    }
}

/// How the kernels cut the matrices of a pass, which begin at multiples of 16 bytes where the heads do.
pub(super) fn tiling(shape: &AttentionShape, like: &Tensor) -> Tiling {
    form(shape, shape.head_dim.is_multiple_of(8), like).tiling
}

/// One call: its matrices, its kernels, and their parameters.
struct Call<'a> {
    q: &'a Tensor,
    kv: &'a Tensor,
    prefix: &'a Tensor,
    form: &'static Form,
    parameters: AttentionParameters,
}

impl<'a> Call<'a> {
    /// `others` are what else the kernels read 16 bytes at a time: [queries, H D].
    fn new(shape: &AttentionShape, inputs: Inputs<'a>, others: &[&Tensor]) -> Result<Self> {
        let (q, kv) = (inputs.qkv.queries(), inputs.qkv.keys_values());
        let prefix = inputs.prefix.unwrap_or(kv);
        let (queries, q_width) = q.dims2()?;
        let (kv_width, prefix_width) = (kv.dims2()?.1, prefix.dims2()?.1);
        let (kv_column, prefix_column) = (kv_width - shape.kv_width(), prefix_width - shape.kv_width());
        let widths = [shape.head_dim, q_width, kv_width, prefix_width];
        let aligned = gpu::aligned(&widths, &[&[q, kv, prefix], others].concat());
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
        Ok(Self { q, kv, prefix, form: form(shape, aligned == 1, q), parameters })
    }

    /// `heads` are all that the kernel has to do with.
    fn kernel(&self, kernel: Sized, blocks: usize, heads: usize) -> Kernel {
        let Sized { name, shared, heads: at_a_time } = kernel;
        Kernel { file: self.form.file, name, grid: [blocks, heads / at_a_time, 1], threads: THREADS, shared }
    }

    fn on_tensor_cores(&self) -> bool {
        self.form.file == "attention_mma"
    }

    fn launch(&self, kernel: &Kernel, buffers: &[&Tensor]) -> Result<()> {
        gpu::launch(kernel, self.q.dtype(), buffers, &self.parameters)
    }
}

pub(super) fn forward(shape: &AttentionShape, inputs: Inputs) -> Result<Attended> {
    let call = Call::new(shape, inputs, &[])?;
    let (queries, q) = (call.q.dims()[0], call.q);
    let out = gpu::empty((queries, shape.q_width()), q.dtype(), q)?;
    let lse = gpu::empty((queries, shape.heads), DType::F32, q)?;
    let plan = inputs.segments.query_plan(&call.form.tiling, queries);
    let (visible, tiles) = (inputs.segments.visible().on(q.device())?, plan.on(q.device())?);
    let kernel = call.kernel(call.form.forward, plan.len() / 6, shape.heads);
    call.launch(&kernel, &[q, call.kv, call.prefix, &visible, &tiles, &out, &lse])?;
    Ok(Attended { out, lse })
}

/// The matrices that the backward kernels write.
struct Outputs {
    /// Gradients of the queries and of the keys and values; one matrix where the inputs are.
    qkv: Option<Qkv>,
    /// f32.
    prefix: Option<Tensor>,
    wanted: Wanted,
}

impl Outputs {
    fn new(shape: &AttentionShape, inputs: &Inputs, needs: Needs) -> Result<Self> {
        let (q, kv) = (inputs.qkv.queries(), inputs.qkv.keys_values());
        let prefix_rows = inputs.prefix.map(|p| p.dims()[0]);
        let (queries, keys) = match needs {
            Needs::All => (q.dims()[0], kv.dims()[0]),
            Needs::Prefixes if inputs.prefix.is_some() => (0, 0),
            Needs::Prefixes => inputs.prefix_rows(),
        };
        let none = needs == Needs::Prefixes && inputs.prefix.is_some();
        let qkv = match inputs.qkv {
            _ if none => None,
            Qkv::Fused(_) => Some(Qkv::Fused(gpu::empty((queries, q.dims()[1]), q.dtype(), q)?)),
            Qkv::Split { .. } => Some(Qkv::Split {
                q: gpu::empty((queries, shape.q_width()), q.dtype(), q)?,
                kv: gpu::empty((keys, shape.kv_width()), q.dtype(), q)?,
            }),
        };
        let prefix =
            prefix_rows.map(|rows| gpu::empty((rows, shape.kv_width()), DType::F32, q)).transpose()?;
        Ok(Self { qkv, prefix, wanted: Wanted { queries, keys, prefix: prefix_rows } })
    }
}

/// Whether the kernels turn gradients back: those on tensor cores do with heads of exactly their size, where the two
/// columns of a pair are in the same lane's registers.
fn turns_back(call: &Call, shape: &AttentionShape, rotation: &Rotation) -> bool {
    let fits = matches!(shape.head_dim, 64 | 128) && rotation.table.head_dim() == shape.head_dim;
    let (cos, sin) = rotation.table.tables();
    let readable = cos.dtype() == DType::F32 && gpu::aligned(&[], &[cos, sin]) == 1;
    call.on_tensor_cores() && fits && readable
}

/// cos, sin and positions as the kernels take them.
struct Turned<'a> {
    cos: &'a Tensor,
    sin: &'a Tensor,
    queries: Tensor,
    keys: Tensor,
}

/// Gradients of the inputs. On tensor cores the dQ kernel makes `delta` too; where it does not run over all queries, or
/// not on tensor cores, `delta` has a kernel of its own.
pub(super) fn backward(
    shape: &AttentionShape,
    inputs: Inputs,
    (out, lse): (&Tensor, &Tensor),
    (dout, rotation): (&Tensor, Option<Rotation>),
    needs: Needs,
) -> Result<Gradients> {
    let mut call = Call::new(shape, inputs, &[out, dout])?;
    let (q, device) = (call.q, call.q.device());
    let outputs = Outputs::new(shape, &inputs, needs)?;
    let delta = gpu::empty((q.dims()[0], shape.heads), DType::F32, q)?;
    if !call.on_tensor_cores() || outputs.wanted.queries < q.dims()[0] {
        let pairs = q.dims()[0] * shape.heads;
        let kernel = Kernel::new("attention", "attention_delta", pairs.div_ceil(THREADS / 8), THREADS);
        call.launch(&kernel, &[out, dout, &delta])?;
    }
    let rotation = rotation.filter(|r| turns_back(&call, shape, r));
    call.parameters.rotated = u32::from(rotation.is_some());
    let visible = inputs.segments.visible().on(device)?;
    // Without a rotation any buffers do.
    let turned = match &rotation {
        Some(r) => {
            let (cos, sin) = r.table.tables();
            Turned { cos, sin, queries: r.queries.on(device)?, keys: r.keys.on(device)? }
        }
        None => Turned { cos: lse, sin: lse, queries: visible.clone(), keys: visible.clone() },
    };
    let seen = [q, call.kv, call.prefix, &visible];
    if let Some(qkv) = &outputs.qkv {
        let plan = inputs.segments.query_plan(&call.form.tiling, outputs.wanted.queries);
        let kernel = call.kernel(call.form.dq, plan.len() / 6, shape.heads);
        let (tiles, dq) = (plan.on(device)?, qkv.queries());
        let turn = [turned.cos, turned.sin, &turned.queries];
        match call.on_tensor_cores() {
            true => {
                call.launch(&kernel, &[&seen[..], &[&tiles, out, dout, lse], &turn, &[&delta, dq]].concat())?
            }
            false => call.launch(&kernel, &[&seen[..], &[&tiles, dout, lse, &delta, dq]].concat())?,
        }
    }
    let plan = inputs.segments.key_plan(&call.form.tiling, &outputs.wanted);
    let slot = call.form.tiling.key_tile * shape.kv_width();
    let partials = gpu::empty((plan.slots.max(1), slot), DType::F32, q)?;
    // Where a matrix is not wanted no item writes to it: any buffer does.
    let dkv = outputs.qkv.as_ref().map_or(call.kv, Qkv::keys_values);
    let items = plan.items.on(device)?;
    let kernel = call.kernel(call.form.dkv, plan.items.len() / 6, shape.kv_heads);
    let turn = [turned.cos, turned.sin, &turned.keys];
    let turn = if call.on_tensor_cores() { &turn[..] } else { &[] };
    call.launch(&kernel, &[&seen[..], &[&items, dout, lse, &delta], turn, &[dkv, &partials]].concat())?;
    reduce(&call, shape, &plan, &Sums { partials: &partials, dkv, prefix: outputs.prefix.as_ref(), turned })?;
    Ok(Gradients { qkv: outputs.qkv, prefix: outputs.prefix, rotated_back: rotation.is_some() })
}

/// What the reduction reads and writes.
struct Sums<'a> {
    partials: &'a Tensor,
    dkv: &'a Tensor,
    prefix: Option<&'a Tensor>,
    turned: Turned<'a>,
}

/// Adds up the partial sums of the prefixes' rows.
fn reduce(
    call: &Call,
    shape: &AttentionShape,
    plan: &super::plan::UploadedKeyPlan,
    sums: &Sums,
) -> Result<()> {
    let (key_tile, width) = (call.form.tiling.key_tile, shape.kv_width());
    let Sums { partials, dkv, prefix, turned } = sums;
    let parameters = AttentionReduceParameters {
        key_tile: gpu::uint(key_tile),
        width: gpu::uint(width),
        dkv_width: call.parameters.dkv_width,
        dkv_column: call.parameters.dkv_column,
        to_prefix: u32::from(prefix.is_some()),
        aligned: gpu::aligned(&[width, call.parameters.dkv_width as usize, shape.q_width()], &[]),
        rotated: if prefix.is_some() { 0 } else { call.parameters.rotated },
        head_dim: gpu::uint(shape.head_dim),
    };
    let reductions = plan.reductions.on(partials.device())?;
    let mut kernel = Kernel::new("attention", "attention_reduce", plan.reductions.len() / 4, THREADS);
    kernel.grid[1] = (key_tile * width.div_ceil(8)).div_ceil(THREADS);
    // The one of the two that is not written may be any buffer.
    let written = [dkv, prefix.unwrap_or(partials)];
    let buffers = [partials, &reductions, turned.cos, turned.sin, &turned.keys, written[0], written[1]];
    gpu::launch(&kernel, call.q.dtype(), &buffers, &parameters)
}

#[cfg(test)]
mod tests;
