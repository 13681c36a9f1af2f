//! A mixture of experts (Shazeer et al., 2017, arXiv:1701.06538; transformers `modeling_granitemoe.py`): a router chooses k of E
//! experts for each row, and the row's output is the sum of theirs.
//!
//! ```text
//! chosen  = the k largest of s[t]                  s: the router's logits [T, E]; of equal logits the lowest expert first
//! p[t]    = softmax of the chosen logits           [T, k]
//! h[s]    = u[row of s] Wi[e]ᵀ                     gate and up of pair s, which goes to expert e
//! a[s]    = p[s] * silu(gate) * up
//! out[t]  = sum over the pairs s of row t of a[s] Wo[e]ᵀ
//!
//! dp[s]   = <da[s], silu(gate) * up>               da: gradient of a, dout[row of s] Wo[e]
//! dh[s]   = gradient of gate and up from p[s] * da[s], as in `swiglu`
//! ds[t,e] = p[t,e] * (dp[t,e] - sum over the chosen e' of p[t,e'] * dp[t,e'])      0 for experts that were not chosen
//! du[t]   = sum over the pairs s of row t of dh[s] Wi[e], plus the router's part
//! ```
//!
//! The choice is a constant of the backward pass. A *pair* is a row and an expert that it goes to. Pairs are sorted by expert,
//! with ascending rows for each expert, so that an expert's rows follow one another and each of its matrices is read once:
//!
//! ```text
//! gather   u [T, C] ─▶ [S, C]       sorted by expert: offsets[e]..offsets[e + 1] are those of expert e
//! combine  [S, C] ─▶ out [T, C]     place[t, j] is the place of row t's choice j among the sorted pairs
//! ```
//!
//! `p` is a factor of the activation and not of the expert's output: an activation has fewer elements, and the backward pass
//! needs no output of an expert.

mod activation;
mod cpu;
mod gpu;
mod linear;
mod reference;
mod routing;
#[cfg(test)]
mod tests;

pub use activation::{activation_backward, activation_forward};
pub use linear::ExpertLinear;
pub use reference::reference;
pub use routing::Routing;

use super::backend::{Route, route};
use crate::{Error, Result};
use candle_core::{DType, Tensor};

/// The experts' output [T, C] for rows `u` [T, C], by `gate_up`, matrices [2F, C], and `down`, matrices [C, F]; and gate and up
/// [S, 2F], in dtype `saved`, for the backward pass. dtypes as in [`ExpertLinear::forward_to`]; on the CPU the output has the
/// dtype of the weights p.
///
/// # Errors
/// Returns an error if shapes do not match, there is no product in these dtypes, or a device operation fails.
pub fn forward(
    u: &Tensor,
    routing: &Routing,
    [gate_up, down]: [&ExpertLinear; 2],
    saved: DType,
) -> Result<(Tensor, Tensor)> {
    let h = gate_up.forward_to(&routing.gather(u)?, routing, saved)?;
    Ok((output(&h, routing, down)?, h))
}

/// The second half of [`forward`]: the experts' output [T, C] from gate and up `h` [S, 2F].
///
/// # Errors
/// As [`forward`].
pub fn output(h: &Tensor, routing: &Routing, down: &ExpertLinear) -> Result<Tensor> {
    let out = match route(h) {
        Route::Cpu => routing.weights.dtype(),
        Route::Kernel => h.dtype(),
    };
    routing.combine(&down.forward_to(&activation_forward(h, routing)?, routing, out)?)
}

/// Gradients of `u` [T, C], without the router's part, and of the router's logits [T, E], from `scale` times `dout` [T, C] and `h`
/// [S, 2F], which [`forward`] saved.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    dout: &Tensor,
    h: &Tensor,
    routing: &Routing,
    [gate_up, down]: [&ExpertLinear; 2],
    scale: f64,
) -> Result<(Tensor, Tensor)> {
    let da = down.backward(&routing.gather(&down.operand(dout)?)?, routing, scale)?;
    let (dh, dweights) = activation_backward(&da, h, routing)?;
    drop(da);
    let du = routing.combine(&gate_up.backward(&dh, routing, 1.0)?)?;
    Ok((du, routing.backward(&dweights)?))
}

/// Returns an error if `x` is not a matrix of `rows` rows and, if given, `columns` columns.
fn check_matrix(op: &'static str, x: &Tensor, rows: usize, columns: Option<usize>) -> Result<usize> {
    match *x.dims() {
        [r, c] if r == rows && columns.is_none_or(|columns| columns == c) => Ok(c),
        _ => Err(Error::Shape {
            op,
            expected: match columns {
                Some(columns) => format!("[{rows}, {columns}]"),
                None => format!("a matrix of {rows} rows"),
            },
            found: format!("{:?}", x.dims()),
        }),
    }
}
