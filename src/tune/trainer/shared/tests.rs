//! Ranks as threads against one process: the gradient, and a rank that runs out of memory.

use super::super::tests::{Watch, examples, flat, model, options, prompt};
use super::super::{Task, Trainer};
use super::*;
use crate::checkpoint::Checkpoint;
use crate::config::TrainOptions;
use crate::device::{Work, faults};
use crate::model::{Decoder, Dtypes};
use crate::prompt::Prompt;
use crate::ranks::Threads;
use crate::tune::prompt_run::StepExamples;
use candle_core::DType;
use std::path::Path;

fn task<'a>(model: &'a Decoder, train: &'a [Example], options: &'a TrainOptions, limits: Limits) -> Task<'a> {
    Task { model, train, validation: &[], teacher: None, options, limits }
}

fn all_examples(examples: &[Example]) -> StepPart {
    let examples = StepExamples { now: (0..examples.len()).collect(), next: None };
    StepPart { run: 0, examples, learning_rate: 0.01 }
}

/// The norm of the difference to `expected`, as a part of its norm.
fn difference(found: &[f64], expected: &[f64]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
    norm(&mut found.iter().zip(expected).map(|(a, b)| a - b)) / norm(&mut expected.iter().copied())
}

fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Targets have 1 to 3 tokens, so that a mean of the ranks' means would be another number. Of the five ranks two have no example.
/// In f64 the gradients are equal to the digits of f32, in which they are sent; in f32 that of the ranks is as near to the one in
/// f64 as that of one process is, which is 2e-6.
#[test]
fn gradient_of_ranks_is_that_of_one_process() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/granite");
    let bare = Checkpoint::open_without_tokenizer(&path).unwrap();
    let options = options();
    let mut exact = Vec::new();
    for dtype in [DType::F64, DType::F32] {
        let dtypes = Dtypes::for_weights(dtype, &Device::Cpu).unwrap();
        let model = Decoder::load(&bare.config, &bare.weights, dtypes, &Device::Cpu, &mut |_| ()).unwrap();
        for (i, (ranks, number)) in [(2, 9), (3, 10), (5, 3)].into_iter().enumerate() {
            let train = examples(number);
            let start = prompt(&model, 20..26);
            let prompts = start.prefix().unwrap().to_dtype(model.prompt_dtype()).unwrap();
            let group = prompts.group(&train).unwrap();
            let whole = objective::gradient(&model, &prompts, &[group], Limits::rows(100)).unwrap();
            let expected = values(whole.gradient.as_ref().unwrap().values());
            let found = Threads::run(ranks, |ranks| {
                let limits = Limits::rows(100);
                let trainer = Trainer::new(task(&model, &train, &options, limits), &start).unwrap();
                let trainer = trainer.with_ranks(ranks).unwrap();
                let part = all_examples(&train);
                let groups = trainer.groups(std::iter::once((0, &part.examples.now[..]))).unwrap();
                let (own, _) = trainer.gradient_of_share(&groups, None, &part, limits).unwrap();
                let shares = ranks.gather(own.encode()).unwrap();
                (ranks.rank() == 0).then(|| {
                    let shares: Vec<_> =
                        shares.iter().map(|share| StepMessage::<2>::decode(share).unwrap()).collect();
                    let idle = shares.iter().filter(|share| share.values.is_empty()).count();
                    assert_eq!(idle, shares.len().saturating_sub(train.len()));
                    let gradient = trainer.gradient_from(&shares, &part).unwrap();
                    (sums(&shares).0, values(gradient.values()))
                })
            });
            let (nll, gradient) = found[0].as_ref().unwrap();
            let target_tokens = whole.target_tokens() as f64;
            let loss = whole.loss().unwrap();
            assert!((nll / target_tokens - loss).abs() < 1e-6 * loss, "{ranks} ranks, {dtype:?}: {nll}");
            let from_one = difference(gradient, &expected);
            println!("{ranks} ranks, {dtype:?}: {from_one:.1e} from one process");
            if dtype == DType::F64 {
                assert!(from_one < 1e-7, "{ranks} ranks: {from_one:e}");
                exact.push(expected);
                continue;
            }
            let [of_ranks, of_one] = [gradient, &expected].map(|found| difference(found, &exact[i]));
            println!("from f64: {of_ranks:.1e}, one process {of_one:.1e}");
            assert!(of_ranks < 5e-6 && of_ranks < 1.5 * of_one, "{ranks} ranks: {of_ranks:e} for {of_one:e}");
        }
    }
}

#[test]
fn all_ranks_go_on_with_less_if_one_runs_out_of_memory() {
    let (model, train, options) = (model(), examples(10), options());
    let run = |ranks: &dyn Ranks| {
        let start = prompt(&model, 20..26);
        let task = task(&model, &train, &options, Limits::rows(100));
        let mut trainer = Trainer::new(task, &start).unwrap().with_ranks(ranks).unwrap();
        let mut watch = Watch::default();
        // From the third step on the last rank has too little for 11 rows.
        let (is_last, mut passes) = (ranks.rank() > 0 && ranks.rank() + 1 == ranks.size(), 0);
        let fails = move |work: Work, rows: usize| {
            passes += usize::from(work == Work::Pass);
            is_last && passes >= 3 && rows > 10
        };
        faults::with(fails, || trainer.run(&mut watch).unwrap());
        (watch.losses, watch.limits, trainer.limits, flat(trainer.first().values()))
    };
    let (expected, _, _, _) = run(&crate::ranks::Alone);
    let found = Threads::run(3, run);
    let (losses, retries, limits, prompt) = &found[0];
    assert!(!retries.is_empty() && limits.max_rows <= 10, "{retries:?}");
    for other in &found[1..] {
        assert_eq!((&other.0, &other.1, &other.2, &other.3), (losses, retries, limits, prompt));
    }
    assert_eq!(losses.len(), expected.len());
    for (found, expected) in losses.iter().zip(&expected) {
        assert!((found - expected).abs() < 1e-5 * expected, "{found} for {expected}");
    }
}

/// The limits at the start are those of the rank that can do the least.
#[test]
fn limits_are_those_of_the_rank_with_the_least_memory() {
    let (model, train, options) = (model(), examples(4), options());
    let layers = model.config().num_hidden_layers;
    let limits = Threads::run(3, |ranks| {
        let own = match ranks.rank() {
            1 => Limits { max_rows: 200, recompute: layers - 1 },
            rank => Limits { max_rows: 100 * (1 + rank), recompute: 0 },
        };
        let start = prompt(&model, 20..26);
        let trainer = Trainer::new(task(&model, &train, &options, own), &start).unwrap();
        trainer.with_ranks(ranks).unwrap().limits
    });
    assert_eq!(limits, [Limits { max_rows: 100, recompute: layers - 1 }; 3]);
}

#[test]
fn several_runs_are_not_dealt_to_several_ranks() {
    let (model, train, options) = (model(), examples(4), options());
    let problems = Threads::run(2, |ranks| {
        let start: Prompt = prompt(&model, 20..26);
        let run = || {
            let examples = crate::tune::RunExamples { train: &train, validation: &[], teacher: None };
            crate::tune::PromptRun::new(&model, examples, &options, &start).unwrap()
        };
        let trainer = Trainer::with_runs(&model, Limits::rows(100), vec![run(), run()]).unwrap();
        trainer.with_ranks(ranks).err().unwrap().to_string()
    });
    assert!(problems.iter().all(|problem| problem.contains("one run")), "{problems:?}");
}
