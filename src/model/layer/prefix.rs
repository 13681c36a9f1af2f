//! What a layer hands from a prefix to the sequences that follow it.

use crate::ops::ssd::ScanStates;
use crate::{Error, Result};
use candle_core::Tensor;

/// What the sequences of a group read of its prefix in one layer.
#[derive(Debug, Clone)]
pub enum PrefixState {
    /// Attention: a matrix [prefix rows, ..] whose last 2K D columns are the keys and values.
    KeysValues(Tensor),
    /// Mamba2: the state at the end of each prefix.
    Scan(ScanStates),
}

/// The gradient of a [`PrefixState`].
#[derive(Debug, Clone)]
pub enum PrefixGradient {
    /// Attention: [prefix rows, 2K D].
    KeysValues(Tensor),
    /// Mamba2: of the state at the end of each prefix.
    Scan(ScanStates),
}

/// A layer's part of prefixes that are in another pass.
#[derive(Clone, Copy)]
pub(in crate::model) struct LayerPrefix<'a> {
    /// What the layer made of prefixes in another pass; `None` if the prefixes are in this pass.
    pub(in crate::model) state: Option<&'a PrefixState>,
    /// The gradient that other passes have for the prefixes of this pass.
    pub(in crate::model) gradient: Option<&'a PrefixGradient>,
}

/// The error for a value of another kind of layer.
pub(in crate::model) fn other_kind(what: &str) -> Error {
    Error::Invalid(format!("{what}: expected that of this kind of layer, found another's"))
}

impl PrefixState {
    pub(super) fn keys_values(&self) -> Result<&Tensor> {
        match self {
            Self::KeysValues(tensor) => Ok(tensor),
            Self::Scan(_) => Err(other_kind("prefix state")),
        }
    }

    pub(super) fn scan(&self) -> Result<&ScanStates> {
        match self {
            Self::Scan(states) => Ok(states),
            Self::KeysValues(_) => Err(other_kind("prefix state")),
        }
    }
}

impl PrefixGradient {
    /// The sum of two gradients.
    ///
    /// # Errors
    /// Returns an error if the kinds or shapes differ or a device operation fails.
    pub fn add(&self, other: &Self) -> Result<Self> {
        match (self, other) {
            (Self::KeysValues(a), Self::KeysValues(b)) => Ok(Self::KeysValues((a + b)?)),
            (Self::Scan(a), Self::Scan(b)) => {
                Ok(Self::Scan(ScanStates { ssm: (&a.ssm + &b.ssm)?, conv: (&a.conv + &b.conv)? }))
            }
            _ => Err(other_kind("prefix gradient")),
        }
    }

    pub(super) fn keys_values(&self) -> Result<&Tensor> {
        match self {
            Self::KeysValues(tensor) => Ok(tensor),
            Self::Scan(_) => Err(other_kind("prefix gradient")),
        }
    }

    pub(super) fn scan(&self) -> Result<&ScanStates> {
        match self {
            Self::Scan(states) => Ok(states),
            Self::KeysValues(_) => Err(other_kind("prefix gradient")),
        }
    }
}
