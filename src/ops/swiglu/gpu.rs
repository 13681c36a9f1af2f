//! Launches of `kernels/swiglu.cu`.

use super::check;
use crate::Result;
use crate::ops::cpu::check_same_dtype;
use crate::ops::gpu::{self, Kernel};
use candle_core::Tensor;

gpu::parameters!(SwigluParameters { rows: u32, width: u32, aligned: u32 });

pub(super) fn forward(gate_up: &Tensor) -> Result<Tensor> {
    let (t, f) = check(gate_up)?;
    let a = gpu::empty((t, f), gate_up.dtype(), gate_up)?;
    let (kernel, parameters) = kernel("swiglu_forward", (t, f), &[gate_up, &a]);
    // SAFETY: `gate_up` is [t, 2f], and `a` [t, f].
    unsafe { gpu::launch(&kernel, gate_up.dtype(), &[gate_up, &a], &parameters) }?;
    Ok(a)
}

pub(super) fn backward(da: &Tensor, gate_up: &Tensor) -> Result<Tensor> {
    check_same_dtype("swiglu backward", da, gate_up.dtype())?;
    let (t, f) = check(gate_up)?;
    let dgate_up = gpu::empty((t, 2 * f), da.dtype(), da)?;
    let (kernel, parameters) = kernel("swiglu_backward", (t, f), &[da, gate_up, &dgate_up]);
    // SAFETY: the module has checked that `da` is [t, f]; both others are [t, 2f].
    unsafe { gpu::launch(&kernel, da.dtype(), &[da, gate_up, &dgate_up], &parameters) }?;
    Ok(dgate_up)
}

/// The kernel `name` for an activation of this shape, and its parameters.
fn kernel(
    name: &'static str,
    (rows, width): (usize, usize),
    buffers: &[&Tensor],
) -> (Kernel, SwigluParameters) {
    let aligned = gpu::aligned(&[width], buffers);
    let parameters = SwigluParameters { rows: gpu::uint(rows), width: gpu::uint(width), aligned };
    // Each thread computes 8 elements of a row of the activation.
    let threads = gpu::balanced_threads(width.div_ceil(8));
    let mut kernel = Kernel::new("swiglu", name, rows, threads);
    kernel.grid[1] = width.div_ceil(8 * threads);
    (kernel, parameters)
}
