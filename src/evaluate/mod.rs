//! Evaluation: a model with or without a soft prompt answers the test file.

pub mod compare;
pub mod metrics;
pub mod result;
pub mod text;

use crate::Result;
use crate::config::Task;
use crate::data::encode::Encoder;
use crate::data::pack::common_head;
use crate::data::{Dataset, Example, PrefixGroup, Record};
use crate::generate::{self, Generated, Options};
use crate::model::{Granite, TextTokenizer};
use crate::tune::objective;
use candle_core::Tensor;
use candle_transformers::generation::Sampling;
pub use compare::Paired;
pub use metrics::{ClassScores, Scores};
pub use result::{Answers, Arm, Evaluation, Prediction};
use std::collections::BTreeSet;
pub use text::TextScores;

/// What is asked, and of whom.
pub struct Exam<'a> {
    /// The frozen model.
    pub model: &'a Granite,
    /// Its tokenizer.
    pub tokenizer: &'a TextTokenizer,
    /// The rows to answer.
    pub dataset: &'a Dataset,
    /// Classification also scores each label's likelihood.
    pub task: Task,
    /// The answers that count as labels; see [`labels`].
    pub labels: &'a [String],
    /// Rows that go through the model at a time.
    pub max_rows: usize,
}

/// The distinct outputs of some rows, sorted: the labels of a classification.
pub fn labels<'a>(records: impl IntoIterator<Item = &'a Record>) -> Vec<String> {
    let all: BTreeSet<&str> = records.into_iter().map(|r| r.output.trim()).collect();
    all.into_iter().map(str::to_owned).collect()
}

impl Exam<'_> {
    /// Answers every row by greedy generation behind `prompt` f32 [P, C], or without one; `encoder` may hold an
    /// instruction in plain text. `progress` is told of the rows answered so far.
    ///
    /// # Errors
    /// A row that can't be encoded; the device's.
    pub fn answer(
        &self,
        prompt: Option<&Tensor>,
        encoder: &Encoder,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Answers> {
        let started = std::time::Instant::now();
        let examples = encoder.encode_dataset(self.dataset)?.examples;
        let label_ids =
            self.labels.iter().map(|l| self.tokenizer.encode(l, false)).collect::<Result<Vec<_>>>()?;
        // One token a label, and no two alike: the first step's probabilities are all that is needed.
        let mut score: Vec<u32> = label_ids.iter().filter(|ids| ids.len() == 1).map(|ids| ids[0]).collect();
        if self.task != Task::Classification || score.len() != self.labels.len() {
            score.clear();
        }
        let generated = self.generate(prompt, &examples, encoder.max_output_tokens, &score, progress)?;
        let scores = match (self.task, score.is_empty()) {
            (Task::Classification, true) => self.likelihoods(prompt, &examples, &label_ids)?,
            _ => generated.iter().map(|g| g.scores.clone()).collect(),
        };
        let predictions: Vec<Prediction> = self
            .dataset
            .records
            .iter()
            .zip(&generated)
            .zip(&scores)
            .map(|((record, generated), scores)| self.prediction(record, generated, scores))
            .collect::<Result<_>>()?;
        let pairs = |of: fn(&Prediction) -> &str| {
            Scores::of(self.labels, predictions.iter().map(|p| (p.expected.as_str(), of(p))))
        };
        let classification = self.task == Task::Classification;
        let generated = classification.then(|| pairs(|p| &p.generated));
        let likelihood = classification.then(|| pairs(|p| p.likeliest.as_deref().unwrap_or_default()));
        let perplexity = f64::NAN; // WIP
        let seconds = started.elapsed().as_secs_f64();
        Ok(Answers { generated, likelihood, text: None, predictions, perplexity, seconds })
    }

    fn prediction(&self, record: &Record, generated: &Generated, scores: &[f64]) -> Result<Prediction> {
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let likeliest = scores.iter().position(|s| *s == largest).map(|i| self.labels[i].clone());
        Ok(Prediction {
            line: record.line,
            input: record.input.clone(),
            expected: record.output.trim().to_owned(),
            generated: self.tokenizer.decode(&generated.tokens, true)?.trim().to_owned(),
            likeliest,
            probabilities: weights.iter().map(|w| w / sum).collect(),
        })
    }

    fn generate(
        &self,
        prompt: Option<&Tensor>,
        examples: &[Example],
        max_new_tokens: usize,
        score: &[u32],
        progress: &mut dyn FnMut(usize),
    ) -> Result<Vec<Generated>> {
        let head = common_head(examples.iter().map(|e| e.input.as_slice()));
        let prefix = generate::prefix(self.model, prompt, head)?;
        let options = Options {
            max_new_tokens,
            stop_token_ids: &self.tokenizer.stop_token_ids,
            sampling: Sampling::ArgMax,
            seed: 0,
            score,
        };
        let inputs: Vec<&[u32]> = examples.iter().map(|e| &e.input[head.len()..]).collect();
        let (mut generated, mut from, mut rows) = (Vec::with_capacity(inputs.len()), 0, 0);
        for to in 1..=inputs.len() {
            rows += inputs[to - 1].len();
            if to == inputs.len() || rows + inputs[to].len() > self.max_rows {
                generated.extend(generate::generate(self.model, &prefix, &inputs[from..to], &options)?);
                progress(to);
                (from, rows) = (to, 0);
            }
        }
        Ok(generated)
    }

    /// Log-likelihood of every label as each row's target.
    fn likelihoods(
        &self,
        prompt: Option<&Tensor>,
        examples: &[Example],
        labels: &[Vec<u32>],
    ) -> Result<Vec<Vec<f64>>> {
        let all: Vec<Example> = examples
            .iter()
            .flat_map(|e| labels.iter().map(|ids| Example { target: ids.clone(), ..e.clone() }))
            .collect();
        let prompts = generate::prompts(self.model, prompt)?;
        let group = PrefixGroup::new(0..prompts.dims()[0] as u32, &all);
        let nll = objective::evaluate(self.model, &prompts, &[group], self.max_rows)?.nll()?;
        let mut rest = nll.as_slice();
        let mut take = |n: usize| {
            let (now, later) = rest.split_at(n);
            rest = later;
            -now.iter().sum::<f64>()
        };
        Ok(examples.iter().map(|_| labels.iter().map(|ids| take(ids.len())).collect()).collect())
    }
}
