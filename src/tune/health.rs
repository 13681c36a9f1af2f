//! Prompt tuning is sensitive to initialisation, prompt length and learning rate, and it can fail without an error. This
//! module detects the usual failures and suggests a remedy.

mod data;
mod learned;
#[cfg(test)]
mod tests;

use super::observer::{EpochRecord, StepRecord};
use crate::Result;
use crate::batch::Example;
use crate::data::Record;
use crate::prompt::vocabulary;
use crate::prompt::vocabulary::Norms;
use candle_core::Tensor;
pub use data::data;
pub use learned::{Outcome, is_outdated, schedule};
use std::collections::BTreeSet;

/// An epoch's loss below this share of an earlier one's has moved.
const MOVED: f64 = 0.98;
/// A loss above this share of what guessing the labels gives has learned nothing of them.
const AT_CHANCE: f64 = 0.93;
/// Steps whose median gradient norm is looked at.
const WINDOW: usize = 10;
/// A gradient norm below this share of the first steps' has vanished.
const VANISHED: f64 = 1e-4;
/// What all advice about a loss that stands still comes to.
const TRY: &str = "try train.learning_rate three to ten times as high or as low (gneiss tune --find-lr suggests one), \
                   more epochs, or a prompt.init_text that says what to answer";

/// A kind of trouble, which is reported once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Trouble {
    GradientVanished,
    LossStands,
    PromptLeftVocabulary,
    LossNotFinite,
    StepsSkipped,
}

impl Trouble {
    const ALL: [Self; 5] = [
        Self::GradientVanished,
        Self::LossStands,
        Self::PromptLeftVocabulary,
        Self::LossNotFinite,
        Self::StepsSkipped,
    ];

    /// The words of its warning by which a resumed run recognises it.
    fn words(self) -> &'static str {
        match self {
            Self::GradientVanished => "the gradient has vanished",
            Self::LossStands => "the training loss",
            Self::PromptLeftVocabulary => "the prompt has left the vocabulary's range",
            Self::LossNotFinite => "the validation loss is not finite",
            Self::StepsSkipped => "steps in a row were left out",
        }
    }
}

/// A mean divergence below this is small: the model does nearly what the teacher does.
const SMALL_DIVERGENCE: f64 = 0.01;
/// What all advice about a divergence that stands still comes to.
const TRY_DISTILLATION: &str = "try train.learning_rate three to ten times as high or as low (gneiss tune --find-lr \
                                suggests one), more epochs, or more virtual tokens";

/// Watches a run for signs of trouble. Each kind of trouble is reported once.
#[derive(Debug)]
pub struct Health {
    /// Loss of guessing each label as often as it occurs and being sure of the rest; none without labels.
    chance: Option<f64>,
    vocabulary: Option<Norms>,
    first_epoch_loss: Option<f64>,
    first_loss: Option<f64>,
    first_norm: f64,
    recent: Vec<(f64, f64)>,
    skipped_in_a_row: usize,
    reported: BTreeSet<Trouble>,
    /// Whether losses are divergences from a teacher: a small one is good, wherever it began, and labels have no chance level.
    divergences: bool,
}

impl Health {
    /// Of a run over `train`; `records` are its rows, for a classification, and `vocabulary` the norms of the model's
    /// embeddings, `None` for a prompt that is none.
    pub fn new(train: &[Example], records: Option<&[Record]>, vocabulary: Option<Norms>) -> Self {
        Self {
            chance: records.and_then(|records| chance(train, records)),
            vocabulary,
            first_epoch_loss: None,
            first_loss: None,
            first_norm: 0.0,
            recent: Vec::new(),
            skipped_in_a_row: 0,
            reported: BTreeSet::new(),
            divergences: false,
        }
    }

    /// The same for losses that are divergences from a teacher's distribution: what is said of guessing labels is left out.
    pub fn of_divergences(self) -> Self {
        Self { chance: None, divergences: true, ..self }
    }

    /// The same for a resumed run, which has these records; what they show was reported already.
    pub fn replay(mut self, steps: &[StepRecord], epochs: &[EpochRecord]) -> Self {
        for step in steps {
            self.step(step);
        }
        for epoch in epochs {
            self.epoch(epoch);
        }
        self
    }

    /// The same for a resumed run, which has reported `warnings` already.
    pub fn after(mut self, warnings: &[String]) -> Self {
        let is_in = |trouble: &Trouble| warnings.iter().any(|text| text.contains(trouble.words()));
        self.reported = Trouble::ALL.into_iter().filter(is_in).collect();
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
        let words = Trouble::GradientVanished.words();
        let learned = self.divergences && loss < SMALL_DIVERGENCE;
        let vanished = norm <= VANISHED * self.first_norm && loss > 0.5 * first && !learned;
        (self.recent.len() == WINDOW && vanished && self.is_new(Trouble::GradientVanished)).then(|| {
            format!(
                "step {}: {words} (norm {norm:.1e}, {:.1e} at first) and the loss is still {loss:.4}: \
                 a lower train.learning_rate may keep the prompt where the model listens to it; {}",
                record.step,
                self.first_norm,
                if self.divergences { TRY_DISTILLATION } else { TRY }
            )
        })
    }

    /// After a step that was left out as its `what` was `value`.
    pub fn skipped(&mut self, step: usize, what: &str, value: f64) -> Option<String> {
        self.skipped_in_a_row += 1;
        let words = Trouble::StepsSkipped.words();
        (self.skipped_in_a_row >= WINDOW && self.is_new(Trouble::StepsSkipped)).then(|| {
            format!(
                "step {step}: {WINDOW} {words}, the last as {what} is {value}: nothing is learned any more; start again \
                 with a lower train.learning_rate"
            )
        })
    }

    /// After an epoch.
    pub fn epoch(&mut self, record: &EpochRecord) -> Option<String> {
        if let Some(loss) = record.validation_loss.filter(|loss| !loss.is_finite())
            && self.is_new(Trouble::LossNotFinite)
        {
            let words = Trouble::LossNotFinite.words();
            return Some(format!(
                "epoch {}: {words} ({loss}): no epoch with such a loss counts as the best, and the prompt is of no \
                 use; try a lower train.learning_rate, and model.dtype = \"f32\" if it is f16",
                record.epoch
            ));
        }
        let loss = record.train_loss?;
        let first = *self.first_epoch_loss.get_or_insert(loss);
        if record.epoch < 2 {
            return None;
        }
        let at_chance = self.chance.filter(|chance| is_at_chance(loss, *chance));
        let stands = loss > MOVED * first && !(self.divergences && loss < SMALL_DIVERGENCE);
        let hint = if self.divergences { TRY_DISTILLATION } else { TRY };
        let words = Trouble::LossStands.words();
        match at_chance {
            Some(chance) if self.is_new(Trouble::LossStands) => Some(format!(
                "epoch {}: {words} is {loss:.4}, and guessing the labels gives {chance:.4}: nothing of them \
                 is learned yet; {TRY}",
                record.epoch
            )),
            None if stands && self.is_new(Trouble::LossStands) => Some(format!(
                "epoch {}: {words} has not moved ({loss:.4}, {first:.4} in the first epoch); {hint}",
                record.epoch
            )),
            _ => None,
        }
    }

    /// After an epoch that ended with `prompt`, f32 [P, C].
    pub fn prompt(&mut self, prompt: &Tensor) -> Result<Option<String>> {
        let Some(Norms { min, max: most, .. }) = self.vocabulary else { return Ok(None) };
        let norms = vocabulary::row_norms(prompt)?;
        let beyond = norms.iter().filter(|norm| **norm > most).count();
        if 2 * beyond <= norms.len() || !self.is_new(Trouble::PromptLeftVocabulary) {
            return Ok(None);
        }
        let mean = norms.iter().sum::<f64>() / norms.len() as f64;
        let words = Trouble::PromptLeftVocabulary.words();
        let mean = if mean < 1e5 { format!("{mean:.2}") } else { format!("{mean:.1e}") };
        Ok(Some(format!(
            "{words}: {beyond} of {} virtual tokens are longer than any embedding \
             (mean norm {mean}; the vocabulary's go from {min:.2} to {most:.2}): where the validation loss suffers, try \
             a lower train.learning_rate or some train.weight_decay",
            norms.len(),
        )))
    }

    /// Whether this kind of trouble has not been reported yet; it counts as reported from now on.
    fn is_new(&mut self, trouble: Trouble) -> bool {
        self.reported.insert(trouble)
    }
}

/// Whether `loss` shows nothing learned of the labels, if guessing them gives `chance`.
pub fn is_at_chance(loss: f64, chance: f64) -> bool {
    loss > AT_CHANCE * chance
}

/// The loss of guessing each label as often as it occurs: the entropy of the labels, spread over the target tokens; nats.
/// `None` if the outputs are no labels.
pub fn chance(train: &[Example], records: &[Record]) -> Option<f64> {
    let counts = data::counts(records);
    let tokens: usize = train.iter().map(|example| example.target.len()).sum();
    // Outputs that hardly repeat are no labels.
    if counts.len() < 2 || 4 * counts.len() > records.len() || tokens == 0 {
        return None;
    }
    let n = records.len() as f64;
    let entropy: f64 = counts.values().map(|count| *count as f64 * (n / *count as f64).ln()).sum();
    Some(entropy / tokens as f64)
}
