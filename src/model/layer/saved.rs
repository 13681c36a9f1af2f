//! What a layer's forward pass saves for its backward pass.

use super::feed_forward::FeedForwardSaved;
use super::{Mixer, MixerSaved, PrefixState, other_kind};
use crate::ops::experts::Routing;
use crate::{Error, Result};
use candle_core::Tensor;

/// What is saved of a layer.
pub(in crate::model) enum Saved {
    /// All that its backward pass reads.
    All(LayerSaved),
    /// Its input alone, from which the backward pass runs the layer again.
    Input {
        /// The residual stream before the layer, [T, C].
        residual: Tensor,
        /// What the example passes read of the prefixes in this pass.
        prefix: Option<PrefixState>,
        /// The choice of experts.
        routing: Option<Routing>,
    },
}

/// All that a layer's backward pass reads.
pub(in crate::model) struct LayerSaved {
    pub(in crate::model) mixer_norm: NormSaved,
    pub(in crate::model) mixer: MixerSaved,
    pub(in crate::model) feed_forward_norm: NormSaved,
    pub(in crate::model) feed_forward: FeedForwardSaved,
}

/// The residual stream at a norm [rows, C], and its reciprocal RMS [rows].
pub(in crate::model) struct NormSaved {
    pub(in crate::model) residual: Tensor,
    pub(in crate::model) rstd: Tensor,
}

impl LayerSaved {
    /// What the sequences of other passes read of the first `rows` rows, as a view of what is saved.
    pub(in crate::model) fn prefix_state(&self, rows: usize) -> Result<PrefixState> {
        match &self.mixer {
            MixerSaved::Attention(saved) => saved.prefix_state(rows),
            MixerSaved::Mamba2(saved) => saved.prefix_state(),
        }
    }

    /// The same in memory of its own.
    pub(in crate::model) fn own_prefix_state(&self, rows: usize, mixer: &Mixer) -> Result<PrefixState> {
        match (&self.mixer, mixer) {
            (MixerSaved::Attention(saved), Mixer::Attention(attention)) => {
                saved.own_prefix_state(rows, &attention.shape)
            }
            (MixerSaved::Mamba2(saved), Mixer::Mamba2(_)) => saved.prefix_state(),
            _ => Err(other_kind("the tape of the layer's mixer")),
        }
    }

    /// The layer's input alone, and what the example passes read of the first `prefix_rows` rows, if they do.
    pub(in crate::model) fn into_input(self, prefix_rows: Option<usize>, mixer: &Mixer) -> Result<Saved> {
        let prefix = prefix_rows.map(|rows| self.own_prefix_state(rows, mixer)).transpose()?;
        let routing = self.feed_forward.into_routing();
        Ok(Saved::Input { residual: self.mixer_norm.residual, prefix, routing })
    }
}

impl Saved {
    /// What the sequences of other passes read of the first `rows` rows.
    pub(in crate::model) fn prefix_state(&self, rows: usize) -> Result<PrefixState> {
        match self {
            Self::All(saved) => saved.prefix_state(rows),
            Self::Input { prefix: Some(state), .. } => Ok(state.clone()),
            Self::Input { prefix: None, .. } => Err(Error::Invalid(
                "prefix state: expected a prefix pass, found a pass that shares none and whose layers are recomputed"
                    .into(),
            )),
        }
    }
}
