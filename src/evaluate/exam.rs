//! The evaluation of one arm: the texts that it generates, its likeliest label, and the likelihood of the expected
//! output.

use super::likelihood::{finite, nll_after_each};
use super::{Answers, Prediction, RowScores, Scores, TextScores, share};
use crate::batch::Example;
use crate::checkpoint::TextTokenizer;
use crate::config::Task;
use crate::data::encode::Encoder;
use crate::data::ensemble::{largest, probabilities};
use crate::data::labels::{self, normalize};
use crate::data::{Dataset, Record};
use crate::generate::{self, GenerateProgress, Generated, Request};
use crate::model::Decoder;
use crate::prompt::Prefix;
use crate::ranks::{Ranks, deal};
use crate::{Error, Result};
use std::sync::Arc;

/// The model that answers, and the rows.
pub struct Exam<'a> {
    /// The frozen model.
    pub model: &'a Decoder,
    /// Its tokenizer.
    pub tokenizer: &'a TextTokenizer,
    /// The rows to answer.
    pub dataset: &'a Dataset,
    /// In a classification the likelihood of each label is scored too.
    pub task: Task,
    /// The answers that count as labels; see [`crate::data::labels::distinct`].
    pub labels: &'a [String],
    /// Rows that go through the model at once.
    pub max_rows: usize,
    /// Each answers some of the dataset's rows, and all get all answers.
    pub ranks: &'a dyn Ranks,
}

/// What the model gives for one row.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Answered {
    /// The generated tokens.
    pub(super) tokens: Vec<u32>,
    /// Log-likelihoods of the labels; empty for other tasks.
    pub(super) scores: Vec<f64>,
    /// Negative log-likelihoods of the expected output's tokens.
    pub(super) nll: Vec<f64>,
}

/// The stage of an arm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Answers are generated.
    Generating,
    /// Given outputs are scored.
    Scoring,
}

/// The progress of an arm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Its stage.
    pub stage: Stage,
    /// Texts done.
    pub done: usize,
    /// Texts of this stage in all.
    pub of: usize,
    /// Rows that go through the model at once: fewer than requested after the device ran out of memory.
    pub max_rows: usize,
}

/// exp of a loss in nats; at most the largest f64, because JSON has no infinite numbers.
fn perplexity(loss: f64) -> f64 {
    loss.exp().min(f64::MAX)
}

impl Exam<'_> {
    /// Answers every row by greedy generation after `prompt`, or without a prompt; `encoder` may contain a
    /// plain-text instruction.
    ///
    /// # Errors
    /// Returns an error if a row can't be encoded, the tokenizer doesn't tell the labels apart, a likelihood is not
    /// finite, or a device operation fails.
    pub fn answer(
        &self,
        prompt: Option<&Prefix>,
        encoder: &Encoder,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Answers> {
        Ok(self.answer_after_each(&[prompt], encoder, progress)?.remove(0))
    }

    /// As [`Exam::answer`], after each of `prompts`: all of them are in one batch, in which each is a prefix of its own with the
    /// rows of the texts after it.
    ///
    /// # Errors
    /// As [`Exam::answer`].
    pub fn answer_after_each(
        &self,
        prompts: &[Option<&Prefix>],
        encoder: &Encoder,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<Answers>> {
        let encoded = self.ranks.all(encoder.encode_dataset(self.dataset))?;
        let lengths: Vec<usize> = encoded.examples.iter().map(|e| e.input.len() + e.target.len()).collect();
        let shares = deal(&lengths, self.ranks.size());
        let own: Vec<Example> =
            shares[self.ranks.rank()].iter().map(|row| encoded.examples[*row].clone()).collect();
        let own = self.answer_rows(prompts, &own, encoder.max_output_tokens, progress);
        let (answered, seconds) = share::join(self.ranks, &shares, own)?;
        answered.iter().map(|rows| self.answers(rows, seconds)).collect()
    }

    /// What the model gives for `examples` after each of `prompts`, and the seconds that the answers took, without those of the
    /// expected outputs' likelihoods.
    fn answer_rows(
        &self,
        prompts: &[Option<&Prefix>],
        examples: &[Example],
        max_new_tokens: usize,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(Vec<Vec<Answered>>, f64)> {
        if examples.is_empty() {
            return Ok((vec![Vec::new(); prompts.len()], 0.0));
        }
        let classification = self.task == Task::Classification;
        let targets = if classification { self.label_targets()? } else { Vec::new() };
        // If each label is one token, the probabilities of the first step are all that is needed.
        let one_token = targets.iter().all(|ids| ids.len() == 1);
        let score: Vec<u32> = if one_token { targets.concat() } else { Vec::new() };
        let started = std::time::Instant::now();
        let generated = self.generate(prompts, examples, max_new_tokens, &score, progress)?;
        let scores = match (classification, one_token) {
            (true, false) => self.likelihoods(prompts, examples, &targets, progress)?,
            _ => generated.iter().map(|all| all.iter().map(|g| g.scores.clone()).collect()).collect(),
        };
        let seconds = started.elapsed().as_secs_f64();
        let nll = self.score(prompts, examples, progress)?;
        let mut answered = Vec::with_capacity(prompts.len());
        for ((generated, scores), nll) in generated.into_iter().zip(scores).zip(nll) {
            let mut nll = nll.into_iter();
            let rows = examples.iter().zip(generated).zip(scores).map(|((example, generated), scores)| {
                let nll = nll.by_ref().take(example.target.len()).collect();
                Answered { tokens: generated.tokens, scores, nll }
            });
            answered.push(rows.collect());
        }
        Ok((answered, seconds))
    }

    /// The answers of a prompt from what the model gave for each row of the dataset.
    fn answers(&self, rows: &[Answered], seconds: f64) -> Result<Answers> {
        let classification = self.task == Task::Classification;
        let nll: Vec<f64> = rows.iter().flat_map(|row| row.nll.iter().copied()).collect();
        let loss = nll.iter().sum::<f64>() / nll.len() as f64;
        let rows = self.dataset.records.iter().zip(rows);
        let predictions: Vec<Prediction> =
            rows.map(|(record, answered)| self.prediction(record, answered)).collect::<Result<_>>()?;
        let pairs =
            |of: fn(&Prediction) -> &str| predictions.iter().map(move |p| (p.expected.as_str(), of(p)));
        Ok(Answers {
            generated: classification.then(|| Scores::from_pairs(self.labels, pairs(|p| &p.generated))),
            likelihood: classification.then(|| {
                Scores::from_pairs(self.labels, pairs(|p| p.likeliest.as_deref().unwrap_or_default()))
            }),
            text: (!classification).then(|| TextScores::mean(&RowScores::all(pairs(|p| &p.generated)))),
            loss,
            perplexity: perplexity(loss),
            seconds,
            predictions,
        })
    }

    /// Whether the expected label of each row is the likeliest after `prompt`; `examples` are the encoded rows.
    ///
    /// # Errors
    /// Returns an error if the tokenizer doesn't tell the labels apart, a likelihood is not finite, or a device operation
    /// fails.
    pub fn judge_labels(&self, prompt: Option<&Prefix>, examples: &[Example]) -> Result<Vec<bool>> {
        let scores = self.likelihoods(&[prompt], examples, &self.label_targets()?, &mut |_| {})?.remove(0);
        let is_right = |(record, scores): (&Record, &Vec<f64>)| {
            self.labels.get(largest(scores)).is_some_and(|label| label == record.output.trim())
        };
        Ok(self.dataset.records.iter().zip(&scores).map(is_right).collect())
    }

    /// The labels' token sequences; see [`labels::targets`].
    fn label_targets(&self) -> Result<Vec<Vec<u32>>> {
        let encode = |label: &String| {
            let ids = self.tokenizer.encode(label, false);
            ids.map_err(|error| error.in_text(&format!("label {label:?}")))
        };
        let tokens = self.labels.iter().map(encode).collect::<Result<Vec<_>>>()?;
        let same = |(i, j): (usize, usize)| {
            Error::Invalid(format!(
                "labels {:?} and {:?}: expected tokens of their own, found that the model's tokenizer gives both the same, \
                 {:?}; hint: other words for them in the data's outputs",
                self.labels[i], self.labels[j], tokens[i]
            ))
        };
        labels::targets(&tokens, self.tokenizer.eos_token_id).map_err(same)
    }

    fn prediction(&self, record: &Record, answered: &Answered) -> Result<Prediction> {
        let Answered { tokens, scores, .. } = answered;
        scores.iter().try_for_each(|score| finite("the log-likelihood of a label", *score))?;
        let likeliest = (!scores.is_empty()).then(|| self.labels[largest(scores)].clone());
        Ok(Prediction {
            line: record.line,
            input: record.input.clone(),
            expected: record.output.trim().to_owned(),
            generated: self.answer_text(&self.tokenizer.decode(tokens, true)?),
            likeliest,
            probabilities: probabilities(scores),
        })
    }

    /// A generated text as it is judged: in a classification in the form of its labels, otherwise without surrounding
    /// white space.
    fn answer_text(&self, text: &str) -> String {
        match self.task {
            Task::Classification => normalize(text).into_owned(),
            Task::Generation => text.trim().to_owned(),
        }
    }

    fn generate(
        &self,
        prompts: &[Option<&Prefix>],
        examples: &[Example],
        max_new_tokens: usize,
        score: &[u32],
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<Vec<Generated>>> {
        let stop_token_ids: Arc<[u32]> = self.tokenizer.stop_token_ids.as_slice().into();
        let request = |example: &Example| Request {
            tokens: example.input.clone(),
            max_new_tokens,
            stop_token_ids: stop_token_ids.clone(),
            score: score.to_vec(),
            ..Request::default()
        };
        let requests: Vec<Request> = examples.iter().map(request).collect();
        let of = prompts.len() * examples.len();
        let mut progress = |GenerateProgress { texts: done, max_rows }| {
            progress(Progress { stage: Stage::Generating, done, of, max_rows })
        };
        generate::generate_after_each(self.model, prompts, &requests, self.max_rows, &mut progress)
    }

    /// Negative log-likelihoods of the targets' tokens of `examples`, after each of `prompts`.
    fn score(
        &self,
        prompts: &[Option<&Prefix>],
        examples: &[Example],
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<Vec<f64>>> {
        let of = prompts.len() * examples.len();
        let mut progress = |GenerateProgress { texts: done, max_rows }| {
            progress(Progress { stage: Stage::Scoring, done, of, max_rows })
        };
        nll_after_each(self.model, prompts, examples, self.max_rows, &mut progress)
    }

    /// Log-likelihood of every label as each row's target, after each of `prompts`.
    fn likelihoods(
        &self,
        prompts: &[Option<&Prefix>],
        examples: &[Example],
        labels: &[Vec<u32>],
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<Vec<Vec<f64>>>> {
        let all: Vec<Example> = examples
            .iter()
            .flat_map(|e| labels.iter().map(|ids| Example { target: ids.clone(), ..e.clone() }))
            .collect();
        let nll = self.score(prompts, &all, progress)?;
        let of_rows = |nll: &Vec<f64>| {
            let mut values = nll.iter();
            let mut take = |n: usize| -values.by_ref().take(n).sum::<f64>();
            examples.iter().map(|_| labels.iter().map(|ids| take(ids.len())).collect()).collect()
        };
        Ok(nll.iter().map(of_rows).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_perplexity_is_a_number_to_json() {
        for (loss, expected) in [(0.0, 1.0), (1.0, std::f64::consts::E), (1e4, f64::MAX)] {
            let text = serde_json::to_string(&perplexity(loss)).unwrap();
            assert_eq!(serde_json::from_str::<f64>(&text).unwrap(), expected);
        }
    }
}
