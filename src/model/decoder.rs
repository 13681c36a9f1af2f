//! The decoder: one code for Granite, Llama (multipliers of 1) and dense granitemoehybrid (transformers
//! `modeling_granite.py`).
//!
//! ```text
//! x  = embedding_multiplier * embed(ids)
//! x  = layer(x)                                 every layer (src/model/layer/)
//! logits = head(norm(x)) / logits_scaling
//! ```

use super::layer::{InputGradient, Layer, LayerPass, OutputRows, attention_shape, norm_to_device};
use crate::batch::PackedBatch;
use crate::checkpoint::{MixerKind, ModelConfig};
use crate::ops::backend::{Route, device_route, route};
use crate::ops::bf16::Isa;
use crate::ops::gpu;
use crate::ops::rms_norm::RmsNorm;
use crate::ops::{AttentionShape, Linear, RopeTable, cpu};
use crate::{Error, Result};
use candle_core::{DType, Device, DeviceLocation, Tensor};
use std::sync::{Arc, Mutex};

/// A frozen model on a device.
pub struct Decoder {
    pub(super) config: ModelConfig,
    pub(super) embedding: Tensor,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: RmsNorm,
    pub(super) head: Linear,
    pub(super) attention: AttentionShape,
    /// dtype in which the layers' projections read their inputs.
    input_dtype: DType,
    rope: Mutex<Option<Arc<RopeTable>>>,
    dtype: DType,
    device: Device,
}

/// The weights of a whole model.
pub(super) struct Parts {
    /// [V, C].
    pub(super) embedding: Tensor,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: RmsNorm,
    /// [V, C]; the embedding again if it is tied. On a GPU rows of zeros follow ([`padded_vocab`]).
    pub(super) head: Linear,
}

/// Rows of the head's weight, and so the width of the logits, are a multiple of this on a GPU: products by tensor cores read
/// and write 16 bytes at a time, and tiles are 64 wide. Granite 3's vocabularies are 49,155 and 49,159.
const HEAD_MULTIPLE: usize = 64;

/// Rows of the head's weight for `vocab` tokens on a device of this kind.
pub(super) fn padded_vocab(vocab: usize, device: DeviceLocation) -> usize {
    if device_route(device) == Route::Kernel { vocab.next_multiple_of(HEAD_MULTIPLE) } else { vocab }
}

/// An embedding [V, C], and the head of the same values in the same memory.
pub(super) fn tied(embedding: Tensor) -> Result<(Tensor, Linear)> {
    let vocab = embedding.dims2()?.0;
    let head = untied(Linear::new(embedding, None)?)?;
    Ok((head.weight()?.narrow(0, 0, vocab)?, head))
}

/// A head that is padded if the device needs it.
pub(super) fn untied(head: Linear) -> Result<Linear> {
    head.padded(HEAD_MULTIPLE)
}

/// dtypes of a loaded model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dtypes {
    /// Of the weights on the device.
    pub weights: DType,
    /// Of the activations, the prompt's gradient included.
    pub activations: DType,
}

impl Dtypes {
    /// The dtypes of a model whose weights are `weights`: f32 activations of f32, bf16 or f16 weights on the CPU; a GPU
    /// computes in the weights' dtype.
    ///
    /// # Errors
    /// Returns an error if `weights` is no float of 16, 32 or 64 bits.
    pub fn for_weights(weights: DType, device: &Device) -> Result<Self> {
        match (weights, device) {
            (DType::F32 | DType::F64, _) => Ok(Self { weights, activations: weights }),
            (DType::F16 | DType::BF16, Device::Cpu) => Ok(Self { weights, activations: DType::F32 }),
            (DType::F16 | DType::BF16, _) => Ok(Self { weights, activations: weights }),
            (other, _) => {
                Err(Error::Invalid(format!("model.dtype: expected f32, bf16 or f16, found {other:?}")))
            }
        }
    }

    /// dtype of sums over rows and of a Mamba2 layer's vectors: at least f32.
    pub(super) fn row_sums(&self) -> DType {
        if self.activations == DType::F64 { DType::F64 } else { DType::F32 }
    }

    /// The instructions that the layers' weights are packed for on a device of this kind.
    pub(super) fn packed_for(&self, device: DeviceLocation) -> Option<Isa> {
        let packed =
            device == DeviceLocation::Cpu && (self.weights, self.activations) == (DType::BF16, DType::F32);
        Isa::best().filter(|_| packed)
    }
}

impl Decoder {
    /// A model of weights that are on `device` in `dtypes`.
    pub(super) fn from_parts(
        config: &ModelConfig,
        parts: Parts,
        dtypes: Dtypes,
        device: &Device,
    ) -> Result<Self> {
        let Some(projection) = parts.layers.last().and_then(|layer| layer.projections().next()) else {
            return Err(Error::Invalid("num_hidden_layers: expected at least 1, found 0".into()));
        };
        Ok(Self {
            config: config.clone(),
            input_dtype: projection.gemm_dtype(dtypes.activations),
            embedding: parts.embedding,
            layers: parts.layers,
            norm: parts.norm,
            head: parts.head,
            attention: attention_shape(config),
            rope: Mutex::new(None),
            dtype: dtypes.activations,
            device: device.clone(),
        })
    }

    /// The same model in other dtypes on another device.
    pub(crate) fn to_device(&self, dtypes: Dtypes, device: &Device) -> Result<Self> {
        let Dtypes { weights, activations } = dtypes;
        let embedding = gpu::to_device(&self.embedding.to_dtype(weights)?, device)?;
        let (embedding, head) = match self.config.tie_word_embeddings {
            true => tied(embedding)?,
            false => {
                let head =
                    self.head.rows(0..self.config.vocab_size)?.converted(weights, activations, device)?;
                (embedding, untied(head)?)
            }
        };
        let layers = self.layers.iter().map(|layer| layer.to_device(dtypes, device));
        let layers = layers.collect::<Result<_>>()?;
        let norm = norm_to_device(&self.norm, activations, device)?;
        Self::from_parts(&self.config, Parts { embedding, layers, norm, head }, dtypes, device)
    }

    /// Shape and multipliers.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// dtype of the activations.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// dtype in which the layers' projections read their inputs: that of the activations, or bf16 on a CPU that
    /// multiplies bf16.
    pub fn product_dtype(&self) -> DType {
        self.input_dtype
    }

    /// dtype of the prompts that [`Decoder::forward`] takes: f32, or f64 if the activations are f64.
    pub fn prompt_dtype(&self) -> DType {
        if self.dtype == DType::F64 { DType::F64 } else { DType::F32 }
    }

    /// A matrix of prompts without rows, for batches that have no virtual tokens.
    pub(crate) fn no_prompts(&self) -> Result<Tensor> {
        crate::ops::no_rows(self.config.hidden_size, self.prompt_dtype(), &self.device)
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The vocabulary's embeddings [V, C], before the embedding multiplier.
    pub fn embedding(&self) -> &Tensor {
        &self.embedding
    }

    /// Packs the transposes of the layers' weights too, which the backward pass on a CPU with AMX multiplies by. A head's is not
    /// among them: few rows pass through it.
    pub(crate) fn pack_transposes(&self) {
        self.layers.iter().flat_map(Layer::projections).for_each(Linear::pack_transpose);
    }

    /// Whether the transposes of the layers' weights are packed.
    pub(crate) fn has_transposes(&self) -> bool {
        self.layers.iter().flat_map(Layer::projections).all(Linear::has_transpose)
    }

    /// Bytes of the frozen weights, a padded head's zeros and packed transposes included; a tied head counts once.
    pub fn weight_bytes(&self) -> usize {
        let embedding = match self.config.tie_word_embeddings {
            true => 0,
            false => self.embedding.elem_count() * self.embedding.dtype().size_in_bytes(),
        };
        let layers: usize = self.layers.iter().flat_map(Layer::projections).map(Linear::bytes).sum();
        embedding + self.head.bytes() + layers
    }

    /// Bytes of what all Mamba2 layers keep of a sequence while it is generated.
    pub fn state_bytes(&self) -> usize {
        let Some(mamba) = &self.config.mamba else { return 0 };
        let state = mamba.inner() * mamba.state * self.prompt_dtype().size_in_bytes();
        let tail = (mamba.taps - 1) * mamba.channels() * self.input_dtype.size_in_bytes();
        self.config.layers_with(MixerKind::Mamba2) * (state + tail)
    }

    /// The part of layer `layer` in a pass over `batch`; `rope` is [`Decoder::rope_of`] the batch.
    pub(super) fn layer_pass<'a>(
        &self,
        layer: usize,
        batch: &'a PackedBatch,
        rope: Option<&'a RopeTable>,
    ) -> LayerPass<'a> {
        LayerPass {
            batch,
            rope,
            dtype: self.dtype,
            input_dtype: self.input_dtype,
            residual_multiplier: self.config.residual_multiplier,
            output_rows: OutputRows::new(&self.config, layer),
            input_gradient: InputGradient::new(layer),
        }
    }

    /// Rotary angles of the positions in a batch; `None` if the model has none.
    pub(super) fn rope_of(&self, batch: &PackedBatch) -> Result<Option<Arc<RopeTable>>> {
        let positions = batch.position_ids.iter().max().map_or(0, |p| *p as usize + 1);
        let Some(rope) = &self.config.rope else { return Ok(None) };
        let mut held = self.rope.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(table) = held.as_ref().filter(|t| t.positions() >= positions) {
            return Ok(Some(table.clone()));
        }
        let size = positions.next_power_of_two().max(512);
        let table =
            Arc::new(RopeTable::new(rope, self.config.head_dim, size, self.prompt_dtype(), &self.device)?);
        *held = Some(table.clone());
        Ok(Some(table))
    }

    /// Runs `f` on the thread pool, where the loops of the CPU's ops begin at once.
    pub(super) fn on_pool<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        if route(&self.embedding) == Route::Cpu { cpu::on_pool(f) } else { f() }
    }
}
