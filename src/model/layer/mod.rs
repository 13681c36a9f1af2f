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
mod experts;
mod feed_forward;
mod mamba2;
mod mixer;
mod pass;
mod prefix;
mod saved;
mod stream;

pub(super) use attention::{Attention, attention_shape};
pub(super) use dense::Dense;
pub(super) use experts::Experts;
pub(super) use feed_forward::FeedForward;
pub(super) use mamba2::Mamba2;
pub(super) use mixer::{LayerCachePart, Mixer, MixerSaved};
pub(super) use pass::{InputGradient, LayerPass, OutputRows};
pub(super) use prefix::LayerPrefix;
pub(super) use prefix::other_kind;
pub use prefix::{PrefixGradient, PrefixState};
pub(super) use saved::{LayerSaved, NormSaved, Saved};
pub(super) use stream::Stream;

use super::{Dtypes, KvCache};
use crate::Result;
use crate::checkpoint::ModelConfig;
use crate::checkpoint::tensors::{LayerTensors, LayerVector, Stack};
use crate::ops::experts::Routing;
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

/// Where a layer's weights come from: a checkpoint, or random numbers.
pub(super) trait LayerWeights {
    /// A norm over the residual stream, by its name in the layer.
    fn norm(&mut self, name: &str) -> Result<RmsNorm>;
    /// A vector in the dtype of sums over rows, f32 or f64, in its shape in transformers' files.
    fn vector(&mut self, vector: &LayerVector) -> Result<Tensor>;
    /// A stack as one projection.
    fn stack(&mut self, stack: &Stack) -> Result<Linear>;
}

/// What a layer reads that other passes, or an earlier run of the same pass, have made.
#[derive(Clone, Copy, Default)]
pub(super) struct Given<'a> {
    /// What this layer made of prefixes in another pass; `None` if the prefixes are in this pass.
    pub(super) prefix: Option<&'a PrefixState>,
    /// The choice of experts if the layer is run again: a second choice could be another one.
    pub(super) routing: Option<&'a Routing>,
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
    /// Layer `index` of a model of this shape.
    pub(super) fn new(
        config: &ModelConfig,
        index: usize,
        tensors: &LayerTensors,
        weights: &mut impl LayerWeights,
    ) -> Result<Self> {
        let [mixer_norm, feed_forward_norm] = LayerTensors::NORMS;
        Ok(Self {
            mixer_norm: weights.norm(mixer_norm)?,
            feed_forward_norm: weights.norm(feed_forward_norm)?,
            mixer: Mixer::new(config, index, &tensors.mixer, weights)?,
            feed_forward: FeedForward::new(tensors, weights)?,
        })
    }

    /// The norm before the mixer.
    pub(super) fn normed(&self, stream: &Stream, pass: &LayerPass) -> Result<Normed> {
        stream.normed(&self.mixer_norm, pass.residual_multiplier, pass.input_dtype)
    }

    /// Everything up to the feed-forward network's output projection, from what [`Layer::normed`] gave.
    pub(super) fn forward(&self, normed: Normed, pass: &LayerPass, given: Given) -> Result<LayerSaved> {
        let Normed { residual, normed, rstd } = normed;
        let (mixed, mixer) = self.mixer.forward(normed, &residual, pass, given.prefix)?;
        let mixer_norm = NormSaved { residual, rstd };
        let Normed { residual, normed, rstd } =
            mixed.normed(&self.feed_forward_norm, pass.residual_multiplier, pass.input_dtype)?;
        drop(mixed);
        let feed_forward = self.feed_forward.forward(&normed, pass, given.routing)?;
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
        let saved = self.feed_forward.forward(&normed, pass, None)?;
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
        self.mixer.projections().into_iter().chain(self.feed_forward.projections())
    }

    /// The same layer with weights and activations of other dtypes on another device.
    pub(super) fn to_device(&self, dtypes: Dtypes, device: &Device) -> Result<Self> {
        let change = ToDevice { dtypes, device };
        let activations = dtypes.activations;
        Ok(Self {
            mixer_norm: norm_to_device(&self.mixer_norm, activations, device)?,
            mixer: self.mixer.to_device(change)?,
            feed_forward_norm: norm_to_device(&self.feed_forward_norm, activations, device)?,
            feed_forward: self.feed_forward.to_device(change)?,
        })
    }
}

/// Other dtypes and another device for a layer.
#[derive(Clone, Copy)]
pub(super) struct ToDevice<'a> {
    dtypes: Dtypes,
    device: &'a Device,
}

impl ToDevice<'_> {
    fn linear(self, linear: &Linear) -> Result<Linear> {
        linear.converted(self.dtypes.weights, self.dtypes.activations, self.device)
    }

    /// A vector that stays in f32, or f64 if the activations are.
    fn vector(self, vector: &Tensor) -> Result<Tensor> {
        crate::ops::gpu::to_device(&vector.to_dtype(self.dtypes.row_sums())?, self.device)
    }
}

/// The same norm in another dtype on another device.
pub(super) fn norm_to_device(norm: &RmsNorm, dtype: DType, device: &Device) -> Result<RmsNorm> {
    let weight = crate::ops::gpu::to_device(&norm.weight.to_dtype(dtype)?, device)?;
    Ok(RmsNorm { weight, eps: norm.eps })
}
