//! The backward pass on a GPU.

use super::plan::{GradRows, UploadedKeyPlan};
use super::{AttentionCall, AttentionReduceParameters, THREADS};
use crate::Result;
use crate::ops::attention::{AttentionShape, GradTargets, Gradients, Inputs, Qkv, Rotation};
use crate::ops::gpu::{self, Kernel};
use candle_core::{DType, Tensor};

/// The matrices that the backward kernels write.
struct BackwardOutputs {
    /// Gradients of the queries and of the keys and values; one matrix if the inputs are.
    qkv: Option<Qkv>,
    /// f32.
    prefix: Option<Tensor>,
    rows: GradRows,
}

impl BackwardOutputs {
    fn new(shape: &AttentionShape, inputs: &Inputs, targets: GradTargets) -> Result<Self> {
        let (q, kv) = (inputs.qkv.queries(), inputs.qkv.keys_values());
        let prefix_rows = inputs.prefix.map(|p| p.dims()[0]);
        let (queries, keys) = match targets {
            GradTargets::All => (q.dims()[0], kv.dims()[0]),
            GradTargets::Prefixes if inputs.prefix.is_some() => (0, 0),
            GradTargets::Prefixes => inputs.prefix_rows(),
        };
        let none = targets == GradTargets::Prefixes && inputs.prefix.is_some();
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
        Ok(Self { qkv, prefix, rows: GradRows { queries, keys, prefix: prefix_rows } })
    }
}

/// Whether the kernels rotate gradients back: those on tensor cores do if heads have exactly their size, so that the two
/// columns of a pair are in the same lane's registers.
fn rotates_back(call: &AttentionCall, shape: &AttentionShape, rotation: &Rotation) -> bool {
    let fits = matches!(shape.head_dim, 64 | 128) && rotation.table.head_dim() == shape.head_dim;
    let (cos, sin) = rotation.table.tables();
    let readable = cos.dtype() == DType::F32 && gpu::aligned(&[], &[cos, sin]) == 1;
    call.on_tensor_cores() && fits && readable
}

/// The rotation's tables and positions.
struct RotationBuffers<'a> {
    cos: &'a Tensor,
    sin: &'a Tensor,
    queries: Tensor,
    keys: Tensor,
}

impl<'a> RotationBuffers<'a> {
    /// Those of `rotation`. Without a rotation the kernels do not read them: any buffers stand for them.
    fn new(rotation: Option<&Rotation<'a>>, lse: &'a Tensor, visible: &Tensor) -> Result<Self> {
        Ok(match rotation {
            Some(r) => {
                let (cos, sin) = r.table.tables();
                let device = lse.device();
                Self { cos, sin, queries: r.queries.to_device(device)?, keys: r.keys.to_device(device)? }
            }
            None => Self { cos: lse, sin: lse, queries: visible.clone(), keys: visible.clone() },
        })
    }
}

/// One call of the backward kernels.
struct BackwardCall<'a> {
    call: AttentionCall<'a>,
    shape: &'a AttentionShape,
    inputs: Inputs<'a>,
    out: &'a Tensor,
    lse: &'a Tensor,
    dout: &'a Tensor,
    /// `rowsum(do * out)`, [queries, H].
    delta: Tensor,
    /// First and last visible key of each query.
    visible: Tensor,
    rotation: RotationBuffers<'a>,
    outputs: BackwardOutputs,
}

/// Gradients of the inputs. On tensor cores the dQ kernel computes `delta` too. If it does not run over all queries, or not on
/// tensor cores, `delta` has a kernel of its own.
pub(super) fn run(
    shape: &AttentionShape,
    inputs: Inputs,
    (out, lse): (&Tensor, &Tensor),
    (dout, rotation): (&Tensor, Option<Rotation>),
    targets: GradTargets,
) -> Result<Gradients> {
    let mut call = AttentionCall::new(shape, inputs, &[out, dout])?;
    let (q, device) = (call.q, call.q.device());
    let outputs = BackwardOutputs::new(shape, &inputs, targets)?;
    let delta = gpu::empty((q.dims()[0], shape.heads), DType::F32, q)?;
    if !call.on_tensor_cores() || outputs.rows.queries < q.dims()[0] {
        let pairs = q.dims()[0] * shape.heads;
        let kernel = Kernel::new("attention", "attention_delta", pairs.div_ceil(THREADS / 8), THREADS);
        // SAFETY: all three have a row for each query; the call has checked the dtypes.
        unsafe { call.launch(&kernel, &[out, dout, &delta]) }?;
    }
    let rotation = rotation.filter(|r| rotates_back(&call, shape, r));
    call.parameters.rotated = u32::from(rotation.is_some());
    let visible = inputs.segments.visible().to_device(device)?;
    let rotated_back = rotation.is_some();
    let rotation = RotationBuffers::new(rotation.as_ref(), lse, &visible)?;
    let call = BackwardCall { call, shape, inputs, out, lse, dout, delta, visible, rotation, outputs };
    call.query_gradients()?;
    call.key_value_gradients()?;
    Ok(Gradients { qkv: call.outputs.qkv, prefix: call.outputs.prefix, rotated_back })
}

impl BackwardCall<'_> {
    /// The buffers that the dQ and the dK and dV kernels read first.
    fn inputs(&self) -> [&Tensor; 4] {
        [self.call.q, self.call.kv, self.call.prefix, &self.visible]
    }

    fn query_gradients(&self) -> Result<()> {
        let Some(qkv) = &self.outputs.qkv else { return Ok(()) };
        let (call, dq) = (&self.call, qkv.queries());
        let plan = self.inputs.segments.query_plan(&call.kernels.tiling, self.outputs.rows.queries);
        let kernel = call.kernel(call.kernels.dq, plan.len() / 6, self.shape.heads);
        let (tiles, inputs) = (plan.to_device(call.q.device())?, self.inputs());
        let Self { out, lse, dout, delta, rotation, .. } = self;
        let buffers: Vec<&Tensor> = match call.on_tensor_cores() {
            true => {
                let rotation = [rotation.cos, rotation.sin, &rotation.queries];
                [&inputs[..], &[&tiles, *out, *dout, *lse], &rotation, &[delta, dq]].concat()
            }
            false => [&inputs[..], &[&tiles, *dout, *lse, delta, dq]].concat(),
        };
        // SAFETY: as in the forward pass; `dq` has the rows of the plan.
        unsafe { call.launch(&kernel, &buffers) }
    }

    fn key_value_gradients(&self) -> Result<()> {
        let (call, q) = (&self.call, self.call.q);
        let plan = self.inputs.segments.key_plan(&call.kernels.tiling, &self.outputs.rows);
        let slot = call.kernels.tiling.key_tile * self.shape.kv_width();
        let partials = gpu::empty((plan.slots.max(1), slot), DType::F32, q)?;
        // If the gradient of a matrix is not computed no item writes it: any buffer stands for it.
        let dkv = self.outputs.qkv.as_ref().map_or(call.kv, Qkv::keys_values);
        let items = plan.items.to_device(q.device())?;
        let kernel = call.kernel(call.kernels.dkv, plan.items.len() / 6, self.shape.kv_heads);
        let Self { lse, dout, delta, rotation, .. } = self;
        let rotation = [rotation.cos, rotation.sin, &rotation.keys];
        let rotation = if call.on_tensor_cores() { &rotation[..] } else { &[] };
        let inputs = self.inputs();
        let buffers = [&inputs[..], &[&items, *dout, *lse, delta], rotation, &[dkv, &partials]].concat();
        // SAFETY: as in the forward pass; `dkv` has the rows of the plan, and `partials` its slots.
        unsafe { call.launch(&kernel, &buffers) }?;
        self.reduce(&plan, &partials, dkv)
    }

    /// Adds up the partial sums of the prefixes' rows.
    fn reduce(&self, plan: &UploadedKeyPlan, partials: &Tensor, dkv: &Tensor) -> Result<()> {
        let (call, prefix, rotation) = (&self.call, self.outputs.prefix.as_ref(), &self.rotation);
        let (key_tile, width) = (call.kernels.tiling.key_tile, self.shape.kv_width());
        let widths = [width, call.parameters.dkv_width as usize, self.shape.q_width()];
        let parameters = AttentionReduceParameters {
            key_tile: gpu::uint(key_tile),
            width: gpu::uint(width),
            dkv_width: call.parameters.dkv_width,
            dkv_column: call.parameters.dkv_column,
            to_prefix: u32::from(prefix.is_some()),
            aligned: gpu::aligned(&widths, &[]),
            rotated: if prefix.is_some() { 0 } else { call.parameters.rotated },
            head_dim: gpu::uint(self.shape.head_dim),
        };
        let reductions = plan.reductions.to_device(partials.device())?;
        let mut kernel = Kernel::new("attention", "attention_reduce", plan.reductions.len() / 4, THREADS);
        kernel.grid[1] = (key_tile * width.div_ceil(8)).div_ceil(THREADS);
        // One of the two outputs is not written: any buffer stands for it.
        let written = [dkv, prefix.unwrap_or(partials)];
        let buffers =
            [partials, &reductions, rotation.cos, rotation.sin, &rotation.keys, written[0], written[1]];
        // SAFETY: the reductions are of the plan's slots and of rows of the matrix that is written.
        unsafe { gpu::launch(&kernel, call.q.dtype(), &buffers, &parameters) }
    }
}
