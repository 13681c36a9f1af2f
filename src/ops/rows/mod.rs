//! Rows of a matrix by number. The last block of the model computes its queries, output and MLP for the target rows
//! alone: they are taken out of the matrix of all rows, and their gradients are put back. In the gradient of a prefix
//! pass the prefix rows, which are the first, get what the example passes found for them.
//!
//! ```text
//! y[i]            = x[rows[i]]                                  forward
//! dx[t]           = dy[i] where rows[i] = t, else 0             backward
//! x[rows[i]]     += dy[i]                                       add
//! x[t, column..] += leading[t]            t < P                 add_leading
//! ```
//!
//! The numbers ascend, so that no row is written twice.

use super::IndexView;
use super::gpu::{self, Kernel, Route};
use super::profile;
use crate::{Error, Result};
use candle_core::{DType, Tensor};

gpu::parameters!(RowsParameters { width: u32, count: u32, column: u32, columns: u32, aligned: u32 });

/// Threads that work on a row, 8 elements each at a time.
fn row_threads(columns: usize) -> usize {
    columns.div_ceil(8).next_multiple_of(32).min(256)
}

/// Parameters of the kernels that take whole rows.
fn parameters(width: usize, count: usize, tensors: &[&Tensor]) -> RowsParameters {
    RowsParameters {
        width: gpu::uint(width),
        count: gpu::uint(count),
        column: 0,
        columns: gpu::uint(width),
        aligned: gpu::aligned(&[width], tensors),
    }
}

/// Refuses numbers that do not ascend or are not under `limit`.
fn check(op: &'static str, rows: IndexView, limit: usize) -> Result<()> {
    let numbers = rows.host();
    let fail = |found: String| {
        let expected = format!("ascending row numbers under {limit}");
        Err(Error::Shape { op, expected, found })
    };
    if let Some(pair) = numbers.windows(2).find(|pair| pair[0] >= pair[1]) {
        return fail(format!("{} before {}", pair[0], pair[1]));
    }
    match numbers.last() {
        Some(last) if *last as usize >= limit => fail(last.to_string()),
        _ => Ok(()),
    }
}

/// Refuses `dy` if it is no matrix of a row for each number and of `width` columns.
fn check_gradient(op: &'static str, dy: &Tensor, rows: IndexView, width: usize) -> Result<()> {
    let expected = (rows.host().len(), width);
    if dy.dims2().ok() == Some(expected) {
        return Ok(());
    }
    Err(Error::Shape { op, expected: format!("{expected:?}"), found: format!("{:?}", dy.dims()) })
}

/// Rows `rows` of `x` [T, C]: [rows, C] in the dtype of `x`.
///
/// # Errors
/// Numbers that do not ascend or are not under T; the device's.
pub fn forward(x: &Tensor, rows: IndexView) -> Result<Tensor> {
    const OP: &str = "rows";
    let _timed = profile::scope(OP, x.device());
    let (t, c) = x.dims2()?;
    check(OP, rows, t)?;
    let count = rows.host().len();
    match gpu::route(x) {
        _ if count == 0 => Ok(x.narrow(0, 0, 0)?),
        Route::Kernel => {
            let y = gpu::empty((count, c), x.dtype(), x)?;
            let kernel = Kernel::new("rows", "rows_forward", count, row_threads(c));
            let parameters = parameters(c, count, &[x]);
            gpu::launch(&kernel, x.dtype(), &[x, &rows.on(x.device())?, &y], &parameters)?;
            Ok(y)
        }
        Route::Cpu | Route::Reference => reference(x, rows),
    }
}

/// Gradient of [`forward`]'s input [T, C] from that of its output, `dy` [rows, C], in the dtype of `dy`: rows that were
/// not taken get zeros.
///
/// # Errors
/// As [`forward`]; another shape of `dy`.
pub fn backward(dy: &Tensor, rows: IndexView, t: usize) -> Result<Tensor> {
    const OP: &str = "rows backward";
    let _timed = profile::scope(OP, dy.device());
    let (_, c) = dy.dims2()?;
    check(OP, rows, t)?;
    check_gradient(OP, dy, rows, c)?;
    if gpu::route(dy) == Route::Kernel {
        let dx = gpu::empty((t, c), dy.dtype(), dy)?;
        let kernel = Kernel::new("rows", "rows_backward", t, row_threads(c));
        let parameters = parameters(c, rows.host().len(), &[dy]);
        gpu::launch(&kernel, dy.dtype(), &[dy, &rows.on(dy.device())?, &dx], &parameters)?;
        return Ok(dx);
    }
    let zeros = Tensor::zeros((t, c), dy.dtype(), dy.device())?;
    if rows.host().is_empty() { Ok(zeros) } else { Ok(zeros.index_add(&rows.on(dy.device())?, dy, 0)?) }
}

/// `x` [T, C] with `dy` [rows, C] added to its rows `rows`. A GPU's kernel changes `x` in place.
///
/// # Errors
/// As [`backward`]; another dtype of `dy` than that of `x`.
pub fn add(x: Tensor, dy: &Tensor, rows: IndexView) -> Result<Tensor> {
    const OP: &str = "rows add";
    let _timed = profile::scope(OP, x.device());
    let (t, c) = x.dims2()?;
    check(OP, rows, t)?;
    check_gradient(OP, dy, rows, c)?;
    super::cpu::same_dtype(OP, &x, dy.dtype())?;
    let count = rows.host().len();
    match gpu::route(&x) {
        _ if count == 0 => Ok(x),
        Route::Kernel => {
            let kernel = Kernel::new("rows", "rows_add", count, row_threads(c));
            let parameters = parameters(c, count, &[&x, dy]);
            gpu::launch(&kernel, x.dtype(), &[&x, dy, &rows.on(x.device())?], &parameters)?;
            Ok(x)
        }
        Route::Cpu | Route::Reference => Ok(x.index_add(&rows.on(x.device())?, dy, 0)?),
    }
}

/// `x` [T, W] with `leading` [P, w] added to its first P rows, in the w columns from `column` on. The sum is taken in the
/// dtype of `leading`, which kernels read in f32, and rounded to that of `x`. A GPU's kernel changes `x` in place.
///
/// # Errors
/// Fewer rows or columns in `x` than that; the device's.
pub fn add_leading(x: Tensor, leading: &Tensor, column: usize) -> Result<Tensor> {
    const OP: &str = "rows add_leading";
    let _timed = profile::scope(OP, x.device());
    let ((t, width), (p, columns)) = (x.dims2()?, leading.dims2()?);
    if p > t || column + columns > width {
        return Err(Error::Shape {
            op: OP,
            expected: format!("at most {t} rows, and columns from {column} up to {width}"),
            found: format!("{p} rows of {columns} columns"),
        });
    }
    if leading.elem_count() == 0 {
        return Ok(x);
    }
    if gpu::route(&x) != Route::Kernel {
        return add_leading_reference(&x, leading, column);
    }
    let leading = leading.to_dtype(DType::F32)?;
    let parameters = RowsParameters {
        column: gpu::uint(column),
        columns: gpu::uint(columns),
        aligned: gpu::aligned(&[width, column, columns], &[&x, &leading]),
        ..parameters(width, p, &[])
    };
    let kernel = Kernel::new("rows", "rows_add_leading", p, row_threads(columns));
    gpu::launch(&kernel, x.dtype(), &[&x, &leading], &parameters)?;
    Ok(x)
}

/// [`forward`] in plain candle ops.
pub fn reference(x: &Tensor, rows: IndexView) -> Result<Tensor> {
    Ok(x.index_select(&rows.on(x.device())?, 0)?)
}

/// [`add_leading`] in plain candle ops.
pub(crate) fn add_leading_reference(x: &Tensor, leading: &Tensor, column: usize) -> Result<Tensor> {
    let ((t, width), (p, columns)) = (x.dims2()?, leading.dims2()?);
    let (first, end) = (x.narrow(0, 0, p)?, column + columns);
    let part = first.narrow(1, column, columns)?;
    let sum = (part.to_dtype(leading.dtype())? + leading)?.to_dtype(x.dtype())?;
    let (left, right) = (first.narrow(1, 0, column)?, first.narrow(1, end, width - end)?);
    let parts: Vec<Tensor> = [left, sum, right].into_iter().filter(|part| part.elem_count() > 0).collect();
    let first = Tensor::cat(&parts, 1)?;
    Ok(if p == t { first } else { Tensor::cat(&[first, x.narrow(0, p, t - p)?], 0)? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{Indices, autograd, testing::*};
    use candle_core::Device;

    /// Every third row of `t`, from the second on.
    fn some(t: usize) -> Indices {
        (0..t as u32).filter(|row| t == 1 || row % 3 == 1).collect::<Vec<_>>().into()
    }

    #[test]
    fn forward_and_backward_agree_with_the_reference() -> Result<()> {
        for (t, c) in [(1, 1), (5, 123), (123, 5), (64, 576)] {
            for dtype in [DType::F32, DType::F64] {
                let (x, rows) = (randn(1, (t, c), dtype)?, some(t));
                let dy = randn(2, (rows.len(), c), dtype)?;
                let y = forward(&x, (&rows).into())?;
                assert_close("rows", &y, &reference(&x, (&rows).into())?, Tolerance::of(dtype));
                let expected = autograd(&[&x], &dy, |v| reference(v[0].as_tensor(), (&rows).into()))?;
                let dx = backward(&dy, (&rows).into(), t)?;
                assert_close("rows backward", &dx, &expected[0], Tolerance::of(dtype));
                assert!(max_abs(&dx)? > 0.0);
                let sum = add(x.clone(), &dy, (&rows).into())?;
                assert_close("rows add", &sum, &(&x + &expected[0])?, Tolerance::of(dtype));
            }
        }
        Ok(())
    }

    #[test]
    fn add_leading_changes_the_first_rows_alone() -> Result<()> {
        let x = Tensor::new(&[[1f32, 2., 3., 4.], [5., 6., 7., 8.], [9., 10., 11., 12.]], &Device::Cpu)?;
        let leading = Tensor::new(&[[100f32, 200.], [300., 400.]], &Device::Cpu)?;
        let of = |column| -> Result<Vec<Vec<f32>>> {
            Ok(add_leading(x.clone(), &leading, column)?.to_vec2::<f32>()?)
        };
        let last = [9., 10., 11., 12.];
        assert_eq!(of(0)?, [[101., 202., 3., 4.], [305., 406., 7., 8.], last]);
        assert_eq!(of(1)?, [[1., 102., 203., 4.], [5., 306., 407., 8.], last]);
        assert_eq!(of(2)?, [[1., 2., 103., 204.], [5., 6., 307., 408.], last]);
        assert!(add_leading(x.clone(), &leading, 3).is_err());
        let none = leading.narrow(1, 0, 0)?;
        assert_eq!(add_leading(x.clone(), &none, 4)?.to_vec2::<f32>()?, x.to_vec2::<f32>()?);
        Ok(())
    }

    #[test]
    fn no_rows_give_no_rows_and_zeros() -> Result<()> {
        let (x, none) = (randn(1, (3, 4), DType::F32)?, Indices::default());
        let y = forward(&x, (&none).into())?;
        assert_eq!(y.dims(), [0, 4]);
        assert_eq!(max_abs(&backward(&y, (&none).into(), 3)?)?, 0.0);
        assert_eq!(add(x.clone(), &y, (&none).into())?.to_vec2::<f32>()?, x.to_vec2::<f32>()?);
        Ok(())
    }

    #[test]
    fn numbers_out_of_order_or_range_are_errors() -> Result<()> {
        let x = randn(1, (3, 4), DType::F32)?;
        for (numbers, found) in [(vec![1, 1], "1 before 1"), (vec![2, 0], "2 before 0"), (vec![0, 3], "3")] {
            let error = forward(&x, (&Indices::from(numbers)).into()).unwrap_err();
            let expected = format!("rows: expected ascending row numbers under 3, found {found}");
            assert_eq!(error.to_string(), expected);
        }
        let one = Indices::from(vec![1]);
        assert!(backward(&x, (&one).into(), 3).is_err(), "three gradients for one row");
        assert!(add(x.clone(), &randn(2, (1, 4), DType::F64)?, (&one).into()).is_err());
        Ok(())
    }
}
