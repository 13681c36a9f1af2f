//! The loss scale of f16: on the emulator against the exact gradient in f64.

use super::weights::{loss_scale, scale_in_f16};
use super::*;
use crate::batch::Example;
use crate::checkpoint::{ModelConfig, ModelType};
use crate::config::TrainOptions;
use crate::model::Dtypes;
use crate::ops::gpu::emulated::emulate;
use crate::ops::rope::Rope;
use crate::ops::{Indices, testing::randn};
use crate::prompt::Prompt;
use crate::tune::{Observer, StepRecord, Task, Trainer};

/// A Granite of two blocks whose logits are divided as those of 8b are.
fn config(vocab_size: usize, logits_scaling: f64) -> ModelConfig {
    ModelConfig {
        model_type: ModelType::Granite,
        vocab_size,
        hidden_size: 64,
        intermediate_size: 160,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 16,
        max_position_embeddings: 4096,
        rms_norm_eps: 1e-5,
        rope: Some(Rope::new(1e4)),
        tie_word_embeddings: true,
        attention_bias: false,
        mlp_bias: false,
        embedding_multiplier: 12.0,
        residual_multiplier: 0.22,
        attention_multiplier: 1.0 / 16.0,
        logits_scaling,
        mamba: None,
        experts: None,
    }
}

/// A model in f16, and the same weights in f64.
fn models(vocab_size: usize, logits_scaling: f64) -> (Decoder, Decoder) {
    let of = |dtype| Dtypes { weights: dtype, activations: dtype };
    let wide = Decoder::random(&config(vocab_size, logits_scaling), of(DType::F32), &Device::Cpu, 3).unwrap();
    let narrow = wide.to_device(of(DType::F16), &Device::Cpu).unwrap();
    let exact = narrow.to_device(of(DType::F64), &Device::Cpu).unwrap();
    (narrow, exact)
}

/// Length of `found - exact` as a share of that of `exact`.
fn error(found: &Tensor, exact: &Tensor) -> f64 {
    let values =
        |t: &Tensor| t.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap();
    let (found, exact) = (values(found), values(exact));
    assert_eq!(found.len(), exact.len());
    let length = |of: &mut dyn Iterator<Item = f64>| of.map(|x| x * x).sum::<f64>().sqrt();
    length(&mut found.iter().zip(&exact).map(|(a, b)| a - b)) / length(&mut exact.iter().copied())
}

#[test]
fn loss_scale_keeps_the_tail_of_the_softmax_in_f16() {
    let (narrow, exact) = models(2000, 16.0);
    let targets = 512;
    let hidden = randn(5, (targets, 64), DType::F16).unwrap();
    let labels = Indices::from((0..targets as u32).map(|i| i * 31 % 2000).collect::<Vec<_>>());
    let dloss = 1.0 / targets as f64;
    let wide = hidden.to_dtype(DType::F64).unwrap();
    let expected = exact.head_loss(&wide, &labels, Some(&dloss.into())).unwrap().dhidden.unwrap();
    let at = |scale: f64| {
        let found = emulate(0, || narrow.head_loss(&hidden, &labels, Some(&(scale * dloss).into()))).unwrap();
        error(&(found.dhidden.unwrap().to_dtype(DType::F64).unwrap() / scale).unwrap(), &expected)
    };
    let (before, after) = (at(1.0), at(emulate(0, || loss_scale(&narrow, targets))));
    assert!(before > 0.01 && after < 1e-3, "{before} without a scale, {after} with it");
}

#[test]
fn loss_scale_is_of_f16_kernels_alone() {
    let (narrow, exact) = models(50, 16.0);
    assert_eq!(emulate(0, || loss_scale(&narrow, 512)), 8192.0);
    // The CPU's own code, and other dtypes.
    assert_eq!((loss_scale(&narrow, 512), emulate(0, || loss_scale(&exact, 512))), (1.0, 1.0));
    for targets in [1, 2, 100, 512, 8192] {
        for logits_scaling in [1.0, 4.0, 8.0, 10.0, 16.0] {
            let scale = scale_in_f16(targets, logits_scaling);
            assert!(scale.log2().fract() == 0.0 && (1024.0..=16384.0).contains(&scale), "{scale}");
            let factor = scale / (targets as f64 * logits_scaling);
            // A label's own gradient is far from 65,504, and a probability of 2^-22 from the flush at 2^-25.
            assert!((0.125..=1024.0).contains(&factor), "{factor} at {targets}, {logits_scaling}");
        }
    }
}

/// Examples with as many target tokens as an answer of some sentences has.
fn examples(n: u32) -> Vec<Example> {
    let tokens = |seed: u32, n: u32| (0..n).map(|j| (seed * 31 + j * 17) % 110 + 10).collect::<Vec<_>>();
    let example = |i: u32| Example {
        input: [vec![1, 2, 3], tokens(i, 4 + i % 5)].concat(),
        target: tokens(i % 2, 15),
        line: i as usize + 1,
    };
    (0..n).map(example).collect()
}

#[test]
fn loss_scale_leaves_the_gradient_that_of_the_mean_loss() {
    let (narrow, exact) = models(130, 16.0);
    let examples = examples(3);
    let group = PrefixGroup::new(0..7, &examples);
    let prompts = randn(9, (7, 64), DType::F32).unwrap().affine(0.02, 0.0).unwrap();
    let prompts = Prefix::Embeddings(prompts);
    let wide = prompts.to_dtype(DType::F64).unwrap();
    for limits in [Limits::rows(4096), Limits { max_rows: 30, recompute: 1 }] {
        let groups = std::slice::from_ref(&group);
        let expected = gradient(&exact, &wide, groups, limits).unwrap().gradient.unwrap();
        let found = emulate(0, || gradient(&narrow, &prompts, groups, limits)).unwrap().gradient.unwrap();
        assert_eq!(found.values().dtype(), DType::F32);
        let error = error(found.values(), expected.values());
        assert!(error < 5e-3, "{limits:?}: {error}");
    }
}

struct Losses(Vec<f64>);

impl Observer for Losses {
    fn step(&mut self, record: &StepRecord) -> Result<()> {
        self.0.push(record.loss);
        Ok(())
    }
    fn skipped(&mut self, _: usize, what: &str, value: f64) -> Result<()> {
        panic!("{what} is {value}");
    }
    fn out_of_memory(&mut self, _: Limits) -> Result<()> {
        unreachable!("the CPU ran out of memory")
    }
}

/// Loss of each step of a run over long answers.
fn curve(model: &Decoder) -> Result<Vec<f64>> {
    let train = examples(2);
    let options = TrainOptions {
        learning_rate: 0.03,
        warmup_ratio: 0.0,
        batch_size: 2,
        num_epochs: 3,
        ..TrainOptions::default()
    };
    let prompt = model.embedding().narrow(0, 30, 7)?.to_dtype(DType::F32)?;
    let task = Task {
        model,
        train: &train,
        validation: &[],
        teacher: None,
        options: &options,
        limits: Limits::rows(4096),
    };
    let mut losses = Losses(Vec::new());
    Trainer::new(task, &Prompt::embeddings(&prompt)?)?.run(&mut losses)?;
    Ok(losses.0)
}

#[test]
fn losses_in_f16_follow_those_in_f64() {
    let (narrow, exact) = models(130, 0.05);
    let (ours, expected) = (emulate(0, || curve(&narrow)).unwrap(), curve(&exact).unwrap());
    let fall = expected[0] - expected[2];
    assert!(expected.len() == 3 && fall > 0.01, "{expected:?}");
    for (ours, expected) in ours.iter().zip(&expected) {
        assert!((ours - expected).abs() < 0.05 * fall, "{ours} for {expected}, which fell by {fall}");
    }
}

/// `logits_scaling` of 1e-5 makes 3,400,000 of a label's gradient at the least scale, more than f16 holds.
#[test]
fn a_gradient_that_the_scale_overflows_is_reported() {
    let (narrow, _) = models(130, 1e-5);
    match emulate(0, || curve(&narrow)) {
        Err(Error::NotFinite { step: 1, what: "the gradient's norm", value, .. }) => {
            assert!(!value.is_finite())
        }
        other => panic!("{other:?}"),
    }
}
