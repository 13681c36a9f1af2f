//! Networks that make the rows of a prompt of its trainable values, for the time of the tuning.
//!
//! ```text
//! residual           row = p + LayerNorm(up relu(down p))       Razdaibiedina et al., 2023, arXiv:2305.03937
//! mlp, embeddings    row = linear relu linear relu linear e     PEFT's PromptEncoder (P-tuning)
//! mlp, prefix        row = linear tanh linear e                 PEFT's PrefixEncoder with prefix_projection
//! ```
//!
//! Linear layers have biases; all rows share the weights. Tensors may be f32 or f64.

mod layer_norm;
mod network;
mod start;
#[cfg(test)]
mod tests;

use super::PromptLayout;
use crate::Result;
use crate::config::{PromptKind, Reparameterization};
use candle_core::Tensor;
use layer_norm::LayerNorm;
use network::{Activation, Network};
pub(super) use start::start;

/// The trainable rows [n, W] that `parts`, which [`PromptLayout::parts`] lists, make.
pub(super) fn forward(layout: &PromptLayout, parts: &[Tensor]) -> Result<Tensor> {
    let input = &parts[0];
    match layout.reparameterization {
        Reparameterization::None => Ok(input.clone()),
        Reparameterization::Residual => {
            let (network, norm) = residual(parts);
            let output = network.forward(input)?.output;
            Ok((input + norm.forward(&output)?.output)?)
        }
        Reparameterization::Mlp => Ok(mlp(layout, parts).forward(input)?.output),
    }
}

/// The gradient of each part from that of the rows, [n, W]. The forward pass runs again: it is small, and nothing has to be
/// saved.
pub(super) fn backward(layout: &PromptLayout, parts: &[Tensor], gradient: &Tensor) -> Result<Vec<Tensor>> {
    let input = &parts[0];
    match layout.reparameterization {
        Reparameterization::None => Ok(vec![gradient.clone()]),
        Reparameterization::Residual => {
            let (network, norm) = residual(parts);
            let saved = network.forward(input)?;
            let normalized = norm.forward(&saved.output)?;
            let (d_output, d_norm) = norm.backward(&normalized, gradient)?;
            let (d_input, d_network) = network.backward(&saved, &d_output)?;
            Ok([(gradient + d_input)?].into_iter().chain(d_network).chain(d_norm).collect())
        }
        Reparameterization::Mlp => {
            let network = mlp(layout, parts);
            let (d_input, d_network) = network.backward(&network.forward(input)?, gradient)?;
            Ok([d_input].into_iter().chain(d_network).collect())
        }
    }
}

fn residual(parts: &[Tensor]) -> (Network<'_>, LayerNorm<'_>) {
    (
        Network { parts: &parts[1..5], activation: Activation::Relu },
        LayerNorm { weight: &parts[5], bias: &parts[6] },
    )
}

fn mlp<'a>(layout: &PromptLayout, parts: &'a [Tensor]) -> Network<'a> {
    let activation = match layout.kind {
        PromptKind::Embeddings => Activation::Relu,
        PromptKind::Prefix => Activation::Tanh,
    };
    Network { parts: &parts[1..], activation }
}
