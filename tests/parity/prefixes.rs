//! Prefix tuning: keys and values, loss, gradient and ten steps against PEFT's PREFIX_TUNING.

use crate::common::close::assert_tensors_close;
use crate::fixtures::*;
use crate::training::trains_as_peft;
use candle_core::DType;
use gneiss::batch::{Example, PrefixGroup};
use gneiss::config::PromptKind;
use gneiss::prompt::Prefix;
use gneiss::tune::{self, Limits};

fn fixture(name: &str) -> Golden {
    let file = |end: &str| folder("prefixes").join(format!("{name}.{end}"));
    golden_in(&file("json"), &file("safetensors"))
}

fn agrees_with_peft(name: &str) {
    let (golden, model) = (fixture(name), model(name, DType::F32));
    let case = &golden.json["cases"][0];
    let prefix = &golden.tensors["prefix"];
    let own = model.keys_values(&golden.tensors["embeddings"]).unwrap();
    assert_tensors_close(&format!("{name}: keys and values"), &own, prefix, 1e-5);
    let examples: Vec<Example> = case["examples"].as_array().unwrap().iter().map(example).collect();
    let groups = [PrefixGroup::new(0..prefix.dims()[0] as u32, &examples)];
    assert_eq!(groups[0].head.len(), 3);
    let prompts = Prefix::KeysValues(prefix.clone());
    let expected = case["loss"].as_f64().unwrap();
    for max_rows in [usize::MAX, 20, 1] {
        let objective = tune::gradient(&model, &prompts, &groups, Limits::rows(max_rows)).unwrap();
        let error = (objective.loss().unwrap() - expected).abs() / expected;
        assert!(error < 1e-5, "{name}, {max_rows} rows: {} against {expected}", objective.loss().unwrap());
        let gradient = objective.gradient.unwrap();
        let what = format!("{name}, {max_rows} rows: gradient");
        assert_tensors_close(&what, gradient.values(), &golden.tensors["gradient"], 1e-4);
    }
    for max_rows in [usize::MAX, 12] {
        trains_as_peft(name, &golden, &model, (PromptKind::Prefix, max_rows));
    }
}

#[test]
fn prefixes_of_granite_train_as_with_peft() {
    agrees_with_peft("granite");
}

#[test]
fn prefixes_of_llama_with_biases_train_as_with_peft() {
    agrees_with_peft("llama_bias");
}

#[test]
fn prefixes_of_dense_granitemoehybrid_train_as_with_peft() {
    agrees_with_peft("hybrid_dense");
}
