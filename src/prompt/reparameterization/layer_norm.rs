//! LayerNorm (Ba et al., 2016, arXiv:1607.06450) over the last dimension, as `torch.nn.LayerNorm` computes it:
//!
//! ```text
//! x^ = (x - mean x) rstd     rstd = 1 / sqrt(var x + eps)
//! y  = x^ weight + bias
//! dx = rstd (dx^ - mean dx^ - x^ mean(dx^ x^))     dx^ = dy weight
//! ```

use crate::Result;
use candle_core::{D, Tensor};

/// torch's default.
const EPS: f64 = 1e-5;

pub(super) struct LayerNorm<'a> {
    /// [W].
    pub(super) weight: &'a Tensor,
    /// [W].
    pub(super) bias: &'a Tensor,
}

/// What the backward pass reads, and the output.
pub(super) struct Normalized {
    /// x^, [n, W].
    x: Tensor,
    /// [n, 1].
    rstd: Tensor,
    pub(super) output: Tensor,
}

impl LayerNorm<'_> {
    pub(super) fn forward(&self, x: &Tensor) -> Result<Normalized> {
        let centered = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let variance = centered.sqr()?.mean_keepdim(D::Minus1)?;
        let rstd = variance.affine(1.0, EPS)?.sqrt()?.recip()?;
        let x = centered.broadcast_mul(&rstd)?;
        let output = x.broadcast_mul(self.weight)?.broadcast_add(self.bias)?;
        Ok(Normalized { x, rstd, output })
    }

    /// The gradients of the input, and of weight and bias.
    pub(super) fn backward(&self, pass: &Normalized, gradient: &Tensor) -> Result<(Tensor, [Tensor; 2])> {
        let Normalized { x, rstd, .. } = pass;
        let d_weight = (gradient * x)?.sum(0)?;
        let d_bias = gradient.sum(0)?;
        let dx = gradient.broadcast_mul(self.weight)?;
        let along = (&dx * x)?.mean_keepdim(D::Minus1)?;
        let dx = dx.broadcast_sub(&dx.mean_keepdim(D::Minus1)?)?.sub(&x.broadcast_mul(&along)?)?;
        Ok((dx.broadcast_mul(rstd)?, [d_weight, d_bias]))
    }
}
