//! One sequence that the model generates: from events of the worker to pieces of text.

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

/// What comes of a sequence, in this order.
#[derive(Debug, PartialEq)]
pub(super) enum Piece {
    /// The trailing tokens of the text, as many as [`Request::scored`] says.
    Scored(Vec<Token>),
    /// Log-probabilities of [`Request::score`].
    First(Vec<f64>),
    /// Some more text, and the tokens since the last piece.
    Text { text: String, tokens: Vec<Token> },
    /// Nothing comes behind this.
    End { reason: FinishReason, generated: usize },
}

/// How tokens become text.
#[derive(Debug, Clone, Default)]
pub(super) struct Stopping {
    /// The text ends before the first of them.
    pub sequences: Vec<String>,
    /// The text ends behind it instead.
    pub include: bool,
    /// Special tokens have their text too.
    pub show_special: bool,
}

/// A request that is under way; dropped, it is cancelled.
pub(super) struct Generation {
    app: Arc<AppState>,
    events: Option<UnboundedReceiver<Event>>,
    text: TextStream,
    stop: StopFilter,
    include_stop: bool,
    min_new_tokens: usize,
    generated: usize,
    /// Tokens whose text was not given yet.
    tokens: Vec<Token>,
    ready: VecDeque<Piece>,
    meter: Meter,
}

impl Generation {
    /// Hands a request to the worker.
    ///
    /// # Errors
    /// What the worker refuses; the tokenizer's.
    pub fn start(
        app: &Arc<AppState>,
        model: &Served,
        request: Request,
        stopping: &Stopping,
        started: Instant,
    ) -> Result<Self, ApiError> {
        if app.is_ending() {
            return Err(ApiError::ending());
        }
        // A choice is a text by itself, whatever a decoder would make of it behind another.
        let before = if request.choices.is_some() { &[] } else { &request.tokens[..] };
        let text = TextStream::new(&app.tokenizer.tokenizer, before, !stopping.show_special)?;
        let min_new_tokens = request.min_new_tokens;
        let tokens = request.text_positions() + model.virtual_tokens;
        let events = app.client.submit(model, request)?;
        let meter = Meter::new(&app.metrics, started);
        meter.asked(tokens);
        Ok(Self {
            app: app.clone(),
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

    /// The next piece; `None` behind the end.
    pub async fn next(&mut self) -> Option<Result<Piece, ApiError>> {
        poll_fn(|context| self.poll_next(context)).await
    }

    pub fn poll_next(&mut self, context: &mut Context) -> Poll<Option<Result<Piece, ApiError>>> {
        loop {
            if let Some(piece) = self.ready.pop_front() {
                return Poll::Ready(Some(Ok(piece)));
            }
            let Some(events) = &mut self.events else { return Poll::Ready(None) };
            let taken = match ready!(events.poll_recv(context)) {
                Some(event) => self.take(event),
                None if self.app.is_ending() => Err(ApiError::ending()),
                None => Err(ApiError::internal("the model's thread ended without an answer")),
            };
            if let Err(failure) = taken {
                self.events = None;
                return Poll::Ready(Some(Err(failure)));
            }
        }
    }

    fn take(&mut self, event: Event) -> Result<(), ApiError> {
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
        self.meter.token();
        let tokenizer = &self.app.tokenizer;
        let text = self.text.push(&tokenizer.tokenizer, token.id)?;
        let special = (!self.stop.is_empty() && tokenizer.is_special(token.id))
            .then(|| tokenizer.tokenizer.id_to_token(token.id));
        self.tokens.push(token);
        if self.generated < self.min_new_tokens {
            self.give(text);
            return Ok(());
        }
        let mut passed = self.stop.push(&text);
        if let (None, Some(token)) = (&passed.stop, special.flatten()) {
            let behind = self.stop.push_special(&token);
            passed = FilteredText { text: passed.text + &behind.text, ..behind };
        }
        match passed.stop {
            Some(stop) => {
                if self.include_stop {
                    passed.text.push_str(&stop);
                }
                self.end(passed.text, FinishReason::Sequence(stop));
            }
            None => self.give(passed.text),
        }
        Ok(())
    }

    /// Makes a piece of the text, with the tokens since the last one.
    fn give(&mut self, text: String) {
        if !text.is_empty() {
            self.ready.push_back(Piece::Text { text, tokens: std::mem::take(&mut self.tokens) });
        }
    }

    fn end(&mut self, text: String, reason: FinishReason) {
        if !text.is_empty() || !self.tokens.is_empty() {
            self.ready.push_back(Piece::Text { text, tokens: std::mem::take(&mut self.tokens) });
        }
        self.ready.push_back(Piece::End { reason, generated: self.generated });
        // Dropped here, so that the worker stops at once where a stop sequence ended the text.
        self.events = None;
    }

    /// Everything that comes of the sequence.
    ///
    /// # Errors
    /// The device's, and a worker that ends.
    pub async fn whole(mut self) -> Result<GeneratedText, ApiError> {
        let mut whole = GeneratedText::default();
        while let Some(piece) = self.next().await {
            match piece? {
                Piece::Scored(tokens) => whole.scored = tokens,
                Piece::First(scores) => whole.first = scores,
                Piece::Text { text, tokens } => {
                    whole.text.push_str(&text);
                    whole.tokens.extend(tokens);
                }
                Piece::End { reason, generated } => {
                    whole.reason = Some(reason);
                    whole.generated = generated;
                }
            }
        }
        Ok(whole)
    }
}

/// What came of a sequence.
#[derive(Debug, Default)]
pub(super) struct GeneratedText {
    pub scored: Vec<Token>,
    pub first: Vec<f64>,
    pub text: String,
    pub tokens: Vec<Token>,
    pub reason: Option<FinishReason>,
    pub generated: usize,
}

/// Several sequences whose pieces come as they do.
pub(super) struct Generations {
    all: Vec<Option<Generation>>,
    /// Where to look first, so that none starves.
    from: usize,
}

impl Generations {
    pub fn new(all: Vec<Generation>) -> Self {
        Self { all: all.into_iter().map(Some).collect(), from: 0 }
    }

    /// The next piece of any, with its sequence's place; `None` when all have ended.
    pub async fn next(&mut self) -> Option<(usize, Result<Piece, ApiError>)> {
        poll_fn(|context| self.poll_next(context)).await
    }

    fn poll_next(&mut self, context: &mut Context) -> Poll<Option<(usize, Result<Piece, ApiError>)>> {
        let n = self.all.len();
        let mut open = false;
        for at in (0..n).map(|i| (self.from + i) % n) {
            let Some(generation) = &mut self.all[at] else { continue };
            match generation.poll_next(context) {
                Poll::Ready(Some(piece)) => {
                    self.from = at + 1;
                    return Poll::Ready(Some((at, piece)));
                }
                Poll::Ready(None) => self.all[at] = None,
                Poll::Pending => open = true,
            }
        }
        if open { Poll::Pending } else { Poll::Ready(None) }
    }
}

#[cfg(test)]
mod tests;
