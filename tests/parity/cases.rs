//! Logits, loss and prompt gradient of every case, in one pass and in as many as a small budget makes.

use crate::common::close::assert_tensors_close;
use crate::fixtures::*;
use candle_core::{DType, Device, Tensor};
use gneiss::batch::Passes;
use gneiss::prompt::Prefix;
use gneiss::tune::{self, Limits};
use std::collections::HashMap;

fn cases(name: &str, count: usize) {
    let (golden, model) = (golden(name), model(name, DType::F32));
    let cases = golden.json["cases"].as_array().unwrap();
    assert_eq!(cases.len(), count);
    for case in cases {
        let what = |part: &str| format!("{name}, {}: {part}", case["name"]);
        let (prompts, groups, gradient) = golden.case(case);
        let expected = golden.tensor(&case["logits"]);
        let batch = Passes::new(&groups, usize::MAX).prefix_pass;
        let tape = model.forward(&batch, &prompts, None, 0).unwrap();
        assert_tensors_close(&what("logits"), &model.logits(tape.hidden()).unwrap(), expected, 1e-4);
        for max_rows in [usize::MAX, 20, 1] {
            let objective =
                tune::gradient(&model, &Prefix::Embeddings(prompts.clone()), &groups, Limits::rows(max_rows))
                    .unwrap();
            let loss = case["loss"].as_f64().unwrap();
            let error = (objective.loss().unwrap() - loss).abs() / loss;
            assert!(error < 1e-4, "{}: {} against {loss}", what("loss"), objective.loss().unwrap());
            let ours: Tensor = objective.gradient.as_ref().unwrap().values().clone();
            assert_tensors_close(&what(&format!("gradient, {max_rows} rows")), &ours, &gradient, 1e-4);
            let evaluated =
                tune::evaluate(&model, &Prefix::Embeddings(prompts.clone()), &groups, max_rows).unwrap();
            assert_eq!(evaluated.nll().unwrap(), objective.nll().unwrap(), "{}", what("evaluate"));
        }
    }
}

#[test]
fn granite_agrees_with_peft() {
    cases("granite", 5);
}

#[test]
fn llama_with_biases_agrees_with_peft() {
    cases("llama_bias", 5);
}

#[test]
fn dense_granitemoehybrid_agrees_with_peft() {
    cases("hybrid_dense", 5);
}

#[test]
fn experts_agree_with_peft() {
    cases("experts", 10);
    cases("shared_experts", 10);
}

#[test]
fn mamba_agrees_with_peft() {
    cases("mamba", 10);
    cases("mamba_experts", 10);
    cases("mamba_groups", 10);
}

/// Half-precision weights on the CPU are widened as the products go: the same as rounding them and computing in f32. But a
/// CPU that multiplies bf16 rounds the inputs too ([`crate::bf16`]).
#[test]
fn half_precision_weights_are_rounded_weights() {
    for name in CHECKPOINTS {
        let golden = golden(name);
        let multiplies_bf16 = model(name, DType::BF16).product_dtype() == DType::BF16;
        for dtype in [DType::F16, DType::BF16].into_iter().filter(|d| *d == DType::F16 || !multiplies_bf16) {
            let rounded = tempfile::tempdir().unwrap();
            let weights =
                candle_core::safetensors::load(folder(name).join("model.safetensors"), &Device::Cpu).unwrap();
            // Vectors and convolutions stay in f32.
            let round = |name: &str, t: Tensor| match t.rank() {
                2 | 3 if !name.contains("conv1d") => {
                    t.to_dtype(dtype).and_then(|t| t.to_dtype(DType::F32)).unwrap()
                }
                _ => t,
            };
            let weights: HashMap<String, Tensor> =
                weights.into_iter().map(|(name, t)| (name.clone(), round(&name, t))).collect();
            candle_core::safetensors::save(&weights, rounded.path().join("model.safetensors")).unwrap();
            std::fs::copy(folder(name).join("config.json"), rounded.path().join("config.json")).unwrap();
            let (half, wide) = (model(name, dtype), model_in(rounded.path(), DType::F32));
            for case in golden.json["cases"].as_array().unwrap() {
                let (prompts, groups, _) = golden.case(case);
                let ours = tune::gradient(
                    &half,
                    &Prefix::Embeddings(prompts.clone()),
                    &groups,
                    Limits::rows(usize::MAX),
                )
                .unwrap();
                let expected = tune::gradient(
                    &wide,
                    &Prefix::Embeddings(prompts.clone()),
                    &groups,
                    Limits::rows(usize::MAX),
                )
                .unwrap();
                let what = format!("{name}, {}, {dtype:?}", case["name"]);
                assert_tensors_close(
                    &what,
                    ours.gradient.unwrap().values(),
                    expected.gradient.unwrap().values(),
                    1e-5,
                );
            }
        }
    }
}
