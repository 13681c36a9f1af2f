//! The causal convolution of a Mamba2 layer with its SiLU, channel by channel (Gu and Dao, 2023, arXiv:2312.00752, section 3.4;
//! transformers `modeling_granitemoehybrid.py`, `GraniteMoeHybridMambaLayer`).
//!
//! ```text
//! v_t  = bias + sum_{d=0..W-1} weight[W-1-d] * x_{t-d}       y = silu(v) = v * sigmoid(v)
//! dv   = dy * sigmoid(v) * (1 + v * (1 - sigmoid(v)))
//! dx_t = sum_{d=0..W-1} weight[W-1-d] * dv_{t+d}
//! ```
//!
//! The rows before a segment's first are the last rows of the segment from which it starts, or the tail of a given state, and zeros
//! before the first row of a sequence. So the last W - 1 rows of a prefix also get gradients of the first rows of every sequence
//! that follows it, and so does the tail of a given state.

mod cpu;
mod gpu;
mod lists;
mod reference;
mod source;
#[cfg(test)]
mod tests;

pub(in crate::ops) use lists::ConvLists;
pub use reference::reference;

use super::backend::{Route, route};
use super::{ScanPlan, profile};
use crate::{Error, Result};
use candle_core::{DType, Tensor};

/// Frozen weights of the convolution, in f32, or f64 for activations in f64.
#[derive(Debug, Clone)]
pub struct ConvWeights {
    /// [X, W], the tap of the oldest row first.
    pub weight: Tensor,
    /// `[X]`.
    pub bias: Tensor,
}

/// Inputs of the convolution.
#[derive(Clone, Copy)]
pub struct ConvInputs<'a> {
    /// xBC, [T, X].
    pub x: &'a Tensor,
    /// Segments of the rows.
    pub plan: &'a ScanPlan,
    /// The last W - 1 rows before each given state, oldest first, [n, W - 1, X], in the dtype of `x` ([`super::ScanStates::conv`]).
    pub tails: Option<&'a Tensor>,
}

/// Result of [`backward`].
#[derive(Debug, Clone)]
pub struct ConvGradients {
    /// Gradient of `x`, [T, X].
    pub x: Tensor,
    /// Gradient of the given tails, [n, W - 1, X], if there were any.
    pub tails: Option<Tensor>,
}

/// `silu(v)` [T, X] in dtype `out`: on the CPU that of the weights, or bf16 if that is f32; on a GPU that of `x`.
///
/// # Errors
/// Returns an error if shapes, dtypes or segments do not match, or a device operation fails.
pub fn forward(inputs: ConvInputs, conv: &ConvWeights, out: DType) -> Result<Tensor> {
    let _timed = profile::scope("conv", inputs.x.device());
    inputs.check("conv", conv)?;
    match route(inputs.x) {
        Route::Cpu => cpu::forward(inputs, conv, out),
        Route::Kernel => gpu::forward(inputs, conv, out),
    }
}

/// The last W - 1 rows of `x` of every segment whose end is wanted, [n, W - 1, X], for a convolution of `taps` taps, W. `None` if
/// there is no such segment.
///
/// # Errors
/// Returns an error if shapes, dtypes or segments do not match, or a device operation fails.
pub fn ends(inputs: ConvInputs, taps: usize) -> Result<Option<Tensor>> {
    let _timed = profile::scope("conv ends", inputs.x.device());
    inputs.check_rows("conv ends", taps)?;
    if inputs.plan.ends() == 0 {
        return Ok(None);
    }
    let ends = match route(inputs.x) {
        Route::Cpu => cpu::ends(inputs, taps),
        Route::Kernel => gpu::ends(inputs, taps),
    };
    ends.map(Some)
}

/// Gradients from `dy` [T, X], that of the output, and `dends`, that of [`ends`], which is zero if it is `None`. The gradient of `x` is
/// in the dtype of `dy`: on the CPU that of the weights, on a GPU that of `x`. Those of ends and tails are in the dtype of the weights.
///
/// # Errors
/// Returns an error if shapes, dtypes or segments do not match, or a device operation fails.
pub fn backward(
    (dy, dends): (&Tensor, Option<&Tensor>),
    inputs: ConvInputs,
    conv: &ConvWeights,
) -> Result<ConvGradients> {
    const OP: &str = "conv backward";
    let _timed = profile::scope(OP, dy.device());
    let taps = inputs.check(OP, conv)?;
    let ends = [inputs.plan.ends(), taps - 1, inputs.x.dims()[1]];
    if dy.dims() != inputs.x.dims() || dends.is_some_and(|d| d.dims() != ends) {
        return Err(Error::Shape {
            op: OP,
            expected: format!("gradients of {:?} and {ends:?}", inputs.x.dims()),
            found: format!("{:?} and {:?}", dy.dims(), dends.map(Tensor::dims)),
        });
    }
    match route(dy) {
        Route::Cpu => cpu::backward((dy, dends), inputs, conv),
        Route::Kernel => gpu::backward((dy, dends), inputs, conv),
    }
}

impl ConvInputs<'_> {
    /// Returns the number of taps, W.
    fn check(&self, op: &'static str, conv: &ConvWeights) -> Result<usize> {
        let channels = self.x.dims().get(1).copied().unwrap_or(0);
        match (conv.weight.dims(), conv.bias.dims()) {
            (&[weight, taps], &[bias]) if weight == channels && bias == channels && taps > 0 => {
                self.check_rows(op, taps).map(|()| taps)
            }
            (weight, bias) => Err(Error::Shape {
                op,
                expected: format!("a weight of [{channels}, W] and a bias of [{channels}]"),
                found: format!("{weight:?} and {bias:?}"),
            }),
        }
    }

    fn check_rows(&self, op: &'static str, taps: usize) -> Result<()> {
        let (rows, channels) = self.x.dims2()?;
        let states = self.tails.map_or(0, |tails| tails.dims()[0]);
        let tails_fit = |t: &Tensor| {
            t.dims() == [states, taps.saturating_sub(1), channels] && t.dtype() == self.x.dtype()
        };
        if taps == 0 || !self.tails.is_none_or(tails_fit) {
            return Err(Error::Shape {
                op,
                expected: format!("tails of [n, {taps} - 1, {channels}] in {:?}", self.x.dtype()),
                found: format!("{:?} in {:?}", self.tails.map(Tensor::dims), self.tails.map(Tensor::dtype)),
            });
        }
        self.plan.check(op, rows, states)
    }
}
