//! Runs that end, or leave steps out, before their time.

use super::*;
use gneiss::prompt::Prompt;

/// Learning rates beyond all measure: a later step's loss is not finite, or the first step's prompt.
#[test]
fn a_run_that_blows_up_stops_with_a_finite_prompt() {
    let train = examples(8, 10);
    for learning_rate in [3e37, 1e38, 1e300] {
        let run = Setting::new(&train, TrainOptions { learning_rate, num_epochs: 20, ..options() }).run();
        let Err(error) = &run.outcome else { panic!("{learning_rate:e}: expected an error") };
        assert!(matches!(error, Error::NotFinite { .. }), "{learning_rate:e}: {error}");
        assert!(error.to_string().contains("learning_rate"), "{error}");
        assert!(!error.is_bad_input());
        assert!(is_finite(run.kept.prompt.values()), "{learning_rate:e}: what is kept is not finite");
        let loss = evaluate(&MODEL, run.kept.prompt.values(), &train);
        assert!(loss.is_finite(), "{learning_rate:e}: the loss of what is kept is {loss}");
        // A prompt whose own loss is not finite is not kept, but the one before it.
        let Error::NotFinite { what, .. } = error else { unreachable!() };
        let back = usize::from(*what == "the loss" && !run.steps.is_empty());
        assert_eq!(run.kept.step, run.steps.len() - back, "{learning_rate:e}");
    }
}

/// The last update leaves a prompt whose validation loss is not finite.
#[test]
fn a_prompt_whose_validation_loss_is_not_finite_is_not_kept() {
    let (train, validation) = (examples(4, 10), examples(4, 11));
    for keep in [Keep::Last, Keep::Best] {
        // Without a first moment the step is as long as the rate: the values are finite, and times the embedding
        // multiplier of 3.5 they are not.
        let options = TrainOptions { learning_rate: 1.5e38, beta1: 0.0, num_epochs: 1, keep, ..options() };
        let setting = Setting { validation: &validation, ..Setting::new(&train, options) };
        let run = setting.finish();
        let loss = run.epochs[0].validation_loss.unwrap();
        assert!(!loss.is_finite() && !run.epochs[0].best, "{loss}");
        assert_eq!((run.kept.step, run.kept.epoch, run.kept.validation_loss), (0, 0, None));
        assert_eq!(bits(run.kept.prompt.values()), bits(&prompt()));
    }
}

/// The prompt of a step is finite and its loss is not; every step is left out and counted.
#[test]
fn steps_without_a_finite_loss_are_skipped_where_that_is_asked_for() {
    let train = examples(8, 10);
    let huge = prompt().ones_like().unwrap().affine(3e38, 0.0).unwrap();
    let setting = |on_not_finite| {
        let options = TrainOptions { on_not_finite, ..options() };
        Setting { prompt: huge.clone(), ..Setting::new(&train, options) }
    };
    let stopped = setting(OnNotFinite::Stop).run();
    let Err(Error::NotFinite { step, value, .. }) = stopped.outcome else { panic!("expected NotFinite") };
    assert_eq!((step, value.is_finite()), (1, false));
    assert_eq!(bits(stopped.kept.prompt.values()), bits(&huge));
    assert_eq!((stopped.steps.len(), stopped.count_skipped), (0, 0));

    let skipped = setting(OnNotFinite::Skip).finish();
    assert_eq!((skipped.steps.len(), skipped.count_skipped, skipped.total_steps), (0, 4, 4));
    assert_eq!(skipped.skipped.iter().map(|s| s.0).collect::<Vec<_>>(), [1, 2, 3, 4]);
    assert_eq!(bits(skipped.kept.prompt.values()), bits(&huge), "a skipped step leaves the prompt as it was");
    assert_eq!(skipped.kept.step, 0);
}

/// A step whose update overflows is skipped too; the run ends and what it keeps is finite.
#[test]
fn a_skipping_run_never_takes_up_a_prompt_that_is_not_finite() {
    let train = examples(8, 10);
    for learning_rate in [1e38, 1e300] {
        let options = TrainOptions { learning_rate, on_not_finite: OnNotFinite::Skip, ..options() };
        let run = Setting::new(&train, options).finish();
        assert!(run.count_skipped > 0, "{learning_rate:e}");
        assert_eq!(run.steps.len() + run.count_skipped, run.total_steps);
        assert_eq!(run.skipped.len(), run.count_skipped);
        assert!(is_finite(run.kept.prompt.values()), "{learning_rate:e}: what is kept is not finite");
    }
}

/// After five of ten steps, two of which made the first epoch.
#[test]
fn an_observer_ends_a_run_and_what_was_learned_is_kept() {
    struct Fifth;
    impl Observer for Fifth {
        fn step(&mut self, record: &StepRecord) -> Result<()> {
            if record.step == 5 { Err(Error::Invalid("enough".into())) } else { Ok(()) }
        }
        fn skipped(&mut self, _: usize, _: &str, _: f64) -> Result<()> {
            Ok(())
        }
        fn out_of_memory(&mut self, _: Limits) -> Result<()> {
            Ok(())
        }
    }
    let (train, validation) = (examples(8, 11), examples(4, 12));
    for keep in [Keep::Last, Keep::Best] {
        let options = TrainOptions { keep, num_epochs: 5, ..options() };
        let task = Task {
            model: &MODEL,
            train: &train,
            validation: &validation,
            teacher: None,
            options: &options,
            limits: Limits::rows(512),
        };
        let mut trainer = Trainer::new(task, &Prompt::embeddings(&prompt()).unwrap()).unwrap();
        assert_eq!(trainer.run(&mut Fifth).unwrap_err().to_string(), "enough");
        let kept = trainer.kept().unwrap();
        let loss = evaluate(&MODEL, kept.prompt.values(), &validation);
        match keep {
            // The losses of an epoch's end are not those of a prompt that has moved since.
            Keep::Last => {
                assert_eq!(
                    (kept.step, kept.epoch, kept.train_loss, kept.validation_loss),
                    (5, 2, None, None)
                );
                assert!(distance(kept.prompt.values(), &prompt()) > 0.0);
            }
            Keep::Best => {
                assert!(kept.step.is_multiple_of(2) && kept.step <= 4, "{kept:?}");
                assert!((kept.validation_loss.unwrap() - loss).abs() < 1e-6, "{kept:?}");
            }
        }
    }
}

#[test]
fn what_can_not_be_trained_is_an_error_before_the_first_step() {
    let options = options();
    let new = |train: &[Example], validation: &[Example]| {
        let task = Task {
            model: &MODEL,
            train,
            validation,
            teacher: None,
            options: &options,
            limits: Limits::rows(512),
        };
        Trainer::new(task, &Prompt::embeddings(&prompt()).unwrap())
            .err()
            .map(|e| (e.is_bad_input(), e.to_string()))
    };
    let fine = examples(2, 12);
    let (bad_input, message) = new(&[], &fine).unwrap();
    assert!(bad_input && message.contains("data.train") && message.contains("none"), "{message}");

    let limit = MODEL.config().max_position_embeddings;
    let of = |tokens: usize| vec![Example { input: vec![1; tokens - 1], target: vec![2], line: 2 }];
    assert_eq!(new(&of(limit - VIRTUAL_TOKENS), &fine), None);
    let long = of(limit - VIRTUAL_TOKENS + 1);
    for found in [new(&long, &[]), new(&fine, &long)] {
        let (bad_input, message) = found.unwrap();
        assert!(bad_input, "{message}");
        for part in [&limit.to_string(), &(limit + 1).to_string(), "data.max_input_tokens"] {
            assert!(message.contains(part), "expected {part:?} in {message}");
        }
    }
}
