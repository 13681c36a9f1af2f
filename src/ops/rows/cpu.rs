//! Rows by number on the CPU: candle's own ops.

use super::reference;
use crate::Result;
use crate::ops::IndexView;
use candle_core::Tensor;

pub(super) fn forward(x: &Tensor, rows: IndexView) -> Result<Tensor> {
    reference(x, rows)
}

pub(super) fn backward(dy: &Tensor, rows: IndexView, t: usize) -> Result<Tensor> {
    let zeros = Tensor::zeros((t, dy.dims2()?.1), dy.dtype(), dy.device())?;
    if rows.host().is_empty() {
        return Ok(zeros);
    }
    Ok(zeros.index_add(&rows.to_device(dy.device())?, dy, 0)?)
}

pub(super) fn add(x: &Tensor, dy: &Tensor, rows: IndexView) -> Result<Tensor> {
    Ok(x.index_add(&rows.to_device(x.device())?, dy, 0)?)
}

pub(super) fn add_leading(x: &Tensor, leading: &Tensor, column: usize) -> Result<Tensor> {
    let ((t, width), (p, columns)) = (x.dims2()?, leading.dims2()?);
    let (first, end) = (x.narrow(0, 0, p)?, column + columns);
    let part = first.narrow(1, column, columns)?;
    let sum = (part.to_dtype(leading.dtype())? + leading)?.to_dtype(x.dtype())?;
    let (left, right) = (first.narrow(1, 0, column)?, first.narrow(1, end, width - end)?);
    let parts: Vec<Tensor> = [left, sum, right].into_iter().filter(|part| part.elem_count() > 0).collect();
    let first = Tensor::cat(&parts, 1)?;
    Ok(if p == t { first } else { Tensor::cat(&[first, x.narrow(0, p, t - p)?], 0)? })
}
