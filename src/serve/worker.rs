//! The one thread that owns the model, and the handle by which requests reach it.

use super::adapters::Served;
use crate::generate::{Event, Request};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock, mpsc};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// Why a request was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// As many requests wait as the limits allow: try again later.
    #[error("{waiting} requests are waiting, which is as many as this server keeps; try again later")]
    Busy {
        /// Requests that wait.
        waiting: usize,
    },
    /// The text and what is to be generated are longer than a sequence may be.
    #[error("expected at most {most} tokens of text and answer together, found {found}")]
    TooLong {
        /// Tokens of text and answer together.
        found: usize,
        /// Tokens that a sequence may have.
        most: usize,
    },
    /// The model of that name was unloaded.
    #[error("the model {0} is not loaded any more")]
    Gone(String),
    /// The server is ending.
    #[error("the server is shutting down")]
    Ending,
}

/// What a step came to, for whoever counts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// Sequences in the pass.
    pub sequences: usize,
    /// Token rows in the pass.
    pub rows: usize,
    /// Tokens generated.
    pub generated: usize,
    /// Requests that wait behind it.
    pub waiting: usize,
    /// Seconds that it took.
    pub seconds: f64,
}

/// What a server keeps for requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Requests that may wait for their first step; one more is [`Refused::Busy`].
    pub queue: usize,
    /// Most tokens of a sequence, text and answer together, virtual tokens not counted.
    pub sequence_tokens: usize,
    /// Rows of the key and value cache, prefixes included.
    pub cache_rows: usize,
    /// Rows that go through the model at a time.
    pub step_rows: usize,
}

/// What reaches the thread.
pub(super) enum Command {
    /// A request for the model of that name, and where its events go.
    Submit {
        /// The model's name.
        model: String,
        /// What is asked.
        request: Request,
        /// Where the answer goes.
        events: UnboundedSender<Event>,
    },
}

/// A handle on the thread that owns the model; cheap to clone.
#[derive(Clone)]
pub struct Client {
    pub(super) commands: mpsc::Sender<Command>,
    pub(super) shared: Arc<Shared>,
}

/// What the thread and its clients both see.
pub(super) struct Shared {
    pub(super) limits: Limits,
    /// Requests that have not had their first step.
    pub(super) waiting: AtomicUsize,
    pub(super) models: RwLock<Arc<[Arc<Served>]>>,
}

impl Client {
    /// The models that requests may name now: the base first, then the tuned prompts by name.
    pub fn models(&self) -> Arc<[Arc<Served>]> {
        self.shared.models.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What this server keeps for requests.
    pub fn limits(&self) -> Limits {
        self.shared.limits
    }

    /// Requests that wait for their first step.
    pub fn waiting(&self) -> usize {
        self.shared.waiting.load(Ordering::Relaxed)
    }

    /// Hands a request over. Its events come through the receiver; when that is dropped, the request ends.
    ///
    /// # Errors
    /// A full queue, a sequence that is too long, a model that is gone, a server that ends.
    pub fn submit(&self, model: &Served, request: Request) -> Result<UnboundedReceiver<Event>, Refused> {
        let limits = self.shared.limits;
        let found = request.tokens.len() + request.max_new_tokens;
        if found > limits.sequence_tokens {
            return Err(Refused::TooLong { found, most: limits.sequence_tokens });
        }
        if !self.models().iter().any(|served| served.name == model.name) {
            return Err(Refused::Gone(model.name.clone()));
        }
        let waiting = &self.shared.waiting;
        let taken = waiting
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| (n < limits.queue).then_some(n + 1));
        if let Err(waiting) = taken {
            return Err(Refused::Busy { waiting });
        }
        let (events, receiver) = unbounded_channel();
        let sent = self.commands.send(Command::Submit { model: model.name.clone(), request, events });
        match sent {
            Ok(()) => Ok(receiver),
            Err(_) => {
                waiting.fetch_sub(1, Ordering::Relaxed);
                Err(Refused::Ending)
            }
        }
    }
}
