//! One sequence that the model generates: from the worker's events to pieces of text.

use super::ensemble;
use super::metrics::Meter;
use crate::generate::stop::{FilteredText, StopFilter};
use crate::generate::text_stream::TextStream;
use crate::generate::{Event, Request, StopReason, Token};
use crate::serve::api_error::ApiError;
use crate::serve::served::Served;
use crate::serve::state::AppState;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;
use tokio::sync::mpsc::UnboundedReceiver;

/// Why a text ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum FinishReason {
    EndOfText,
    MaxTokens,
    TimeLimit,
    /// A stop sequence of the request.
    Sequence(String),
}

/// The output of a sequence, in this order.
#[derive(Debug, PartialEq)]
pub(super) enum Piece {
    /// The trailing tokens of the text, as many as [`Request::scored`] says.
    Scored(Vec<Token>),
    /// Log-probabilities of [`Request::score`].
    First(Vec<f64>),
    /// More text, and the tokens since the last piece.
    Text { text: String, tokens: Vec<Token> },
    /// The last piece.
    End { reason: FinishReason, generated: usize },
}

/// Where a text ends, and which tokens are part of it.
#[derive(Debug, Clone, Default)]
pub(super) struct Stopping {
    /// The text ends before the first of them.
    pub sequences: Vec<String>,
    /// Whether the text includes the stop sequence that ended it.
    pub include: bool,
    /// Whether the text includes special tokens.
    pub show_special: bool,
}

/// A running request. It is cancelled when this is dropped.
pub(super) struct Generation {
    state: Arc<AppState>,
    events: Option<UnboundedReceiver<Event>>,
    text: TextStream,
    stop: StopFilter,
    include_stop: bool,
    min_new_tokens: usize,
    generated: usize,
    /// Tokens whose text has not been returned yet.
    tokens: Vec<Token>,
    ready: VecDeque<Piece>,
    meter: Meter,
}

impl Generation {
    /// Submits a request to the worker.
    ///
    /// # Errors
    /// Returns an error if the worker refuses the request, the server is ending, or the tokenizer cannot decode the
    /// text.
    pub fn start(
        state: &Arc<AppState>,
        model: &Served,
        request: Request,
        stopping: &Stopping,
        started: Instant,
    ) -> Result<Self, ApiError> {
        if state.is_ending() {
            return Err(ApiError::ending());
        }
        // A choice is decoded by itself, without regard to the text before it.
        let before = if request.choices.is_some() { &[] } else { &request.tokens[..] };
        let text = TextStream::new(&state.tokenizer.tokenizer, before, !stopping.show_special)?;
        let min_new_tokens = request.min_new_tokens;
        let tokens = request.text_positions() + model.virtual_tokens;
        let events = match model.members.is_empty() {
            true => state.client.submit(model, request)?,
            false => ensemble::submit(state, model, request, started)?,
        };
        let meter = Meter::new(&state.metrics, started);
        // Those of an ensemble are counted with its prompts' sequences.
        if model.members.is_empty() {
            meter.count_prompt_tokens(tokens);
        }
        Ok(Self {
            state: state.clone(),
            events: Some(events),
            text,
            stop: StopFilter::new(stopping.sequences.clone()),
            include_stop: stopping.include,
            min_new_tokens,
            generated: 0,
            tokens: Vec::new(),
            ready: VecDeque::new(),
            meter,
        })
    }

    /// The next piece; `None` after the last one.
    pub async fn next(&mut self) -> Option<Result<Piece, ApiError>> {
        poll_fn(|context| self.poll_next(context)).await
    }

    pub fn poll_next(&mut self, context: &mut Context) -> Poll<Option<Result<Piece, ApiError>>> {
        loop {
            if let Some(piece) = self.ready.pop_front() {
                return Poll::Ready(Some(Ok(piece)));
            }
            let Some(events) = &mut self.events else { return Poll::Ready(None) };
            let handled = match ready!(events.poll_recv(context)) {
                Some(event) => self.handle(event),
                None if self.state.is_ending() => Err(ApiError::ending()),
                None => Err(ApiError::internal("the model's thread ended without an answer")),
            };
            if let Err(error) = handled {
                self.events = None;
                return Poll::Ready(Some(Err(error)));
            }
        }
    }

    fn handle(&mut self, event: Event) -> Result<(), ApiError> {
        match event {
            Event::Scored(tokens) => self.ready.push_back(Piece::Scored(tokens)),
            Event::FirstScores(scores) => self.ready.push_back(Piece::First(scores)),
            Event::Token(token) => self.token(token)?,
            Event::Finished(reason) => {
                let text = self.stop.finish();
                self.end(
                    text,
                    match reason {
                        StopReason::StopToken => FinishReason::EndOfText,
                        StopReason::MaxTokens => FinishReason::MaxTokens,
                        StopReason::TimeLimit => FinishReason::TimeLimit,
                    },
                );
            }
            Event::Failed(problem) => return Err(ApiError::internal(problem)),
            Event::NoMemory(problem) => return Err(ApiError::no_memory(problem)),
        }
        Ok(())
    }

    fn token(&mut self, token: Token) -> Result<(), ApiError> {
        self.generated += 1;
        self.meter.count_token();
        let tokenizer = &self.state.tokenizer;
        let text = self.text.push(&tokenizer.tokenizer, token.id)?;
        let special = (!self.stop.is_empty() && tokenizer.is_special(token.id))
            .then(|| tokenizer.tokenizer.id_to_token(token.id));
        self.tokens.push(token);
        if self.generated < self.min_new_tokens {
            self.push_text(text);
            return Ok(());
        }
        let mut passed = self.stop.push(&text);
        if let (None, Some(token)) = (&passed.stop, special.flatten()) {
            let special = self.stop.push_special(&token);
            passed = FilteredText { text: passed.text + &special.text, ..special };
        }
        match passed.stop {
            Some(stop) => {
                if self.include_stop {
                    passed.text.push_str(&stop);
                }
                self.end(passed.text, FinishReason::Sequence(stop));
            }
            None => self.push_text(passed.text),
        }
        Ok(())
    }

    /// Adds a piece with this text and the tokens since the last piece.
    fn push_text(&mut self, text: String) {
        if !text.is_empty() {
            self.ready.push_back(Piece::Text { text, tokens: std::mem::take(&mut self.tokens) });
        }
    }

    fn end(&mut self, text: String, reason: FinishReason) {
        if !text.is_empty() || !self.tokens.is_empty() {
            self.ready.push_back(Piece::Text { text, tokens: std::mem::take(&mut self.tokens) });
        }
        self.ready.push_back(Piece::End { reason, generated: self.generated });
        // Dropped here, so that the worker stops at once when a stop sequence has ended the text.
        self.events = None;
    }

    /// The complete output.
    ///
    /// # Errors
    /// Returns an error if the device fails or the worker ends.
    pub async fn collect(mut self) -> Result<GeneratedText, ApiError> {
        let mut generated_text = GeneratedText::default();
        while let Some(piece) = self.next().await {
            match piece? {
                Piece::Scored(tokens) => generated_text.scored = tokens,
                Piece::First(scores) => generated_text.first = scores,
                Piece::Text { text, tokens } => {
                    generated_text.text.push_str(&text);
                    generated_text.tokens.extend(tokens);
                }
                Piece::End { reason, generated } => {
                    generated_text.reason = Some(reason);
                    generated_text.generated = generated;
                }
            }
        }
        Ok(generated_text)
    }
}

/// The complete output of a sequence.
#[derive(Debug, Default)]
pub(super) struct GeneratedText {
    pub scored: Vec<Token>,
    pub first: Vec<f64>,
    pub text: String,
    pub tokens: Vec<Token>,
    pub reason: Option<FinishReason>,
    pub generated: usize,
}

/// Several sequences, whose pieces are returned as they arrive.
pub(super) struct Generations {
    all: Vec<Option<Generation>>,
    /// The sequence that is polled first, so that each gets its turn.
    next_index: usize,
}

impl Generations {
    pub fn new(all: Vec<Generation>) -> Self {
        Self { all: all.into_iter().map(Some).collect(), next_index: 0 }
    }

    /// The next piece of any sequence, with the sequence's index; `None` when all have ended.
    pub async fn next(&mut self) -> Option<(usize, Result<Piece, ApiError>)> {
        poll_fn(|context| self.poll_next(context)).await
    }

    fn poll_next(&mut self, context: &mut Context) -> Poll<Option<(usize, Result<Piece, ApiError>)>> {
        let n = self.all.len();
        let mut is_pending = false;
        for index in (0..n).map(|i| (self.next_index + i) % n) {
            let Some(generation) = &mut self.all[index] else { continue };
            match generation.poll_next(context) {
                Poll::Ready(Some(piece)) => {
                    self.next_index = index + 1;
                    return Poll::Ready(Some((index, piece)));
                }
                Poll::Ready(None) => self.all[index] = None,
                Poll::Pending => is_pending = true,
            }
        }
        if is_pending { Poll::Pending } else { Poll::Ready(None) }
    }
}

#[cfg(test)]
mod tests;
