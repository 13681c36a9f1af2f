//! SwiGLU (Shazeer, 2020, arXiv:2002.05202; transformers `modeling_granite.py`, `GraniteMLP`), on gate and
//! up side by side in one matrix:
//!
//! ```text
//! a     = silu(gate) * up                   silu(g) = g * sigmoid(g)
//! dgate = da * up * sigmoid(g) * (1 + g * (1 - sigmoid(g)))
//! dup   = da * silu(g)
//! ```

mod cpu;
mod gpu;
mod reference;
#[cfg(test)]
mod tests;

pub(super) use cpu::SwigluRow;
pub use reference::reference;

use super::backend::{Route, route};
use super::profile;
use crate::{Error, Result};
use candle_core::Tensor;

/// `silu(gate) * up` [T, F] of `gate_up` [T, 2F], in its dtype; the CPU computes bf16 in f32.
///
/// # Errors
/// Returns an error if the number of columns is odd or a device operation fails.
pub fn forward(gate_up: &Tensor) -> Result<Tensor> {
    let _timed = profile::scope("swiglu", gate_up.device());
    check(gate_up)?;
    match route(gate_up) {
        Route::Cpu => cpu::forward(gate_up),
        Route::Kernel => gpu::forward(gate_up),
    }
}

/// Gradient of `gate_up` [T, 2F] from `da` [T, F], in the dtype of `gate_up`: that of `da`, or on the CPU bf16 if `da` is f32.
///
/// # Errors
/// Returns an error if shapes do not match, the dtypes are others, or a device operation fails.
pub fn backward(da: &Tensor, gate_up: &Tensor) -> Result<Tensor> {
    let _timed = profile::scope("swiglu backward", gate_up.device());
    let (t, f) = check(gate_up)?;
    if da.dims() != [t, f] {
        return Err(Error::Shape {
            op: "swiglu backward",
            expected: format!("a gradient of [{t}, {f}]"),
            found: format!("{:?}", da.dims()),
        });
    }
    match route(da) {
        Route::Cpu => cpu::backward(da, gate_up),
        Route::Kernel => gpu::backward(da, gate_up),
    }
}

/// T and F of a matrix [T, 2F].
fn check(gate_up: &Tensor) -> Result<(usize, usize)> {
    match gate_up.dims() {
        [t, width] if width % 2 == 0 => Ok((*t, width / 2)),
        dims => Err(Error::Shape {
            op: "swiglu",
            expected: "gate and up side by side, [T, 2F]".into(),
            found: format!("{dims:?}"),
        }),
    }
}
