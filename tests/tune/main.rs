//! How a run behaves: it learns, repeats bit for bit, splits its batches without changing them, and stops well.

mod distillation;
mod keys_values;
mod passes;
mod ranks;
mod recompute;
mod resume;
mod stopping;

use candle_core::{DType, Device, Tensor};
use gneiss::batch::{Example, Passes, PrefixGroup};
use gneiss::checkpoint::{BareCheckpoint, Checkpoint, ModelConfig};
use gneiss::config::{Keep, OnNotFinite, Schedule, TrainOptions};
use gneiss::model::{Decoder, Dtypes};
use gneiss::prompt::Prefix;
use gneiss::prompt::Prompt;
use gneiss::tune::{self, EpochRecord, Kept, Limits, Observer, StepRecord, Task, Trainer};
use gneiss::{Error, Result};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::path::Path;
use std::sync::LazyLock;

static MODEL: LazyLock<Decoder> = LazyLock::new(|| load("granite"));

fn load(name: &str) -> Decoder {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let BareCheckpoint { config, weights, .. } = Checkpoint::open_without_tokenizer(&path).unwrap();
    let dtypes = Dtypes::for_weights(DType::F32, &Device::Cpu).unwrap();
    Decoder::load(&config, &weights, dtypes, &Device::Cpu, &mut |_| ()).unwrap()
}

const VIRTUAL_TOKENS: usize = 6;

/// Examples of random tokens: inputs of 3 to 9 that begin alike, targets of 1 to 3.
fn examples(n: usize, seed: u64) -> Vec<Example> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let vocab = MODEL.config().vocab_size as u32;
    let mut tokens = |n: usize| (0..n).map(|_| rng.random_range(0..vocab)).collect::<Vec<u32>>();
    (0..n)
        .map(|i| Example {
            input: [vec![7, 8], tokens(1 + i * 5 % 7)].concat(),
            target: tokens(1 + i % 3),
            line: i + 2,
        })
        .collect()
}

/// Rows of the embedding, as the init method `vocab` takes them.
fn prompt() -> Tensor {
    let ids = Tensor::new(&[90u32, 3, 41, 66, 12, 120][..VIRTUAL_TOKENS], &Device::Cpu).unwrap();
    MODEL.embedding().index_select(&ids, 0).unwrap()
}

/// Options whose learning rate neither warms up nor falls.
fn options() -> TrainOptions {
    TrainOptions {
        schedule: Schedule::Constant,
        warmup_ratio: 0.0,
        num_epochs: 2,
        batch_size: 4,
        keep: Keep::Last,
        ..TrainOptions::default()
    }
}

/// What an observer saw of a run, and what was kept of it.
struct Run {
    steps: Vec<StepRecord>,
    epochs: Vec<EpochRecord>,
    skipped: Vec<(usize, String)>,
    /// The prompts that [`Trainer::kept`] gives at the end.
    kept: Kept,
    count_skipped: usize,
    total_steps: usize,
    outcome: Result<tune::Ended>,
}

#[derive(Default)]
struct Watch {
    steps: Vec<StepRecord>,
    epochs: Vec<EpochRecord>,
    skipped: Vec<(usize, String)>,
}

impl Observer for Watch {
    // Wall times differ from run to run, and nothing else may.
    fn step(&mut self, record: &StepRecord) -> Result<()> {
        assert!(record.seconds > 0.0);
        self.steps.push(StepRecord { seconds: 0.0, elapsed: 0.0, ..record.clone() });
        Ok(())
    }
    fn skipped(&mut self, step: usize, what: &str, value: f64) -> Result<()> {
        assert!(!value.is_finite());
        self.skipped.push((step, what.to_owned()));
        Ok(())
    }
    fn out_of_memory(&mut self, limits: Limits) -> Result<()> {
        panic!("the CPU ran out of memory: {limits:?}");
    }
    fn epoch(&mut self, record: &EpochRecord) -> Result<()> {
        self.epochs.push(EpochRecord { seconds: 0.0, elapsed: 0.0, ..record.clone() });
        Ok(())
    }
}

struct Setting<'a> {
    train: &'a [Example],
    validation: &'a [Example],
    options: TrainOptions,
    max_rows: usize,
    recompute: usize,
    prompt: Tensor,
}

impl<'a> Setting<'a> {
    fn new(train: &'a [Example], options: TrainOptions) -> Self {
        Self { train, validation: &[], options, max_rows: usize::MAX, recompute: 0, prompt: prompt() }
    }

    fn run(self) -> Run {
        let Self { train, validation, options, max_rows, recompute, prompt } = self;
        let limits = Limits { max_rows, recompute };
        let task = Task { model: &MODEL, train, validation, teacher: None, options: &options, limits };
        let mut trainer = Trainer::new(task, &Prompt::embeddings(&prompt).unwrap()).unwrap();
        let mut watch = Watch::default();
        let total_steps = trainer.first().total_steps();
        let outcome = trainer.run(&mut watch);
        let Watch { steps, epochs, skipped } = watch;
        let (kept, count_skipped) = (trainer.kept().unwrap(), trainer.first().skipped());
        Run { steps, epochs, skipped, kept, count_skipped, total_steps, outcome }
    }

    /// Runs to an end without an error.
    #[track_caller]
    fn finish(self) -> Run {
        let run = self.run();
        assert!(run.outcome.is_ok(), "{:?}", run.outcome);
        run
    }
}

/// The bits of a prompt.
fn bits(prompt: &Tensor) -> Vec<u32> {
    prompt.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

fn losses(run: &Run) -> Vec<f64> {
    run.steps.iter().map(|s| s.loss).collect()
}

fn is_finite(prompt: &Tensor) -> bool {
    prompt.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|x| x.is_finite())
}

/// The largest difference of two prompts' elements.
fn distance(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

fn evaluate(model: &Decoder, prompt: &Tensor, examples: &[Example]) -> f64 {
    let group = PrefixGroup::new(0..prompt.dims()[0] as u32, examples);
    tune::evaluate(model, &Prefix::Embeddings(prompt.clone()), &[group], usize::MAX).unwrap().loss().unwrap()
}

/// On the Llama: the Granite fixture divides its logits, so that no token can be nearly certain.
#[test]
fn one_batch_is_learned_by_heart() {
    let (model, train) = (load("llama_bias"), examples(4, 1));
    let options = TrainOptions { learning_rate: 0.05, num_epochs: 300, ..options() };
    let ids = Tensor::new(&[90u32, 3, 41, 66, 12, 120], &Device::Cpu).unwrap();
    let before = model.embedding().index_select(&ids, 0).unwrap();
    let bits_before = bits(&before);
    let task = Task {
        model: &model,
        train: &train,
        validation: &[],
        teacher: None,
        options: &options,
        limits: Limits::rows(512),
    };
    let mut trainer = Trainer::new(task, &Prompt::embeddings(&before).unwrap()).unwrap();
    let mut watch = Watch::default();
    trainer.run(&mut watch).unwrap();
    let (first, last) = (watch.steps[0].loss, watch.steps.last().unwrap().loss);
    assert!(first > 3.0, "random targets are not known before: {first}");
    assert!(last < 0.05 * first, "the loss fell from {first} to {last} only");
    let kept = trainer.kept().unwrap().prompt.values().clone();
    let moved = distance(&kept, &before);
    assert!(moved > 0.05, "the prompt moved by {moved}");
    assert_eq!(bits_before, bits(&before), "the prompt that the run started from is the caller's");
    let now = evaluate(&model, &kept, &train);
    assert!((now - last).abs() < 0.05, "what is kept has the loss {now}, the last step had {last}");
}

#[test]
fn a_seed_repeats_bit_for_bit_and_another_does_not() {
    let (train, validation) = (examples(11, 2), examples(5, 3));
    let with = |seed: u64| {
        let setting = Setting::new(&train, TrainOptions { seed, num_epochs: 3, ..options() });
        Setting { validation: &validation, max_rows: 30, ..setting }.finish()
    };
    let (a, b, other) = (with(1), with(1), with(2));
    assert_eq!(a.steps.len(), 9);
    assert_eq!((&a.steps, &a.epochs), (&b.steps, &b.epochs));
    assert_eq!(bits(a.kept.prompt.values()), bits(b.kept.prompt.values()));
    assert_ne!(a.steps, other.steps);
    assert_ne!(bits(a.kept.prompt.values()), bits(other.kept.prompt.values()));
}

#[test]
fn each_epoch_has_an_order_of_its_own() {
    let train = examples(12, 4);
    // A rate so low that the prompt stands still: a step's loss tells which examples it saw.
    let still = TrainOptions { learning_rate: 1e-30, batch_size: 3, ..options() };
    let shuffled = Setting::new(&train, still.clone()).finish();
    let orders: Vec<Vec<f64>> = losses(&shuffled).chunks(4).map(<[f64]>::to_vec).collect();
    assert_ne!(orders[0], orders[1]);
    let tokens = |run: &Run| run.steps.iter().map(|s| s.target_tokens).sum::<usize>();
    let all = train.iter().map(|e| e.target.len()).sum::<usize>();
    assert_eq!(tokens(&shuffled), 2 * all, "an epoch sees every example once");

    let in_order = Setting::new(&train, TrainOptions { shuffle: false, ..still }).finish();
    let expected: Vec<f64> = train.chunks(3).map(|chunk| evaluate(&MODEL, &prompt(), chunk)).collect();
    for epoch in losses(&in_order).chunks(4) {
        for (ours, expected) in epoch.iter().zip(&expected) {
            assert!((ours - expected).abs() < 1e-9, "{ours}, expected {expected}");
        }
    }
    assert_ne!(orders[0], expected);
}

#[test]
fn accumulation_is_the_whole_batch() {
    let train = examples(16, 5);
    let run = |batch_size, accumulate_steps| {
        let options = TrainOptions { batch_size, accumulate_steps, num_epochs: 3, ..options() };
        Setting::new(&train, options).finish()
    };
    let whole = run(8, 1);
    assert_eq!(whole.steps.len(), 6);
    assert!(whole.steps.iter().all(|s| s.examples == 8));
    for (batch_size, accumulate_steps) in [(4, 2), (2, 4), (1, 8)] {
        let parts = run(batch_size, accumulate_steps);
        assert_eq!(parts.steps, whole.steps, "{batch_size} times {accumulate_steps}");
        assert_eq!(bits(parts.kept.prompt.values()), bits(whole.kept.prompt.values()));
    }
}

#[test]
fn the_budget_of_rows_changes_no_step() {
    let train = examples(10, 6);
    let run = |max_rows| Setting { max_rows, ..Setting::new(&train, options()) }.finish();
    let whole = run(usize::MAX);
    for max_rows in [1, 16, 40] {
        let parts = run(max_rows);
        assert_eq!(parts.steps.len(), whole.steps.len());
        for (a, b) in parts.steps.iter().zip(&whole.steps) {
            assert!((a.loss - b.loss).abs() < 1e-5 * b.loss, "{max_rows} rows: {} and {}", a.loss, b.loss);
            assert_eq!((a.rows, a.target_tokens), (b.rows, b.target_tokens));
        }
        let moved = distance(parts.kept.prompt.values(), whole.kept.prompt.values());
        assert!(moved < 1e-4, "{max_rows} rows: the prompts are {moved} apart");
    }
}

/// The epoch with the lowest validation loss lies in the middle: random targets are learned by heart, and
/// other random targets become less likely on the way.
#[test]
fn the_best_epoch_or_the_last_is_kept() {
    let (train, validation) = (examples(6, 7), examples(6, 8));
    let run = |keep| {
        let options = TrainOptions { keep, learning_rate: 0.03, num_epochs: 25, ..options() };
        Setting { validation: &validation, ..Setting::new(&train, options) }.finish()
    };
    let (best, last) = (run(Keep::Best), run(Keep::Last));
    assert_eq!(best.epochs, last.epochs);
    assert_eq!(best.epochs.len(), 25);
    let validation_loss = |e: &EpochRecord| e.validation_loss.unwrap();
    let lowest = best.epochs.iter().min_by(|a, b| validation_loss(a).total_cmp(&validation_loss(b))).unwrap();
    assert!(lowest.epoch < 25, "the test needs a run whose last epoch is not its best");
    assert_eq!((best.kept.epoch, best.kept.step), (lowest.epoch, lowest.step));
    assert_eq!(best.kept.validation_loss, lowest.validation_loss);
    assert_eq!(best.kept.train_loss, lowest.train_loss);
    assert!(
        (evaluate(&MODEL, best.kept.prompt.values(), &validation) - validation_loss(lowest)).abs() < 1e-6
    );
    // `best` marks each epoch that is better than all before it.
    let mut least = f64::INFINITY;
    for epoch in &best.epochs {
        assert_eq!(epoch.best, validation_loss(epoch) < least, "epoch {}", epoch.epoch);
        least = least.min(validation_loss(epoch));
    }
    assert_eq!((last.kept.epoch, last.kept.step), (25, 50));
    assert_eq!(last.kept.validation_loss, last.epochs[24].validation_loss);
    assert_ne!(bits(last.kept.prompt.values()), bits(best.kept.prompt.values()));
}

#[test]
fn steps_are_counted_with_the_partial_batch() {
    let train = examples(10, 9);
    let run = Setting::new(&train, TrainOptions { batch_size: 2, accumulate_steps: 2, ..options() }).finish();
    assert_eq!((run.total_steps, run.steps.len()), (6, 6));
    assert_eq!(run.steps.iter().map(|s| s.examples).collect::<Vec<_>>(), [4, 4, 2, 4, 4, 2]);
    assert_eq!(run.steps.iter().map(|s| s.step).collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6]);
    assert_eq!(run.steps.iter().map(|s| s.epoch).collect::<Vec<_>>(), [1, 1, 1, 2, 2, 2]);
    assert_eq!(run.epochs.iter().map(|e| (e.epoch, e.step)).collect::<Vec<_>>(), [(1, 3), (2, 6)]);
    assert!(run.epochs.iter().all(|e| e.validation_loss.is_none() && !e.best));
    for (epoch, steps) in run.epochs.iter().zip(run.steps.chunks(3)) {
        let nll: f64 = steps.iter().map(|s| s.loss * s.target_tokens as f64).sum();
        let mean = nll / steps.iter().map(|s| s.target_tokens).sum::<usize>() as f64;
        assert!((epoch.train_loss.unwrap() - mean).abs() < 1e-12);
    }
}

#[test]
fn max_steps_counts_instead_of_epochs() {
    let train = examples(10, 9);
    for (max_steps, epochs) in [(2, 1), (3, 1), (7, 3)] {
        let options = TrainOptions { max_steps, num_epochs: 2, schedule: Schedule::Linear, ..options() };
        let run = Setting::new(&train, options.clone()).finish();
        assert_eq!((run.total_steps, run.steps.len(), run.kept.step), (max_steps, max_steps, max_steps));
        assert_eq!(run.epochs.len(), epochs, "{max_steps} steps of 3 an epoch");
        assert_eq!(run.kept.epoch, epochs);
        // The schedule falls to 0 over the steps that are taken.
        for (i, step) in run.steps.iter().enumerate() {
            let expected = options.learning_rate * (max_steps - i) as f64 / max_steps as f64;
            assert!((step.learning_rate - expected).abs() < 1e-15, "step {}", step.step);
        }
    }
}
