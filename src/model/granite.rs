//! The decoder, written as the papers write it: one code for Granite, Llama (multipliers of 1) and dense
//! granitemoehybrid (transformers `modeling_granite.py`).
//!
//! ```text
//! x  = embedding_multiplier * embed(ids)
//! x += residual_multiplier * o_proj(attention(rope(qkv(norm(x)))))       every block
//! x += residual_multiplier * down(swiglu(gate_up(norm(x))))
//! logits = head(norm(x)) / logits_scaling
//! ```

use crate::checkpoint::{ModelConfig, Weights};
use crate::ops::gpu::{self, Route};
use crate::ops::packed::{Isa, Panels};
use crate::ops::rms_norm::RmsNorm;
use crate::ops::{AttentionShape, Linear, RopeTable};
use crate::{Error, Result};
use candle_core::{DType, Device, DeviceLocation, Tensor};
use std::sync::{Arc, Mutex};

/// A frozen model on a device.
pub struct Granite {
    pub(super) config: ModelConfig,
    pub(super) embedding: Tensor,
    pub(super) blocks: Vec<Block>,
    pub(super) norm: RmsNorm,
    pub(super) head: Linear,
    /// Of the last block, the layer that makes the queries, and the one that makes keys and values.
    pub(super) last_qkv: (Linear, Linear),
    /// dtype in which the blocks' layers read their inputs.
    pub(super) inputs: DType,
    pub(super) attention: AttentionShape,
    rope: Mutex<Option<Arc<RopeTable>>>,
    dtype: DType,
    device: Device,
}

/// The frozen weights of one block; layers over the same input are stacked.
pub(super) struct Block {
    pub(super) attention_norm: RmsNorm,
    /// Queries, keys, values.
    pub(super) qkv: Linear,
    pub(super) o: Linear,
    pub(super) mlp_norm: RmsNorm,
    /// Gate, up.
    pub(super) gate_up: Linear,
    pub(super) down: Linear,
}

impl Block {
    /// All layers with a weight matrix.
    fn layers(&self) -> [&Linear; 4] {
        [&self.qkv, &self.o, &self.gate_up, &self.down]
    }
}

/// The weights of a whole model.
pub(super) struct Parts {
    /// [V, C].
    pub(super) embedding: Tensor,
    pub(super) blocks: Vec<Block>,
    pub(super) norm: RmsNorm,
    /// [V, C]; the embedding again where it is tied. On a GPU it has rows of zeros behind ([`padded_vocab`]).
    pub(super) head: Linear,
}

/// Rows of the head's weight, and so the width of the logits, are a multiple of this on a GPU: products by tensor cores read
/// and write 16 bytes at a time, and tiles are 64 wide. Granite 3's vocabularies are 49,155 and 49,159.
const HEAD_MULTIPLE: usize = 64;

/// Rows of the head's weight for `vocab` tokens in this dtype on a device of this kind.
pub(super) fn padded_vocab(vocab: usize, dtype: DType, device: DeviceLocation) -> usize {
    if gpu::route_on(device, dtype) == Route::Kernel { vocab.next_multiple_of(HEAD_MULTIPLE) } else { vocab }
}

/// An embedding [V, C], and the head of the same values in the same memory.
pub(super) fn tied(embedding: Tensor) -> Result<(Tensor, Linear)> {
    let vocab = embedding.dims2()?.0;
    let head = untied(Linear::new(embedding, None)?)?;
    Ok((head.weight()?.narrow(0, 0, vocab)?, head))
}

/// A head that is padded where the device wants it.
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
    /// The instructions that the layers' weights are packed for on a device of this kind.
    pub(super) fn packed_for(&self, device: DeviceLocation) -> Option<Isa> {
        let packed =
            device == DeviceLocation::Cpu && (self.weights, self.activations) == (DType::BF16, DType::F32);
        Isa::best().filter(|_| packed)
    }
}

impl Granite {
    /// Reads the weights of a checkpoint onto `device`; `progress` is told after each block.
    ///
    /// # Errors
    /// A tensor that is missing or has another shape than `config` says; the device's.
    pub fn load(
        config: &ModelConfig,
        weights: &Weights,
        dtypes: Dtypes,
        device: &Device,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Self> {
        let load = Loader { config, weights, dtypes, device };
        let embedding = load.matrix("model.embed_tokens.weight", config.vocab_size, config.hidden_size)?;
        // Before the blocks: while it is padded, a second copy is in memory.
        let (embedding, head) = match config.tie_word_embeddings {
            true => tied(embedding)?,
            false => (
                embedding,
                untied(load.stacked(&[("lm_head".into(), config.vocab_size)], config.hidden_size, false)?)?,
            ),
        };
        let mut blocks = Vec::with_capacity(config.num_hidden_layers);
        for i in 0..config.num_hidden_layers {
            blocks.push(load.block(&format!("model.layers.{i}"))?);
            progress(i + 1);
        }
        let norm = load.norm("model.norm.weight")?;
        Self::from_parts(config, Parts { embedding, blocks, norm, head }, dtypes, device)
    }

    /// The same model in other dtypes on another device.
    pub(crate) fn on(&self, dtypes: Dtypes, device: &Device) -> Result<Self> {
        let linear = |l: &Linear| l.on(dtypes.weights, dtypes.activations, device);
        let norm = |n: &RmsNorm| -> Result<RmsNorm> {
            Ok(RmsNorm {
                weight: gpu::to_device(&n.weight.to_dtype(dtypes.activations)?, device)?,
                eps: n.eps,
            })
        };
        let block = |b: &Block| -> Result<Block> {
            Ok(Block {
                attention_norm: norm(&b.attention_norm)?,
                qkv: linear(&b.qkv)?,
                o: linear(&b.o)?,
                mlp_norm: norm(&b.mlp_norm)?,
                gate_up: linear(&b.gate_up)?,
                down: linear(&b.down)?,
            })
        };
        let embedding = gpu::to_device(&self.embedding.to_dtype(dtypes.weights)?, device)?;
        let (embedding, head) = match self.config.tie_word_embeddings {
            true => tied(embedding)?,
            false => (embedding, untied(linear(&self.head.rows(0..self.config.vocab_size)?)?)?),
        };
        let blocks = self.blocks.iter().map(block).collect::<Result<_>>()?;
        let norm = norm(&self.norm)?;
        Self::from_parts(&self.config, Parts { embedding, blocks, norm, head }, dtypes, device)
    }

    /// A model of weights that are on `device` in `dtypes`.
    pub(super) fn from_parts(
        config: &ModelConfig,
        parts: Parts,
        dtypes: Dtypes,
        device: &Device,
    ) -> Result<Self> {
        let attention = AttentionShape {
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            scale: config.attention_multiplier,
        };
        let Some(Block { qkv, .. }) = parts.blocks.last() else {
            return Err(Error::Invalid("num_hidden_layers: expected at least 1, found 0".into()));
        };
        let (q, kv) = (attention.q_width(), attention.kv_width());
        let last_qkv = (qkv.rows(0..q)?, qkv.rows(q..q + kv)?);
        Ok(Self {
            config: config.clone(),
            embedding: parts.embedding,
            norm: parts.norm,
            head: parts.head,
            last_qkv,
            inputs: qkv.input_dtype(dtypes.activations),
            blocks: parts.blocks,
            attention,
            rope: Mutex::new(None),
            dtype: dtypes.activations,
            device: device.clone(),
        })
    }

    /// Shape and multipliers.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// dtype of the activations.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// dtype in which the blocks' products read what they multiply: that of the activations, or bf16 on a CPU that
    /// multiplies bf16.
    pub fn product_dtype(&self) -> DType {
        self.inputs
    }

    /// dtype of the prompts that [`Granite::forward`] takes: f32, or f64 where the activations are.
    pub fn prompt_dtype(&self) -> DType {
        if self.dtype == DType::F64 { DType::F64 } else { DType::F32 }
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The vocabulary's embeddings [V, C], before the embedding multiplier.
    pub fn embedding(&self) -> &Tensor {
        &self.embedding
    }

    /// Packs the transposes of the blocks' weights too, which the backward pass on a CPU with AMX multiplies by. A head's is not
    /// among them: few rows pass through it.
    pub(crate) fn pack_transposes(&self) {
        self.blocks.iter().flat_map(Block::layers).for_each(Linear::pack_transpose);
    }

    /// Whether the transposes of the blocks' weights are packed.
    pub(crate) fn has_transposes(&self) -> bool {
        self.blocks.iter().flat_map(Block::layers).all(Linear::has_transpose)
    }

    /// Bytes of the frozen weights, a padded head's zeros and packed transposes included; a tied head counts once.
    pub fn weight_bytes(&self) -> usize {
        let of_block = |block: &Block| block.layers().map(Linear::bytes).iter().sum::<usize>();
        let embedding = match self.config.tie_word_embeddings {
            true => 0,
            false => self.embedding.elem_count() * self.embedding.dtype().size_in_bytes(),
        };
        embedding + self.head.bytes() + self.blocks.iter().map(of_block).sum::<usize>()
    }

    /// Rotary angles of at least `positions` positions; `None` where the model has none.
    pub(super) fn rope(&self, positions: usize) -> Result<Option<Arc<RopeTable>>> {
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
}

struct Loader<'a> {
    config: &'a ModelConfig,
    weights: &'a Weights,
    dtypes: Dtypes,
    device: &'a Device,
}

impl Loader<'_> {
    fn matrix(&self, name: &str, rows: usize, columns: usize) -> Result<Tensor> {
        self.weights.matrix(name, (rows, columns), self.dtypes.weights, self.device)
    }

    fn norm(&self, name: &str) -> Result<RmsNorm> {
        let weight =
            self.weights.tensor(name, &[self.config.hidden_size], self.dtypes.activations, self.device)?;
        Ok(RmsNorm { weight, eps: self.config.rms_norm_eps })
    }

    /// Layers over one input as one, stacked in the order given.
    fn stacked(&self, names: &[(String, usize)], columns: usize, bias: bool) -> Result<Linear> {
        let mut biases = Vec::new();
        for (name, rows) in names.iter().filter(|_| bias) {
            let name = format!("{name}.bias");
            biases.push(self.weights.tensor(&name, &[*rows], self.dtypes.activations, self.device)?);
        }
        let bias = if bias { Some(Tensor::cat(&biases, 0)?) } else { None };
        let parts: Vec<_> = names.iter().map(|(name, rows)| (format!("{name}.weight"), *rows)).collect();
        if let Some(isa) = self.dtypes.packed_for(self.device.location()) {
            return Linear::packed(self.packed(isa, &parts, columns)?, bias);
        }
        let parts = parts.iter().map(|(name, rows)| self.matrix(name, *rows, columns));
        let parts = parts.collect::<Result<Vec<_>>>()?;
        let weight = if let [only] = &parts[..] { only.clone() } else { Tensor::cat(&parts, 0)? };
        Linear::new(weight, bias)
    }

    /// Matrices [rows, columns] on top of each other, from the file into panels without a whole one in between.
    fn packed(&self, isa: Isa, parts: &[(String, usize)], columns: usize) -> Result<Panels> {
        let mut starts = Vec::new();
        let mut total = 0;
        for (name, rows) in parts {
            starts.push(total);
            total += rows;
            self.weights.check(name, &[*rows, columns])?;
        }
        Panels::pack(isa, (total, columns), |range, out| {
            let mut done = 0;
            for ((name, rows), start) in parts.iter().zip(&starts) {
                let part = range.start.max(*start)..range.end.min(start + rows);
                if part.is_empty() {
                    continue;
                }
                let values = part.len() * columns;
                self.weights.rows(
                    name,
                    part.start - start..part.end - start,
                    &mut out[done..done + values],
                )?;
                done += values;
            }
            Ok(())
        })
    }

    fn block(&self, name: &str) -> Result<Block> {
        let c = self.config;
        let (width, f) = (c.hidden_size, c.intermediate_size);
        let (q, kv) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
        let at = |part: &str, rows: usize| (format!("{name}.{part}"), rows);
        let qkv = [at("self_attn.q_proj", q), at("self_attn.k_proj", kv), at("self_attn.v_proj", kv)];
        // Granite 4's dense models keep gate and up in one matrix, as it is wanted here.
        let (gate_up, down) = match self.weights.contains(&format!("{name}.shared_mlp.input_linear.weight")) {
            true => (vec![at("shared_mlp.input_linear", 2 * f)], at("shared_mlp.output_linear", width)),
            false => (vec![at("mlp.gate_proj", f), at("mlp.up_proj", f)], at("mlp.down_proj", width)),
        };
        Ok(Block {
            attention_norm: self.norm(&format!("{name}.input_layernorm.weight"))?,
            qkv: self.stacked(&qkv, width, c.attention_bias)?,
            o: self.stacked(&[at("self_attn.o_proj", width)], q, c.attention_bias)?,
            mlp_norm: self.norm(&format!("{name}.post_attention_layernorm.weight"))?,
            gate_up: self.stacked(&gate_up, width, c.mlp_bias)?,
            down: self.stacked(&[down], f, c.mlp_bias)?,
        })
    }
}

/// `f32` activations need `f32` (or half) weights on the CPU; a GPU computes in the weights' dtype.
pub fn dtypes(weights: DType, device: &Device) -> Result<Dtypes> {
    match (weights, device) {
        (DType::F32 | DType::F64, _) => Ok(Dtypes { weights, activations: weights }),
        (DType::F16 | DType::BF16, Device::Cpu) => Ok(Dtypes { weights, activations: DType::F32 }),
        (DType::F16 | DType::BF16, _) => Ok(Dtypes { weights, activations: weights }),
        (other, _) => Err(Error::Invalid(format!("model.dtype: expected f32, bf16 or f16, found {other:?}"))),
    }
}
