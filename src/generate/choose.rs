//! From the hidden states of a step's target rows to what their sequences make of the logits.

use super::engine::Sequence;
use super::sampling::{largest, log_sum_exp, top};
use super::{Event, StopReason, Token};
use crate::Result;
use crate::device::Shortage;
use crate::model::Granite;
use crate::ops::cpu::View;
use candle_core::{D, DType, Device, Tensor};
use rayon::prelude::*;

/// The target rows of one sequence: row numbers of its own, in order, beside where their logits are.
struct Rows<'a> {
    sequence: &'a mut Sequence,
    rows: Vec<(usize, usize)>,
}

/// What the device has to say of some rows.
enum Found {
    /// The likeliest token of each.
    Tokens(Vec<u32>),
    /// Logits f32 [rows, V] on the CPU.
    Logits(Tensor),
}

/// Gives each sequence the logits of its rows: `rows` names (sequence, its own row) of each of `hidden` [rows, C]. Logits
/// exist for some rows at a time, fewer where the device runs out of memory; a sequence whose single row's logits do not
/// fit ends.
pub(super) fn choose(
    model: &Granite,
    hidden: &Tensor,
    rows: &[(usize, usize)],
    running: &mut [Sequence],
    shortage: &mut Shortage,
) -> Result<()> {
    let (mut start, mut step) = (0, model.head_rows());
    while start < rows.len() {
        let some = &rows[start..rows.len().min(start + step)];
        let plain = some.iter().all(|(i, row)| running[*i].takes_the_likeliest(*row));
        match find(model, &hidden.narrow(0, start, some.len())?, plain) {
            Ok(found) => {
                give(model, found, some, running)?;
                start += some.len();
            }
            Err(error) if shortage.caused(&error) => {
                if some.len() == 1 {
                    running[some[0].0].events.push(Event::no_memory(&error));
                    start += 1;
                } else {
                    step = some.len() / 2;
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// All that is asked of the device; with `plain` the likeliest token of each row is enough.
fn find(model: &Granite, hidden: &Tensor, plain: bool) -> Result<Found> {
    let logits = model.logits(hidden)?;
    if plain && !logits.device().is_cpu() {
        // A number a row comes back from the device, and not a vocabulary.
        return Ok(Found::Tokens(logits.argmax(D::Minus1)?.to_vec1::<u32>()?));
    }
    Ok(Found::Logits(logits.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.contiguous()?))
}

fn give(model: &Granite, found: Found, rows: &[(usize, usize)], running: &mut [Sequence]) -> Result<()> {
    let logits = match found {
        Found::Tokens(tokens) => {
            for ((i, _), token) in rows.iter().zip(tokens) {
                running[*i].chosen(Token { id: token, logprob: None, top: Vec::new() });
            }
            return Ok(());
        }
        Found::Logits(logits) => logits,
    };
    let values = View::<f32>::new("logits", &logits)?;
    let vocabulary = logits.dims()[1];
    let mut of: Vec<Rows> = running.iter_mut().map(|sequence| Rows { sequence, rows: Vec::new() }).collect();
    for (at, (i, row)) in rows.iter().enumerate() {
        of[*i].rows.push((*row, at));
    }
    of.retain(|of| !of.rows.is_empty());
    of.par_iter_mut().try_for_each(|Rows { sequence, rows }| {
        rows.iter().try_for_each(|(row, at)| {
            sequence.read(model, *row, &values[at * vocabulary..(at + 1) * vocabulary])
        })
    })
}

impl Sequence {
    /// Whether the largest logit is all that is wanted of `row`.
    fn takes_the_likeliest(&self, row: usize) -> bool {
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
    fn read(&mut self, model: &Granite, row: usize, logits: &[f32]) -> Result<()> {
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

    fn chosen(&mut self, token: Token) {
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
    fn first(&self, model: &Granite) -> Result<Token> {
        let id = self.request.tokens[0];
        let Some(logits) = self.logits_of_last_virtual(model)? else {
            return Ok(Token { id, logprob: None, top: Vec::new() });
        };
        Ok(self.token(id, &logits, self.request.logprobs))
    }

    /// Logits [V] of what follows the last virtual token; `None` when there is none.
    fn logits_of_last_virtual(&self, model: &Granite) -> Result<Option<Vec<f32>>> {
        let Some(hidden) = self.last_virtual() else { return Ok(None) };
        let logits = model.logits(hidden)?.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
        Ok(Some(logits.flatten_all()?.to_vec1()?))
    }

    /// Chooses the first token of an answer to a text of embeddings.
    pub(super) fn begin(&mut self, model: &Granite) -> Result<()> {
        if let Some(logits) = self.logits_of_last_virtual(model)? {
            self.go_on(&logits);
        }
        Ok(())
    }
}
