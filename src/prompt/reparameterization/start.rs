//! The values of the parts before the first step.

use crate::Result;
use crate::config::Reparameterization;
use crate::prompt::PromptLayout;
use candle_core::{Device, Tensor};
use rand::SeedableRng;
use rand::distr::Uniform;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

/// Stream of the random numbers: the first rows are drawn from 0, and the order of an epoch from the epoch's number.
const STREAM: u64 = u64::MAX;

/// The values of all parts in one f32 tensor on the CPU. `rows` are the trainable rows of the initial prefix, f32 [n, W].
///
/// Linear layers start as `torch.nn.Linear`: weight and bias uniform in ±1/√inputs.
///
/// * Residual: the trainable rows are `rows`, and the weight and the bias of the LayerNorm are 0, so that the rows of the prompt
///   are exactly `rows` before the first step. All parts learn from the second step on, those of the LayerNorm and the rows from
///   the first. (With an up-projection of 0 the LayerNorm would divide by √eps, and the first gradient would be 300 times too
///   large.)
/// * MLP: the embedding is N(0, 1), as in PEFT; `rows` give the shape alone.
pub(in crate::prompt) fn start(layout: &PromptLayout, rows: &Tensor, seed: u64) -> Result<Tensor> {
    if layout.reparameterization == Reparameterization::None {
        return Ok(rows.contiguous()?);
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(STREAM);
    let mut values: Vec<f32> = Vec::with_capacity(layout.elem_count());
    let mut inputs = layout.input_width;
    for part in layout.parts() {
        let count = part.shape.iter().product();
        match part.name {
            "prompt_embeddings" => values.extend(rows.flatten_all()?.to_vec1::<f32>()?),
            "embedding.weight" => {
                let normal = Distribution::<f32>::sample_iter(StandardNormal, &mut rng);
                values.extend(normal.take(count));
            }
            "norm.weight" | "norm.bias" => values.extend(std::iter::repeat_n(0.0, count)),
            _ => {
                // A bias follows its weight [outputs, inputs].
                if let [_, found] = part.shape[..] {
                    inputs = found;
                }
                let bound = 1.0 / (inputs as f32).sqrt();
                let uniform = Uniform::new(-bound, bound)
                    .map_err(|e| crate::Error::Invalid(format!("prompt.bottleneck: {e}")))?;
                values.extend(uniform.sample_iter(&mut rng).take(count));
            }
        }
    }
    Ok(Tensor::from_vec(values, layout.values_shape(), &Device::Cpu)?)
}
