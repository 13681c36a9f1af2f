//! Launches of `kernels/ssd.cu`: the segments of a level are independent, and each level is a launch.

mod lists;

pub(in crate::ops) use lists::SsdLists;

use super::{SsdGradients, SsdInputs, SsdOutput, SsdShape, SsdWeights};
use crate::ops::cpu::check_same_dtype;
use crate::ops::gpu::{self, Kernel};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use lists::{StateOrigin, StateSums};
use std::ops::Range;

gpu::parameters!(SsdParameters {
    rows: u32,
    heads: u32,
    head_dim: u32,
    state: u32,
    groups: u32,
    width: u32,
    inner: u32,
    parts: u32,
    slices: u32,
    slice_units: u32,
    first_item: u32,
    output: u32,
    low: f32,
    high: f32,
});
gpu::parameters!(SsdSumParameters { first: u32, state_len: u32 });

/// As `PART` in `kernels/ssd.cu`.
const PART: usize = 32;
/// Units whose gradients of B and C one block adds up.
const SLICE_UNITS: usize = 4;
/// Columns of a state at most: a thread has one.
const MAX_STATE: usize = 256;

/// What all launches of a pass share.
struct GpuPass<'a> {
    inputs: SsdInputs<'a>,
    shape: &'a SsdShape,
    weights: &'a SsdWeights,
    lists: &'a SsdLists,
    /// r in f32.
    r: Tensor,
    items: Tensor,
    segments: Tensor,
    parameters: SsdParameters,
}

impl<'a> GpuPass<'a> {
    fn new(
        op: &'static str,
        inputs: SsdInputs<'a>,
        shape: &'a SsdShape,
        weights: &'a SsdWeights,
    ) -> Result<Self> {
        if shape.state > MAX_STATE {
            let expected = format!("a state of at most {MAX_STATE} on a GPU");
            return Err(Error::Shape { op, expected, found: format!("{}", shape.state) });
        }
        gpu::check_dtype(op, &[&weights.a, &weights.d, &weights.dt_bias], DType::F32)?;
        gpu::check_dtype(op, inputs.states.as_slice(), DType::F32)?;
        let (lists, device) = (inputs.plan.ssd_lists(), inputs.xbc.device());
        let parts = shape.head_dim.div_ceil(PART);
        let number = gpu::uint;
        let parameters = SsdParameters {
            rows: number(inputs.xbc.dims()[0]),
            heads: number(shape.heads),
            head_dim: number(shape.head_dim),
            state: number(shape.state),
            groups: number(shape.groups),
            width: number(shape.width()),
            inner: number(shape.inner()),
            parts: number(parts),
            slices: number((shape.heads / shape.groups * parts).div_ceil(SLICE_UNITS)),
            slice_units: number(SLICE_UNITS),
            first_item: 0,
            output: 1,
            low: weights.dt_limit.0 as f32,
            high: weights.dt_limit.1 as f32,
        };
        Ok(Self {
            inputs,
            shape,
            weights,
            lists,
            r: inputs.dt.to_dtype(DType::F32)?,
            items: lists.item_list.to_device(device)?,
            segments: lists.segment_list.to_device(device)?,
            parameters,
        })
    }

    fn device(&self) -> &Device {
        self.inputs.xbc.device()
    }

    fn kernel(&self, name: &'static str, grid: [usize; 2]) -> Kernel {
        let mut kernel = Kernel::new("ssd", name, grid[0], self.shape.state.next_multiple_of(32).max(32));
        kernel.grid[1] = grid[1];
        kernel
    }

    /// States in f32, at least one: a driver allocates no tensor without elements.
    fn states(&self, n: usize) -> Result<Tensor> {
        gpu::empty((n.max(1), self.shape.inner(), self.shape.state), DType::F32, self.inputs.xbc)
    }

    /// Units of all heads.
    fn units(&self) -> usize {
        self.shape.heads * self.shape.head_dim.div_ceil(PART)
    }

    /// Writes the end states of the items of a level to `memory`, and their rows of `y` if it is given.
    fn forward_level(&self, items: &Range<usize>, memory: &Tensor, y: Option<&Tensor>) -> Result<()> {
        let (SsdInputs { xbc, states, .. }, SsdWeights { a, d, dt_bias, .. }) = (self.inputs, self.weights);
        let parameters = SsdParameters {
            first_item: gpu::uint(items.start),
            output: u32::from(y.is_some()),
            ..self.parameters
        };
        // Without given states or y any buffer can stand for them.
        let unused = gpu::empty(1, xbc.dtype(), xbc)?;
        let (given, y) = (states.unwrap_or(&self.r), y.unwrap_or(&unused));
        let buffers = [xbc, &self.r, a, d, dt_bias, given, &self.items, &self.segments, memory, y];
        let kernel = self.kernel("ssd_forward", [items.len(), self.units()]);
        // SAFETY: the module has checked the shapes and the plan; the dtypes were checked above.
        unsafe { gpu::launch(&kernel, xbc.dtype(), &buffers, &parameters) }
    }

    /// Writes the sums of a range to `out`.
    fn sum_states(
        &self,
        sums: &StateSums,
        range: &Range<usize>,
        [starts, dends]: [&Tensor; 2],
        out: &Tensor,
    ) -> Result<()> {
        let state_len = self.shape.inner() * self.shape.state;
        let (offsets, terms) = (sums.offsets.to_device(self.device())?, sums.terms.to_device(self.device())?);
        let mut kernel = Kernel::new("ssd", "ssd_sum_states", range.len(), 256);
        kernel.grid[1] = state_len.div_ceil(256);
        let parameters = SsdSumParameters { first: gpu::uint(range.start), state_len: gpu::uint(state_len) };
        let buffers = [starts, dends, &offsets, &terms, out];
        // SAFETY: the module has checked the shapes and the plan; the dtypes were checked above.
        unsafe { gpu::launch(&kernel, self.inputs.xbc.dtype(), &buffers, &parameters) }
    }
}

pub(super) fn forward(inputs: SsdInputs, shape: &SsdShape, weights: &SsdWeights) -> Result<SsdOutput> {
    let pass = GpuPass::new("scan", inputs, shape, weights)?;
    let memory = pass.states(pass.lists.slots)?;
    let y = gpu::empty((inputs.xbc.dims()[0], shape.inner()), inputs.xbc.dtype(), inputs.xbc)?;
    for items in &pass.lists.levels {
        pass.forward_level(items, &memory, Some(&y))?;
    }
    let ends = inputs.plan.ends();
    if ends == 0 {
        return Ok(SsdOutput { y, ends: None });
    }
    for (end, source) in &pass.lists.copies {
        let state = match (*source, inputs.states) {
            (StateOrigin::Given(state), Some(states)) => states.narrow(0, state, 1)?,
            (StateOrigin::Segment(segment), _) => match pass.lists.slot(segment) {
                Some(slot) => memory.narrow(0, slot, 1)?,
                None => unreachable!("the end of segment {segment} is wanted"),
            },
            _ => Tensor::zeros((1, shape.inner(), shape.state), DType::F32, pass.device())?,
        };
        memory.slice_set(&state.copy()?, 0, *end)?;
    }
    Ok(SsdOutput { y, ends: Some(memory.narrow(0, 0, ends)?) })
}

pub(super) fn backward(
    (dy, dends): (&Tensor, Option<&Tensor>),
    inputs: SsdInputs,
    shape: &SsdShape,
    weights: &SsdWeights,
) -> Result<SsdGradients> {
    const OP: &str = "scan backward";
    check_same_dtype(OP, dy, inputs.xbc.dtype())?;
    gpu::check_dtype(OP, dends.as_slice(), DType::F32)?;
    let pass = GpuPass::new(OP, inputs, shape, weights)?;
    let (lists, xbc, rows) = (pass.lists, inputs.xbc, inputs.xbc.dims()[0]);
    let memory = pass.states(lists.slots)?;
    for items in lists.levels.iter().rev().skip(1).rev() {
        pass.forward_level(items, &memory, None)?;
    }
    let slices = pass.parameters.slices as usize * shape.groups;
    let gradients = LevelGradients {
        dxbc: gpu::empty((rows, shape.width()), xbc.dtype(), xbc)?,
        starts: pass.states(lists.starts)?,
        end_gradients: pass.states(lists.gradients.last().map_or(0, |range| range.end))?,
        sides: gpu::empty((slices, rows, 2 * shape.state), DType::F32, xbc)?,
        dots: gpu::empty((rows, pass.units(), 2), DType::F32, xbc)?,
        memory,
    };
    // Without gradients of the ends any buffer can stand for them.
    let given = [&gradients.starts, dends.unwrap_or(&pass.r)];
    for (items, range) in lists.levels.iter().zip(&lists.gradients).rev() {
        pass.sum_states(lists.sums(dends.is_some()), range, given, &gradients.end_gradients)?;
        pass.backward_level(items, dy, &gradients)?;
    }
    let kernel = pass.kernel("ssd_backward_sides", [rows, shape.groups]);
    // SAFETY: the module has checked the shapes and the plan; the dtypes were checked above.
    unsafe { gpu::launch(&kernel, xbc.dtype(), &[&gradients.sides, &gradients.dxbc], &pass.parameters) }?;
    let dr = gpu::empty((rows, shape.heads), xbc.dtype(), xbc)?;
    let mut kernel = Kernel::new("ssd", "ssd_backward_steps", lists.segments, 32);
    kernel.grid[1] = shape.heads.div_ceil(32);
    let buffers = [&gradients.dots, &pass.r, &weights.a, &weights.dt_bias, &pass.segments, &dr];
    // SAFETY: the module has checked the shapes and the plan; the dtypes were checked above.
    unsafe { gpu::launch(&kernel, xbc.dtype(), &buffers, &pass.parameters) }?;
    let states = match inputs.states.map(|states| states.dims()[0]) {
        Some(n) => {
            let dstates = pass.states(n)?;
            pass.sum_states(&lists.given_sums(n, dends.is_some()), &(0..n), given, &dstates)?;
            Some(dstates)
        }
        None => None,
    };
    Ok(SsdGradients { xbc: gradients.dxbc, dt: dr, states })
}

/// What the backward pass of each level writes and reads.
struct LevelGradients {
    /// The end states from which segments start.
    memory: Tensor,
    /// [T, X].
    dxbc: Tensor,
    /// Gradients of the items' start states.
    starts: Tensor,
    /// Gradients of the segments' end states.
    end_gradients: Tensor,
    /// Gradients of B and C of each slice, [slices, T, 2 N].
    sides: Tensor,
    /// Two numbers of each row and unit.
    dots: Tensor,
}

impl GpuPass<'_> {
    fn backward_level(&self, items: &Range<usize>, dy: &Tensor, gradients: &LevelGradients) -> Result<()> {
        let (SsdInputs { xbc, states, .. }, SsdWeights { a, d, dt_bias, .. }) = (self.inputs, self.weights);
        let LevelGradients { memory, dxbc, starts, end_gradients, sides, dots } = gradients;
        let parameters = SsdParameters { first_item: gpu::uint(items.start), ..self.parameters };
        let given = states.unwrap_or(&self.r);
        let (items_list, segments) = (&self.items, &self.segments);
        let buffers = [
            dy, xbc, &self.r, a, d, dt_bias, given, memory, end_gradients, items_list, segments, dxbc,
            starts, sides, dots,
        ];
        let slices = self.parameters.slices as usize * self.shape.groups;
        let kernel = self.kernel("ssd_backward", [items.len(), slices]);
        // SAFETY: the module has checked the shapes and the plan; the dtypes were checked above.
        unsafe { gpu::launch(&kernel, xbc.dtype(), &buffers, &parameters) }
    }
}
