//! The scan of a Mamba2 layer: a state space model with a scalar decay per head and row, computed in chunks as products (Dao and Gu,
//! 2024, arXiv:2405.21060, section 6; transformers `modeling_granitemoehybrid.py`, `GraniteMoeHybridMambaLayer`). A sequence that
//! follows a prefix starts from the prefix's state, which exists once.
//!
//! ```text
//! dt  = clamp(softplus(r + dt_bias))        a = A dt        per row and head
//! S_t = exp(a_t) S_{t-1} + dt_t x_t B_tᵀ    [R, N] per head; head h reads B and C of group h / (M/G)
//! y_t = S_t C_t + D x_t
//! ```
//!
//! Rows 1..q of a chunk with start state S⁰, `l_i = a_1 + ... + a_i`, `G_ij = C_i · B_j`, `L_ij = exp(l_i - l_j)` for j <= i, else 0:
//!
//! ```text
//! y_i = exp(l_i) S⁰ C_i + sum_j G_ij L_ij dt_j x_j + D x_i
//! S¹  = exp(l_q) S⁰ + sum_j exp(l_q - l_j) dt_j x_j B_jᵀ
//!
//! P_ij = dy_i · x_j      K_ij = L_ij dt_j P_ij      E_ij = G_ij K_ij      dS¹ is the gradient of S¹
//! b_j  = sum_i G_ij L_ij dy_i + exp(l_q - l_j) dS¹ B_j
//! dx_j = D dy_j + dt_j b_j
//! dC_i = sum_h [ sum_j K_ij B_j + exp(l_i) S⁰ᵀ dy_i ]
//! dB_j = sum_h [ sum_i K_ij C_i + dt_j exp(l_q - l_j) dS¹ᵀ x_j ]
//! dS⁰  = exp(l_q) dS¹ + sum_i exp(l_i) dy_i C_iᵀ
//! dl_i = sum_{j<i} E_ij - sum_{j>i} E_ji + exp(l_i) dy_i · S⁰ C_i - into_i + [i = q] (sum_j into_j + exp(l_q) <dS¹, S⁰>)
//! ddt_j = x_j · b_j + A sum_{i>=j} dl_i      into_j = dt_j exp(l_q - l_j) x_j · dS¹ B_j
//! dr   = ddt sigmoid(r + dt_bias), 0 if softplus was clamped
//! ```

mod cpu;
mod gpu;
mod plan;
mod reference;
#[cfg(test)]
mod tests;

pub(crate) use plan::CHUNK;
pub use plan::{ScanPlan, ScanSegment, ScanStart, ScanStates};
pub use reference::reference;

use super::backend::{Route, route};
use super::profile;
use crate::{Error, Result};
use candle_core::Tensor;

/// Sizes of the scan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SsdShape {
    /// Heads, M.
    pub heads: usize,
    /// Values of a head, R.
    pub head_dim: usize,
    /// State size, N.
    pub state: usize,
    /// Groups of B and C, G; M is a multiple of it.
    pub groups: usize,
}

impl SsdShape {
    /// Inner width, I = M R.
    pub fn inner(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Columns of x, B and C side by side, X = I + 2 G N.
    pub fn width(&self) -> usize {
        self.inner() + 2 * self.groups * self.state
    }
}

/// Frozen weights of the scan, in f32, or f64 for activations in f64.
#[derive(Debug, Clone)]
pub struct SsdWeights {
    /// A = -exp(A_log), `[M]`.
    pub a: Tensor,
    /// D, `[M]`.
    pub d: Tensor,
    /// Added to the step before the softplus, `[M]`.
    pub dt_bias: Tensor,
    /// Smallest and largest step.
    pub dt_limit: (f64, f64),
}

/// Inputs of the scan.
#[derive(Clone, Copy)]
pub struct SsdInputs<'a> {
    /// x, B and C side by side after convolution and SiLU, [T, X].
    pub xbc: &'a Tensor,
    /// The step r of every row and head before bias and softplus, [T, M], in the dtype of the weights; on a GPU also in that of `xbc`.
    pub dt: &'a Tensor,
    /// Segments of the rows.
    pub plan: &'a ScanPlan,
    /// The states from which segments with [`ScanStart::State`] start, [n, I, N], in the dtype of the weights.
    pub states: Option<&'a Tensor>,
}

/// Result of [`forward`].
#[derive(Debug, Clone)]
pub struct SsdOutput {
    /// y [T, I], in the dtype of `xbc`.
    pub y: Tensor,
    /// The end states that the plan wants, [n, I, N]; `None` if there are none.
    pub ends: Option<Tensor>,
}

/// Result of [`backward`].
#[derive(Debug, Clone)]
pub struct SsdGradients {
    /// Gradient of x, B and C, [T, X].
    pub xbc: Tensor,
    /// Gradient of r, [T, M].
    pub dt: Tensor,
    /// Gradient of the given states, [n, I, N], if there were any.
    pub states: Option<Tensor>,
}

/// The scan of every segment.
///
/// # Errors
/// Returns an error if shapes, dtypes or segments do not match, or a device operation fails.
pub fn forward(inputs: SsdInputs, shape: &SsdShape, weights: &SsdWeights) -> Result<SsdOutput> {
    let _timed = profile::scope("scan", inputs.xbc.device());
    inputs.check("scan", shape, weights)?;
    match route(inputs.xbc) {
        Route::Cpu => cpu::forward(inputs, shape, weights),
        Route::Kernel => gpu::forward(inputs, shape, weights),
    }
}

/// Gradients from `dy` [T, I], that of `y`, and `dends`, that of [`SsdOutput::ends`], which is zero if it is `None`. Those of rows are in
/// the dtype of `dy`: on the CPU that of the weights, on a GPU that of `xbc`. Those of states are in the dtype of the weights. The
/// states inside of segments are computed again.
///
/// # Errors
/// Returns an error if shapes, dtypes or segments do not match, or a device operation fails.
pub fn backward(
    (dy, dends): (&Tensor, Option<&Tensor>),
    inputs: SsdInputs,
    shape: &SsdShape,
    weights: &SsdWeights,
) -> Result<SsdGradients> {
    const OP: &str = "scan backward";
    let _timed = profile::scope(OP, dy.device());
    let rows = inputs.check(OP, shape, weights)?;
    let ends = inputs.plan.ends();
    let ends_fit = dends.is_none_or(|d| d.dims() == [ends, shape.inner(), shape.state]);
    if dy.dims() != [rows, shape.inner()] || !ends_fit {
        return Err(Error::Shape {
            op: OP,
            expected: format!("gradients of {:?} and of {ends} states", [rows, shape.inner()]),
            found: format!("{:?} and {:?}", dy.dims(), dends.map(Tensor::dims)),
        });
    }
    match route(dy) {
        Route::Cpu => cpu::backward((dy, dends), inputs, shape, weights),
        Route::Kernel => gpu::backward((dy, dends), inputs, shape, weights),
    }
}

impl SsdInputs<'_> {
    /// Returns the number of rows, T.
    fn check(&self, op: &'static str, shape: &SsdShape, weights: &SsdWeights) -> Result<usize> {
        let fail = |expected: String, found: String| Err(Error::Shape { op, expected, found });
        let SsdShape { heads, groups, .. } = *shape;
        if groups == 0 || !heads.is_multiple_of(groups) {
            return fail("heads that are a multiple of the groups".into(), format!("{heads} and {groups}"));
        }
        let rows = self.xbc.dims()[0];
        let states = self.states.map_or(0, |states| states.dims()[0]);
        let found = [self.xbc, self.dt, &weights.a, &weights.d, &weights.dt_bias].map(Tensor::dims);
        let states_fit = self.states.is_none_or(|s| s.dims() == [states, shape.inner(), shape.state]);
        if found != [&[rows, shape.width()][..], &[rows, heads], &[heads], &[heads], &[heads]] || !states_fit
        {
            let expected = format!("[T, {}], [T, {heads}], three of [{heads}]", shape.width());
            let expected = format!("{expected}, states of [n, {}, {}]", shape.inner(), shape.state);
            return fail(expected, format!("{found:?}, {:?}", self.states.map(Tensor::dims)));
        }
        self.plan.check(op, rows, states)?;
        Ok(rows)
    }
}
