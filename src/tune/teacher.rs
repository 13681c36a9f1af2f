//! The teacher of a distillation: the base model with a text in front of every input. Its prefix goes through the model once in
//! a run; a step runs its examples after that, forward only, for the hidden states of the target rows.
//!
//! ```text
//! teacher    BOS text head ── once a run ── keys, values, states of a scan
//!                                             └─ own input, target ── hidden states ── logits ┐
//! student    virtual tokens, BOS head, own input, target ──────────── hidden states ── logits ┴─ KL of each target row
//! ```

use super::prompt_run::RunExamples;
use crate::batch::{Example, PackedBatch, Passes, PrefixGroup, common_head};
use crate::model::{Decoder, PrefixState};
use crate::ops::no_rows;
use crate::ops::rope::Rope;
use crate::{Error, Result};
use candle_core::Tensor;

/// The examples of a run as the teacher reads them, in the same order: the text stands in front of each input, and the targets
/// are the same.
#[derive(Debug, Clone, Copy)]
pub struct TeacherExamples<'a> {
    /// Those of [`RunExamples::train`].
    pub train: &'a [Example],
    /// Those of [`RunExamples::validation`].
    pub validation: &'a [Example],
}

/// A teacher whose prefix has gone through the model.
pub struct Teacher<'a> {
    examples: TeacherExamples<'a>,
    /// The tokens that all its inputs begin with.
    head: Vec<u32>,
    /// What sequences read of the head, layer by layer.
    states: Vec<PrefixState>,
    /// Positions above which a sequence has other rotary frequencies.
    long_above: Option<usize>,
}

impl<'a> TeacherExamples<'a> {
    /// All of them, those of the training first.
    pub(super) fn all(self) -> impl Iterator<Item = &'a Example> + Clone {
        self.train.iter().chain(self.validation)
    }

    /// The tokens that all inputs begin with, but for one token of each.
    pub(super) fn head(self) -> &'a [u32] {
        common_head(self.all().map(|example| example.input.as_slice()))
    }

    /// Positions of the longest sequence, its target included.
    fn longest(self) -> usize {
        self.all().map(positions).max().unwrap_or(0)
    }

    /// Whether they are the examples of `run`: the same targets in the same order.
    fn check(self, run: RunExamples) -> Result<()> {
        let targets = |examples: &'a [Example]| examples.iter().map(|example| &example.target);
        let same = targets(self.train).eq(run.train.iter().map(|example| &example.target))
            && targets(self.validation).eq(run.validation.iter().map(|example| &example.target));
        if same {
            return Ok(());
        }
        Err(Error::Invalid(
            "data.teacher_text: expected the run's targets after the text, found others".into(),
        ))
    }
}

impl<'a> Teacher<'a> {
    /// Runs the tokens that all `examples` begin with through the model.
    ///
    /// # Errors
    /// Returns an error if the examples are others than those of `run`, are longer than the model takes, or have short and long
    /// sequences for a model that rotates these by different frequencies, or if a device operation fails.
    pub fn new(model: &Decoder, examples: TeacherExamples<'a>, run: RunExamples) -> Result<Self> {
        examples.check(run)?;
        let limit = model.config().max_position_embeddings;
        let longest = examples.longest();
        if longest > limit {
            return Err(Error::Invalid(format!(
                "data.teacher_text: expected at most {limit} positions with the text, the model's \
                 max_position_embeddings, found {longest}: shorten the text, or lower data.max_input_tokens"
            )));
        }
        let rope = model.config().rope.as_ref();
        if let Some(most) = rope.and_then(Rope::most_positions).filter(|most| longest > *most) {
            return Err(Error::Invalid(format!(
                "data.teacher_text: expected at most {most} positions with the text, found {longest}: in longer sequences \
                 the rotary scaling `dynamic` turns every position by frequencies of the length; shorten the text, or \
                 lower data.max_input_tokens"
            )));
        }
        let long_above = rope.and_then(Rope::long_above);
        let mut kinds =
            examples.all().map(|example| long_above.is_some_and(|most| positions(example) > most));
        let first = kinds.next();
        if kinds.any(|long| Some(long) != first) {
            let most = long_above.unwrap_or(0);
            return Err(Error::Invalid(format!(
                "data.teacher_text: the model rotates sequences of more than {most} positions by other frequencies, and with \
                 the text some examples are longer and some are not; expected all on one side: change the text's length, \
                 or data.max_input_tokens"
            )));
        }
        let head = examples.head().to_vec();
        let states = prefix_states(
            model,
            PrefixGroup::with_head(0..0, head.clone(), examples.all().take(1)),
            long_above,
        )?;
        Ok(Self { examples, head, states, long_above })
    }

    /// Rows of the prefix.
    pub fn prefix_rows(&self) -> usize {
        self.head.len()
    }

    /// Its training examples of these indices, cut into passes as `passes` are.
    pub fn training_passes(&self, passes: &Passes, chunk: &[usize]) -> Vec<PackedBatch> {
        self.passes(passes, chunk.iter().map(|i| &self.examples.train[*i]))
    }

    /// Its validation examples of these indices, cut into passes as `passes` are.
    pub(super) fn validation_passes(&self, passes: &Passes, chunk: &[usize]) -> Vec<PackedBatch> {
        self.passes(passes, chunk.iter().map(|i| &self.examples.validation[*i]))
    }

    fn passes<'e>(
        &self,
        passes: &Passes,
        examples: impl IntoIterator<Item = &'e Example>,
    ) -> Vec<PackedBatch> {
        passes.cut_alike(&PrefixGroup::with_head(0..0, self.head.clone(), examples), self.long_above)
    }

    /// Hidden states [targets, C] of the target rows of `batch`, one of [`Passes::teacher_passes`].
    ///
    /// # Errors
    /// Returns an error if a device operation fails.
    pub(super) fn hidden(&self, model: &Decoder, batch: &PackedBatch) -> Result<Tensor> {
        if batch.examples == 0 {
            return no_rows(model.config().hidden_size, model.dtype(), model.device());
        }
        let states = (!self.head.is_empty()).then_some(&self.states[..]);
        model.hidden(batch, &model.no_prompts()?, states)
    }
}

fn positions(example: &Example) -> usize {
    example.input.len() + example.target.len()
}

/// What the prefix of `group` hands on to sequences of the kind of the group's, layer by layer.
fn prefix_states(model: &Decoder, group: PrefixGroup, long_above: Option<usize>) -> Result<Vec<PrefixState>> {
    if group.head.is_empty() {
        return Ok(Vec::new());
    }
    let batch = Passes::of_prefixes(&[group], long_above);
    Ok(model.prefix_pass(&batch, &model.no_prompts()?, None)?.states)
}
