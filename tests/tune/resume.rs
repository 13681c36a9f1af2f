//! Runs that go on from a checkpoint.

use super::*;
use gneiss::config::{PromptKind, PromptOptions, Reparameterization};
use gneiss::prompt::Prefix;
use gneiss::prompt::Prompt;
use gneiss::tune::{Ended, State};

/// Keeps every state that it is given, and can end the run.
#[derive(Default)]
struct Keeper {
    watch: Watch,
    states: Vec<State>,
    end_after: Option<usize>,
}

impl Observer for Keeper {
    fn step(&mut self, record: &StepRecord) -> Result<()> {
        self.watch.step(record)
    }
    fn skipped(&mut self, step: usize, what: &str, value: f64) -> Result<()> {
        self.watch.skipped(step, what, value)
    }
    fn out_of_memory(&mut self, limits: Limits) -> Result<()> {
        self.watch.out_of_memory(limits)
    }
    fn epoch(&mut self, record: &EpochRecord) -> Result<()> {
        self.watch.epoch(record)
    }
    fn checkpoint(&mut self, state: &State) -> Result<()> {
        self.states.push(state.clone());
        Ok(())
    }
    fn interrupted(&self) -> bool {
        self.end_after == Some(self.watch.steps.len())
    }
}

fn task<'a>(
    train: &'a [Example],
    validation: &'a [Example],
    options: &'a TrainOptions,
    rows: usize,
) -> Task<'a> {
    Task { model: &MODEL, train, validation, teacher: None, options, limits: Limits::rows(rows) }
}

#[test]
fn a_run_goes_on_from_every_step_bit_for_bit() {
    goes_on_from_every_step(&Prompt::embeddings(&prompt()).unwrap());
}

#[test]
fn runs_of_reparameterized_prompts_go_on_from_every_step() {
    use Reparameterization::{Mlp, None, Residual};
    let keys_values = Prefix::KeysValues(MODEL.keys_values(&prompt()).unwrap());
    let embeddings = Prefix::Embeddings(prompt());
    let cases = [
        (&embeddings, None, 0, 2),
        (&embeddings, Residual, 5, 1),
        (&embeddings, Mlp, 7, 0),
        (&keys_values, Residual, 0, 0),
        (&keys_values, Mlp, 0, 2),
    ];
    for (initial, reparameterization, bottleneck, frozen_tokens) in cases {
        let kind = initial.kind();
        let token_dim = if kind == PromptKind::Prefix { 8 } else { 40 };
        let options =
            PromptOptions { kind, reparameterization, bottleneck, frozen_tokens, ..Default::default() };
        goes_on_from_every_step(&Prompt::with_options(initial, &options, token_dim, 42).unwrap());
    }
}

/// From each of 15 checkpoints, written to a file and read again: the same losses and the same prompt.
fn goes_on_from_every_step(initial: &Prompt) {
    let (train, validation) = (examples(10, 21), examples(4, 22));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint.safetensors");
    for keep in [Keep::Best, Keep::Last] {
        let options = TrainOptions {
            keep,
            num_epochs: 4,
            checkpoint_steps: 1,
            learning_rate: 0.03,
            schedule: Schedule::Cosine,
            warmup_ratio: 0.2,
            ..options()
        };
        let mut whole = Keeper::default();
        let mut trainer = Trainer::new(task(&train, &validation, &options, 20), initial).unwrap();
        assert_eq!(trainer.run(&mut whole).unwrap(), Ended::Completed);
        let expected = trainer.kept().unwrap();
        assert_eq!(whole.states.len(), 12 + 4, "one a step and one an epoch");
        let frozen = |prefix: &Prefix| {
            bits(&prefix.values().narrow(0, 0, initial.layout().frozen_tokens).unwrap().contiguous().unwrap())
        };
        assert_eq!(frozen(&expected.prompt), frozen(&initial.prefix().unwrap()));
        for state in &whole.states {
            state.write(&path).unwrap();
            let read = State::read(&path).unwrap();
            assert_eq!((&read.position, read.prompt.layout()), (&state.position, initial.layout()));
            assert_eq!(bits(read.initial.values()), bits(initial.prefix().unwrap().values()));
            // Other limits than the run had: it takes those that it began with.
            let task = task(&train, &validation, &options, 1000);
            let mut trainer = Trainer::resume(task, &read).unwrap();
            let started = trainer.first().initial().unwrap();
            assert_eq!(bits(started.values()), bits(state.initial.values()));
            let mut rest = Keeper::default();
            assert_eq!(trainer.run(&mut rest).unwrap(), Ended::Completed);
            let kept = trainer.kept().unwrap();
            assert_eq!(bits(kept.prompt.values()), bits(expected.prompt.values()), "{:?}", state.position);
            assert_eq!((kept.step, kept.epoch), (expected.step, expected.epoch));
            assert_eq!(kept.validation_loss, expected.validation_loss);
            let done = state.position.step;
            assert_eq!(rest.watch.steps, whole.watch.steps[done..]);
            assert_eq!(rest.watch.epochs, whole.watch.epochs[state.position.last.epoch..]);
        }
    }
}

#[test]
fn an_interrupted_run_gives_its_state_last() {
    let train = examples(10, 23);
    let options = options();
    let mut keeper = Keeper { end_after: Some(4), ..Keeper::default() };
    let mut trainer =
        Trainer::new(task(&train, &[], &options, 512), &Prompt::embeddings(&prompt()).unwrap()).unwrap();
    assert_eq!(trainer.run(&mut keeper).unwrap(), Ended::Interrupted);
    let last = keeper.states.last().unwrap();
    assert_eq!((keeper.watch.steps.len(), last.position.step, last.position.open), (4, 4, true));
    assert_eq!(bits(last.prompt.values()), bits(trainer.kept().unwrap().prompt.values()));
    assert_eq!(bits(last.initial.values()), bits(&prompt()));
}

#[test]
fn other_examples_and_other_models_are_refused() {
    let (train, options) = (examples(6, 24), options());
    let mut keeper = Keeper::default();
    let mut trainer =
        Trainer::new(task(&train, &[], &options, 512), &Prompt::embeddings(&prompt()).unwrap()).unwrap();
    trainer.run(&mut keeper).unwrap();
    let mut state = keeper.states.pop().unwrap();
    let mut changed = train.clone();
    changed[3].target[0] ^= 1;
    for other in [&changed, &train[..5].to_vec(), &examples(6, 25)] {
        let error = Trainer::resume(task(other, &[], &options, 512), &state).err().unwrap();
        assert!(error.is_bad_input() && error.to_string().contains("data.train"), "{error}");
    }
    assert!(
        Trainer::resume(task(&train, &train, &options, 512), &state).is_err(),
        "a validation file is new"
    );
    let other_width = Tensor::zeros((6, 32), DType::F32, &Device::Cpu).unwrap();
    state.prompt = Prompt::embeddings(&other_width).unwrap();
    let error = Trainer::resume(task(&train, &[], &options, 512), &state).err().unwrap();
    assert!(error.to_string().contains("width 40") && error.to_string().contains("32"), "{error}");
}
