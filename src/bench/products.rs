//! The matrix products of a step with their own shapes, computed by the same code as in a step. Differences from the
//! rate of the square product are due to the shapes, not to other ops between them.

use super::sustained::seconds_per_call;
use crate::Result;
use crate::checkpoint::tensors::{DenseTensors, ExpertsTensors, LayerTensors, MixerTensors, Stack};
use crate::checkpoint::{MixerKind, ModelConfig};
use crate::ops::Linear;
use candle_core::{DType, Device, Tensor};
use serde::Serialize;

/// Rows of a measured step: the default limit of a pass on a GPU.
const ROWS: usize = 8192;

/// Target rows of the head's product.
const HEAD_ROWS: usize = 512;

/// Alternating weights of each shape, so that none is in a cache from the last product.
const TURNS: usize = 3;

/// Time for which all products of a layer are repeated, and then each of them, s.
const BLOCK_SECONDS: f64 = 2.0;
const PRODUCT_SECONDS: f64 = 0.1;

/// A linear layer's product, forward and backward.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerProduct {
    /// The layer's name.
    pub layer: &'static str,
    /// Rows, outputs and inputs.
    pub shape: [usize; 3],
    /// Floating-point operations per second of the forward pass.
    pub forward_flops_per_second: f64,
    /// Floating-point operations per second of the backward pass.
    pub backward_flops_per_second: f64,
}

/// The products of a layer, and of the head.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepProducts {
    /// Floating-point operations per second of a layer's products, forward and backward, alternating.
    pub flops_per_second: f64,
    /// Time for which they were measured, s.
    pub sustained_seconds: f64,
    /// Each product by itself, for a tenth of a second.
    pub products: Vec<LayerProduct>,
}

/// A linear layer with its input and gradient.
struct TimedLayer {
    name: &'static str,
    weights: Vec<Linear>,
    x: Tensor,
    dy: Tensor,
}

impl StepProducts {
    /// Measures the products of a model of this shape on a GPU.
    ///
    /// # Errors
    /// Returns an error if a device operation fails, most likely for lack of memory.
    pub fn measure(config: &ModelConfig, device: &Device, dtype: DType) -> Result<Self> {
        let rows = (ROWS, HEAD_ROWS);
        Self::measure_for(config, device, dtype, rows, (BLOCK_SECONDS, PRODUCT_SECONDS))
    }

    fn measure_for(
        config: &ModelConfig,
        device: &Device,
        dtype: DType,
        (rows, head_rows): (usize, usize),
        (block_seconds, product_seconds): (f64, f64),
    ) -> Result<Self> {
        let layer = |(name, rows, stack): (_, _, Stack)| {
            TimedLayer::new(name, (rows, stack.outputs(), stack.inputs), TURNS, device, dtype)
        };
        let block = layer_products(config, rows).into_iter().map(layer).collect::<Result<Vec<_>>>()?;
        let mut turn = 0;
        let mut all = || -> Result<()> {
            turn += 1;
            block.iter().try_for_each(|layer| layer.forward(turn))?;
            block.iter().rev().try_for_each(|layer| layer.backward(turn))
        };
        let seconds = seconds_per_call(device, block_seconds, &mut all)?;
        let flops: f64 = block.iter().map(|layer| 2.0 * layer.flops()).sum();
        let mut products = Vec::new();
        let mut one = |layer: &TimedLayer| -> Result<()> {
            let rate = |run: &dyn Fn(usize) -> Result<()>| -> Result<f64> {
                let mut turn = 0;
                let mut queue = || {
                    turn += 1;
                    run(turn)
                };
                Ok(layer.flops() / seconds_per_call(device, product_seconds, &mut queue)?)
            };
            products.push(LayerProduct {
                layer: layer.name,
                shape: layer.shape()?,
                forward_flops_per_second: rate(&|turn| layer.forward(turn))?,
                backward_flops_per_second: rate(&|turn| layer.backward(turn))?,
            });
            Ok(())
        };
        block.iter().try_for_each(&mut one)?;
        drop(block);
        one(&TimedLayer::new("head", (head_rows, config.vocab_size, config.hidden_size), 1, device, dtype)?)?;
        Ok(Self { flops_per_second: flops / seconds, sustained_seconds: block_seconds, products })
    }
}

/// Name, rows and matrix of the products of a layer with each mixer that the model has; an expert's has its share of the rows.
fn layer_products(config: &ModelConfig, rows: usize) -> Vec<(&'static str, usize, Stack)> {
    let first = |kind| (0..config.num_hidden_layers).find(|layer| config.mixer(*layer) == kind);
    let layers: Vec<LayerTensors> = [MixerKind::Attention, MixerKind::Mamba2]
        .into_iter()
        .filter_map(|kind| Some(LayerTensors::new(config, first(kind)?, false)))
        .collect();
    let mut products = Vec::new();
    for layer in &layers {
        match layer.mixer.clone() {
            MixerTensors::Attention { qkv, o } => products.extend([("qkv", rows, qkv), ("o", rows, o)]),
            MixerTensors::Mamba2 { input, output, .. } => {
                products.extend([("mamba in", rows, input), ("mamba out", rows, output)]);
            }
        }
    }
    // All layers have the same networks.
    let networks = layers.first();
    if let Some(DenseTensors { gate_up, down }) = networks.and_then(|layer| layer.dense.clone()) {
        products.extend([("gate_up", rows, gate_up), ("down", rows, down)]);
    }
    if let Some(ExpertsTensors { gate_up, down, .. }) = networks.and_then(|layer| layer.experts.clone()) {
        let share =
            gate_up.experts.map_or(rows, |experts| (rows * experts.per_token).div_ceil(experts.count));
        products.extend([("expert gate_up", share, gate_up), ("expert down", share, down)]);
    }
    products
}

impl TimedLayer {
    fn new(
        name: &'static str,
        (rows, n, k): (usize, usize, usize),
        turns: usize,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        let matrix = |rows: usize, columns: usize| -> Result<Tensor> {
            Ok(Tensor::randn(0f32, 1.0, (rows, columns), device)?.to_dtype(dtype)?)
        };
        let weights = (0..turns).map(|_| Linear::new(matrix(n, k)?, None)).collect::<Result<_>>()?;
        Ok(Self { name, weights, x: matrix(rows, k)?, dy: matrix(rows, n)? })
    }

    fn shape(&self) -> Result<[usize; 3]> {
        let ((n, k), rows) = (self.weights[0].dims()?, self.x.dims()[0]);
        Ok([rows, n, k])
    }

    /// For one direction.
    fn flops(&self) -> f64 {
        2.0 * (self.x.elem_count() * self.dy.dims()[1]) as f64
    }

    fn forward(&self, turn: usize) -> Result<()> {
        self.weights[turn % self.weights.len()].forward(&self.x)?;
        Ok(())
    }

    fn backward(&self, turn: usize) -> Result<()> {
        self.weights[turn % self.weights.len()].backward(&self.dy, 1.0)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn measure_names_every_product_of_a_block_and_the_head() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/granite/config.json");
        let config = ModelConfig::from_json(&path).unwrap();
        let measure =
            || StepProducts::measure_for(&config, &Device::Cpu, DType::F32, (24, 8), (0.02, 0.001)).unwrap();
        let found = measure();
        let c = config.hidden_size;
        let q = config.num_attention_heads * config.head_dim;
        let qkv = q + 2 * config.num_key_value_heads * config.head_dim;
        let f = config.intermediate_size;
        let shapes: Vec<_> = found.products.iter().map(|p| (p.layer, p.shape)).collect();
        let expected = [
            ("qkv", [24, qkv, c]),
            ("o", [24, c, q]),
            ("gate_up", [24, 2 * f, c]),
            ("down", [24, c, f]),
            ("head", [8, config.vocab_size, c]),
        ];
        assert_eq!(shapes, expected);
        // All of a layer take together about what each takes alone: the rate lies between theirs, within a factor that
        // a busy machine may cost. One that stood still for a moment is asked again.
        let agrees = |found: &StepProducts| {
            let of = |p: &LayerProduct| [p.forward_flops_per_second, p.backward_flops_per_second];
            let rates = || found.products[..4].iter().flat_map(of);
            let (least, most) = (rates().fold(f64::INFINITY, f64::min), rates().fold(0.0, f64::max));
            least > 0.0 && (least / 10.0..most * 10.0).contains(&found.flops_per_second)
        };
        assert!(agrees(&found) || (0..5).any(|_| agrees(&measure())), "{found:?}");
    }
}
