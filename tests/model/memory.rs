//! The sizes of tape and workspace, held against what the allocator gives out. One test a process, so that nothing
//! else allocates meanwhile.

use candle_core::{DType, Device, DeviceLocation, Tensor};
use gneiss::batch::{Example, Packing, Passes, PrefixGroup};
use gneiss::checkpoint::{Checkpoint, ExpertsConfig, MambaConfig, ModelConfig};
use gneiss::model::{Decoder, Dtypes, TuningMemory};
use gneiss::prompt::Prefix;
use gneiss::tune::{self, Limits};
use std::path::Path;

#[path = "../common/allocated.rs"]
mod allocated;

const DTYPES: Dtypes = Dtypes { weights: DType::F32, activations: DType::F32 };

fn golden(name: &str) -> Decoder {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let bare = Checkpoint::open_without_tokenizer(&path).unwrap();
    Decoder::load(&bare.config, &bare.weights, DTYPES, &Device::Cpu, &mut |_| {}).unwrap()
}

/// A model whose tape is large beside the packed blocks of its products.
fn larger(name: &str) -> Decoder {
    let like = golden(name).config().clone();
    let shape = ModelConfig {
        num_hidden_layers: 6,
        mamba: like.mamba.clone().map(|mamba| MambaConfig { heads: 16, head_dim: 32, state: 32, ..mamba }),
        experts: like.experts.map(|experts| ExpertsConfig { size: 128, ..experts }),
        hidden_size: 256,
        num_attention_heads: 8,
        num_key_value_heads: 2,
        head_dim: 32,
        intermediate_size: if like.intermediate_size == 0 { 0 } else { 768 },
        vocab_size: 1000,
        ..like
    };
    Decoder::random(&shape, DTYPES, &Device::Cpu, 1).unwrap()
}

/// A batch of about `rows` rows behind 5 virtual tokens, half of which predict, so that both kinds of rows count.
fn example(rows: usize) -> Example {
    let half = rows as u32 / 2;
    Example { input: (1..half).map(|i| i % 97).collect(), target: vec![3; half as usize], line: 1 }
}

#[track_caller]
fn assert_near(what: &str, found: isize, estimated: usize, tolerance: f64) {
    let ratio = found as f64 / estimated as f64;
    assert!(
        (ratio - 1.0).abs() < tolerance,
        "{what}: estimated {estimated} bytes, found {found}: {ratio:.3}"
    );
}

fn tapes(name: &str, model: &Decoder, rows: usize) {
    let memory = TuningMemory::new(model.config(), DTYPES, DeviceLocation::Cpu);
    let prompt = Tensor::ones((5, model.config().hidden_size), DType::F32, &Device::Cpu).unwrap();
    let example = example(rows);
    let group = |examples: &[Example]| PrefixGroup::new(0..5, examples);
    let batch = Passes::new(&[group(&[example])], 1000).prefix_pass;
    assert!(batch.target_rows.len() * 2 >= batch.ids.len() - 5, "{name}: few target rows");
    // The first passes make what stays: the rotary table, the threads, the products' buffers of each of them.
    for _ in 0..8 {
        drop(model.forward(&batch, &prompt, None, 0).unwrap());
    }
    for recompute in 0..model.config().num_hidden_layers {
        let (_, held, tape) = allocated::during(|| model.forward(&batch, &prompt, None, recompute).unwrap());
        let estimated = memory.tape(batch.ids.len(), batch.target_rows.len(), recompute);
        assert_near(&format!("{name}, {recompute} recomputed"), held, estimated, 0.02);
        drop(tape);
    }
    // A pass of prefixes alone: many tokens that all inputs share, beside which a few kB of headers are nothing.
    let head = vec![9; 3 * rows];
    let prefixes = PrefixGroup { before: Vec::new(), prompt: 0..5, head, sequences: Vec::new() };
    let lead = Passes::new(&[prefixes], 1000).prefix_pass;
    for _ in 0..8 {
        drop(model.forward(&lead, &prompt, None, 0).unwrap());
    }
    for recompute in 0..model.config().num_hidden_layers {
        let (_, held, tape) = allocated::during(|| model.forward(&lead, &prompt, None, recompute).unwrap());
        let rows = lead.ids.len();
        let estimated = memory.tape(rows, 0, recompute)
            + memory.prefix_keys_values(rows, recompute)
            + memory.states_per_prefix;
        assert_near(&format!("{name}, prefixes, {recompute} recomputed"), held, estimated, 0.02);
        assert_eq!(tape.prefix_states().unwrap().len(), model.config().num_hidden_layers);
    }
}

/// What a step in two passes takes at its peak: the tape of the prefix pass, which holds sequences, is alive beside that
/// of the example pass.
fn split_peak(model: &Decoder, tolerance: f64) {
    let memory = TuningMemory::new(model.config(), DTYPES, DeviceLocation::Cpu);
    let prompt = Tensor::ones((5, model.config().hidden_size), DType::F32, &Device::Cpu).unwrap();
    // Inputs of other first tokens share no head.
    let example =
        |i: u32| Example { input: (0..50).map(|j| (i * 7 + j) % 97).collect(), target: vec![3; 50], line: 1 };
    let groups = [PrefixGroup::new(0..5, &(0..10).map(example).collect::<Vec<_>>())];
    let passes = Passes::packed(&groups, Packing { max_rows: 700, prefix_pass_rows: 300, long_above: None });
    let [rest] = &passes.example_passes[..] else { panic!("{} example passes", passes.example_passes.len()) };
    assert_eq!((passes.prefix_pass.examples, rest.examples, passes.rows()), (3, 7, 5 + 990));
    let (rows, targets) = (passes.rows(), passes.target_tokens());
    for recompute in 0..model.config().num_hidden_layers {
        let (peak, ..) = allocated::during(|| {
            tune::gradient_of(model, &Prefix::Embeddings(prompt.clone()), &passes, recompute, tune::Mean::All)
                .unwrap()
        });
        let tapes = memory.tapes([5, rows - 5], targets, recompute)
            + memory.prefix_keys_values(5, recompute)
            + memory.states_per_prefix;
        let workspace = memory.workspace(rest.ids.len(), rest.target_rows.len(), recompute);
        let estimated = tapes + workspace + 5 * memory.split_per_row + memory.split_per_prefix;
        assert_near(&format!("two passes, {recompute} recomputed"), peak, estimated, tolerance);
    }
}

/// What a step takes at its peak, and what evaluation takes.
fn peaks(model: &Decoder, rows: usize, tolerance: f64) {
    let memory = TuningMemory::new(model.config(), DTYPES, DeviceLocation::Cpu);
    let prompt = Tensor::ones((5, model.config().hidden_size), DType::F32, &Device::Cpu).unwrap();
    let groups = [PrefixGroup::new(0..5, [&example(rows)])];
    let (rows, targets) = (rows + 3, rows / 2);
    for _ in 0..4 {
        drop(
            tune::gradient(model, &Prefix::Embeddings(prompt.clone()), &groups, Limits::rows(1000)).unwrap(),
        );
    }
    for recompute in 0..model.config().num_hidden_layers {
        let limits = Limits { max_rows: 1000, recompute };
        let (peak, ..) = allocated::during(|| {
            tune::gradient(model, &Prefix::Embeddings(prompt.clone()), &groups, limits).unwrap()
        });
        let estimated = memory.tape(rows, targets, recompute) + memory.workspace(rows, targets, recompute);
        assert_near(&format!("step, {recompute} recomputed"), peak, estimated, tolerance);
    }
    let (peak, ..) = allocated::during(|| {
        tune::evaluate(model, &Prefix::Embeddings(prompt.clone()), &groups, 1000).unwrap()
    });
    let one_block = rows * (memory.inner_layers[0].tape + memory.workspace_per_row);
    assert!(peak < one_block as isize, "evaluation took {peak} bytes, a block's step {one_block}");
}

#[test]
fn memory_is_as_estimated() {
    for (name, rows) in [("granite", 300), ("llama_bias", 211), ("hybrid_dense", 320)] {
        tapes(name, &golden(name), rows);
    }
    for (name, rows) in [("experts", 300), ("shared_experts", 300), ("mamba", 320), ("mamba_experts", 320)] {
        tapes(name, &golden(name), rows);
    }
    // The estimate counts every row of a Mamba2 layer's workspace, of which a task has its own part at a time.
    for (name, tolerance) in [("granite", 0.02), ("mamba_experts", 0.1)] {
        let model = larger(name);
        tapes("larger", &model, 400);
        peaks(&model, 600, tolerance);
        split_peak(&model, tolerance);
    }
}
