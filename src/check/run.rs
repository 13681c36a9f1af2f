//! A short tuning run of a small random model on a device, and the same run on the CPU in f32.

use super::CheckTarget;
use crate::Result;
use crate::batch::Example;
use crate::checkpoint::{ModelConfig, ModelType};
use crate::config::TrainOptions;
use crate::model::{Decoder, Dtypes};
use crate::ops::rope::Rope;
use crate::prompt::Prompt;
use crate::tune::{Limits, Observer, StepRecord, Task, Trainer};
use candle_core::{DType, Device};
use serde::Serialize;

/// Virtual tokens of the runs.
const VIRTUAL_TOKENS: usize = 20;

/// Sizes of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct RunSize {
    /// Optimizer steps.
    pub steps: usize,
    /// Examples of a step.
    pub examples: usize,
    /// Most rows of a pass; with fewer than a step has, the step is split.
    pub max_rows: usize,
    /// Size of a head, D; the model has 4 of them.
    pub head_dim: usize,
}

/// Loss of each step, on the device and on the CPU.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Curves {
    /// Description of the run.
    pub size: RunSize,
    /// On the device, in the dtype under test.
    pub device: Vec<f64>,
    /// On the CPU, in f32.
    pub cpu: Vec<f64>,
}

impl Curves {
    /// Largest difference of the two curves as a fraction of the CPU's first loss; NaN if a loss is NaN.
    pub fn deviation(&self) -> f64 {
        let differences = self.device.iter().zip(&self.cpu).map(|(a, b)| (a - b).abs());
        let largest = differences.fold(0.0, |most: f64, d| if most.is_nan() || d <= most { most } else { d });
        largest / self.cpu.first().copied().unwrap_or(f64::NAN)
    }

    /// The largest allowed deviation: f32 differs only by the order of its sums; 16-bit activations round every result
    /// to 8 or 11 bits.
    pub fn allowed(dtype: DType) -> f64 {
        if dtype == DType::F32 { 1e-3 } else { 0.03 }
    }
}

/// Tunes the same prompt on the device and on the CPU.
pub fn run(target: &CheckTarget, size: RunSize) -> Result<Curves> {
    let config = config(size.head_dim);
    let cpu = Decoder::random(&config, Dtypes::for_weights(DType::F32, &Device::Cpu)?, &Device::Cpu, 7)?;
    let expected = curve(&cpu, size)?;
    let dtypes = Dtypes { weights: target.dtype, activations: target.dtype };
    // The model is made on the device too: if the device pads the head, 515 tokens become 576 rows.
    let device = target.result(|| curve(&cpu.to_device(dtypes, target.device)?, size))?;
    Ok(Curves { size, device, cpu: expected })
}

/// A Granite model of two layers, with its multipliers.
pub(super) fn config(head_dim: usize) -> ModelConfig {
    ModelConfig {
        model_type: ModelType::Granite,
        vocab_size: 515,
        hidden_size: 4 * head_dim,
        intermediate_size: 10 * head_dim,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim,
        max_position_embeddings: 4096,
        rms_norm_eps: 1e-5,
        rope: Some(Rope::new(1e4)),
        tie_word_embeddings: true,
        attention_bias: false,
        mlp_bias: false,
        embedding_multiplier: 12.0,
        residual_multiplier: 0.5,
        attention_multiplier: 1.0 / (head_dim as f64).sqrt(),
        logits_scaling: 0.5,
        mamba: None,
        experts: None,
    }
}

/// Examples of different lengths after a common head, with one of two targets each.
pub(super) fn examples(n: usize) -> Vec<Example> {
    let example = |i: usize| {
        let label = (i * 7 % 3 % 2) as u32;
        let body = (0..5 + i * 13 % 29).map(|j| ((i * 31 + j * 17) % 500) as u32 + 10);
        let input = [1, 2, 3].into_iter().chain(body).chain([4 + label, 6]).collect();
        Example { input, target: vec![7 + label, 9], line: i + 1 }
    };
    (0..n).map(example).collect()
}

fn curve(model: &Decoder, size: RunSize) -> Result<Vec<f64>> {
    let examples = examples(size.examples * 4);
    let options = TrainOptions {
        learning_rate: 0.03,
        batch_size: size.examples,
        num_epochs: size.steps,
        max_steps: size.steps,
        ..TrainOptions::default()
    };
    let prompt = model.embedding().narrow(0, 100, VIRTUAL_TOKENS)?.to_dtype(DType::F32)?;
    let task = Task {
        model,
        train: &examples,
        validation: &[],
        teacher: None,
        options: &options,
        limits: Limits::rows(size.max_rows),
    };
    let mut losses = LossRecorder(Vec::new());
    Trainer::new(task, &Prompt::embeddings(&prompt)?)?.run(&mut losses)?;
    Ok(losses.0)
}

struct LossRecorder(Vec<f64>);

impl Observer for LossRecorder {
    fn step(&mut self, record: &StepRecord) -> Result<()> {
        self.0.push(record.loss);
        Ok(())
    }

    fn skipped(&mut self, _: usize, _: &str, value: f64) -> Result<()> {
        self.0.push(value);
        Ok(())
    }

    fn out_of_memory(&mut self, _: Limits) -> Result<()> {
        Ok(())
    }
}
