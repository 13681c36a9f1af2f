//! The order of a run's work, and what becomes of prepared steps on a device that runs out of memory.

use super::attempt::ORDER;
use super::*;
use crate::checkpoint::Checkpoint;
use crate::config::{Keep, Schedule};
use crate::device::{Work, faults};
use crate::model::Dtypes;
use crate::ops::gpu::{emulated::emulate, uploads};
use crate::tune::{epoch_order, objective};
use candle_core::{DType, Device, Tensor};
use std::cell::RefCell;
use std::ops::Range;
use std::path::Path;
use std::rc::Rc;

pub(super) fn model() -> Decoder {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/granite");
    let bare = Checkpoint::open_without_tokenizer(&path).unwrap();
    let dtypes = Dtypes::for_weights(DType::F32, &Device::Cpu).unwrap();
    Decoder::load(&bare.config, &bare.weights, dtypes, &Device::Cpu, &mut |_| ()).unwrap()
}

pub(super) fn examples(n: u32) -> Vec<Example> {
    let example = |i: u32| Example {
        input: [vec![7, 8], (0..2 + i * 5 % 7).map(|j| (i * 13 + j * 7) % 90).collect()].concat(),
        target: (0..1 + i % 3).map(|j| (i * 3 + j) % 90).collect(),
        line: i as usize + 1,
    };
    (0..n).map(example).collect()
}

pub(super) fn options() -> TrainOptions {
    TrainOptions {
        schedule: Schedule::Constant,
        warmup_ratio: 0.0,
        num_epochs: 2,
        batch_size: 4,
        keep: Keep::Last,
        ..TrainOptions::default()
    }
}

#[derive(Default)]
pub(super) struct Watch {
    pub(super) losses: Vec<f64>,
    pub(super) limits: Vec<usize>,
    order: Vec<Vec<&'static str>>,
}

impl Observer for Watch {
    fn step(&mut self, record: &StepRecord) -> Result<()> {
        self.losses.push(record.loss);
        self.order.push(ORDER.take());
        Ok(())
    }
    fn skipped(&mut self, _: usize, what: &str, value: f64) -> Result<()> {
        panic!("{what} is {value}");
    }
    fn out_of_memory(&mut self, limits: Limits) -> Result<()> {
        self.limits.push(limits.max_rows);
        Ok(())
    }
}

/// A prompt of some rows of the embedding.
pub(super) fn prompt(model: &Decoder, rows: Range<usize>) -> Prompt {
    Prompt::embeddings(&model.embedding().narrow(0, rows.start, rows.len()).unwrap()).unwrap()
}

/// Runs 2 epochs of 3 steps from rows of the embedding.
fn run(model: &Decoder, options: &TrainOptions) -> (Watch, Vec<f32>) {
    run_with(model, options, &[])
}

fn run_with(model: &Decoder, options: &TrainOptions, validation: &[Example]) -> (Watch, Vec<f32>) {
    let train = examples(10);
    let prompt = prompt(model, 20..26);
    let task = Task { model, train: &train, validation, teacher: None, options, limits: Limits::rows(100) };
    let mut trainer = Trainer::new(task, &prompt).unwrap();
    let mut watch = Watch::default();
    ORDER.take();
    trainer.run(&mut watch).unwrap();
    let prompt = trainer.first().values().flatten_all().unwrap().to_vec1().unwrap();
    (watch, prompt)
}

#[test]
fn each_step_is_prepared_before_the_host_waits_for_the_one_before() {
    let (watch, _) = run(&model(), &options());
    assert_eq!(watch.losses.len(), 6);
    // The first step prepares itself; the last has none behind it, and the third prepares the next epoch's first.
    let expected: [&[&str]; 6] = [
        &["prepare", "prepare", "wait"],
        &["prepare", "wait"],
        &["prepare", "wait"],
        &["prepare", "wait"],
        &["prepare", "wait"],
        &["wait"],
    ];
    assert_eq!(watch.order, expected);
    let (short, _) = run(&model(), &TrainOptions { max_steps: 2, ..options() });
    assert_eq!(short.order, [expected[0], expected[5]]);
}

#[test]
fn steps_that_were_prepared_are_those_that_were_not() {
    let model = model();
    let (options, train) = (options(), examples(10));
    let (watch, prompt) = run(&model, &options);
    // The same steps without a look at the next one.
    let start = self::prompt(&model, 20..26);
    let task = Task {
        model: &model,
        train: &train,
        validation: &[],
        teacher: None,
        options: &options,
        limits: Limits::rows(100),
    };
    let mut trainer = Trainer::new(task, &start).unwrap();
    let mut losses = Vec::new();
    for epoch in [1, 2] {
        for chunk in epoch_order(train.len(), &options, epoch).chunks(4) {
            let examples = StepExamples { now: chunk.to_vec(), next: None };
            let part = StepPart { run: 0, examples, learning_rate: options.learning_rate };
            let record = trainer.step(&[part], &mut [&mut Watch::default()]).unwrap().remove(0).unwrap();
            losses.push(record.unwrap().loss);
        }
    }
    assert_eq!(watch.losses, losses);
    assert_eq!(prompt, trainer.first().values().flatten_all().unwrap().to_vec1::<f32>().unwrap());
}

#[test]
fn a_prepared_step_is_made_again_under_fewer_rows() {
    let model = model();
    let calls = Rc::new(RefCell::new(0));
    let seen = calls.clone();
    // From the third step's forward pass on, 20 rows are too many.
    let fails = move |work: Work, rows: usize| {
        *seen.borrow_mut() += usize::from(work == Work::Pass);
        *seen.borrow() >= 3 && rows > 20
    };
    let (watch, _) = faults::with(fails, || run(&model, &options()));
    let (expected, _) = run(&model, &options());
    assert!(!watch.limits.is_empty() && *watch.limits.last().unwrap() <= 20, "{:?}", watch.limits);
    let third = watch.order[2].iter().filter(|what| **what == "prepare").count();
    assert_eq!(third, 1 + watch.limits.len(), "once a try, and the step behind: {:?}", watch.order);
    assert_eq!(watch.order[3..], expected.order[3..]);
    for (found, expected) in watch.losses.iter().zip(&expected.losses) {
        assert!((found - expected).abs() < 1e-5 * expected, "{found} for {expected}");
    }
}

/// The next epoch's first step is prepared before the validation, which may leave fewer rows.
#[test]
fn a_step_prepared_before_a_validation_that_did_not_fit_is_made_again() {
    let (model, validation) = (model(), examples(6));
    let mut calls = 0;
    // Behind three steps of one pass each comes the validation's.
    let fails = move |work: Work, rows: usize| {
        calls += usize::from(work == Work::Pass);
        calls == 4 && work == Work::Pass && rows > 20
    };
    let (watch, _) = faults::with(fails, || run_with(&model, &options(), &validation));
    assert_eq!(watch.limits.len(), 1, "{:?}", watch.limits);
    assert_eq!(watch.order[2], ["prepare", "wait"]);
    assert_eq!(watch.order[3], ["prepare", "prepare", "wait"], "of its own step again, and of the next");
    assert_eq!(watch.order[4], ["prepare", "wait"]);
}

#[test]
fn a_pass_has_one_upload() {
    let model = model();
    let examples = examples(5);
    let groups = [PrefixGroup::new(0..6, &examples)];
    let prompts = prompt(&model, 20..26).prefix().unwrap();
    emulate(0, || {
        for (max_rows, least) in [(100, 1), (20, 3)] {
            let limits = Limits::rows(max_rows);
            let passes =
                objective::prepare(&model, &groups, prompts.kind(), max_rows).unwrap().iter().count();
            assert!(passes >= least, "{passes} passes");
            let before = uploads();
            let found = objective::gradient(&model, &prompts, &groups, limits).unwrap().gradient.unwrap();
            assert_eq!(uploads() - before, passes, "{max_rows} rows a pass");
            // The same without: each list by itself.
            let bare = crate::batch::Passes::new(&groups, max_rows);
            let before = uploads();
            let alone = objective::gradient_of(&model, &prompts, &bare, 0, objective::Mean::All)
                .unwrap()
                .gradient
                .unwrap();
            println!("{passes} passes: {} uploads", uploads() - before);
            assert!(uploads() - before > 10 * passes);
            let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(values(found.values()), values(alone.values()));
            let before = uploads();
            objective::evaluate(&model, &prompts, &groups, max_rows).unwrap();
            assert_eq!(uploads() - before, passes, "{max_rows} rows a pass, without a gradient");
        }
    });
}

/// What a run does by itself: its losses and last values.
fn alone(task: Task, prompt: &Prompt) -> (Vec<f64>, Vec<f32>) {
    let mut trainer = Trainer::new(task, prompt).unwrap();
    let mut watch = Watch::default();
    trainer.run(&mut watch).unwrap();
    (watch.losses, flat(trainer.first().values()))
}

pub(super) fn flat(values: &Tensor) -> Vec<f32> {
    values.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Options of three runs of other rates, numbers of epochs and batch sizes, their examples, and the rows of their prompts.
fn three_runs(all: &[Example]) -> [(TrainOptions, &[Example], Range<usize>); 3] {
    let options = |learning_rate, num_epochs, batch_size| TrainOptions {
        learning_rate,
        num_epochs,
        batch_size,
        max_grad_norm: 0.05,
        ..options()
    };
    [
        (options(0.01, 2, 4), &all[..10], 20..26),
        (options(0.05, 1, 2), &all[10..17], 30..33),
        (options(0.02, 3, 5), &all[4..], 40..41),
    ]
}

/// Losses and last values of three runs that are trained together in passes of at most `max_rows` rows, each beside those of the
/// run alone in passes of 100.
fn together_and_alone(model: &Decoder, max_rows: usize) -> Vec<[(Vec<f64>, Vec<f32>); 2]> {
    let all = examples(24);
    let (settings, validation) = (three_runs(&all), &all[..3]);
    let runs = settings.iter().map(|(options, train, rows)| {
        let examples = RunExamples { train, validation, teacher: None };
        PromptRun::new(model, examples, options, &prompt(model, rows.clone())).unwrap()
    });
    let mut together = Trainer::with_runs(model, Limits::rows(max_rows), runs.collect()).unwrap();
    let mut watches: Vec<Watch> = settings.iter().map(|_| Watch::default()).collect();
    let observers = watches.iter_mut().map(|watch| watch as &mut dyn Observer);
    let outcomes = together.run_all(&mut observers.collect::<Vec<_>>()).unwrap();
    assert!(outcomes.iter().all(|outcome| matches!(outcome, Ok(Ended::Completed))), "{outcomes:?}");
    let compared = settings.iter().zip(watches).zip(together.runs());
    compared
        .map(|(((options, train, rows), watch), run)| {
            assert!(run.position().last.validation_loss.is_some());
            let task = Task { model, train, validation, teacher: None, options, limits: Limits::rows(100) };
            let alone = alone(task, &prompt(model, rows.clone()));
            assert!(alone.0.len() > 3 && watch.losses.len() == alone.0.len());
            [(watch.losses, flat(run.values())), alone]
        })
        .collect()
}

/// Three runs with different prompts, rates, examples and lengths in one step are those that each is alone. Targets have 1 to 3
/// tokens: a mean over all of them would weigh the runs by their target tokens.
#[test]
fn runs_that_are_trained_together_are_those_alone() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/granite");
    let bare = Checkpoint::open_without_tokenizer(&path).unwrap();
    let dtypes = Dtypes::for_weights(DType::F64, &Device::Cpu).unwrap();
    let model = Decoder::load(&bare.config, &bare.weights, dtypes, &Device::Cpu, &mut |_| ()).unwrap();
    for (i, [ours, alone]) in together_and_alone(&model, 60).into_iter().enumerate() {
        for (a, b) in ours.0.iter().zip(&alone.0) {
            assert!((a - b).abs() < 1e-5 * b, "run {i}: {a} for {b}");
        }
        let far = largest_difference(&ours.1, &alone.1);
        let rows = three_runs(&examples(24))[i].2.clone();
        let moved = largest_difference(&alone.1, &flat(prompt(&model, rows).prefix().unwrap().values()));
        assert!(
            moved > 0.01 && far < 1e-4 * moved,
            "run {i}: {far} from the run alone, which moved by {moved}"
        );
    }
}

/// In bf16 on the CPU they are so bit for bit, if each step is in one pass: no row depends on others than its own run's.
#[test]
fn runs_in_bf16_that_are_trained_together_are_those_alone_bit_for_bit() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/granite");
    let bare = Checkpoint::open_without_tokenizer(&path).unwrap();
    let dtypes = Dtypes::for_weights(DType::BF16, &Device::Cpu).unwrap();
    let model = Decoder::load(&bare.config, &bare.weights, dtypes, &Device::Cpu, &mut |_| ()).unwrap();
    for (i, [ours, alone]) in together_and_alone(&model, 1000).into_iter().enumerate() {
        assert!(ours == alone, "run {i}: {ours:?}\n{alone:?}");
    }
}

/// A run whose loss is not finite ends by itself, and the others go on.
#[test]
fn an_error_of_a_run_does_not_end_the_others() {
    let model = model();
    let all = examples(10);
    let good = options();
    let bad = TrainOptions { learning_rate: 1e38, weight_decay: 0.0, max_grad_norm: 0.0, ..options() };
    let prompt = prompt(&model, 20..26);
    let run = |options| {
        PromptRun::new(&model, RunExamples { train: &all, validation: &[], teacher: None }, options, &prompt)
            .unwrap()
    };
    let mut trainer = Trainer::with_runs(&model, Limits::rows(200), vec![run(&bad), run(&good)]).unwrap();
    let (mut a, mut b) = (Watch::default(), Watch::default());
    let outcomes = trainer.run_all(&mut [&mut a, &mut b]).unwrap();
    assert!(matches!(outcomes[0], Err(Error::NotFinite { .. })), "{outcomes:?}");
    assert!(matches!(outcomes[1], Ok(Ended::Completed)), "{outcomes:?}");
    assert_eq!(b.losses.len(), 6);
    assert!(b.losses.iter().all(|loss| loss.is_finite()));
}

#[test]
fn run_all_needs_an_observer_for_each_run() {
    let (model, all, options) = (model(), examples(4), options());
    let prompt = prompt(&model, 20..26);
    let run = PromptRun::new(
        &model,
        RunExamples { train: &all, validation: &[], teacher: None },
        &options,
        &prompt,
    )
    .unwrap();
    let mut trainer = Trainer::with_runs(&model, Limits::rows(200), vec![run]).unwrap();
    assert!(trainer.run_all(&mut []).unwrap_err().to_string().contains("expected 1"));
    // A device that has no memory for a single sequence fails the step of all runs.
    let failed = faults::with(|_, _| true, || trainer.run_all(&mut [&mut Watch::default()]));
    assert!(matches!(failed, Err(Error::OutOfMemory { .. })), "{failed:?}");
    assert!(Trainer::with_runs(&model, Limits::rows(200), Vec::new()).is_err());
    let other = TrainOptions { time_products: !options.time_products, ..options.clone() };
    let run = |options| {
        PromptRun::new(&model, RunExamples { train: &all, validation: &[], teacher: None }, options, &prompt)
            .unwrap()
    };
    let error =
        Trainer::with_runs(&model, Limits::rows(200), vec![run(&options), run(&other)]).err().unwrap();
    assert!(error.to_string().contains("train.time_products"), "{error}");
}
