//! A request that the engine runs, and what its logits mean for it.

use super::prefixes::Block;
use super::sampling::{Chooser, largest, log_sum_exp, top};
use super::{Event, Request, StopReason, Token};
use crate::Result;
use crate::model::Decoder;
use candle_core::{DType, Device, Tensor};
use std::ops::Range;
use std::sync::Arc;

/// A handle on a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub(super) u64);

/// A request under way.
pub(super) struct Sequence {
    pub(super) id: SequenceId,
    pub(super) request: Request,
    pub(super) chooser: Chooser,
    pub(super) block: Arc<Block>,
    pub(super) own: Range<usize>,
    /// Rows of `own` that are written.
    pub(super) filled: usize,
    pub(super) generated: Vec<u32>,
    pub(super) scored: Vec<Token>,
    /// Events of the step under way.
    pub(super) events: Vec<Event>,
}

impl Sequence {
    /// Tokens of the text that are not in the block.
    pub(super) fn text(&self) -> &[u32] {
        &self.request.tokens[self.block.head.len()..]
    }

    /// The first row of the text whose logits are wanted: that before the first token to score, else the last.
    pub(super) fn first_target(&self) -> usize {
        self.text().len().saturating_sub(self.request.scored + 1)
    }

    /// Tokens before the answer's first that row `row` of `own` stands behind, itself counted.
    pub(super) fn position(&self, row: usize) -> usize {
        self.block.head.len() + row + 1
    }

    /// Hidden state of the last virtual token, which predicts the first token of the text.
    pub(super) fn last_virtual(&self) -> Option<&Tensor> {
        self.block.last.as_ref()
    }

    /// Rows of the next steps that are known: the rest of the text, or a token.
    pub(super) fn rows_to_come(&self) -> usize {
        self.text().len().saturating_sub(self.filled).max(1)
    }

    /// Whether the largest logit is all that is wanted of `row`.
    pub(super) fn takes_the_likeliest(&self, row: usize) -> bool {
        self.position(row) >= self.request.tokens.len()
            && self.request.max_new_tokens > 0
            && self.chooser.is_plain()
            && self.request.logprobs.is_none()
            && (self.request.score.is_empty() || !self.generated.is_empty())
            && !self.must_go_on()
    }

    /// Whether no stop token may come yet.
    fn must_go_on(&self) -> bool {
        self.generated.len() < self.request.min_new_tokens
    }

    /// Takes the logits [V] of one of its rows.
    pub(super) fn read(&mut self, model: &Decoder, row: usize, logits: &[f32]) -> Result<()> {
        let position = self.position(row);
        let text = self.request.tokens.len();
        if position < text {
            if self.scored.is_empty() && self.request.scored == text {
                let first = self.first(model)?;
                self.scored.push(first);
            }
            let token = self.token(self.request.tokens[position], logits, self.request.logprobs);
            self.scored.push(token);
            return Ok(());
        }
        if position == text {
            if self.request.scored > 0 {
                if self.scored.is_empty() && self.request.scored == text {
                    let first = self.first(model)?;
                    self.scored.push(first);
                }
                let scored = std::mem::take(&mut self.scored);
                self.events.push(Event::Scored(scored));
            }
            if !self.request.score.is_empty() {
                let lse = log_sum_exp(logits);
                let of = |token: &u32| f64::from(logits[*token as usize]) - lse;
                self.events.push(Event::FirstScores(self.request.score.iter().map(of).collect()));
            }
        }
        if self.request.max_new_tokens == 0 {
            self.events.push(Event::Finished(StopReason::MaxTokens));
            return Ok(());
        }
        self.go_on(logits);
        Ok(())
    }

    /// Chooses the next token; where the logits are no numbers, this sequence alone ends.
    fn go_on(&mut self, logits: &[f32]) {
        let chosen = if self.chooser.is_plain() && !self.must_go_on() {
            largest(logits)
        } else {
            let forbidden = if self.must_go_on() { self.request.stop_token_ids.clone() } else { [].into() };
            self.chooser.choose(&mut logits.to_vec(), &forbidden)
        };
        match chosen {
            Ok(token) => {
                let token = match self.request.logprobs {
                    Some(_) => self.token(token, logits, self.request.logprobs),
                    None => Token { id: token, logprob: None, top: Vec::new() },
                };
                self.chosen(token);
            }
            Err(error) => self.events.push(Event::Failed(error.to_string())),
        }
    }

    pub(super) fn chosen(&mut self, token: Token) {
        if self.request.stop_token_ids.contains(&token.id) || self.chooser.has_ended() {
            self.events.push(Event::Finished(StopReason::StopToken));
            return;
        }
        self.generated.push(token.id);
        self.events.push(Event::Token(token));
        if self.chooser.is_complete() {
            self.events.push(Event::Finished(StopReason::StopToken));
        } else if self.generated.len() == self.request.max_new_tokens {
            self.events.push(Event::Finished(StopReason::MaxTokens));
        }
    }

    fn token(&self, id: u32, logits: &[f32], likeliest: Option<usize>) -> Token {
        let lse = log_sum_exp(logits);
        let logprob = Some(f64::from(logits[id as usize]) - lse);
        Token { id, logprob, top: top(logits, likeliest.unwrap_or(0), lse) }
    }

    /// The first token of the text, which the last virtual token predicts, where there is one.
    fn first(&self, model: &Decoder) -> Result<Token> {
        let id = self.request.tokens[0];
        let Some(logits) = self.logits_of_last_virtual(model)? else {
            return Ok(Token { id, logprob: None, top: Vec::new() });
        };
        Ok(self.token(id, &logits, self.request.logprobs))
    }

    /// Logits [V] of what follows the last virtual token; `None` when there is none.
    fn logits_of_last_virtual(&self, model: &Decoder) -> Result<Option<Vec<f32>>> {
        let Some(hidden) = self.last_virtual() else { return Ok(None) };
        let logits = model.logits(hidden)?.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
        Ok(Some(logits.flatten_all()?.to_vec1()?))
    }

    /// Chooses the first token of an answer to a text of embeddings.
    pub(super) fn begin(&mut self, model: &Decoder) -> Result<()> {
        if let Some(logits) = self.logits_of_last_virtual(model)? {
            self.go_on(&logits);
        }
        Ok(())
    }
}
