//! Several ranks against one process: threads here, processes in `tests/mpi`.

use super::*;
use gneiss::config::PromptKind;
use gneiss::ranks::{Alone, Ranks, Threads};
use gneiss::tune::Ended;
use std::cell::Cell;

/// Steps and epochs of a run, its outcome and the bits of its last prompt.
type Course = (Vec<StepRecord>, Vec<EpochRecord>, std::result::Result<Ended, String>, Vec<u32>);

fn tune(ranks: &dyn Ranks, options: &TrainOptions, initial: &Prompt, train: usize) -> Course {
    let (train, validation) = (examples(train, 2), examples(4, 3));
    let limits = Limits::rows(60);
    let task = Task { model: &MODEL, train: &train, validation: &validation, teacher: None, options, limits };
    let mut trainer = Trainer::new(task, initial).unwrap().with_ranks(ranks).unwrap();
    let mut watch = Watch::default();
    let outcome = trainer.run(&mut watch).map_err(|error| error.to_string());
    (watch.steps, watch.epochs, outcome, bits(trainer.first().values()))
}

fn embeddings() -> Prompt {
    Prompt::embeddings(&prompt()).unwrap()
}

/// Ten steps and more. The last step of each epoch has 3 examples: of five ranks two have none; the validation has 4.
#[test]
fn ranks_tune_as_one_process_does() {
    let options = TrainOptions { num_epochs: 4, learning_rate: 0.02, max_grad_norm: 0.1, ..options() };
    let (expected, epochs, outcome, moved) = tune(&Alone, &options, &embeddings(), 11);
    assert_eq!((expected.len(), outcome), (12, Ok(Ended::Completed)));
    for size in [2, 3, 5] {
        let all = Threads::run(size, |ranks| tune(ranks, &options, &embeddings(), 11));
        let (steps, found_epochs, outcome, _) = &all[0];
        assert_eq!(*outcome, Ok(Ended::Completed));
        assert_eq!(steps.len(), expected.len());
        for (found, one) in steps.iter().zip(&expected) {
            let counts = |step: &StepRecord| (step.step, step.epoch, step.examples, step.target_tokens);
            assert_eq!(counts(found), counts(one));
            assert!((found.loss - one.loss).abs() < 1e-5, "{size} ranks: {} for {}", found.loss, one.loss);
            assert!((found.grad_norm - one.grad_norm).abs() < 1e-4 * one.grad_norm, "{size} ranks");
            assert!(found.rows > one.rows, "each rank has a prefix of its own");
        }
        for (found, one) in found_epochs.iter().zip(&epochs) {
            let [found, one] = [found, one].map(|epoch| epoch.validation_loss.unwrap());
            assert!((found - one).abs() < 1e-5, "{size} ranks: {found} for {one}");
        }
        // All ranks saw the same and have the same prompt, and so it is the next time.
        let again = Threads::run(size, |ranks| tune(ranks, &options, &embeddings(), 11));
        for other in all.iter().chain(&again) {
            assert_eq!(other, &all[0], "{size} ranks");
        }
        assert_ne!(all[0].3, bits(&prompt()), "the prompt moved");
        assert_eq!(all[0].3.len(), moved.len());
    }
}

#[test]
fn alone_has_the_bits_of_a_trainer_without_ranks() {
    let options = options();
    let (train, validation) = (examples(11, 2), examples(4, 3));
    let limits = Limits::rows(60);
    let task = Task {
        model: &MODEL,
        train: &train,
        validation: &validation,
        teacher: None,
        options: &options,
        limits,
    };
    let mut trainer = Trainer::new(task, &embeddings()).unwrap();
    let mut watch = Watch::default();
    trainer.run(&mut watch).unwrap();
    let (steps, epochs, _, prompt) = tune(&Alone, &options, &embeddings(), 11);
    assert_eq!((steps, epochs), (watch.steps, watch.epochs));
    assert_eq!(prompt, bits(trainer.first().values()));
}

/// Prefix tuning: the gradient is that of keys and values.
#[test]
fn ranks_tune_keys_and_values() {
    let options = TrainOptions { num_epochs: 3, ..options() };
    let width =
        2 * MODEL.config().num_hidden_layers * MODEL.config().num_key_value_heads * MODEL.config().head_dim;
    let values = Tensor::randn(0f32, 0.5, (4, width), &Device::Cpu).unwrap();
    let initial = Prompt::new(&Prefix::KeysValues(values)).unwrap();
    assert_eq!(initial.kind(), PromptKind::Prefix);
    let (expected, ..) = tune(&Alone, &options, &initial, 9);
    let all = Threads::run(3, |ranks| tune(ranks, &options, &initial, 9));
    for (found, one) in all[0].0.iter().zip(&expected) {
        assert!((found.loss - one.loss).abs() < 1e-5, "{} for {}", found.loss, one.loss);
    }
    assert_eq!(all[0].0.len(), expected.len());
    assert!(all.iter().all(|other| other == &all[0]));
}

/// A huge rate: the loss is not finite on every rank at the same step, whichever rank computed it.
#[test]
fn ranks_agree_on_values_that_are_not_finite() {
    let huge = |on_not_finite| TrainOptions {
        learning_rate: 1e38,
        weight_decay: 0.0,
        max_grad_norm: 0.0,
        on_not_finite,
        ..options()
    };
    let stop = Threads::run(3, |ranks| tune(ranks, &huge(OnNotFinite::Stop), &embeddings(), 8));
    let error = stop[0].2.as_ref().unwrap_err();
    assert!(error.starts_with("step "), "{error}");
    assert!(stop.iter().all(|other| other == &stop[0]));
    let skip = Threads::run(3, |ranks| tune(ranks, &huge(OnNotFinite::Skip), &embeddings(), 8));
    assert!(skip.iter().all(|other| other.2 == Ok(Ended::Completed) && other == &skip[0]));
    assert!(skip[0].0.len() < 4, "steps were skipped");
}

/// Asked to end on one rank, from its third step on.
struct AskedToEnd {
    steps: Cell<usize>,
    is_asked: bool,
}

impl Observer for AskedToEnd {
    fn step(&mut self, _: &StepRecord) -> Result<()> {
        self.steps.set(self.steps.get() + 1);
        Ok(())
    }
    fn skipped(&mut self, _: usize, what: &str, value: f64) -> Result<()> {
        panic!("{what} is {value}");
    }
    fn out_of_memory(&mut self, limits: Limits) -> Result<()> {
        panic!("{limits:?}");
    }
    fn interrupted(&self) -> bool {
        self.is_asked && self.steps.get() >= 3
    }
}

#[test]
fn ranks_end_together_if_one_is_interrupted() {
    let (train, options) = (examples(11, 2), options());
    let ends = Threads::run(3, |ranks| {
        let limits = Limits::rows(60);
        let task =
            Task { model: &MODEL, train: &train, validation: &[], teacher: None, options: &options, limits };
        let mut trainer = Trainer::new(task, &embeddings()).unwrap().with_ranks(ranks).unwrap();
        let mut watch = AskedToEnd { steps: Cell::new(0), is_asked: ranks.rank() == 2 };
        let ended = trainer.run(&mut watch).unwrap();
        (ended, watch.steps.get(), trainer.first().position().step)
    });
    assert_eq!(ends, [(Ended::Interrupted, 3, 3); 3]);
}

/// Fails at the second step, as a full disk would.
struct FullDisk(usize);

impl Observer for FullDisk {
    fn step(&mut self, _: &StepRecord) -> Result<()> {
        self.0 += 1;
        if self.0 == 2 { Err(Error::Invalid("the disk is full".into())) } else { Ok(()) }
    }
    fn skipped(&mut self, _: usize, _: &str, _: f64) -> Result<()> {
        Ok(())
    }
    fn out_of_memory(&mut self, _: Limits) -> Result<()> {
        Ok(())
    }
}

#[test]
fn ranks_do_not_wait_for_one_that_failed() {
    let (train, options) = (examples(11, 2), options());
    let errors = Threads::run(3, |ranks| {
        let limits = Limits::rows(60);
        let task =
            Task { model: &MODEL, train: &train, validation: &[], teacher: None, options: &options, limits };
        let mut trainer = Trainer::new(task, &embeddings()).unwrap().with_ranks(ranks).unwrap();
        match ranks.rank() {
            0 => trainer.run(&mut FullDisk(0)),
            _ => trainer.run(&mut Watch::default()),
        }
        .unwrap_err()
        .to_string()
    });
    assert_eq!(errors, ["the disk is full", "rank 0 has ended", "rank 0 has ended"]);
}
