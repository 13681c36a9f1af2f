//! Loading a checkpoint's weights onto a device.

use super::decoder::{Parts, tied, untied};
use super::layer::{Layer, LayerWeights};
use super::{Decoder, Dtypes};
use crate::Result;
use crate::checkpoint::tensors::{EMBEDDING, HEAD, LayerTensors, LayerVector, NORM, Stack};
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
            false => (embedding, untied(load.linear(&[(HEAD.into(), vec![vocab, width])], width, None)?)?),
        };
        let mut layers = Vec::with_capacity(config.num_hidden_layers);
        for i in 0..config.num_hidden_layers {
            let merged = weights.contains(&LayerTensors::merged_name(i));
            let tensors = LayerTensors::new(config, i, merged);
            layers.push(Layer::new(config, i, &tensors, &mut LayerLoader { load: &load, layer: i })?);
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

/// The weights of one layer.
struct LayerLoader<'a> {
    load: &'a Loader<'a>,
    layer: usize,
}

impl LayerWeights for LayerLoader<'_> {
    fn norm(&mut self, name: &str) -> Result<RmsNorm> {
        self.load.norm(&LayerTensors::name(self.layer, name))
    }

    fn vector(&mut self, vector: &LayerVector) -> Result<Tensor> {
        let Loader { weights, dtypes, device, .. } = self.load;
        let name = LayerTensors::name(self.layer, vector.name);
        weights.tensor(&name, &vector.shape, dtypes.row_sums(), device)
    }

    fn stack(&mut self, stack: &Stack) -> Result<Linear> {
        let name = |tensor: &str, ending| LayerTensors::name(self.layer, &format!("{tensor}.{ending}"));
        let tensors = stack.tensors();
        let bias = match stack.has_bias {
            true => {
                let biases =
                    tensors.iter().map(|(tensor, values)| self.load.vector(&name(tensor, "bias"), *values));
                Some(Tensor::cat(&biases.collect::<Result<Vec<_>>>()?, 0)?)
            }
            false => None,
        };
        let weights = tensors.iter().map(|(tensor, rows)| (name(tensor, "weight"), stack.shape(*rows)));
        self.load.linear(&weights.collect::<Vec<_>>(), stack.inputs, bias)
    }
}

impl Loader<'_> {
    fn matrix(&self, name: &str, rows: usize, columns: usize) -> Result<Tensor> {
        self.weights.matrix(name, &[rows, columns], self.dtypes.weights, self.device)
    }

    fn vector(&self, name: &str, values: usize) -> Result<Tensor> {
        self.weights.tensor(name, &[values], self.dtypes.activations, self.device)
    }

    fn norm(&self, name: &str) -> Result<RmsNorm> {
        let weight = self.vector(name, self.config.hidden_size)?;
        Ok(RmsNorm { weight, eps: self.config.rms_norm_eps })
    }

    /// Tensors [.., columns] of these shapes, one below the other, as one projection.
    fn linear(&self, parts: &[(String, Vec<usize>)], columns: usize, bias: Option<Tensor>) -> Result<Linear> {
        if let Some(isa) = self.dtypes.packed_for(self.device.location()) {
            return Linear::packed(self.packed(isa, parts, columns)?, bias);
        }
        let parts = parts
            .iter()
            .map(|(name, shape)| self.weights.matrix(name, shape, self.dtypes.weights, self.device));
        let parts = parts.collect::<Result<Vec<_>>>()?;
        let weight = if let [only] = &parts[..] { only.clone() } else { Tensor::cat(&parts, 0)? };
        Linear::new(weight, bias)
    }

    /// The same, from the file into panels, without the whole matrix in between.
    fn packed(&self, isa: Isa, parts: &[(String, Vec<usize>)], columns: usize) -> Result<PackedWeight> {
        let mut starts = Vec::new();
        let mut total = 0;
        for (name, shape) in parts {
            starts.push(total);
            total += shape.iter().product::<usize>() / columns.max(1);
            self.weights.check(name, shape)?;
        }
        starts.push(total);
        PackedWeight::pack(isa, (total, columns), |range, out| {
            let mut done = 0;
            for ((name, _), rows) in parts.iter().zip(starts.windows(2)) {
                let part = range.start.max(rows[0])..range.end.min(rows[1]);
                if part.is_empty() {
                    continue;
                }
                let values = part.len() * columns;
                let rows = part.start - rows[0]..part.end - rows[0];
                self.weights.rows(name, rows, &mut out[done..done + values])?;
                done += values;
            }
            Ok(())
        })
    }
}
