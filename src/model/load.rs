//! Loading a checkpoint's weights onto a device.

use super::decoder::{Parts, tied, untied};
use super::layer::Layer;
use super::{Decoder, Dtypes};
use crate::Result;
use crate::checkpoint::tensors::{EMBEDDING, HEAD, LayerTensors, NORM, Stack};
use crate::checkpoint::{ModelConfig, Weights};
use crate::ops::Linear;
use crate::ops::bf16::{Isa, PackedWeight};
use crate::ops::rms_norm::RmsNorm;
use candle_core::{Device, Tensor};

impl Decoder {
    /// Reads the weights of a checkpoint onto `device`; `progress` is called with the number of layers read so far.
    ///
    /// # Errors
    /// Returns an error if a tensor is missing or has another shape than `config` says, or if a device operation fails.
    pub fn load(
        config: &ModelConfig,
        weights: &Weights,
        dtypes: Dtypes,
        device: &Device,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Self> {
        let load = Loader { config, weights, dtypes, device };
        let (vocab, width) = (config.vocab_size, config.hidden_size);
        let embedding = load.matrix(EMBEDDING, vocab, width)?;
        // Before the layers: while it is padded, a second copy is in memory.
        let (embedding, head) = match config.tie_word_embeddings {
            true => tied(embedding)?,
            false => (embedding, untied(load.linear(&[(HEAD.into(), vocab)], width, None)?)?),
        };
        let mut layers = Vec::with_capacity(config.num_hidden_layers);
        for i in 0..config.num_hidden_layers {
            layers.push(load.layer(i)?);
            progress(i + 1);
        }
        let norm = load.norm(NORM)?;
        Self::from_parts(config, Parts { embedding, layers, norm, head }, dtypes, device)
    }
}

struct Loader<'a> {
    config: &'a ModelConfig,
    weights: &'a Weights,
    dtypes: Dtypes,
    device: &'a Device,
}

impl Loader<'_> {
    fn layer(&self, i: usize) -> Result<Layer> {
        let merged = self.weights.contains(&LayerTensors::merged_name(i));
        let tensors = LayerTensors::new(self.config, merged);
        let [mixer, feed_forward] = LayerTensors::NORMS.map(|norm| LayerTensors::name(i, norm));
        let [qkv, o, gate_up, down] = tensors.stacks();
        let norms = [self.norm(&mixer)?, self.norm(&feed_forward)?];
        let stacks = [self.stack(i, qkv)?, self.stack(i, o)?, self.stack(i, gate_up)?, self.stack(i, down)?];
        Layer::new(self.config, i, norms, stacks)
    }

    fn matrix(&self, name: &str, rows: usize, columns: usize) -> Result<Tensor> {
        self.weights.matrix(name, (rows, columns), self.dtypes.weights, self.device)
    }

    fn vector(&self, name: &str, values: usize) -> Result<Tensor> {
        self.weights.tensor(name, &[values], self.dtypes.activations, self.device)
    }

    fn norm(&self, name: &str) -> Result<RmsNorm> {
        let weight = self.vector(name, self.config.hidden_size)?;
        Ok(RmsNorm { weight, eps: self.config.rms_norm_eps })
    }

    /// A stack of layer `layer` as one projection.
    fn stack(&self, layer: usize, stack: &Stack) -> Result<Linear> {
        let names = |ending: &str| -> Vec<(String, usize)> {
            let name = |projection: &str| LayerTensors::name(layer, &format!("{projection}.{ending}"));
            stack.projections.iter().map(|projection| (name(projection.name), projection.outputs)).collect()
        };
        let bias = match stack.has_bias {
            true => {
                let biases = names("bias")
                    .iter()
                    .map(|(name, values)| self.vector(name, *values))
                    .collect::<Result<Vec<_>>>()?;
                Some(Tensor::cat(&biases, 0)?)
            }
            false => None,
        };
        self.linear(&names("weight"), stack.inputs, bias)
    }

    /// Matrices [rows, columns] one below the other as one projection.
    fn linear(&self, parts: &[(String, usize)], columns: usize, bias: Option<Tensor>) -> Result<Linear> {
        if let Some(isa) = self.dtypes.packed_for(self.device.location()) {
            return Linear::packed(self.packed(isa, parts, columns)?, bias);
        }
        let parts = parts.iter().map(|(name, rows)| self.matrix(name, *rows, columns));
        let parts = parts.collect::<Result<Vec<_>>>()?;
        let weight = if let [only] = &parts[..] { only.clone() } else { Tensor::cat(&parts, 0)? };
        Linear::new(weight, bias)
    }

    /// The same, from the file into panels, without the whole matrix in between.
    fn packed(&self, isa: Isa, parts: &[(String, usize)], columns: usize) -> Result<PackedWeight> {
        let mut starts = Vec::new();
        let mut total = 0;
        for (name, rows) in parts {
            starts.push(total);
            total += rows;
            self.weights.check(name, &[*rows, columns])?;
        }
        PackedWeight::pack(isa, (total, columns), |range, out| {
            let mut done = 0;
            for ((name, rows), start) in parts.iter().zip(&starts) {
                let part = range.start.max(*start)..range.end.min(start + rows);
                if part.is_empty() {
                    continue;
                }
                let values = part.len() * columns;
                let rows = part.start - start..part.end - start;
                self.weights.rows(name, rows, &mut out[done..done + values])?;
                done += values;
            }
            Ok(())
        })
    }
}
