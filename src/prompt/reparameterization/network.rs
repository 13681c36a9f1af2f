//! Linear layers with an activation function between each two.

use crate::Result;
use candle_core::Tensor;

/// What stands between two linear layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Activation {
    Relu,
    Tanh,
}

impl Activation {
    fn forward(self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Relu => x.relu()?,
            Self::Tanh => x.tanh()?,
        })
    }

    /// Gradient of the input from the output `y` and its gradient.
    fn backward(self, y: &Tensor, gradient: &Tensor) -> Result<Tensor> {
        let slope = match self {
            Self::Relu => y.gt(&y.zeros_like()?)?.to_dtype(y.dtype())?,
            Self::Tanh => y.sqr()?.affine(-1.0, 1.0)?,
        };
        Ok((gradient * slope)?)
    }
}

/// Layers `x -> x weightᵀ + bias`, `weight` being [outputs, inputs].
pub(super) struct Network<'a> {
    /// Weight and bias of each layer.
    pub(super) parts: &'a [Tensor],
    pub(super) activation: Activation,
}

/// What the backward pass reads, and the output.
pub(super) struct NetworkPass {
    /// The input of each layer.
    inputs: Vec<Tensor>,
    pub(super) output: Tensor,
}

impl Network<'_> {
    pub(super) fn forward(&self, x: &Tensor) -> Result<NetworkPass> {
        let (mut inputs, mut output) = (Vec::new(), x.clone());
        for layer in self.parts.chunks_exact(2) {
            let input = match inputs.is_empty() {
                true => output,
                false => self.activation.forward(&output)?,
            };
            output = input.matmul(&layer[0].t()?)?.broadcast_add(&layer[1])?;
            inputs.push(input);
        }
        Ok(NetworkPass { inputs, output })
    }

    /// The gradients of the input and of each part.
    pub(super) fn backward(&self, pass: &NetworkPass, gradient: &Tensor) -> Result<(Tensor, Vec<Tensor>)> {
        let (mut gradient, mut parts) = (gradient.clone(), Vec::with_capacity(self.parts.len()));
        for (i, (layer, input)) in self.parts.chunks_exact(2).zip(&pass.inputs).enumerate().rev() {
            parts.push(gradient.sum(0)?);
            parts.push(gradient.t()?.matmul(input)?);
            gradient = gradient.matmul(&layer[0])?;
            if i > 0 {
                gradient = self.activation.backward(input, &gradient)?;
            }
        }
        parts.reverse();
        Ok((gradient, parts))
    }
}
