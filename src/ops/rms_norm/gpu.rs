//! Launches of `kernels/rms_norm.cu`.

use super::{BackwardInputs, Normed, ResidualAdd, RmsNorm};
use crate::Result;
use crate::ops::cpu::check_same_dtype;
use crate::ops::gpu::{self, Kernel};
use candle_core::{DType, Tensor};

gpu::parameters!(RmsNormParameters {
    rows: u32,
    width: u32,
    eps: f32,
    multiplier: f32,
    add: u32,
    aligned: u32,
});

/// Threads for a row: each keeps 16 elements of it in registers, and reads the elements beyond 6,144 again.
fn row_threads(width: usize) -> usize {
    width.div_ceil(16).next_multiple_of(32).min(384)
}

impl RmsNorm {
    fn parameters(
        &self,
        x: &Tensor,
        multiplier: Option<f64>,
        tensors: &[&Tensor],
    ) -> Result<RmsNormParameters> {
        let (rows, width) = x.dims2()?;
        Ok(RmsNormParameters {
            rows: gpu::uint(rows),
            width: gpu::uint(width),
            eps: self.eps as f32,
            multiplier: multiplier.unwrap_or(1.0) as f32,
            add: u32::from(multiplier.is_some()),
            aligned: gpu::aligned(&[width], tensors),
        })
    }
}

pub(super) fn forward(norm: &RmsNorm, x: &Tensor, add: Option<ResidualAdd>, out: DType) -> Result<Normed> {
    check_same_dtype("rms_norm", x, out)?;
    gpu::check_dtype("rms_norm", &[&norm.weight, add.map_or(x, |a| a.delta)], x.dtype())?;
    let (t, c) = x.dims2()?;
    let (delta, residual) = match add {
        Some(ResidualAdd { delta, .. }) => (delta, gpu::empty((t, c), x.dtype(), x)?),
        None => (x, x.clone()),
    };
    let (normed, rstd) = (gpu::empty((t, c), x.dtype(), x)?, gpu::empty(t, DType::F32, x)?);
    let parameters = norm.parameters(x, add.map(|a| a.multiplier), &[x, delta, &norm.weight])?;
    // Without a delta the kernel does not write the residual stream: any buffer can stand for it.
    let written_residual = if add.is_some() { &residual } else { &normed };
    let kernel = Kernel::new("rms_norm", "rms_norm_forward", t, row_threads(c));
    let buffers = [x, delta, &norm.weight, written_residual, &normed, &rstd];
    // SAFETY: the module has checked the shapes; the dtypes were checked above.
    unsafe { gpu::launch(&kernel, x.dtype(), &buffers, &parameters) }?;
    Ok(Normed { residual, normed, rstd })
}

pub(super) fn backward(norm: &RmsNorm, inputs: BackwardInputs) -> Result<Tensor> {
    let BackwardInputs { dy, residual, rstd, dresidual } = inputs;
    let (t, c) = residual.dims2()?;
    let dx = gpu::empty((t, c), dy.dtype(), dy)?;
    // Without a gradient of the residual stream the kernel does not read it: any buffer can stand for it.
    let read_dresidual = dresidual.unwrap_or(dy);
    let tensors = [dy, residual, &norm.weight, read_dresidual];
    gpu::check_dtype("rms_norm backward", &tensors, dy.dtype())?;
    gpu::check_dtype("rms_norm backward", &[rstd], DType::F32)?;
    let parameters = norm.parameters(dy, dresidual.map(|_| 1.0), &tensors)?;
    let kernel = Kernel::new("rms_norm", "rms_norm_backward", t, row_threads(c));
    let buffers = [dy, residual, rstd, &norm.weight, read_dresidual, &dx];
    // SAFETY: the module has checked the shapes; the dtypes were checked above.
    unsafe { gpu::launch(&kernel, dy.dtype(), &buffers, &parameters) }?;
    Ok(dx)
}
