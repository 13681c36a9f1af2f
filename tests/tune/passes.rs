//! Batches in several passes, whose prefix pass holds prefixes alone or some sequences too.

use super::*;
use gneiss::batch::Packing;
use gneiss::prompt::Prefix;
use std::collections::BTreeSet;

pub fn load_f64(name: &str) -> Decoder {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let BareCheckpoint { config, weights, .. } = Checkpoint::open_without_tokenizer(&path).unwrap();
    let dtypes = Dtypes::for_weights(DType::F64, &Device::Cpu).unwrap();
    Decoder::load(&config, &weights, dtypes, &Device::Cpu, &mut |_| ()).unwrap()
}

fn values(gradient: Option<Prefix>) -> Vec<f64> {
    gradient.unwrap().values().flatten_all().unwrap().to_vec1().unwrap()
}

fn assert_all_close(what: &str, found: &[f64], expected: &[f64]) {
    let largest = expected.iter().fold(0.0, |a: f64, b| a.max(b.abs()));
    assert_eq!(found.len(), expected.len(), "{what}");
    assert!(largest > 0.0, "{what}");
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!((a - b).abs() < 1e-12 * largest, "{what}: element {i} is {a}, expected {b}");
    }
}

/// With biases and without, of several blocks and of one, with one prompt and with three; with every number of sequences
/// that a prefix pass can hold.
#[test]
fn every_split_has_the_gradient_of_one_pass() {
    let one_block = ModelConfig { num_hidden_layers: 1, ..MODEL.config().clone() };
    let dtypes = Dtypes::for_weights(DType::F64, &Device::Cpu).unwrap();
    let one_block = Decoder::random(&one_block, dtypes, &Device::Cpu, 1).unwrap();
    let [experts, shared] = ["experts", "shared_experts"].map(load_f64);
    let mamba = ["mamba", "mamba_experts", "mamba_groups"].map(load_f64);
    let dense = [load_f64("granite"), load_f64("llama_bias"), load_f64("hybrid_dense"), one_block];
    let models = dense.into_iter().chain([experts, shared]).chain(mamba);
    for model in models {
        let model = &model;
        for n in [1, 3] {
            let (prompts, groups) = recompute::groups(model, n);
            let prompts = Prefix::Embeddings(prompts);
            let packed = |max_rows, prefix_pass_rows| {
                Passes::packed(&groups, Packing { max_rows, prefix_pass_rows, long_above: None })
            };
            let one = packed(usize::MAX, 0);
            let expected = tune::gradient_of(model, &prompts, &one, 0, tune::Mean::All).unwrap();
            let (nll, gradient) = (expected.nll().unwrap(), values(expected.gradient));
            let rows = one.rows();
            let mut splits = BTreeSet::new();
            for (max_rows, prefix_pass_rows) in
                (0..rows).flat_map(|least| [(rows - 1, least), (rows / 2, least), (1, least)])
            {
                let passes = packed(max_rows, prefix_pass_rows);
                if !splits.insert((passes.prefix_pass.examples, passes.example_passes.len())) {
                    continue;
                }
                let what = format!("{n} groups, {} examples in the prefix pass", passes.prefix_pass.examples);
                let found = tune::gradient_of(model, &prompts, &passes, 0, tune::Mean::All).unwrap();
                let ours = found.nll().unwrap();
                assert_all_close(&format!("{what}: losses"), &ours, &nll);
                let ours_gradient = values(found.gradient);
                assert_all_close(&what, &ours_gradient, &gradient);
                assert_eq!(
                    tune::evaluate_of(model, &prompts, &passes).unwrap().nll().unwrap(),
                    ours,
                    "{what}"
                );
                let again = tune::gradient_of(
                    model,
                    &prompts,
                    &passes,
                    model.config().num_hidden_layers,
                    tune::Mean::All,
                );
                assert_eq!(values(again.unwrap().gradient), ours_gradient, "{what}, recomputed");
            }
            let in_prefix_pass: BTreeSet<usize> = splits.iter().map(|(examples, _)| *examples).collect();
            assert!(in_prefix_pass.len() >= 6, "{n} groups: {splits:?}");
        }
    }
}
