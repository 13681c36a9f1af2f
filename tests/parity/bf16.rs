//! gneiss in bf16 against the fixtures, which are PEFT's in f32: it may err twice as much as PEFT in bf16 does in the
//! logits, three times as much in the prompt's gradient (of SmolLM2 on the mean of seven prompts; tests/golden/bf16.py). On a CPU that multiplies bf16 that is what its products are.

use crate::fixtures::*;
use crate::smollm2;
use candle_core::{DType, Device, Tensor};
use gneiss::batch::{Passes, PrefixGroup};
use gneiss::model::Decoder;
use gneiss::prompt::Prefix;
use gneiss::tune::{self, Limits};
use serde_json::Value;

fn errors(name: &str) -> Value {
    let text = std::fs::read_to_string(folder("bf16.json")).unwrap();
    serde_json::from_str::<Value>(&text).unwrap()["errors"][name].clone()
}

/// Norm of the difference over the norm of `expected`.
fn distance(found: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(found.dims(), expected.dims());
    let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
    let norm = |t: Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt();
    norm((wide(found) - wide(expected)).unwrap()) / norm(wide(expected))
}

/// Fails where the errors of the logits and of the gradients, on the mean, are more than twice and three times PEFT's.
fn compare(name: &str, logits: (f64, f64), gradients: &[(f64, f64)]) {
    println!("{name}: logits {logits:.2?}, gradients {gradients:.2?} (gneiss, PEFT)");
    assert!(logits.0 > 0.0 && logits.0 <= 2.0 * logits.1, "{name}: logits {logits:?}");
    let mean = |of: fn(&(f64, f64)) -> f64| gradients.iter().map(of).sum::<f64>() / gradients.len() as f64;
    let (ours, pefts) = (mean(|g| g.0), mean(|g| g.1));
    assert!(ours > 0.0 && ours <= 3.0 * pefts, "{name}: gradients {ours}, PEFT {pefts}");
}

fn gradient(model: &Decoder, prompts: &Tensor, groups: &[PrefixGroup], max_rows: usize) -> Tensor {
    let prompts = Prefix::Embeddings(prompts.clone());
    let objective = tune::gradient(model, &prompts, groups, Limits::rows(max_rows)).unwrap();
    objective.gradient.unwrap().values().clone()
}

#[test]
fn small_checkpoints_err_no_more_than_pefts() {
    for name in CHECKPOINTS {
        let (golden, model, errors) = (golden(name), model(name, DType::BF16), errors(name));
        let case = &golden.json["cases"][0];
        assert_eq!(case["name"], errors["case"]);
        let (prompts, groups, expected) = golden.case(case);
        let batch = Passes::new(&groups, usize::MAX).prefix_pass;
        let logits = model.logits(&model.hidden(&batch, &prompts, None).unwrap()).unwrap();
        let peft = |what: &str| errors[what].as_f64().unwrap();
        let of_logits = (distance(&logits, golden.tensor(&case["logits"])), peft("logits"));
        let of_rows =
            |rows| (distance(&gradient(&model, &prompts, &groups, rows), &expected), peft("gradient"));
        compare(name, of_logits, &[of_rows(usize::MAX)]);
        compare(name, of_logits, &[of_rows(20)]);
    }
}

#[test]
fn smollm2_errs_no_more_than_pefts() {
    let (golden, (model, _), errors) = (golden("smollm2"), smollm2::open(DType::BF16), errors("smollm2"));
    let case = &golden.json["cases"][0];
    assert_eq!(case["name"], errors["case"]);
    let peft = |of: &Value, what: &str| of[what].as_f64().unwrap();
    let last = smollm2::last_logits(&golden, &model);
    let of_logits = (distance(&last, golden.tensor(&golden.json["last_logits"])), peft(&errors, "logits"));
    let (prompts, groups, expected) = golden.case(case);
    let ours = gradient(&model, &prompts, &groups, usize::MAX);
    let mut gradients = vec![(distance(&ours, &expected), peft(&errors, "gradient"))];
    let more =
        candle_core::safetensors::load(folder("smollm2").join("bf16.safetensors"), &Device::Cpu).unwrap();
    for case in errors["more"].as_array().unwrap() {
        // The prompt is of the model's own embeddings, which bf16 rounds.
        let prompt_ids = Tensor::new(ids(&case["prompt_ids"]), &Device::Cpu).unwrap();
        let prompt = model.embedding().index_select(&prompt_ids, 0).unwrap().to_dtype(DType::F32).unwrap();
        let groups: Vec<PrefixGroup> =
            groups.iter().map(|g| PrefixGroup { prompt: 0..prompt.dims()[0] as u32, ..g.clone() }).collect();
        let expected = &more[case["grad"].as_str().unwrap()];
        let ours = gradient(&model, &prompt, &groups, usize::MAX);
        gradients.push((distance(&ours, expected), peft(case, "gradient")));
    }
    assert_eq!(gradients.len(), 7);
    compare("smollm2", of_logits, &gradients);
}
