//! Launches of `kernels/rows.cu`.

use crate::Result;
use crate::ops::IndexView;
use crate::ops::gpu::{self, Kernel};
use candle_core::{DType, Tensor};

gpu::parameters!(RowsParameters { width: u32, count: u32, column: u32, columns: u32, aligned: u32 });

/// Threads for a row, 8 elements each at a time.
fn row_threads(columns: usize) -> usize {
    columns.div_ceil(8).next_multiple_of(32).min(256)
}

/// Parameters of the kernels that process all columns.
fn parameters(width: usize, count: usize, tensors: &[&Tensor]) -> RowsParameters {
    RowsParameters {
        width: gpu::uint(width),
        count: gpu::uint(count),
        column: 0,
        columns: gpu::uint(width),
        aligned: gpu::aligned(&[width], tensors),
    }
}

pub(super) fn forward(x: &Tensor, rows: IndexView) -> Result<Tensor> {
    let (count, c) = (rows.host().len(), x.dims2()?.1);
    let y = gpu::empty((count, c), x.dtype(), x)?;
    let kernel = Kernel::new("rows", "rows_forward", count, row_threads(c));
    let parameters = parameters(c, count, &[x]);
    let numbers = rows.to_device(x.device())?;
    // SAFETY: the module has checked that the numbers are rows of `x`.
    unsafe { gpu::launch(&kernel, x.dtype(), &[x, &numbers, &y], &parameters) }?;
    Ok(y)
}

pub(super) fn backward(dy: &Tensor, rows: IndexView, t: usize) -> Result<Tensor> {
    let (count, c) = (rows.host().len(), dy.dims2()?.1);
    let dx = gpu::empty((t, c), dy.dtype(), dy)?;
    let kernel = Kernel::new("rows", "rows_backward", t, row_threads(c));
    let parameters = parameters(c, count, &[dy]);
    let numbers = rows.to_device(dy.device())?;
    // SAFETY: the module has checked that `dy` has a row for each number.
    unsafe { gpu::launch(&kernel, dy.dtype(), &[dy, &numbers, &dx], &parameters) }?;
    Ok(dx)
}

pub(super) fn add(x: Tensor, dy: &Tensor, rows: IndexView) -> Result<Tensor> {
    let (count, c) = (rows.host().len(), x.dims2()?.1);
    let kernel = Kernel::new("rows", "rows_add", count, row_threads(c));
    let parameters = parameters(c, count, &[&x, dy]);
    let numbers = rows.to_device(x.device())?;
    // SAFETY: the module has checked that the numbers are rows of `x`, and shape and dtype of `dy`.
    unsafe { gpu::launch(&kernel, x.dtype(), &[&x, dy, &numbers], &parameters) }?;
    Ok(x)
}

pub(super) fn add_leading(x: Tensor, leading: &Tensor, column: usize) -> Result<Tensor> {
    let ((_, width), (p, columns)) = (x.dims2()?, leading.dims2()?);
    let leading = leading.to_dtype(DType::F32)?;
    let parameters = RowsParameters {
        column: gpu::uint(column),
        columns: gpu::uint(columns),
        aligned: gpu::aligned(&[width, column, columns], &[&x, &leading]),
        ..parameters(width, p, &[])
    };
    let kernel = Kernel::new("rows", "rows_add_leading", p, row_threads(columns));
    // SAFETY: the module has checked that `leading` lies inside of `x`.
    unsafe { gpu::launch(&kernel, x.dtype(), &[&x, &leading], &parameters) }?;
    Ok(x)
}
