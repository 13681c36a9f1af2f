//! The mixer of a layer: what makes its rows see each other.

use super::attention::AttentionSaved;
use super::mamba2::Mamba2Saved;
use super::{
    Attention, LayerGradients, LayerPass, LayerPrefix, LayerWeights, Mamba2, OutputRows, PrefixState, Stream,
    ToDevice, attention_shape,
};
use crate::checkpoint::ModelConfig;
use crate::checkpoint::tensors::MixerTensors;
use crate::model::KvCache;
use crate::ops::Linear;
use crate::{Error, Result};
use candle_core::Tensor;

/// The frozen weights.
pub(in crate::model) enum Mixer {
    Attention(Attention),
    Mamba2(Mamba2),
}

/// What the backward pass needs.
pub(in crate::model) enum MixerSaved {
    Attention(AttentionSaved),
    Mamba2(Mamba2Saved),
}

/// A layer of a cache: the cache, and the layer's index.
pub(in crate::model) type LayerCachePart<'a> = (&'a mut KvCache, usize);

impl Mixer {
    /// Of layer `index` of a model of this shape.
    pub(super) fn new(
        config: &ModelConfig,
        index: usize,
        tensors: &MixerTensors,
        weights: &mut impl LayerWeights,
    ) -> Result<Self> {
        let output_rows = OutputRows::new(config, index);
        match (tensors, &config.mamba) {
            (MixerTensors::Attention { qkv, o }, _) => {
                let (qkv, o) = (weights.stack(qkv)?, weights.stack(o)?);
                Ok(Self::Attention(Attention::new(attention_shape(config), qkv, o, output_rows)?))
            }
            (MixerTensors::Mamba2 { input, output, vectors }, Some(mamba)) => {
                let projections = [weights.stack(input)?, weights.stack(output)?];
                let vectors =
                    vectors.iter().map(|vector| weights.vector(vector)).collect::<Result<Vec<_>>>()?;
                Ok(Self::Mamba2(Mamba2::new(mamba, config.rms_norm_eps, projections, &vectors)?))
            }
            (MixerTensors::Mamba2 { .. }, None) => Err(Error::Invalid(format!(
                "layer {index}: expected the shape of Mamba2 layers in the configuration, found none"
            ))),
        }
    }

    /// The residual stream after the mixer, of the rows whose output is wanted.
    pub(super) fn forward(
        &self,
        normed: Tensor,
        residual: &Tensor,
        pass: &LayerPass,
        prefix: Option<&PrefixState>,
    ) -> Result<(Stream, MixerSaved)> {
        match self {
            Self::Attention(attention) => {
                let (stream, saved) = attention.forward(normed, residual, pass, prefix)?;
                Ok((stream, MixerSaved::Attention(saved)))
            }
            Self::Mamba2(mamba) => {
                let (stream, saved) = mamba.forward(normed, residual, pass, prefix)?;
                Ok((stream, MixerSaved::Mamba2(saved)))
            }
        }
    }

    pub(super) fn infer(
        &self,
        normed: &Tensor,
        residual: Tensor,
        pass: &LayerPass,
        cache: LayerCachePart,
    ) -> Result<Stream> {
        match self {
            Self::Attention(attention) => attention.infer(normed, residual, pass, cache),
            Self::Mamba2(mamba) => mamba.infer(normed, residual, pass, cache),
        }
    }

    pub(super) fn backward(
        &self,
        dstream: &Tensor,
        saved: &MixerSaved,
        pass: &LayerPass,
        prefix: LayerPrefix,
    ) -> Result<LayerGradients> {
        match (self, saved) {
            (Self::Attention(attention), MixerSaved::Attention(saved)) => {
                attention.backward(dstream, saved, pass, prefix)
            }
            (Self::Mamba2(mamba), MixerSaved::Mamba2(saved)) => mamba.backward(dstream, saved, pass, prefix),
            _ => Err(super::other_kind("the tape of the layer's mixer")),
        }
    }

    pub(super) fn projections(&self) -> [&Linear; 2] {
        match self {
            Self::Attention(attention) => attention.projections(),
            Self::Mamba2(mamba) => mamba.projections(),
        }
    }

    pub(super) fn to_device(&self, change: ToDevice) -> Result<Self> {
        match self {
            Self::Attention(attention) => {
                Ok(Self::Attention(attention.with_projections(|linear| change.linear(linear))?))
            }
            Self::Mamba2(mamba) => Ok(Self::Mamba2(mamba.to_device(change)?)),
        }
    }
}
