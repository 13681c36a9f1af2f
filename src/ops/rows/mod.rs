//! Rows of a matrix by number. The last layer of the model computes its queries, output and MLP for the target rows only:
//! they are selected from the matrix of all rows, and their gradients are written back. In the gradient of a prefix pass the
//! prefix rows, which are the first, get the gradients that the example passes computed for them.
//!
//! ```text
//! y[i]            = x[rows[i]]                                  forward
//! dx[t]           = dy[i] if rows[i] = t, else 0                backward
//! x[rows[i]]     += dy[i]                                       add
//! x[t, column..] += leading[t]            t < P                 add_leading
//! ```
//!
//! The numbers ascend, so that no row is written twice.

mod cpu;
mod gpu;
mod reference;
#[cfg(test)]
mod tests;

pub use reference::reference;

use super::backend::{Route, route};
use super::cpu::check_same_dtype;
use super::{IndexView, profile};
use crate::{Error, Result};
use candle_core::Tensor;

/// Rows `rows` of `x` [T, C]: [rows, C] in the dtype of `x`.
///
/// # Errors
/// Returns an error if the numbers do not ascend or are not under T, or a device operation fails.
pub fn forward(x: &Tensor, rows: IndexView) -> Result<Tensor> {
    const OP: &str = "rows";
    let _timed = profile::scope(OP, x.device());
    let (t, width) = x.dims2()?;
    check_numbers(OP, rows, t)?;
    if rows.host().is_empty() {
        // A view would keep `x` in memory.
        return super::no_rows(width, x.dtype(), x.device());
    }
    match route(x) {
        Route::Cpu => cpu::forward(x, rows),
        Route::Kernel => gpu::forward(x, rows),
    }
}

/// Gradient of [`forward`]'s input [T, C] from that of its output, `dy` [rows, C], in the dtype of `dy`: zero in rows that
/// were not selected.
///
/// # Errors
/// As [`forward`]; also if `dy` has another shape.
pub fn backward(dy: &Tensor, rows: IndexView, t: usize) -> Result<Tensor> {
    const OP: &str = "rows backward";
    let _timed = profile::scope(OP, dy.device());
    let (_, c) = dy.dims2()?;
    check_numbers(OP, rows, t)?;
    check_gradient(OP, dy, rows, c)?;
    match route(dy) {
        Route::Cpu => cpu::backward(dy, rows, t),
        Route::Kernel => gpu::backward(dy, rows, t),
    }
}

/// `x` [T, C] with `dy` [rows, C] added to its rows `rows`. A GPU's kernel changes `x` in place.
///
/// # Errors
/// As [`backward`]; also if `dy` has another dtype than `x`.
pub fn add(x: Tensor, dy: &Tensor, rows: IndexView) -> Result<Tensor> {
    const OP: &str = "rows add";
    let _timed = profile::scope(OP, x.device());
    let (t, c) = x.dims2()?;
    check_numbers(OP, rows, t)?;
    check_gradient(OP, dy, rows, c)?;
    check_same_dtype(OP, &x, dy.dtype())?;
    if rows.host().is_empty() {
        return Ok(x);
    }
    match route(&x) {
        Route::Cpu => cpu::add(&x, dy, rows),
        Route::Kernel => gpu::add(x, dy, rows),
    }
}

/// `x` [T, W] with `leading` [P, w] added to its first P rows, in the w columns from `column` on. The sum is computed in the
/// dtype of `leading`, which kernels read in f32, and rounded to that of `x`. A GPU's kernel changes `x` in place.
///
/// # Errors
/// Returns an error if `x` has fewer rows or columns than that, or a device operation fails.
pub fn add_leading(x: Tensor, leading: &Tensor, column: usize) -> Result<Tensor> {
    const OP: &str = "rows add_leading";
    let _timed = profile::scope(OP, x.device());
    let ((t, width), (p, columns)) = (x.dims2()?, leading.dims2()?);
    if p > t || column + columns > width {
        return Err(Error::shape(
            OP,
            format!("at most {t} rows, and columns from {column} up to {width}"),
            format!("{p} rows of {columns} columns"),
        ));
    }
    if leading.elem_count() == 0 {
        return Ok(x);
    }
    match route(&x) {
        Route::Cpu => cpu::add_leading(&x, leading, column),
        Route::Kernel => gpu::add_leading(x, leading, column),
    }
}

/// Returns an error for numbers that do not ascend or are not under `limit`.
fn check_numbers(op: &'static str, rows: IndexView, limit: usize) -> Result<()> {
    let numbers = rows.host();
    let fail = |found: String| {
        let expected = format!("ascending row numbers under {limit}");
        Err(Error::shape(op, expected, found))
    };
    if let Some(pair) = numbers.windows(2).find(|pair| pair[0] >= pair[1]) {
        return fail(format!("{} before {}", pair[0], pair[1]));
    }
    match numbers.last() {
        Some(last) if *last as usize >= limit => fail(last.to_string()),
        _ => Ok(()),
    }
}

/// Returns an error if `dy` is not a matrix of one row for each number and `width` columns.
fn check_gradient(op: &'static str, dy: &Tensor, rows: IndexView, width: usize) -> Result<()> {
    let expected = (rows.host().len(), width);
    if dy.dims2().ok() == Some(expected) {
        return Ok(());
    }
    Err(Error::shape(op, format!("{expected:?}"), format!("{:?}", dy.dims())))
}
