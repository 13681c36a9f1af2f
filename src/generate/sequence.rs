//! A request that the engine runs, and what it does with its logits.

use super::prefixes::CachedPrefix;
use super::sampling::{TokenSampler, argmax, log_sum_exp, top_n};
use super::{Event, Request, StopReason, Token};
use crate::Result;
use crate::model::Decoder;
use candle_core::{DType, Device};
use std::ops::Range;
use std::sync::Arc;

/// Identifies a request of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub(super) u64);

/// A running request.
pub(super) struct RunningSequence {
    pub(super) id: SequenceId,
    pub(super) request: Request,
    pub(super) sampler: TokenSampler,
    pub(super) prefix: Arc<CachedPrefix>,
    pub(super) own: Range<usize>,
    /// Number of rows of `own` that are written.
    pub(super) filled: usize,
    pub(super) generated: Vec<u32>,
    pub(super) scored: Vec<Token>,
    /// Events of the current step.
    pub(super) events: Vec<Event>,
}

impl RunningSequence {
    /// A request that begins with the rows `own` of the cache, after `prefix`.
    pub(super) fn new(
        id: SequenceId,
        request: Request,
        prefix: Arc<CachedPrefix>,
        own: Range<usize>,
    ) -> Self {
        let sampler = TokenSampler::new(&request);
        let (generated, scored, events) = (Vec::new(), Vec::new(), Vec::new());
        Self { id, request, sampler, prefix, own, filled: 0, generated, scored, events }
    }

    /// Tokens of the text that are not part of the prefix.
    pub(super) fn text(&self) -> &[u32] {
        &self.request.tokens[self.prefix.head.len()..]
    }

    /// The first row of the text whose logits are needed: the row before the first token to score, or else the last
    /// row.
    pub(super) fn first_target(&self) -> usize {
        self.text().len().saturating_sub(self.request.scored + 1)
    }

    /// The number of text tokens up to row `row` of `own`, including it.
    pub(super) fn position(&self, row: usize) -> usize {
        self.prefix.head.len() + row + 1
    }

    /// Number of rows of the next steps that are known: the tokens of the text that are not processed yet, or one
    /// token.
    pub(super) fn rows_to_come(&self) -> usize {
        self.text().len().saturating_sub(self.filled).max(1)
    }

    /// Whether only the largest logit of `row` is needed.
    pub(super) fn needs_argmax_only(&self, row: usize) -> bool {
        self.position(row) >= self.request.tokens.len()
            && self.request.max_new_tokens > 0
            && self.sampler.is_greedy()
            && self.request.logprobs.is_none()
            && (self.request.score.is_empty() || !self.generated.is_empty())
            && !self.below_min_tokens()
    }

    /// Whether the answer is too short for a stop token.
    fn below_min_tokens(&self) -> bool {
        self.generated.len() < self.request.min_new_tokens
    }

    /// Evaluates the logits [V] of row `row`.
    pub(super) fn read_logits(&mut self, model: &Decoder, row: usize, logits: &[f32]) -> Result<()> {
        let position = self.position(row);
        let text = self.request.tokens.len();
        if position < text {
            self.score_head(model)?;
            let token = self.token(self.request.tokens[position], logits, self.request.logprobs);
            self.scored.push(token);
            return Ok(());
        }
        if position == text {
            if self.request.scored > 0 {
                self.score_head(model)?;
                let scored = std::mem::take(&mut self.scored);
                self.events.push(Event::Scored(scored));
            }
            if !self.request.score.is_empty() {
                let lse = log_sum_exp(logits);
                let logprob = |token: &u32| f64::from(logits[*token as usize]) - lse;
                self.events.push(Event::FirstScores(self.request.score.iter().map(logprob).collect()));
            }
        }
        if self.request.max_new_tokens == 0 {
            self.events.push(Event::Finished(StopReason::MaxTokens));
            return Ok(());
        }
        self.choose_next(logits);
        Ok(())
    }

    /// Chooses the next token. If the logits are not finite, this sequence ends and no other.
    fn choose_next(&mut self, logits: &[f32]) {
        let chosen = if self.sampler.is_greedy() && !self.below_min_tokens() {
            argmax(logits)
        } else {
            let forbidden =
                if self.below_min_tokens() { self.request.stop_token_ids.clone() } else { [].into() };
            self.sampler.choose(&mut logits.to_vec(), &forbidden)
        };
        match chosen {
            Ok(token) => {
                let token = match self.request.logprobs {
                    Some(_) => self.token(token, logits, self.request.logprobs),
                    None => Token { id: token, logprob: None, top: Vec::new() },
                };
                self.push(token);
            }
            Err(error) => self.events.push(Event::Failed(error.to_string())),
        }
    }

    pub(super) fn push(&mut self, token: Token) {
        if self.request.stop_token_ids.contains(&token.id) || self.sampler.has_ended() {
            self.events.push(Event::Finished(StopReason::StopToken));
            return;
        }
        self.generated.push(token.id);
        self.events.push(Event::Token(token));
        if self.sampler.is_complete() {
            self.events.push(Event::Finished(StopReason::StopToken));
        } else if self.generated.len() == self.request.max_new_tokens {
            self.events.push(Event::Finished(StopReason::MaxTokens));
        }
    }

    fn token(&self, id: u32, logits: &[f32], likeliest: Option<usize>) -> Token {
        let lse = log_sum_exp(logits);
        let logprob = Some(f64::from(logits[id as usize]) - lse);
        Token { id, logprob, top: top_n(logits, likeliest.unwrap_or(0), lse) }
    }

    /// Scores the tokens that rows of the prefix predict, unless they are scored already: those before the virtual tokens, and the
    /// first after them. The very first has a log-probability only if virtual tokens precede it.
    fn score_head(&mut self, model: &Decoder) -> Result<()> {
        let (head, first) =
            (self.prefix.head.len(), self.request.tokens.len().saturating_sub(self.request.scored));
        if !self.scored.is_empty() || self.request.scored == 0 || first > head {
            return Ok(());
        }
        let logits = self.head_logits(model)?;
        for index in first..=head {
            let id = self.request.tokens[index];
            let row = if head == 0 { Some(0) } else { index.checked_sub(1) };
            let token = match row.and_then(|row| logits.get(row)) {
                Some(logits) => self.token(id, logits, self.request.logprobs),
                None => Token { id, logprob: None, top: Vec::new() },
            };
            self.scored.push(token);
        }
        Ok(())
    }

    /// Logits [V] of the rows of the prefix that predict tokens of the vocabulary; none if there are no virtual tokens.
    fn head_logits(&self, model: &Decoder) -> Result<Vec<Vec<f32>>> {
        let Some(hidden) = &self.prefix.predicting else { return Ok(Vec::new()) };
        Ok(model.logits(hidden)?.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.to_vec2()?)
    }

    /// Chooses the first token of an answer to a text that is given as embeddings.
    pub(super) fn choose_first(&mut self, model: &Decoder) -> Result<()> {
        if let Some(logits) = self.head_logits(model)?.last() {
            self.choose_next(logits);
        }
        Ok(())
    }
}
