//! The same comparisons on the emulator, and the fixtures of transformers and PEFT on it.

use super::*;
use crate::batch::{Example, Packing, Passes, PrefixGroup};
use crate::generate;
use crate::model::{Decoder, Dtypes};
use crate::ops::gpu::emulated::{emulate, emulate_cuda};
use crate::prompt::{Prefix, Prompt};
use crate::tune::{self, Limits};

/// Every case of an op, on the emulator, its threads in one order.
fn check_in(op: &str, dtype: DType, order: u32) {
    let target = CheckTarget { device: &Device::Cpu, dtype, run: &|f: &mut dyn FnMut()| emulate(order, f) };
    let found = ops(&target, op).unwrap_or_else(|e| panic!("{op}, {dtype:?}, order {order}: {e}"));
    assert!(found.len() > 5, "{op}: {} comparisons", found.len());
    let wrong: Vec<_> = found.iter().filter(|c| !c.holds()).collect();
    assert!(wrong.is_empty(), "{dtype:?}, order {order}: {wrong:#?}");
}

/// In three orders.
fn check(op: &str) {
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        [0, 1, 7].into_iter().for_each(|order| check_in(op, dtype, order));
    }
}

#[test]
fn embed() {
    check("embed");
}

#[test]
fn linear() {
    check("linear");
}

#[test]
fn rms_norm() {
    check("rms_norm");
}

#[test]
fn rope() {
    check("rope");
}

#[test]
fn rows() {
    check("rows");
}

// Minutes in all orders: each dtype, whose kernels are one text, has an order of its own.
#[test]
fn attention_in_f32() {
    check_in("attention", DType::F32, 0);
}

#[test]
fn attention_in_bf16() {
    check_in("attention", DType::BF16, 1);
}

#[test]
fn attention_in_f16() {
    check_in("attention", DType::F16, 7);
}

#[test]
fn swiglu() {
    check("swiglu");
}

#[test]
fn conv() {
    check("conv");
}

#[test]
fn ssd() {
    check("ssd");
}

#[test]
fn gated_norm() {
    check("gated_norm");
}

#[test]
fn experts() {
    check("experts");
}

#[test]
fn cross_entropy() {
    check("cross_entropy");
}

#[test]
fn distillation() {
    check("distillation");
}

#[test]
fn adamw() {
    check("adamw");
}

/// A few steps of the whole model on the emulator, in one pass and in several.
#[test]
fn runs_follow_the_cpu() {
    for (dtype, head_dim, max_rows) in [
        (DType::F32, 32, 4096),
        (DType::F32, 32, 60),
        (DType::BF16, 64, 4096),
        (DType::BF16, 64, 60),
        (DType::F16, 32, 4096),
    ] {
        let target = CheckTarget { device: &Device::Cpu, dtype, run: &|f: &mut dyn FnMut()| emulate(0, f) };
        let size = RunSize { steps: 3, examples: 4, max_rows, head_dim };
        let curves = run(&target, size).unwrap_or_else(|e| panic!("{dtype:?}, {size:?}: {e}"));
        assert!(curves.deviation() <= Curves::allowed(dtype), "{dtype:?}: {curves:?}");
        assert!(curves.cpu[2] < curves.cpu[0], "{curves:?}");
    }
}

/// On the emulator, as on a GPU, the prefix pass of this run holds a sequence: it follows the CPU's, whose prefix pass
/// holds none, and goes on from a checkpoint bit for bit.
#[test]
fn a_run_in_several_passes_goes_on_bit_for_bit() {
    let dtypes = crate::model::Dtypes::for_weights(DType::F32, &Device::Cpu).unwrap();
    let model = Decoder::random(&super::run::config(16), dtypes, &Device::Cpu, 7).unwrap();
    let train = super::run::examples(12);
    let options = crate::config::TrainOptions {
        learning_rate: 0.03,
        batch_size: 6,
        max_steps: 4,
        checkpoint_steps: 1,
        ..Default::default()
    };
    let prompt = Prompt::embeddings(&model.embedding().narrow(0, 100, 4).unwrap()).unwrap();
    let task = |max_rows| {
        let limits = Limits::rows(max_rows);
        tune::Task { model: &model, train: &train, validation: &[], teacher: None, options: &options, limits }
    };
    let run = |mut trainer: tune::Trainer| {
        let mut seen = Checkpoints::default();
        trainer.run(&mut seen).unwrap();
        let prompt = trainer.first().values().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        (seen, prompt.into_iter().map(f32::to_bits).collect::<Vec<_>>())
    };
    let cpu = run(tune::Trainer::new(task(96), &prompt).unwrap()).0;
    emulate(0, || {
        let group = PrefixGroup::new(0..4, &train[..6]);
        let prefix_pass_rows = model.prefix_pass_rows(96);
        let passes = Passes::packed(&[group], Packing { max_rows: 96, prefix_pass_rows, long_above: None });
        assert!(passes.prefix_pass.examples > 0 && !passes.example_passes.is_empty(), "{passes:?}");
        let (seen, last) = run(tune::Trainer::new(task(96), &prompt).unwrap());
        let close = |(a, b): (&f64, &f64)| (a - b).abs() < 1e-3 * b;
        assert!(seen.losses.iter().zip(&cpu.losses).all(close), "{:?}, {:?}", seen.losses, cpu.losses);
        // The limit of rows is the state's.
        let (rest, again) = run(tune::Trainer::resume(task(4096), &seen.states[1]).unwrap());
        assert_eq!(rest.losses, seen.losses[2..]);
        assert!(again == last, "the prompts differ");
    });
}

#[derive(Default)]
struct Checkpoints {
    losses: Vec<f64>,
    states: Vec<tune::State>,
}

impl tune::Observer for Checkpoints {
    fn step(&mut self, record: &tune::StepRecord) -> Result<()> {
        self.losses.push(record.loss);
        Ok(())
    }
    fn skipped(&mut self, _: usize, what: &str, value: f64) -> Result<()> {
        panic!("{what} is {value}");
    }
    fn out_of_memory(&mut self, limits: Limits) -> Result<()> {
        panic!("{limits:?}");
    }
    fn checkpoint(&mut self, state: &tune::State) -> Result<()> {
        self.states.push(state.clone());
        Ok(())
    }
}

/// Odd heads, biases, several groups and passes, blocks computed again, generation: fixtures on the emulator.
#[test]
fn models_compute_as_on_the_cpu() {
    for name in [
        "granite", "llama_bias", "hybrid_dense", "experts", "shared_experts", "mamba", "mamba_experts",
        "mamba_groups",
    ] {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
        let bare = crate::checkpoint::Checkpoint::open_without_tokenizer(&path).unwrap();
        let load = |dtype| {
            let dtypes = Dtypes { weights: dtype, activations: dtype };
            Decoder::load(&bare.config, &bare.weights, dtypes, &Device::Cpu, &mut |_| ()).unwrap()
        };
        // The second with its head padded, as a GPU's is.
        let (model, padded) = (load(DType::F32), emulate(0, || load(DType::F32)));
        assert_eq!(padded.embedding().dims(), model.embedding().dims(), "{name}");
        let vocab = bare.config.vocab_size;
        assert_eq!(
            padded.weight_bytes() - model.weight_bytes(),
            4 * bare.config.hidden_size * (vocab.next_multiple_of(64) - vocab),
            "{name}"
        );
        let prompts = model.embedding().narrow(0, 20, 7).unwrap();
        let logits = emulate(0, || padded.logits(&prompts)).unwrap();
        assert_eq!(logits.dims(), [7, vocab], "{name}: columns of the padding are no tokens");
        let cpu = values(&model.logits(&prompts).unwrap()).unwrap();
        let largest = cpu.iter().fold(0.0, |a: f64, b| a.max(b.abs()));
        assert!(largest_difference(&values(&logits).unwrap(), &cpu) < 1e-5 * largest, "{name}");
        let example = |i: u32| Example {
            input: [vec![3, 4], (0..2 + i * 5 % 9).map(|j| (i * 13 + j * 7) % 90).collect()].concat(),
            target: vec![5 + i % 3, 9, 11][..1 + i as usize % 3].to_vec(),
            line: 1,
        };
        let (some, others) =
            ((0..5).map(example).collect::<Vec<_>>(), (5..8).map(example).collect::<Vec<_>>());
        let groups = [PrefixGroup::new(0..4, &some), PrefixGroup::new(4..7, &others)];
        let own = |rows: std::ops::Range<usize>| {
            model.keys_values(&prompts.narrow(0, rows.start, rows.len()).unwrap()).unwrap()
        };
        let keys_values = Prefix::KeysValues(Tensor::cat(&[own(0..4), own(4..7)], 0).unwrap());
        let (pair, prompts) = ([&model, &padded], Prefix::Embeddings(prompts));
        steps_are_as_on_the_cpu(pair, &keys_values, &groups, &format!("{name}, keys and values"));
        let cpu = continued(&model, &keys_values);
        assert_eq!(emulate(0, || continued(&padded, &keys_values)), cpu, "{name}, keys and values");
        steps_are_as_on_the_cpu(pair, &prompts, &groups, name);
        split_steps_are_as_on_the_cpu(&model, &prompts, &groups, name);
        let cpu = continued(&model, &prompts);
        assert_eq!(emulate(0, || continued(&padded, &prompts)), cpu, "{name}");
        assert_eq!(emulate_cuda(0, || continued(&padded, &prompts)), cpu, "{name}, added in products");
        let narrow = emulate(0, || load(DType::BF16));
        assert_eq!(emulate(0, || continued(&narrow, &prompts)).len(), 3, "{name}");
    }
}

/// In one pass, in several, and with a recomputed layer; `name` is the fixture's.
fn steps_are_as_on_the_cpu(
    [model, padded]: [&Decoder; 2],
    prompts: &Prefix,
    groups: &[PrefixGroup],
    name: &str,
) {
    for limits in [Limits::rows(4096), Limits::rows(20), Limits { max_rows: 25, recompute: 1 }] {
        let gradient = |model: &Decoder| tune::gradient(model, prompts, groups, limits).unwrap();
        let cpu = gradient(model);
        let ours = emulate(7, || gradient(padded));
        // Products that add to the residual stream, as on CUDA.
        let added = emulate_cuda(7, || gradient(padded));
        let expected = values(cpu.gradient.as_ref().unwrap().values()).unwrap();
        let largest = expected.iter().fold(0.0, |a: f64, b| a.max(b.abs()));
        for ours in [ours, added] {
            assert!((cpu.loss().unwrap() - ours.loss().unwrap()).abs() < 1e-4, "{name}, {limits:?}");
            let ours = values(ours.gradient.unwrap().values()).unwrap();
            assert!(largest_difference(&ours, &expected) < 1e-4 * largest, "{name}, {limits:?}");
        }
        let evaluate = |model: &Decoder| {
            tune::evaluate(model, prompts, groups, limits.max_rows).unwrap().loss().unwrap()
        };
        let (cpu, ours) = (evaluate(model), emulate(0, || evaluate(padded)));
        assert!((cpu - ours).abs() < 1e-4, "{name}, {limits:?}");
    }
}

/// With a prefix pass that holds sequences.
fn split_steps_are_as_on_the_cpu(model: &Decoder, prompts: &Prefix, groups: &[PrefixGroup], name: &str) {
    let passes = |max_rows, prefix_pass_rows| {
        Passes::packed(groups, Packing { max_rows, prefix_pass_rows, long_above: None })
    };
    let (one, split) = (passes(4096, 0), passes(45, 35));
    assert!(split.prefix_pass.examples > 0 && !split.example_passes.is_empty());
    let found = emulate(0, || tune::gradient_of(model, prompts, &split, 1, tune::Mean::All).unwrap());
    let expected = tune::gradient_of(model, prompts, &one, 0, tune::Mean::All).unwrap();
    assert!((found.loss().unwrap() - expected.loss().unwrap()).abs() < 1e-4, "{name}");
    let (ours, cpu) = (values(found.gradient.unwrap().values()), values(expected.gradient.unwrap().values()));
    let (ours, cpu) = (ours.unwrap(), cpu.unwrap());
    let largest = cpu.iter().fold(0.0, |a: f64, b| a.max(b.abs()));
    assert!(largest_difference(&ours, &cpu) < 1e-4 * largest, "{name}");
    let evaluated = emulate(1, || tune::evaluate_of(model, prompts, &split).unwrap().loss().unwrap());
    let expected = tune::evaluate_of(model, prompts, &one).unwrap().loss().unwrap();
    assert!((evaluated - expected).abs() < 1e-4, "{name}");
}

/// Six tokens after each of three inputs.
fn continued(model: &Decoder, prompts: &Prefix) -> Vec<Vec<u32>> {
    let inputs: [&[u32]; 3] = [&[3, 4, 1, 2], &[3, 4, 50], &[3, 4, 8, 9, 10, 11]];
    let request = |tokens: &&[u32]| generate::Request {
        tokens: tokens.to_vec(),
        max_new_tokens: 6,
        ..generate::Request::default()
    };
    let requests = inputs.iter().map(request).collect();
    let generated = generate::generate(model, Some(prompts), requests, 512, &mut |_| ()).unwrap();
    generated.into_iter().map(|g| g.tokens).collect()
}

#[test]
fn a_wrong_value_does_not_hold() {
    let target = CheckTarget { device: &Device::Cpu, dtype: DType::F32, run: &|f: &mut dyn FnMut()| f() };
    let mut checks = Checks::new(&target, "embed");
    let exact = Tensor::new(&[1.0f64, 2.0], &Device::Cpu).unwrap();
    for wrong in [[1.0f32, 2.1], [f32::NAN, 2.0]] {
        let wrong = Tensor::new(&wrong, &Device::Cpu).unwrap();
        checks.value("x", &wrong, &exact, &exact).unwrap();
    }
    assert!(checks.finish().iter().all(|c| !c.holds()));
}
