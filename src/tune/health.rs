//! What looks wrong with a run, and what to try. Prompt tuning depends on its start, length and learning rate more than
//! other tuning does, and fails quietly: these are the ways that it fails in.

mod learned;

use super::observer::{EpochRecord, StepRecord};
use crate::Result;
use crate::batch::Example;
use crate::config::{Config, Task};
use crate::data::{Record, labels};
use crate::prompt::vocabulary;
use crate::prompt::vocabulary::Norms;
use candle_core::Tensor;
pub use learned::{Outcome, is_outdated, schedule};
use std::collections::{BTreeMap, HashMap};

/// Share of rows with one label from which on a file counts as unbalanced.
const UNBALANCED: f64 = 0.8;
/// An epoch's loss below this share of an earlier one's has moved.
const MOVED: f64 = 0.98;
/// A loss above this share of what guessing the labels gives has learned nothing of them.
const AT_CHANCE: f64 = 0.93;
/// Steps whose median gradient norm is looked at.
const WINDOW: usize = 10;
/// A gradient norm below this share of the first steps' has vanished.
const VANISHED: f64 = 1e-4;
/// What the text of each kind of trouble says.
const VANISHES: &str = "the gradient has vanished";
const STANDS: &str = "the training loss";
const LEFT: &str = "the prompt has left the vocabulary's range";
const NO_NUMBER: &str = "the validation loss is not finite";
const SKIPPED: &str = "steps in a row were left out";
/// What all advice about a loss that stands still comes to.
const TRY: &str = "try train.learning_rate three to ten times as high or as low (gneiss tune --find-lr suggests one), \
                   more epochs, or a prompt.init_text that says what to answer";

/// What is wrong with the files of a configuration: one label above all others, labels that training never sees, test
/// or validation inputs that stand in the training file. What is wrong within one file, its [`Dataset`] says.
///
/// [`Dataset`]: crate::data::Dataset
pub fn data(
    config: &Config,
    train: &[Record],
    validation: Option<&[Record]>,
    test: Option<&[Record]>,
) -> Vec<String> {
    let others = [("data.validation", validation), ("data.test", test)];
    let others = || others.iter().filter_map(|(key, records)| records.map(|records| (*key, records)));
    let mut found = Vec::new();
    if config.data.task == Task::Classification {
        found.extend(unbalanced(train));
        found.extend(others().filter_map(|(key, records)| unknown_labels(key, train, records)));
    }
    found.extend(others().filter_map(|(key, records)| shared(key, train, records)));
    found
}

fn counts(records: &[Record]) -> BTreeMap<&str, usize> {
    let mut rows = BTreeMap::new();
    records.iter().for_each(|record| *rows.entry(record.output.trim()).or_default() += 1);
    rows
}

fn unbalanced(train: &[Record]) -> Option<String> {
    let counts = counts(train);
    let (label, most) = counts.iter().max_by_key(|(_, n)| **n)?;
    let share = *most as f64 / train.len() as f64;
    if counts.len() == 1 {
        return Some(format!("data.train: every row is labelled {label:?}: there is nothing to tell apart"));
    }
    (share >= UNBALANCED).then(|| {
        format!(
            "data.train: {most} of {} rows ({:.0} %) are labelled {label:?}, so a prompt that always answers it looks \
             good: balance the labels, and judge by macro F1",
            train.len(),
            100.0 * share
        )
    })
}

fn unknown_labels(key: &str, train: &[Record], records: &[Record]) -> Option<String> {
    let known = counts(train);
    let unknown: Vec<_> = counts(records).into_keys().filter(|label| !known.contains_key(label)).collect();
    let first: Vec<_> = unknown.iter().take(3).map(|label| format!("{label:?}")).collect();
    (!unknown.is_empty()).then(|| {
        format!(
            "{key}: {} that no row of data.train has ({}): the prompt can't learn to answer {}",
            if unknown.len() == 1 { "a label".to_owned() } else { format!("{} labels", unknown.len()) },
            first.join(", ") + if unknown.len() > 3 { ", ..." } else { "" },
            if unknown.len() == 1 { "it" } else { "them" },
        )
    })
}

/// Inputs that differ in nothing but case and white space are the same.
fn shared(key: &str, train: &[Record], records: &[Record]) -> Option<String> {
    let plain = labels::plain_input;
    let there: HashMap<String, usize> = train.iter().map(|r| (plain(&r.input), r.line)).collect();
    let same: Vec<(usize, usize)> =
        records.iter().filter_map(|r| Some((r.line, *there.get(&plain(&r.input))?))).collect();
    let &(line, train_line) = same.first()?;
    Some(format!(
        "{key}: {} of {} inputs also stand in data.train (line {line} there is line {train_line} here): figures of them \
         show memory, not learning; take them out of one of the files",
        same.len(),
        records.len()
    ))
}

/// Watches a run's course. Each kind of trouble is told of once.
#[derive(Debug)]
pub struct Health {
    /// Loss of guessing each label as often as it occurs and being sure of the rest; none without labels.
    chance: Option<f64>,
    vocabulary: Norms,
    first_epoch_loss: Option<f64>,
    first_loss: Option<f64>,
    first_norm: f64,
    recent: Vec<(f64, f64)>,
    skipped_in_a_row: usize,
    told: [bool; 5],
}

impl Health {
    /// Of a run over `train`; `records` are its rows, for a classification, and `vocabulary` the norms of the model's
    /// embeddings.
    pub fn new(train: &[Example], records: Option<&[Record]>, vocabulary: Norms) -> Self {
        Self {
            chance: records.and_then(|records| chance(train, records)),
            vocabulary,
            first_epoch_loss: None,
            first_loss: None,
            first_norm: 0.0,
            recent: Vec::new(),
            skipped_in_a_row: 0,
            told: [false; 5],
        }
    }

    /// The same of a run that goes on, which was told `warnings`.
    pub fn after(mut self, warnings: &[String]) -> Self {
        self.told = [VANISHES, STANDS, LEFT, NO_NUMBER, SKIPPED]
            .map(|what| warnings.iter().any(|text| text.contains(what)));
        self
    }

    /// After a step.
    pub fn step(&mut self, record: &StepRecord) -> Option<String> {
        self.skipped_in_a_row = 0;
        let first = *self.first_loss.get_or_insert(record.loss);
        self.first_norm = self.first_norm.max(if record.step <= WINDOW { record.grad_norm } else { 0.0 });
        self.recent.push((record.loss, record.grad_norm));
        if self.recent.len() > WINDOW {
            self.recent.remove(0);
        }
        let median = |of: fn(&(f64, f64)) -> f64| {
            let mut all: Vec<f64> = self.recent.iter().map(of).collect();
            all.sort_by(f64::total_cmp);
            all[all.len() / 2]
        };
        let (loss, norm) = (median(|r| r.0), median(|r| r.1));
        // A loss that is nearly gone has hardly a gradient, and that is well. A gradient may be 0 from the first step on.
        let vanished = norm <= VANISHED * self.first_norm && loss > 0.5 * first;
        (self.recent.len() == WINDOW && vanished && self.tell(0)).then(|| {
            format!(
                "step {}: {VANISHES} (norm {norm:.1e}, {:.1e} at first) and the loss is still {loss:.4}: \
                 a lower train.learning_rate may keep the prompt where the model listens to it; {TRY}",
                record.step, self.first_norm
            )
        })
    }

    /// After a step that was left out as its `what` was `value`.
    pub fn skipped(&mut self, step: usize, what: &str, value: f64) -> Option<String> {
        self.skipped_in_a_row += 1;
        (self.skipped_in_a_row >= WINDOW && self.tell(4)).then(|| {
            format!(
                "step {step}: {WINDOW} {SKIPPED}, the last as {what} is {value}: nothing is learned any more; start again \
                 with a lower train.learning_rate"
            )
        })
    }

    /// After an epoch.
    pub fn epoch(&mut self, record: &EpochRecord) -> Option<String> {
        if let Some(loss) = record.validation_loss.filter(|loss| !loss.is_finite())
            && self.tell(3)
        {
            return Some(format!(
                "epoch {}: {NO_NUMBER} ({loss}): no epoch with such a loss counts as the best, and the prompt is of no \
                 use; try a lower train.learning_rate, and model.dtype = \"f32\" if it is f16",
                record.epoch
            ));
        }
        let loss = record.train_loss?;
        let first = *self.first_epoch_loss.get_or_insert(loss);
        if record.epoch < 2 {
            return None;
        }
        let at_chance = self.chance.filter(|chance| loss > AT_CHANCE * chance);
        let stands = loss > MOVED * first;
        match at_chance {
            Some(chance) if self.tell(1) => Some(format!(
                "epoch {}: {STANDS} is {loss:.4}, and guessing the labels gives {chance:.4}: nothing of them \
                 is learned yet; {TRY}",
                record.epoch
            )),
            None if stands && self.tell(1) => Some(format!(
                "epoch {}: {STANDS} has not moved ({loss:.4}, {first:.4} in the first epoch); {TRY}",
                record.epoch
            )),
            _ => None,
        }
    }

    /// After an epoch that ended with `prompt`, f32 [P, C].
    ///
    /// # Errors
    /// The device's.
    pub fn prompt(&mut self, prompt: &Tensor) -> Result<Option<String>> {
        let norms = vocabulary::row_norms(prompt)?;
        let most = self.vocabulary.max;
        let beyond = norms.iter().filter(|norm| **norm > most).count();
        if 2 * beyond <= norms.len() || !self.tell(2) {
            return Ok(None);
        }
        let mean = norms.iter().sum::<f64>() / norms.len() as f64;
        let mean = if mean < 1e5 { format!("{mean:.2}") } else { format!("{mean:.1e}") };
        Ok(Some(format!(
            "{LEFT}: {beyond} of {} virtual tokens are longer than any embedding \
             (mean norm {mean}; the vocabulary's go from {:.2} to {most:.2}): where the validation loss suffers, try \
             a lower train.learning_rate or some train.weight_decay",
            norms.len(),
            self.vocabulary.min
        )))
    }

    /// Whether trouble of this kind is new.
    fn tell(&mut self, kind: usize) -> bool {
        !std::mem::replace(&mut self.told[kind], true)
    }
}

/// Entropy of the labels, spread over the target tokens; nats.
fn chance(train: &[Example], records: &[Record]) -> Option<f64> {
    let counts = counts(records);
    let tokens: usize = train.iter().map(|example| example.target.len()).sum();
    // Outputs that hardly repeat are no labels.
    if counts.len() < 2 || 4 * counts.len() > records.len() || tokens == 0 {
        return None;
    }
    let n = records.len() as f64;
    let entropy: f64 = counts.values().map(|count| *count as f64 * (n / *count as f64).ln()).sum();
    Some(entropy / tokens as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(rows: &[(&str, &str)]) -> Vec<Record> {
        let record = |(i, (input, output)): (usize, &(&str, &str))| Record {
            input: (*input).into(),
            output: (*output).into(),
            line: i + 2,
        };
        rows.iter().enumerate().map(record).collect()
    }

    fn labels(counts: &[(&str, usize)]) -> Vec<Record> {
        let rows: Vec<(String, &str)> = counts
            .iter()
            .flat_map(|(label, n)| (0..*n).map(move |i| (format!("{label} {i}"), *label)))
            .collect();
        records(&rows.iter().map(|(input, label)| (input.as_str(), *label)).collect::<Vec<_>>())
    }

    fn classification() -> Config {
        let mut config = Config::default();
        config.data.task = Task::Classification;
        config
    }

    #[test]
    fn balanced_files_without_shared_inputs_are_well() {
        let (train, test) = (labels(&[("0", 6), ("1", 8)]), records(&[("new", "1"), ("other", "0")]));
        assert_eq!(data(&classification(), &train, Some(&test), Some(&test)), [""; 0]);
    }

    #[test]
    fn one_label_above_all_others_is_told() {
        let of = |counts: &[(&str, usize)]| data(&classification(), &labels(counts), None, None);
        let found = of(&[("0", 2), ("1", 8)]);
        assert!(found.len() == 1 && found[0].contains("8 of 10 rows (80 %) are labelled \"1\""), "{found:?}");
        assert!(of(&[("0", 21), ("1", 79)]).is_empty());
        assert!(of(&[("1", 3)])[0].contains("every row is labelled \"1\""));
        // Free texts have no labels.
        assert!(data(&Config::default(), &labels(&[("0", 1), ("1", 9)]), None, None).is_empty());
    }

    #[test]
    fn a_label_that_training_never_sees_is_told() {
        let train = labels(&[("0", 3), ("1", 3)]);
        let found = data(&classification(), &train, None, Some(&records(&[("a", "1"), ("b", "maybe")])));
        assert!(found.len() == 1 && found[0].starts_with("data.test: a label"), "{found:?}");
        assert!(found[0].contains("\"maybe\""), "{found:?}");
    }

    #[test]
    fn inputs_that_stand_in_the_training_file_are_told_with_their_lines() {
        let train = records(&[("Good  dog", "1"), ("bad dog", "0")]);
        let test = records(&[("new", "1"), (" good dog\n", "1"), ("BAD DOG", "0")]);
        let found = data(&Config::default(), &train, Some(&train[..1]), Some(&test));
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].starts_with("data.validation: 1 of 1 inputs"), "{found:?}");
        assert!(
            found[1].starts_with("data.test: 2 of 3 inputs also stand in data.train (line 3 there is line 2")
        );
    }

    fn health(records: Option<&[Record]>, targets: usize) -> Health {
        let n = records.map_or(1, <[Record]>::len);
        let example = Example { input: vec![1], target: vec![2; targets], line: 2 };
        Health::new(&vec![example; n], records, Norms { mean: 1.0, min: 0.5, max: 2.0 })
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
        assert!(
            [3.0, 2.0, 1.99, 0.01, 0.01].iter().zip(1..).all(|(l, e)| falls.epoch(&epoch(e, *l)).is_none())
        );
        let mut stands = health(None, 1);
        assert_eq!(stands.epoch(&epoch(1, 3.0)), None);
        assert!(stands.epoch(&epoch(2, 2.99)).unwrap().contains("has not moved (2.9900, 3.0000"));
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
        let of =
            |n: usize, loss: f64| EpochRecord { validation_loss: Some(loss), ..epoch(n, 3.0 / n as f64) };
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
}
