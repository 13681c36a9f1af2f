//! A model of random weights, from its shape alone: what a step costs does not depend on what the weights
//! are.

use super::decoder::{Parts, tied, untied};
use super::layer::{Layer, LayerWeights};
use super::{Decoder, Dtypes};
use crate::Result;
use crate::checkpoint::ModelConfig;
use crate::checkpoint::tensors::{LayerTensors, LayerVector, Stack};
use crate::ops::Linear;
use crate::ops::rms_norm::RmsNorm;
use candle_core::{Device, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use rayon::prelude::*;

/// Standard deviation of the matrices: transformers' `initializer_range`.
const STD: f32 = 0.02;

/// Standard deviation of a convolution's weights.
const CONV_STD: f32 = 0.4;

/// Values of a stream of random numbers on the CPU. It decides which values a seed gives: another number
/// gives others, and 2^16 keeps many threads busy with the smallest matrix of a model.
const STREAM: usize = 1 << 16;

impl Decoder {
    /// A model of this shape: matrices are normal with a standard deviation of 0.02, norms are ones, biases
    /// zeros, and Mamba2 layers forget within some to many tokens. Each matrix is made on `device` in f32 and then cast, so that at most one f32 matrix is in memory beside
    /// the weights. A seed gives the same values again on the same kind of device.
    ///
    /// # Errors
    /// Returns an error if a device operation fails, above all if memory runs out.
    pub fn random(config: &ModelConfig, dtypes: Dtypes, device: &Device, seed: u64) -> Result<Self> {
        if !device.is_cpu() {
            device.set_seed(seed)?;
        }
        let mut make = Maker { config, dtypes, device, seed, stream: 0 };
        let embedding = make.matrix(config.vocab_size, config.hidden_size)?;
        let layer = |i| Layer::new(config, i, &LayerTensors::new(config, i, false), &mut make);
        let layers = (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?;
        let (embedding, head) = match config.tie_word_embeddings {
            true => tied(embedding)?,
            false => (embedding, untied(make.linear(config.vocab_size, config.hidden_size, false)?)?),
        };
        let norm = make.norm("norm")?;
        Self::from_parts(config, Parts { embedding, layers, norm, head }, dtypes, device)
    }
}

struct Maker<'a> {
    config: &'a ModelConfig,
    dtypes: Dtypes,
    device: &'a Device,
    seed: u64,
    /// The next stream of random numbers on the CPU.
    stream: u64,
}

impl LayerWeights for Maker<'_> {
    fn norm(&mut self, _: &str) -> Result<RmsNorm> {
        let weight = Tensor::ones(self.config.hidden_size, self.dtypes.activations, self.device)?;
        Ok(RmsNorm { weight, eps: self.config.rms_norm_eps })
    }

    /// Values whose state lasts for some to many tokens: of `A_log` over -2..2, of `dt_bias` over -3..1.
    fn vector(&mut self, vector: &LayerVector) -> Result<Tensor> {
        let n = vector.values();
        let uniform = |low: f32, high: f32| -> Vec<f32> {
            (0..n).map(|i| low + (high - low) * (i as f32 + 0.5) / n as f32).collect()
        };
        let values = match vector.name {
            "mamba.A_log" => uniform(-2.0, 2.0),
            "mamba.dt_bias" => uniform(-3.0, 1.0).into_iter().rev().collect(),
            "mamba.conv1d.weight" => {
                normal(n, self.seed, self.next_streams(n)).iter().map(|x| CONV_STD / STD * x).collect()
            }
            "mamba.conv1d.bias" => vec![0.0; n],
            _ => vec![1.0; n],
        };
        let tensor = Tensor::from_vec(values, vector.shape.as_slice(), self.device)?;
        Ok(tensor.to_dtype(self.dtypes.row_sums())?)
    }

    fn stack(&mut self, stack: &Stack) -> Result<Linear> {
        self.linear(stack.rows(), stack.inputs, stack.has_bias)
    }
}

impl Maker<'_> {
    /// The first of the streams of random numbers for `n` values.
    fn next_streams(&mut self, n: usize) -> u64 {
        let first = self.stream;
        self.stream += n.div_ceil(STREAM) as u64;
        first
    }

    fn linear(&mut self, rows: usize, columns: usize, bias: bool) -> Result<Linear> {
        let bias = match bias {
            true => Some(Tensor::zeros(rows, self.dtypes.activations, self.device)?),
            false => None,
        };
        Linear::new(self.matrix(rows, columns)?, bias)?.pack(self.dtypes.activations)
    }

    fn matrix(&mut self, rows: usize, columns: usize) -> Result<Tensor> {
        let matrix = match self.device {
            // candle's generator on the CPU takes no seed, and runs on one thread.
            Device::Cpu => {
                let values = normal(rows * columns, self.seed, self.next_streams(rows * columns));
                Tensor::from_vec(values, (rows, columns), &Device::Cpu)?
            }
            device => Tensor::randn(0f32, STD, (rows, columns), device)?,
        };
        Ok(matrix.to_dtype(self.dtypes.weights)?)
    }
}

/// Normal values around 0.
fn normal(n: usize, seed: u64, stream: u64) -> Vec<f32> {
    let mut values = vec![0f32; n];
    values.par_chunks_mut(STREAM).enumerate().for_each(|(i, values)| {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(stream + i as u64);
        for value in values {
            let standard: f32 = StandardNormal.sample(&mut rng);
            *value = STD * standard;
        }
    });
    values
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::TuningMemory;
    use candle_core::{DType, DeviceLocation};
    use std::path::Path;

    fn config(name: &str) -> ModelConfig {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        ModelConfig::from_json(&golden.join(name).join("config.json")).unwrap()
    }

    fn flat(tensor: &Tensor) -> Vec<f32> {
        tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn has_the_shapes_of_a_loaded_model() {
        for name in ["granite", "llama_bias", "hybrid_dense", "mamba_experts"] {
            for weights in [DType::F32, DType::BF16] {
                let config = config(name);
                let dtypes = Dtypes::for_weights(weights, &Device::Cpu).unwrap();
                let model = Decoder::random(&config, dtypes, &Device::Cpu, 1).unwrap();
                // The norms and Mamba2's vectors are no part of what a model counts as its weights.
                let layers = (0..config.num_hidden_layers).map(|i| LayerTensors::new(&config, i, false));
                let vectors: usize = layers.flat_map(|l| l.vectors().to_vec()).map(|v| v.values()).sum();
                let norms = 4 * (config.hidden_size * (2 * config.num_hidden_layers + 1) + vectors);
                let memory = TuningMemory::new(&config, dtypes, DeviceLocation::Cpu);
                assert_eq!(model.weight_bytes(), memory.weights - norms, "{name} in {weights:?}");
                assert_eq!(model.embedding().dtype(), weights);
                assert_eq!(model.embedding().dims(), [config.vocab_size, config.hidden_size]);
                assert_eq!(model.dtype(), DType::F32);
            }
        }
    }

    #[test]
    fn a_seed_gives_one_model_whose_matrices_differ() {
        let config = config("llama_bias");
        let dtypes = Dtypes::for_weights(DType::F32, &Device::Cpu).unwrap();
        let of = |seed| Decoder::random(&config, dtypes, &Device::Cpu, seed).unwrap();
        let (model, again, other) = (of(3), of(3), of(4));
        assert_eq!(flat(model.embedding()), flat(again.embedding()));
        assert_ne!(flat(model.embedding()), flat(other.embedding()));
        let qkv = |model: &Decoder, i: usize| {
            flat(&model.layers[i].projections().next().unwrap().weight().unwrap())
        };
        assert_ne!(qkv(&model, 0), qkv(&model, 1));
        assert_eq!(qkv(&model, 1), qkv(&again, 1));
        assert_ne!(flat(model.embedding()), flat(&model.head.weight().unwrap()), "the head is not tied");
    }

    #[test]
    fn values_are_normal() {
        // An odd number, over several streams.
        let values = normal(3 * STREAM + 7, 5, 0);
        let n = values.len() as f64;
        let moment = |k: i32| values.iter().map(|v| f64::from(*v / STD).powi(k)).sum::<f64>() / n;
        // Ten standard errors of each moment of N(0, 1).
        for (k, expected, variance) in [(1, 0.0, 1.0f64), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)] {
            assert!((moment(k) - expected).abs() < 10.0 * (variance / n).sqrt(), "moment {k}: {}", moment(k));
        }
        assert!(values.iter().all(|v| v.is_finite()));
        assert_ne!(values[..STREAM], values[STREAM..2 * STREAM]);
        assert_eq!(normal(STREAM, 5, 1), values[STREAM..2 * STREAM]);
    }
}
