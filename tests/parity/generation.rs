//! Greedy continuations against transformers', alone and together, behind a cached prefix.

use crate::fixtures::*;
use candle_core::DType;
use candle_transformers::generation::Sampling;
use gneiss::data::pack::common_head;
use gneiss::generate::{Generated, Options, StopReason, generate, prefix};

struct Wanted {
    input: Vec<u32>,
    generated: Vec<u32>,
}

fn continuations(name: &str) {
    let (golden, model) = (golden(name), model(name, DType::F32));
    let case = &golden.json["generate"];
    let prompt = golden.tensor(&case["prompt"]);
    let sequences = case["sequences"].as_array().unwrap();
    let wanted: Vec<Wanted> = sequences
        .iter()
        .map(|s| Wanted { input: ids(&s["input"]), generated: ids(&s["generated"]) })
        .collect();
    assert_eq!(wanted.len(), 4);
    let options = Options {
        max_new_tokens: case["max_new_tokens"].as_u64().unwrap() as usize,
        stop_token_ids: &[],
        sampling: Sampling::ArgMax,
        seed: 0,
        score: &[],
    };
    let cache = prefix(&model, Some(prompt), &[]).unwrap();
    assert_eq!(cache.rows as u64, case["num_virtual_tokens"].as_u64().unwrap());
    let same = |what: &str, ours: &Generated, wanted: &Wanted| {
        assert_eq!(ours.tokens, wanted.generated, "{name}, {what}, behind {:?}", wanted.input);
        assert_eq!(ours.stop_reason, StopReason::MaxTokens);
    };
    let inputs: Vec<&[u32]> = wanted.iter().map(|w| w.input.as_slice()).collect();
    for (input, wanted) in inputs.iter().zip(&wanted) {
        same("alone", &generate(&model, &cache, &[input], &options).unwrap()[0], wanted);
    }
    // The same cache again: a generation leaves the prefix as it was.
    let together = generate(&model, &cache, &inputs, &options).unwrap();
    assert_eq!(together.len(), wanted.len());
    for (ours, wanted) in together.iter().zip(&wanted) {
        same("together", ours, wanted);
    }
    // Each input's own beginning in the prefix, as evaluation puts a template's head there.
    for wanted in &wanted {
        let head = common_head([wanted.input.as_slice()].into_iter());
        let cache = prefix(&model, Some(prompt), head).unwrap();
        let ours = generate(&model, &cache, &[&wanted.input[head.len()..]], &options).unwrap();
        same("its beginning in the prefix", &ours[0], wanted);
    }
    for wanted in &wanted {
        stops_in_time(name, &model, &cache, wanted, &options);
    }
}

/// With the third token of a continuation as a stop token, only what is before its first appearance is left.
fn stops_in_time(
    name: &str,
    model: &gneiss::model::Granite,
    cache: &gneiss::model::PrefixCache,
    wanted: &Wanted,
    options: &Options,
) {
    let stop = [wanted.generated[2]];
    let options = Options { stop_token_ids: &stop, sampling: Sampling::ArgMax, ..*options };
    let ours = generate(model, cache, &[&wanted.input], &options).unwrap().remove(0);
    let before = wanted.generated.iter().take_while(|t| **t != stop[0]).copied().collect::<Vec<_>>();
    assert_eq!((ours.tokens, ours.stop_reason), (before, StopReason::StopToken), "{name}: stop {stop:?}");
}

#[test]
fn granite_continues_as_transformers_does() {
    continuations("granite");
}

#[test]
fn llama_with_biases_continues_as_transformers_does() {
    continuations("llama_bias");
}

#[test]
fn dense_granitemoehybrid_continues_as_transformers_does() {
    continuations("hybrid_dense");
}
