//! The experts' activation.

use super::{Routing, check_matrix, cpu, gpu};
use crate::ops::backend::{Route, route};
use crate::ops::profile;
use crate::{Error, Result};
use candle_core::Tensor;

/// `p * silu(gate) * up` [S, F] of `h` [S, 2F], in its dtype, which on the CPU is that of the weights p, or bf16 if they are f32.
///
/// # Errors
/// Returns an error if `h` has another number of rows or an odd number of columns, its dtype is another, or a device operation
/// fails.
pub fn activation_forward(h: &Tensor, routing: &Routing) -> Result<Tensor> {
    const OP: &str = "experts activation";
    let _timed = profile::scope(OP, h.device());
    check(OP, h, routing)?;
    match route(h) {
        Route::Cpu => cpu::activation::forward(h, routing),
        Route::Kernel => gpu::activation_forward(h, routing),
    }
}

/// Gradients of `h` [S, 2F], in its dtype, and of the weights p in the order of the pairs, `[S]`, in theirs, from `da` [S, F].
/// dtypes as in [`activation_forward`]; `da` has that of the weights on the CPU and that of `h` on a GPU.
///
/// # Errors
/// As [`activation_forward`]; also if `da` has another shape or dtype.
pub fn activation_backward(da: &Tensor, h: &Tensor, routing: &Routing) -> Result<(Tensor, Tensor)> {
    const OP: &str = "experts activation backward";
    let _timed = profile::scope(OP, h.device());
    let f = check(OP, h, routing)?;
    check_matrix(OP, da, routing.pairs(), Some(f))?;
    match route(h) {
        Route::Cpu => cpu::activation::backward(da, h, routing),
        Route::Kernel => gpu::activation_backward(da, h, routing),
    }
}

/// F of a matrix [S, 2F].
fn check(op: &'static str, h: &Tensor, routing: &Routing) -> Result<usize> {
    let width = check_matrix(op, h, routing.pairs(), None)?;
    if width % 2 == 0 {
        return Ok(width / 2);
    }
    Err(Error::Shape {
        op,
        expected: "gate and up side by side, [S, 2F]".into(),
        found: format!("{:?}", h.dims()),
    })
}
