//! What a layer hands from a prefix to the sequences that follow it.

use crate::Result;
use candle_core::Tensor;

/// What the sequences of a group read of its prefix in one layer.
#[derive(Debug, Clone)]
pub enum PrefixState {
    /// Attention: a matrix [prefix rows, ..] whose last 2K D columns are the keys and values.
    KeysValues(Tensor),
}

/// The gradient of a [`PrefixState`].
#[derive(Debug, Clone)]
pub enum PrefixGradient {
    /// Attention: [prefix rows, 2K D].
    KeysValues(Tensor),
}

/// A layer's part of prefixes that are in another pass.
#[derive(Clone, Copy)]
pub(in crate::model) struct LayerPrefix<'a> {
    /// What the layer made of prefixes in another pass; `None` if the prefixes are in this pass.
    pub(in crate::model) state: Option<&'a PrefixState>,
    /// The gradient that other passes have for the prefixes of this pass.
    pub(in crate::model) gradient: Option<&'a PrefixGradient>,
}

impl PrefixState {
    pub(super) fn keys_values(&self) -> &Tensor {
        let Self::KeysValues(tensor) = self;
        tensor
    }
}

impl PrefixGradient {
    /// The sum of two gradients.
    ///
    /// # Errors
    /// Returns an error if the shapes differ or a device operation fails.
    pub fn add(&self, other: &Self) -> Result<Self> {
        let (Self::KeysValues(a), Self::KeysValues(b)) = (self, other);
        Ok(Self::KeysValues((a + b)?))
    }

    pub(super) fn keys_values(&self) -> &Tensor {
        let Self::KeysValues(tensor) = self;
        tensor
    }
}
