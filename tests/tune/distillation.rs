//! Runs whose loss is the divergence from the base model after a text.

use super::*;
use gneiss::batch::Packing;
use gneiss::tune::{Ended, Loss, Mean, PromptRun, RunExamples, State, Teacher, TeacherExamples};

const NAMES: [&str; 8] = [
    "granite", "llama_bias", "hybrid_dense", "experts", "shared_experts", "mamba", "mamba_experts",
    "mamba_groups",
];

/// Tokens of a text, more than a chunk of a scan.
fn text(n: u32) -> Vec<u32> {
    (0..n).map(|i| (i * 37 + 5) % 97).collect()
}

/// `examples` with `text` in front of each input.
fn after(text: &[u32], examples: &[Example]) -> Vec<Example> {
    let with_text = |e: &Example| Example { input: [text, &e.input].concat(), ..e.clone() };
    examples.iter().map(with_text).collect()
}

fn load_in(name: &str, dtype: DType) -> Decoder {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let BareCheckpoint { config, weights, .. } = Checkpoint::open_without_tokenizer(&path).unwrap();
    let dtypes = Dtypes::for_weights(dtype, &Device::Cpu).unwrap();
    Decoder::load(&config, &weights, dtypes, &Device::Cpu, &mut |_| ()).unwrap()
}

fn rows_of(model: &Decoder, tokens: &[u32]) -> Prefix {
    let ids = Tensor::new(tokens, &Device::Cpu).unwrap();
    Prefix::Embeddings(model.embedding().index_select(&ids, 0).unwrap())
}

/// Examples of the smallest of the fixtures' vocabularies.
fn of_every_vocabulary(n: usize, seed: u64) -> Vec<Example> {
    let mut all = examples(n, seed);
    all.iter_mut().flat_map(|e| e.input.iter_mut().chain(&mut e.target)).for_each(|id| *id %= 97);
    all
}

/// The prompt is the text's own embeddings: the student is the teacher.
#[test]
fn the_embeddings_of_the_text_have_no_divergence() {
    let (train, text) = (of_every_vocabulary(6, 30), text(70));
    let with_text = after(&text, &train);
    for (dtype, most) in [(DType::F32, 1e-6), (DType::F64, 1e-9)] {
        for name in NAMES {
            let model = load_in(name, dtype);
            let examples = TeacherExamples { train: &with_text, validation: &[] };
            let run = RunExamples { train: &train, validation: &[], teacher: Some(examples) };
            let teacher = Teacher::new(&model, examples, run).unwrap();
            let groups = [PrefixGroup::new(0..text.len() as u32, &train)];
            for max_rows in [usize::MAX, 20] {
                let mut passes =
                    Passes::packed(&groups, Packing { max_rows, prefix_pass_rows: 0, long_above: None });
                passes.teacher_passes = teacher.training_passes(&passes, &[0, 1, 2, 3, 4, 5]);
                let loss = Loss { mean: Mean::All, teacher: Some(&teacher) };
                let found = tune::gradient_of(&model, &rows_of(&model, &text), &passes, 0, loss)
                    .unwrap()
                    .nll()
                    .unwrap();
                assert_eq!(found.len(), train.iter().map(|e| e.target.len()).sum::<usize>());
                let largest = found.iter().fold(0.0, |a: f64, b| a.max(b.abs()));
                assert!(largest < most, "{name}, {dtype:?}, {max_rows} rows: {largest:e}");
            }
        }
    }
}

/// So are the keys and values that the model makes of them.
#[test]
fn the_keys_and_values_of_the_text_have_no_divergence() {
    let (train, text) = (of_every_vocabulary(6, 35), text(20));
    let with_text = after(&text, &train);
    for name in ["granite", "llama_bias", "experts"] {
        let model = load_in(name, DType::F64);
        let examples = TeacherExamples { train: &with_text, validation: &[] };
        let run = RunExamples { train: &train, validation: &[], teacher: Some(examples) };
        let teacher = Teacher::new(&model, examples, run).unwrap();
        let groups = [PrefixGroup::new(0..text.len() as u32, &train)];
        let prefix = Prefix::KeysValues(model.keys_values(rows_of(&model, &text).values()).unwrap());
        for max_rows in [usize::MAX, 20] {
            let mut passes = Passes::after_given(&groups, max_rows, None);
            passes.teacher_passes = teacher.training_passes(&passes, &[0, 1, 2, 3, 4, 5]);
            let loss = Loss { mean: Mean::All, teacher: Some(&teacher) };
            let found = tune::gradient_of(&model, &prefix, &passes, 0, loss).unwrap().nll().unwrap();
            let largest = found.iter().fold(0.0, |a: f64, b| a.max(b.abs()));
            assert!(largest < 1e-9, "{name}, {max_rows} rows: {largest:e}");
        }
    }
}

/// A run over `train` and `validation` towards the base model after `text`.
fn distil(
    (train, validation): (&[Example], &[Example]),
    text: &[u32],
    options: &TrainOptions,
    limits: Limits,
) -> (Watch, Kept) {
    let (of_train, of_validation) = (after(text, train), after(text, validation));
    let teacher = Some(TeacherExamples { train: &of_train, validation: &of_validation });
    let task = Task { model: &MODEL, train, validation, teacher, options, limits };
    let mut trainer = Trainer::new(task, &Prompt::embeddings(&prompt()).unwrap()).unwrap();
    let mut watch = Watch::default();
    assert_eq!(trainer.run(&mut watch).unwrap(), Ended::Completed);
    (watch, trainer.kept().unwrap())
}

#[test]
fn a_distillation_learns_repeats_and_may_be_split() {
    let (train, validation) = (examples(10, 31), examples(4, 32));
    let options = TrainOptions { num_epochs: 30, keep: Keep::Best, ..options() };
    let run = |max_rows, recompute| {
        distil((&train, &validation), &text(40), &options, Limits { max_rows, recompute })
    };
    let (watch, kept) = run(usize::MAX, 0);
    let (first, last) = (&watch.epochs[0], &watch.epochs[29]);
    let [first, last] = [first, last].map(|epoch| epoch.train_loss.unwrap());
    assert!(first > 0.01 && last < 0.5 * first, "the divergence fell from {first} to {last} only");
    let best = watch.epochs.iter().map(|e| e.validation_loss.unwrap()).fold(f64::INFINITY, f64::min);
    assert_eq!(kept.validation_loss, Some(best), "the lowest divergence is the best");
    let (again, kept_again) = run(usize::MAX, 0);
    assert_eq!((&watch.steps, &watch.epochs), (&again.steps, &again.epochs));
    assert_eq!(bits(kept.prompt.values()), bits(kept_again.prompt.values()));
    // Of a split step the order of sums is another.
    let (split, _) = run(30, 0);
    for (a, b) in watch.steps.iter().zip(&split.steps).take(6) {
        assert!((a.loss - b.loss).abs() < 1e-4 * a.loss, "step {}: {} and {}", a.step, a.loss, b.loss);
    }
    let (recomputed, of_recomputed) = run(30, 2);
    let (split, of_split) = run(30, 0);
    assert_eq!((&recomputed.steps, &recomputed.epochs), (&split.steps, &split.epochs));
    assert_eq!(bits(of_recomputed.prompt.values()), bits(of_split.prompt.values()));
}

/// Keeps the last state.
#[derive(Default)]
struct LastState(Option<State>);

impl Observer for LastState {
    fn step(&mut self, _: &StepRecord) -> Result<()> {
        Ok(())
    }
    fn skipped(&mut self, _: usize, what: &str, value: f64) -> Result<()> {
        panic!("{what} is {value}");
    }
    fn out_of_memory(&mut self, limits: Limits) -> Result<()> {
        panic!("the CPU ran out of memory: {limits:?}");
    }
    fn checkpoint(&mut self, state: &State) -> Result<()> {
        self.0 = Some(state.clone());
        Ok(())
    }
}

#[test]
fn a_distillation_goes_on_with_its_own_text_alone() {
    let (train, options) = (examples(6, 33), options());
    let longer = TrainOptions { num_epochs: 3, ..options.clone() };
    let [own, other] = [text(40), text(41)].map(|text| after(&text, &train));
    let task = |teacher, options| Task {
        model: &MODEL,
        train: &train,
        validation: &[],
        teacher,
        options,
        limits: Limits::rows(100),
    };
    fn of(train: &[Example]) -> Option<TeacherExamples<'_>> {
        Some(TeacherExamples { train, validation: &[] })
    }
    let prompt = Prompt::embeddings(&prompt()).unwrap();
    let (mut last, mut whole) = (LastState::default(), Watch::default());
    Trainer::new(task(of(&own), &options), &prompt).unwrap().run(&mut last).unwrap();
    Trainer::new(task(of(&own), &longer), &prompt).unwrap().run(&mut whole).unwrap();
    let state = last.0.unwrap();
    for teacher in [None, of(&other)] {
        let error = Trainer::resume(task(teacher, &longer), &state).err().unwrap();
        assert!(error.is_bad_input() && error.to_string().contains("teacher"), "{error}");
    }
    let mut rest = Watch::default();
    Trainer::resume(task(of(&own), &longer), &state).unwrap().run(&mut rest).unwrap();
    assert_eq!(rest.steps, whole.steps[state.position.step..]);
}

#[test]
fn a_teacher_that_does_not_fit_is_refused_by_name() {
    let (train, options) = (examples(6, 34), options());
    let refused = |of_teacher: &[Example]| {
        let teacher = Some(TeacherExamples { train: of_teacher, validation: &[] });
        let task = Task {
            model: &MODEL,
            train: &train,
            validation: &[],
            teacher,
            options: &options,
            limits: Limits::rows(100),
        };
        let error = Trainer::new(task, &Prompt::embeddings(&prompt()).unwrap()).err().unwrap();
        assert!(error.is_bad_input(), "{error}");
        error.to_string()
    };
    let long = refused(&after(&text(250), &train));
    assert!(long.starts_with("data.teacher_text: expected at most 256 positions"), "{long}");
    let others = refused(&after(&text(9), &train[..5]));
    assert!(others.starts_with("data.teacher_text: expected the run's targets"), "{others}");
    let own = after(&text(9), &train);
    let run = |teacher| {
        let examples = RunExamples { train: &train, validation: &[], teacher };
        PromptRun::new(&MODEL, examples, &options, &Prompt::embeddings(&prompt()).unwrap()).unwrap()
    };
    let runs = vec![run(None), run(Some(TeacherExamples { train: &own, validation: &[] }))];
    let error = Trainer::with_runs(&MODEL, Limits::rows(100), runs).err().unwrap();
    assert!(
        error.is_bad_input() && error.to_string().contains("data.teacher_text: expected one run"),
        "{error}"
    );
}
