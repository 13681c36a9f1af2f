//! One tiny Llama under many configurations, by `tests/golden/checkpoints.py`: rotary scalings for sequences of all lengths
//! in one batch, heads of their own under `tie_word_embeddings`, names of the activation.

use crate::common::close::assert_tensors_close;
use crate::fixtures::*;
use candle_core::{DType, Device, Tensor};
use gneiss::batch::{Example, PrefixGroup};
use gneiss::evaluate::nll;
use gneiss::generate::{Request, generate};
use gneiss::model::Decoder;
use gneiss::prompt::Prefix;
use gneiss::tune::{self, Limits};
use serde_json::Value;

const NAME: &str = "checkpoints";

/// The folder of a case.
fn write(case: &Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), case["config"].to_string()).unwrap();
    let mut tensors =
        candle_core::safetensors::load(folder(NAME).join("model.safetensors"), &Device::Cpu).unwrap();
    for name in case["drop"].as_array().unwrap() {
        tensors.remove(name.as_str().unwrap()).unwrap();
    }
    candle_core::safetensors::save(&tensors, dir.path().join("model.safetensors")).unwrap();
    dir
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

#[track_caller]
fn assert_nll(what: &str, found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!(
            (found - expected).abs() < 1e-4 * expected.max(1.0),
            "{what}, token {i}: {found} against {expected}"
        );
    }
}

fn requests(case: &Value, max_new_tokens: usize) -> Vec<(Request, Vec<u32>)> {
    let all = case["generate"].as_array().unwrap().iter();
    all.map(|g| {
        (Request { tokens: ids(&g["input"]), max_new_tokens, ..Request::default() }, ids(&g["generated"]))
    })
    .collect()
}

fn continues(what: &str, model: &Decoder, prompt: &Tensor, case: &Value) {
    let (requests, expected): (Vec<_>, Vec<_>) = requests(case, 4).into_iter().unzip();
    // Together, and in steps of a few rows, in both orders.
    for (step_rows, backwards) in [(512, false), (5, false), (5, true)] {
        let (mut requests, mut expected) = (requests.clone(), expected.clone());
        if backwards {
            requests.reverse();
            expected.reverse();
        }
        let found =
            generate(model, Some(&Prefix::Embeddings(prompt.clone())), requests, step_rows, &mut |_| ())
                .unwrap();
        let found: Vec<Vec<u32>> = found.into_iter().map(|generated| generated.tokens).collect();
        assert_eq!(found, expected, "{what}, {step_rows} rows a step");
    }
}

/// Each sequence is as it is alone, whatever its neighbours' lengths are and however a batch is split.
#[test]
fn checkpoints_agree_with_transformers() {
    let golden = golden(NAME);
    let examples: Vec<Example> = golden.json["examples"].as_array().unwrap().iter().map(example).collect();
    let prompt = &golden.tensors["prompt"];
    let cases = golden.json["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 17);
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let dir = write(case);
        let model = model_in(dir.path(), DType::F32);
        let groups = [PrefixGroup::new(0..prompt.dims()[0] as u32, &examples)];
        let expected = numbers(&case["nll"]);
        for (max_rows, recompute) in [(usize::MAX, 0), (60, 1), (20, 0), (1, 1)] {
            let objective = tune::gradient(
                &model,
                &Prefix::Embeddings(prompt.clone()),
                &groups,
                Limits { max_rows, recompute },
            )
            .unwrap();
            let what = format!("{name}, {max_rows} rows");
            assert_nll(&what, &objective.nll().unwrap(), &expected);
            let gradient = &golden.tensors[&format!("{name}.grad")];
            assert_tensors_close(&what, objective.gradient.unwrap().values(), gradient, 1e-4);
            let evaluated =
                tune::evaluate(&model, &Prefix::Embeddings(prompt.clone()), &groups, max_rows).unwrap();
            assert_nll(&what, &evaluated.nll().unwrap(), &expected);
        }
        let alone =
            nll(&model, Some(&Prefix::Embeddings(prompt.clone())), &examples, 64, &mut |_| ()).unwrap();
        assert_nll(name, &alone, &expected);
        continues(name, &model, prompt, case);
    }
}

/// Beyond its length all positions of a sequence turn by other frequencies: what was computed before would be wrong.
#[test]
fn a_request_that_becomes_long_on_the_way_is_refused() {
    let golden = golden(NAME);
    let case =
        golden.json["cases"].as_array().unwrap().iter().find(|case| case["name"] == "longrope").unwrap();
    let dir = write(case);
    let model = model_in(dir.path(), DType::F32);
    let prompt = &golden.tensors["prompt"];
    let ask = |tokens: usize, max_new_tokens: usize| {
        let request = Request { tokens: vec![1; tokens], max_new_tokens, ..Request::default() };
        generate(&model, Some(&Prefix::Embeddings(prompt.clone())), vec![request], 64, &mut |_| ())
            .map(|all| all[0].tokens.len())
    };
    // 3 virtual tokens, 24 positions: the last token that is chosen has none.
    assert_eq!(ask(20, 2).unwrap(), 2);
    assert_eq!(ask(22, 5).unwrap(), 5);
    let message = ask(20, 3).unwrap_err().to_string();
    assert!(message.contains("expected at most 2 new tokens, found 3: beyond 24 positions"), "{message}");
    assert!(
        message.contains("`longrope`") && message.contains("3 virtual tokens and 20 of text"),
        "{message}"
    );
}

#[test]
fn sequences_beyond_dynamic_scaling_are_refused() {
    let golden = golden(NAME);
    let case =
        golden.json["cases"].as_array().unwrap().iter().find(|case| case["name"] == "dynamic").unwrap();
    let dir = write(case);
    let model = model_in(dir.path(), DType::F32);
    let prompt = &golden.tensors["prompt"];
    let of = |input: usize| {
        let example = Example { input: vec![1; input], target: vec![2, 3], line: 0 };
        nll(&model, Some(&Prefix::Embeddings(prompt.clone())), &[example], 64, &mut |_| ())
    };
    assert_eq!(of(59).unwrap().len(), 2);
    let message = of(60).unwrap_err().to_string();
    assert!(
        message.contains("at most 64 positions, virtual tokens and target included, found 65"),
        "{message}"
    );
}
