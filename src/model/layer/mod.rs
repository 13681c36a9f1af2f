//! One layer of the decoder: a mixer, which makes rows see each other, and a feed-forward network, each after a norm and with
//! a skip connection.
//!
//! ```text
//! x += residual_multiplier * mixer(norm(x))
//! x += residual_multiplier * feed_forward(norm(x))
//! ```
//!
//! A kind of mixer or feed-forward network is a file of this folder.

mod attention;
mod dense;
mod pass;
mod prefix;
mod saved;
mod stream;

pub(super) use attention::{Attention, AttentionSaved, attention_shape};
pub(super) use dense::{Dense, DenseSaved};
pub(super) use pass::{InputGradient, LayerPass, OutputRows};
pub(super) use prefix::LayerPrefix;
pub use prefix::{PrefixGradient, PrefixState};
pub(super) use saved::{LayerSaved, NormSaved, Saved};
pub(super) use stream::Stream;

use super::KvCache;
use crate::Result;
use crate::checkpoint::ModelConfig;
use crate::ops::rms_norm::{Normed, RmsNorm};
use crate::ops::{Linear, rows};
use candle_core::{DType, Device, Tensor};

/// The frozen weights of one layer.
pub(super) struct Layer {
    pub(super) mixer_norm: RmsNorm,
    pub(super) mixer: Mixer,
    pub(super) feed_forward_norm: RmsNorm,
    pub(super) feed_forward: FeedForward,
}

/// What makes rows see each other.
pub(super) enum Mixer {
    Attention(Attention),
}

/// What each row goes through by itself.
pub(super) enum FeedForward {
    Dense(Dense),
}

/// What the backward pass needs of a mixer.
pub(super) enum MixerSaved {
    Attention(AttentionSaved),
}

/// What the backward pass needs of a feed-forward network.
pub(super) enum FeedForwardSaved {
    Dense(DenseSaved),
}

/// Gradients of a layer or of its mixer.
pub(super) struct LayerGradients {
    /// Of the input, for the rows of [`LayerPass::input_gradient`]; `None` if the prefix rows are in another pass and only
    /// theirs is wanted.
    pub(super) input: Option<Tensor>,
    /// Of what was read of prefixes in another pass.
    pub(super) prefix: Option<PrefixGradient>,
}

impl Layer {
    /// Layer `index` of a model of this shape: its norms, and its stacks in the order of [`crate::checkpoint::tensors::LayerTensors::stacks`].
    pub(super) fn new(
        config: &ModelConfig,
        index: usize,
        [mixer_norm, feed_forward_norm]: [RmsNorm; 2],
        [qkv, o, gate_up, down]: [Linear; 4],
    ) -> Result<Self> {
        let attention = Attention::new(attention_shape(config), qkv, o, OutputRows::new(config, index))?;
        Ok(Self {
            mixer_norm,
            mixer: Mixer::Attention(attention),
            feed_forward_norm,
            feed_forward: FeedForward::Dense(Dense { gate_up, down }),
        })
    }

    /// The norm before the mixer.
    pub(super) fn normed(&self, stream: &Stream, pass: &LayerPass) -> Result<Normed> {
        stream.normed(&self.mixer_norm, pass.residual_multiplier, pass.input_dtype)
    }

    /// Everything up to the feed-forward network's output projection, from what [`Layer::normed`] gave. `prefix` is what this
    /// layer made of prefixes in another pass.
    pub(super) fn forward(
        &self,
        normed: Normed,
        pass: &LayerPass,
        prefix: Option<&PrefixState>,
    ) -> Result<LayerSaved> {
        let Normed { residual, normed, rstd } = normed;
        let (mixed, mixer) = self.mixer.forward(normed, &residual, pass, prefix)?;
        let mixer_norm = NormSaved { residual, rstd };
        let Normed { residual, normed, rstd } =
            mixed.normed(&self.feed_forward_norm, pass.residual_multiplier, pass.input_dtype)?;
        drop(mixed);
        let feed_forward = self.feed_forward.forward(&normed, pass)?;
        Ok(LayerSaved { mixer_norm, mixer, feed_forward_norm: NormSaved { residual, rstd }, feed_forward })
    }

    /// The residual stream after the layer.
    pub(super) fn output(&self, saved: &LayerSaved, pass: &LayerPass) -> Result<Stream> {
        self.feed_forward.output(&saved.feed_forward, saved.feed_forward_norm.residual.clone(), pass)
    }

    /// The layer while generating: nothing is saved, and what later tokens read goes into layer `index` of `cache`.
    pub(super) fn infer(
        &self,
        stream: &Stream,
        pass: &LayerPass,
        cache: &mut KvCache,
        index: usize,
    ) -> Result<Stream> {
        let Normed { residual, normed, .. } = self.normed(stream, pass)?;
        let mixed = self.mixer.infer(&normed, residual, pass, (cache, index))?;
        let Normed { residual, normed, .. } =
            mixed.normed(&self.feed_forward_norm, pass.residual_multiplier, pass.input_dtype)?;
        let saved = self.feed_forward.forward(&normed, pass)?;
        self.feed_forward.output(&saved, residual, pass)
    }

    /// Gradients from `doutput`, that of the residual stream after the layer.
    pub(super) fn backward(
        &self,
        doutput: &Tensor,
        saved: &LayerSaved,
        pass: &LayerPass,
        prefix: LayerPrefix,
    ) -> Result<LayerGradients> {
        let LayerSaved { mixer_norm, mixer, feed_forward_norm, feed_forward } = saved;
        let dnormed = self.feed_forward.backward(doutput, feed_forward, pass)?;
        let dstream = self.feed_forward_norm.backward(
            &dnormed,
            &feed_forward_norm.residual,
            &feed_forward_norm.rstd,
            Some(doutput),
        )?;
        drop(dnormed);
        let LayerGradients { input, prefix } = self.mixer.backward(&dstream, mixer, pass, prefix)?;
        let Some(dnormed) = input else { return Ok(LayerGradients { input: None, prefix }) };
        let n = pass.gradient_rows();
        let residual = mixer_norm.residual.narrow(0, 0, n)?;
        let rstd = mixer_norm.rstd.narrow(0, 0, n)?;
        let dresidual = match (pass.output_rows, pass.input_gradient) {
            (OutputRows::All, _) => Some(dstream.narrow(0, 0, n)?),
            (OutputRows::Targets, InputGradient::All) => Some(rows::backward(&dstream, pass.targets(), n)?),
            // A model of one layer: no target row is a prefix row.
            (OutputRows::Targets, InputGradient::Prefixes) => None,
        };
        drop(dstream);
        let input = self.mixer_norm.backward(&dnormed, &residual, &rstd, dresidual.as_ref())?;
        Ok(LayerGradients { input: Some(input), prefix })
    }

    /// All projections.
    pub(super) fn projections(&self) -> impl Iterator<Item = &Linear> {
        let Mixer::Attention(attention) = &self.mixer;
        let FeedForward::Dense(dense) = &self.feed_forward;
        attention.projections().into_iter().chain(dense.projections())
    }

    /// The same layer with weights and activations of other dtypes on another device.
    pub(super) fn to_device(&self, (weights, activations): (DType, DType), device: &Device) -> Result<Self> {
        let linear = |l: &Linear| l.converted(weights, activations, device);
        let Mixer::Attention(attention) = &self.mixer;
        let FeedForward::Dense(Dense { gate_up, down }) = &self.feed_forward;
        Ok(Self {
            mixer_norm: norm_to_device(&self.mixer_norm, activations, device)?,
            mixer: Mixer::Attention(attention.with_projections(linear)?),
            feed_forward_norm: norm_to_device(&self.feed_forward_norm, activations, device)?,
            feed_forward: FeedForward::Dense(Dense { gate_up: linear(gate_up)?, down: linear(down)? }),
        })
    }
}

/// The same norm in another dtype on another device.
pub(super) fn norm_to_device(norm: &RmsNorm, dtype: DType, device: &Device) -> Result<RmsNorm> {
    let weight = crate::ops::gpu::to_device(&norm.weight.to_dtype(dtype)?, device)?;
    Ok(RmsNorm { weight, eps: norm.eps })
}

impl Mixer {
    /// The residual stream after the mixer, of the rows whose output is wanted.
    fn forward(
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
        }
    }

    fn infer(
        &self,
        normed: &Tensor,
        residual: Tensor,
        pass: &LayerPass,
        cache: (&mut KvCache, usize),
    ) -> Result<Stream> {
        match self {
            Self::Attention(attention) => attention.infer(normed, residual, pass, cache),
        }
    }

    fn backward(
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
        }
    }
}

impl FeedForward {
    fn forward(&self, normed: &Tensor, pass: &LayerPass) -> Result<FeedForwardSaved> {
        match self {
            Self::Dense(dense) => Ok(FeedForwardSaved::Dense(dense.forward(normed, pass)?)),
        }
    }

    fn output(&self, saved: &FeedForwardSaved, residual: Tensor, pass: &LayerPass) -> Result<Stream> {
        match (self, saved) {
            (Self::Dense(dense), FeedForwardSaved::Dense(saved)) => dense.output(saved, residual, pass),
        }
    }

    fn backward(&self, doutput: &Tensor, saved: &FeedForwardSaved, pass: &LayerPass) -> Result<Tensor> {
        match (self, saved) {
            (Self::Dense(dense), FeedForwardSaved::Dense(saved)) => dense.backward(doutput, saved, pass),
        }
    }
}
