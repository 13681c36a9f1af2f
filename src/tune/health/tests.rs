use super::*;

pub(super) fn records(rows: &[(&str, &str)]) -> Vec<Record> {
    let record = |(i, (input, output)): (usize, &(&str, &str))| Record {
        input: (*input).into(),
        output: (*output).into(),
        line: i + 2,
    };
    rows.iter().enumerate().map(record).collect()
}

pub(super) fn labels(counts: &[(&str, usize)]) -> Vec<Record> {
    let rows: Vec<(String, &str)> =
        counts.iter().flat_map(|(label, n)| (0..*n).map(move |i| (format!("{label} {i}"), *label))).collect();
    records(&rows.iter().map(|(input, label)| (input.as_str(), *label)).collect::<Vec<_>>())
}

fn health(records: Option<&[Record]>, targets: usize) -> Health {
    let n = records.map_or(1, <[Record]>::len);
    let example = Example { input: vec![1], target: vec![2; targets], line: 2 };
    Health::new(&vec![example; n], records, Some(Norms { mean: 1.0, min: 0.5, max: 2.0 }))
}

fn epoch(epoch: usize, train_loss: f64) -> EpochRecord {
    let train_loss = Some(train_loss);
    EpochRecord {
        epoch,
        step: epoch,
        train_loss,
        validation_loss: None,
        best: false,
        seconds: 1.0,
        elapsed: 1.0,
    }
}

/// Half of the labels each, two target tokens: ln 2 / 2.
#[test]
fn a_loss_at_chance_is_told_once_and_from_the_second_epoch_on() {
    let records = labels(&[("0", 10), ("1", 10)]);
    let mut health = health(Some(&records), 2);
    assert!((health.chance.unwrap() - 2f64.ln() / 2.0).abs() < 1e-12);
    assert_eq!(health.epoch(&epoch(1, 1.2)), None);
    let told = health.epoch(&epoch(2, 0.3470)).unwrap();
    assert!(told.contains("0.3470") && told.contains("0.3466") && told.contains("--find-lr"), "{told}");
    assert_eq!(health.epoch(&epoch(3, 0.3466)), None);
}

#[test]
fn a_loss_that_falls_is_well_and_one_that_stands_is_not() {
    let mut falls = health(None, 1);
    assert!([3.0, 2.0, 1.99, 0.01, 0.01].iter().zip(1..).all(|(l, e)| falls.epoch(&epoch(e, *l)).is_none()));
    let mut stands = health(None, 1);
    assert_eq!(stands.epoch(&epoch(1, 3.0)), None);
    assert!(stands.epoch(&epoch(2, 2.99)).unwrap().contains("has not moved (2.9900, 3.0000"));
}

#[test]
fn a_divergence_is_held_against_no_chance_level_and_may_be_small_from_the_first_epoch_on() {
    let records = labels(&[("0", 10), ("1", 10)]);
    let mut small = health(Some(&records), 2).of_divergences();
    assert_eq!(small.epoch(&epoch(1, 0.0031)), None);
    assert_eq!(small.epoch(&epoch(2, 0.0031)), None);
    let mut stands = health(Some(&records), 2).of_divergences();
    assert_eq!(stands.epoch(&epoch(1, 0.347)), None);
    let told = stands.epoch(&epoch(2, 0.347)).unwrap();
    assert!(told.contains("has not moved") && told.contains("more virtual tokens"), "{told}");
    assert!(!told.contains("guessing") && !told.contains("says what to answer"), "{told}");
}

fn step(step: usize, loss: f64, grad_norm: f64) -> StepRecord {
    StepRecord {
        step,
        epoch: 1,
        loss,
        learning_rate: 0.1,
        grad_norm,
        examples: 1,
        target_tokens: 1,
        rows: 1,
        seconds: 1.0,
        elapsed: 1.0,
    }
}

#[test]
fn a_gradient_of_zero_from_the_first_step_on_is_told() {
    let mut health = health(None, 1);
    let told: Vec<String> = (1..=30).filter_map(|i| health.step(&step(i, 3.0, 0.0))).collect();
    assert!(told.len() == 1 && told[0].contains("the gradient has vanished (norm 0.0e0"), "{told:?}");
}

#[test]
fn steps_that_are_left_out_in_a_row_are_told_once() {
    let mut health = health(None, 1);
    let skip = |health: &mut Health, n: usize| {
        (1..=n).filter_map(|i| health.skipped(i, "the loss", f64::NAN)).collect::<Vec<_>>()
    };
    assert!(skip(&mut health, 9).is_empty());
    assert_eq!(health.step(&step(1, 3.0, 2.0)), None);
    assert!(skip(&mut health, 9).is_empty(), "a step was taken between them");
    let told = skip(&mut health, 20);
    assert!(told.len() == 1 && told[0].contains("the last as the loss is NaN"), "{told:?}");
    let mut resumed = self::health(None, 1).after(&told);
    assert!(skip(&mut resumed, 20).is_empty(), "it was told before");
}

#[test]
fn a_validation_loss_that_is_not_finite_is_told_once() {
    let mut health = health(None, 1);
    let of = |n: usize, loss: f64| EpochRecord { validation_loss: Some(loss), ..epoch(n, 3.0 / n as f64) };
    assert_eq!(health.epoch(&of(1, 2.0)), None);
    let told = health.epoch(&of(2, f64::NAN)).unwrap();
    assert!(told.contains("epoch 2: the validation loss is not finite (NaN)"), "{told}");
    assert_eq!(health.epoch(&of(3, f64::INFINITY)), None);
}

#[test]
fn a_gradient_that_vanishes_before_the_loss_does_is_told() {
    let told = |loss: f64, norm: f64| {
        let mut health = health(None, 1);
        let before = (1..=20).filter_map(|i| health.step(&step(i, 3.0, 2.0))).count();
        (before, (21..=60).filter_map(|i| health.step(&step(i, loss, norm))).count())
    };
    assert_eq!(told(2.9, 1e-5), (0, 1));
    assert_eq!(told(2.9, 1e-3), (0, 0));
    // Learned by heart.
    assert_eq!(told(1e-6, 1e-6), (0, 0));
}

#[test]
fn a_prompt_longer_than_any_embedding_is_told() -> Result<()> {
    let rows = |norms: &[f32]| -> Result<Tensor> {
        let values: Vec<f32> = norms.iter().flat_map(|norm| [0.6 * norm, 0.8 * norm]).collect();
        Ok(Tensor::from_vec(values, (norms.len(), 2), &candle_core::Device::Cpu)?)
    };
    let mut health = health(None, 1);
    assert_eq!(health.prompt(&rows(&[1.0, 9.0])?)?, None);
    let told = health.prompt(&rows(&[1.0, 9.0, 3.0])?)?.unwrap();
    assert!(told.contains("2 of 3 virtual tokens") && told.contains("from 0.50 to 2.00"), "{told}");
    assert_eq!(health.prompt(&rows(&[9.0])?)?, None);
    Ok(())
}
