//! Launches of `kernels/gated_norm.cu`.

use super::{GatedNorm, GatedNormGradients, GatedNormed};
use crate::Result;
use crate::ops::cpu::check_same_dtype;
use crate::ops::gpu::{self, Kernel};
use candle_core::{DType, Tensor};

gpu::parameters!(GatedNormParameters { width: u32, groups: u32, eps: f32, aligned: u32 });

impl GatedNorm {
    fn kernel(&self, name: &'static str, tensors: &[&Tensor]) -> Result<(Kernel, GatedNormParameters)> {
        let (rows, width) = tensors[0].dims2()?;
        let width = width / self.groups;
        let parameters = GatedNormParameters {
            width: gpu::uint(width),
            groups: gpu::uint(self.groups),
            eps: self.eps as f32,
            aligned: gpu::aligned(&[width], tensors),
        };
        let threads = width.div_ceil(8).next_multiple_of(32).clamp(32, 256);
        Ok((Kernel::new("gated_norm", name, rows * self.groups, threads), parameters))
    }
}

pub(super) fn forward(norm: &GatedNorm, (y, z): (&Tensor, &Tensor), out: DType) -> Result<GatedNormed> {
    check_same_dtype("gated norm", y, out)?;
    check_same_dtype("gated norm", z, out)?;
    gpu::check_dtype("gated norm", &[&norm.weight], DType::F32)?;
    let (rows, width) = y.dims2()?;
    let normed = gpu::empty((rows, width), out, y)?;
    let rstd = gpu::empty((rows, norm.groups), DType::F32, y)?;
    let (kernel, parameters) = norm.kernel("gated_norm_forward", &[y, z, &norm.weight])?;
    // SAFETY: the module has checked the shapes and the plan; the dtypes were checked above.
    unsafe { gpu::launch(&kernel, out, &[y, z, &norm.weight, &normed, &rstd], &parameters) }?;
    Ok(GatedNormed { normed, rstd })
}

pub(super) fn backward(
    norm: &GatedNorm,
    dnormed: &Tensor,
    (y, z): (&Tensor, &Tensor),
    rstd: &Tensor,
) -> Result<GatedNormGradients> {
    const OP: &str = "gated norm backward";
    check_same_dtype(OP, y, dnormed.dtype())?;
    check_same_dtype(OP, z, dnormed.dtype())?;
    gpu::check_dtype(OP, &[&norm.weight, rstd], DType::F32)?;
    let dims = y.dims2()?;
    let (dy, dz) = (gpu::empty(dims, y.dtype(), y)?, gpu::empty(dims, y.dtype(), y)?);
    let (kernel, parameters) = norm.kernel("gated_norm_backward", &[dnormed, y, z, &norm.weight])?;
    // SAFETY: the module has checked the shapes and the plan; the dtypes were checked above.
    unsafe { gpu::launch(&kernel, y.dtype(), &[dnormed, y, z, rstd, &norm.weight, &dy, &dz], &parameters) }?;
    Ok(GatedNormGradients { y: dy, z: dz })
}
