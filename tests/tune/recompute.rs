//! Blocks that are computed again in the backward pass.

use super::*;
use gneiss::model::PrefixState;
use gneiss::prompt::Prefix;

/// Groups with a prompt each of 6, 2 and 4 rows, and the matrix of prompts of a model.
pub fn groups(model: &Decoder, n: usize) -> (Tensor, Vec<PrefixGroup>) {
    let (mut train, parts) = (examples(9, 20), [0..6, 6..8, 8..12]);
    // The fixtures' vocabularies differ.
    for id in train.iter_mut().flat_map(|e| e.input.iter_mut().chain(&mut e.target)) {
        *id %= model.config().vocab_size as u32;
    }
    let groups = parts[..n].iter().zip(train.chunks(9 / n));
    let groups = groups.map(|(prompt, examples)| PrefixGroup::new(prompt.clone(), examples)).collect();
    let ids: Vec<u32> = (0..parts[n - 1].end).map(|i| i * 11 % 97).collect();
    let ids = Tensor::new(ids, &Device::Cpu).unwrap();
    (model.embedding().index_select(&ids, 0).unwrap(), groups)
}

/// With biases and without, of several blocks and of one; in one pass and in many, with one prompt and with three.
#[test]
fn recomputed_blocks_change_no_bit_of_the_gradient() {
    let one_block = ModelConfig { num_hidden_layers: 1, ..MODEL.config().clone() };
    let dtypes = Dtypes::for_weights(DType::F32, &Device::Cpu).unwrap();
    let one_block = Decoder::random(&one_block, dtypes, &Device::Cpu, 1).unwrap();
    let names = [
        "granite", "llama_bias", "hybrid_dense", "experts", "shared_experts", "mamba", "mamba_experts",
        "mamba_groups",
    ];
    for model in names.map(load).iter().chain([&one_block]) {
        let blocks = model.config().num_hidden_layers;
        for n in [1, 3] {
            let (prompts, groups) = groups(model, n);
            for max_rows in [usize::MAX, 40, 1] {
                let run = |recompute| {
                    let limits = Limits { max_rows, recompute };
                    let found =
                        tune::gradient(model, &Prefix::Embeddings(prompts.clone()), &groups, limits).unwrap();
                    (found.nll().unwrap(), bits(found.gradient.unwrap().values()))
                };
                let whole = run(0);
                assert!(whole.1.iter().any(|b| f32::from_bits(*b) != 0.0));
                for recompute in 1..blocks + 2 {
                    assert!(
                        run(recompute) == whole,
                        "{blocks} blocks, {n} groups, {max_rows} rows, {recompute}"
                    );
                }
                let evaluated =
                    tune::evaluate(model, &Prefix::Embeddings(prompts.clone()), &groups, max_rows).unwrap();
                assert_eq!(evaluated.nll().unwrap(), whole.0);
            }
        }
    }
}

#[test]
fn a_recomputed_run_is_the_same_run() {
    let (train, validation) = (examples(10, 6), examples(4, 7));
    let run = |recompute| {
        let setting = Setting { max_rows: 30, ..Setting::new(&train, options()) };
        Setting { validation: &validation, recompute, ..setting }.finish()
    };
    let (whole, recomputed) = (run(0), run(2));
    assert_eq!((&whole.steps, &whole.epochs), (&recomputed.steps, &recomputed.epochs));
    assert_eq!(bits(whole.kept.prompt.values()), bits(recomputed.kept.prompt.values()));
}

/// The keys and values of sequences are nobody's but the pass's own.
#[test]
fn keys_and_values_are_kept_of_passes_of_prefixes() {
    let (prompts, groups) = groups(&MODEL, 3);
    let Passes { prefix_pass: lead, .. } = Passes::new(&groups, 1);
    let whole = MODEL.prefix_pass(&lead, &prompts, None).unwrap().states;
    let kept = MODEL.forward(&lead, &prompts, None, 2).unwrap().prefix_states().unwrap();
    let width = 2 * MODEL.config().num_key_value_heads * MODEL.config().head_dim;
    let matrix = |state: &PrefixState| match state {
        PrefixState::KeysValues(matrix) => matrix.clone(),
        PrefixState::Scan(_) => panic!("expected keys and values, found the state of a scan"),
    };
    let last = |state: &PrefixState| {
        let matrix = matrix(state);
        matrix.narrow(1, matrix.dims()[1] - width, width).unwrap()
    };
    for (a, b) in whole.iter().zip(&kept) {
        assert_eq!(bits(&last(a)), bits(&last(b)));
    }
    assert_eq!((whole.len(), matrix(&kept[0]).dims()[1]), (kept.len(), width));
    let Passes { prefix_pass: lead, .. } = Passes::new(&groups, usize::MAX);
    let error = MODEL.forward(&lead, &prompts, None, 1).unwrap().prefix_states().err().unwrap().to_string();
    assert!(error.contains("expected a prefix pass") && error.contains("recomputed"), "{error}");
}
