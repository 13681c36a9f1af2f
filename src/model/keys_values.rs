//! Prompts that are keys and values: as what the layers read of them, and back from the layers' gradients.

use super::layer::{PrefixGradient, PrefixState};
use super::{Decoder, PrefixPass};
use crate::batch::{JoinedPrefix, Passes, PrefixGroup};
use crate::checkpoint::{MixerKind, ModelConfig};
use crate::ops::ssd::ScanStates;
use crate::{Error, Result};
use candle_core::{DType, Tensor};

/// Columns of a prompt that is keys and values: 2 K D of each attention layer.
pub fn keys_values_width(config: &ModelConfig) -> usize {
    config.layers_with(MixerKind::Attention) * layer_width(config)
}

/// Columns of one layer's keys and values, 2 K D.
fn layer_width(config: &ModelConfig) -> usize {
    2 * config.num_key_value_heads * config.head_dim
}

impl Decoder {
    /// What the layers read of prompts `keys_values` [n, L 2 K D], L attention layers. Mamba2 layers start from a state of
    /// zeros.
    ///
    /// # Errors
    /// Returns an error if the width is another or a device operation fails.
    pub fn given_states(&self, keys_values: &Tensor) -> Result<Vec<PrefixState>> {
        let (width, expected) = (keys_values.dims2()?.1, keys_values_width(&self.config));
        if width != expected {
            let expected = format!("keys and values of {expected} columns");
            return Err(Error::shape("prompt", expected, width.to_string()));
        }
        let width = layer_width(&self.config);
        let mut columns = (0..).step_by(width);
        let state = |layer| match (self.config.mixer(layer), &self.config.mamba) {
            (MixerKind::Mamba2, Some(mamba)) => {
                let zeros = |shape, dtype| Tensor::zeros(shape, dtype, self.device());
                Ok(PrefixState::Scan(ScanStates {
                    ssm: zeros((1, mamba.inner(), mamba.state), self.prompt_dtype())?,
                    conv: zeros((1, mamba.taps - 1, mamba.channels()), self.product_dtype())?,
                }))
            }
            _ => {
                let column = columns.next().unwrap_or(0);
                let own = keys_values.narrow(1, column, width)?.to_dtype(self.product_dtype())?;
                Ok(PrefixState::KeysValues(own.contiguous()?))
            }
        };
        (0..self.config.num_hidden_layers).map(state).collect()
    }

    /// The keys and values [n, L 2 K D] that the attention layers make of a soft prompt `embeddings` [n, C], f32 (f64 if the
    /// activations are).
    ///
    /// # Errors
    /// Returns an error if the width is another or a device operation fails.
    pub fn keys_values(&self, embeddings: &Tensor) -> Result<Tensor> {
        let prompt = 0..embeddings.dims2()?.0 as u32;
        let group = PrefixGroup { before: Vec::new(), prompt, head: Vec::new(), sequences: Vec::new() };
        let batch = Passes::new(&[group], usize::MAX).prefix_pass;
        let PrefixPass { states, .. } =
            self.prefix_pass(&batch, &embeddings.to_dtype(self.prompt_dtype())?, None)?;
        let width = layer_width(&self.config);
        let own = states.iter().filter_map(|state| match state {
            PrefixState::KeysValues(matrix) => {
                let first = matrix.dims()[1] - width;
                Some(matrix.narrow(1, first, width).and_then(|own| own.to_dtype(self.prompt_dtype())))
            }
            PrefixState::Scan(_) => None,
        });
        side_by_side(own.collect::<candle_core::Result<Vec<_>>>()?)
    }
}

/// The gradient of prompts that are keys and values, [n, L 2 K D], from that of what the layers read of them.
///
/// # Errors
/// Returns an error if no layer has keys and values, or if a device operation fails.
pub fn keys_values_gradient(layers: &[PrefixGradient], dtype: DType) -> Result<Tensor> {
    let own = layers.iter().filter_map(|layer| match layer {
        PrefixGradient::KeysValues(gradient) => Some(gradient.to_dtype(dtype)),
        PrefixGradient::Scan(_) => None,
    });
    side_by_side(own.collect::<candle_core::Result<Vec<_>>>()?)
}

fn side_by_side(layers: Vec<Tensor>) -> Result<Tensor> {
    if layers.is_empty() {
        return Err(Error::Invalid(
            "prompt.kind: expected a model with attention layers, found none; \"prefix\" is their keys and values".into(),
        ));
    }
    Ok(Tensor::cat(&layers, 1)?)
}

/// What a layer reads of `prefixes`, whose first rows are `given` and whose others a pass `computed`. The state of a Mamba2 layer
/// is the computed one.
pub(crate) fn join(
    given: &PrefixState,
    computed: &PrefixState,
    prefixes: &[JoinedPrefix],
) -> Result<PrefixState> {
    let (PrefixState::KeysValues(given), PrefixState::KeysValues(computed)) = (given, computed) else {
        return Ok(computed.clone());
    };
    let width = given.dims()[1];
    let computed = computed.narrow(1, computed.dims()[1] - width, width)?;
    let mut parts = Vec::with_capacity(2 * prefixes.len());
    for prefix in prefixes {
        for (matrix, rows) in [(given, &prefix.given), (&computed, &prefix.computed)] {
            if !rows.is_empty() {
                parts.push(matrix.narrow(0, rows.start, rows.len())?);
            }
        }
    }
    Ok(PrefixState::KeysValues(Tensor::cat(&parts, 0)?))
}

/// The gradients of the two parts that [`join`] joined.
pub(crate) struct SplitGradient {
    /// Of the given rows; `None` in a Mamba2 layer.
    pub(crate) given: Option<PrefixGradient>,
    /// Of the rows of the prefix pass.
    pub(crate) computed: PrefixGradient,
}

/// The gradients of the two parts that [`join`] joined, of which the first are of `rows` rows.
pub(crate) fn split(
    joined: &PrefixGradient,
    prefixes: &[JoinedPrefix],
    rows: usize,
) -> Result<SplitGradient> {
    let gradient = match joined {
        PrefixGradient::Scan(_) => return Ok(SplitGradient { given: None, computed: joined.clone() }),
        PrefixGradient::KeysValues(gradient) => gradient,
    };
    let width = gradient.dims()[1];
    let mut given: Option<Tensor> = None;
    let (mut computed, mut row) = (Vec::with_capacity(prefixes.len()), 0);
    for prefix in prefixes {
        let [own, head] = [prefix.given.len(), prefix.computed.len()];
        let part =
            gradient.narrow(0, row, own)?.pad_with_zeros(0, prefix.given.start, rows - prefix.given.end)?;
        given = Some(match given {
            None => part,
            Some(sum) => (sum + part)?,
        });
        if head > 0 {
            computed.push(gradient.narrow(0, row + own, head)?);
        }
        row += own + head;
    }
    let given = match given {
        Some(given) => given.contiguous()?,
        None => Tensor::zeros((rows, width), gradient.dtype(), gradient.device())?,
    };
    let computed = PrefixGradient::KeysValues(Tensor::cat(&computed, 0)?);
    Ok(SplitGradient { given: Some(PrefixGradient::KeysValues(given)), computed })
}
