//! The handle by which requests reach the thread that owns the model ([`super::worker`]).

use super::limits::ServerLimits;
use crate::generate::{Event, Request};
use crate::prompt::peft::Adapter;
use crate::serve::served::Served;
use crate::{Error, Result};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock, mpsc};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// Why a request was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The queue is full. The client may try again later.
    #[error("{waiting} requests are waiting, which is as many as this server keeps; try again later")]
    Busy {
        /// Number of waiting requests.
        waiting: usize,
    },
    /// Virtual tokens, text and answer together are longer than a sequence may be.
    #[error("expected at most {most} virtual tokens, tokens of text and of answer together, found {found}")]
    TooLong {
        /// Number of tokens that the sequence would have.
        found: usize,
        /// Number of tokens that a sequence may have.
        most: usize,
    },
    /// The request has values that the model does not support.
    #[error("{0}")]
    Invalid(String),
    /// The model of that name was unloaded.
    #[error("the model {0} is not loaded any more")]
    Gone(String),
    /// The server is ending.
    #[error("the server is shutting down")]
    Ending,
}

/// A command to the thread.
pub(super) enum Command {
    /// Runs a request.
    Submit {
        /// The model's name.
        model: String,
        /// The request.
        request: Request,
        /// Receives the events.
        events: UnboundedSender<Event>,
    },
    /// Adds a tuned prompt, or replaces the one of the same name.
    Load {
        /// The prompt's name and description.
        served: Served,
        /// The prompt.
        adapter: Box<Adapter>,
        /// Receives the result.
        done: mpsc::Sender<Result<()>>,
    },
    /// Adds an ensemble with a prompt for each of its members.
    LoadEnsemble {
        /// The ensemble.
        served: Served,
        /// The prompts, in the order of the members.
        adapters: Vec<Adapter>,
        /// Receives the result.
        done: mpsc::Sender<Result<()>>,
    },
    /// Removes the tuned prompt of this name. Requests in progress finish with it.
    Unload(String),
    /// Ends the thread when its requests are complete.
    End,
}

/// A handle to the thread that owns the model; cheap to clone.
#[derive(Clone)]
pub struct Client {
    pub(super) commands: mpsc::Sender<Command>,
    pub(super) shared: Arc<WorkerState>,
}

/// The state that the thread and its clients share.
pub(super) struct WorkerState {
    pub(super) limits: ServerLimits,
    pub(super) vocab_size: usize,
    pub(super) hidden_size: usize,
    /// Number of requests that have not had their first step.
    pub(super) waiting: AtomicUsize,
    pub(super) models: RwLock<Arc<[Arc<Served>]>>,
    /// Whether the thread accepts requests.
    pub(super) serving: AtomicBool,
}

impl Client {
    /// The models that requests may name now: the base model first, then the tuned prompts by name.
    pub fn models(&self) -> Arc<[Arc<Served>]> {
        self.shared.models.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The limits of this server.
    pub fn limits(&self) -> ServerLimits {
        self.shared.limits
    }

    /// Most tokens of text and answer together after the model's virtual tokens.
    pub fn room(&self, model: &Served) -> usize {
        self.shared.limits.sequence_tokens.saturating_sub(model.virtual_tokens)
    }

    /// Number of requests that wait for their first step.
    pub fn waiting(&self) -> usize {
        self.shared.waiting.load(Ordering::Relaxed)
    }

    /// Whether requests are accepted: false after the thread has ended.
    pub fn is_serving(&self) -> bool {
        self.shared.serving.load(Ordering::Relaxed)
    }

    /// Submits a request. Its events come through the receiver; when the receiver is dropped, the request is cancelled.
    ///
    /// # Errors
    /// Returns an error if the queue is full, the sequence would be too long, a token is outside the vocabulary, the
    /// model was unloaded or the server is ending.
    pub fn submit(
        &self,
        model: &Served,
        request: Request,
    ) -> std::result::Result<UnboundedReceiver<Event>, SubmitError> {
        // The thread sets this flag before it drops the commands that it does not handle any more.
        if !self.is_serving() {
            return Err(SubmitError::Ending);
        }
        let limits = self.shared.limits;
        let text = model.virtual_tokens + request.text_positions();
        let tokens = text.saturating_add(request.max_new_tokens);
        if tokens > limits.sequence_tokens {
            return Err(SubmitError::TooLong { found: tokens, most: limits.sequence_tokens });
        }
        let (vocab_size, hidden_size) = (self.shared.vocab_size, self.shared.hidden_size);
        if let Some(embeds) =
            request.embeds.as_ref().filter(|embeds| embeds.dims().get(1) != Some(&hidden_size))
        {
            let problem = format!("expected embeddings [T, {hidden_size}], found {:?}", embeds.dims());
            return Err(SubmitError::Invalid(problem));
        }
        if let Some(before) = model.task.as_ref().and_then(|task| task.before.as_ref()) {
            before.check(&request.tokens).map_err(SubmitError::Invalid)?;
        }
        let choices = request.choices.iter().flat_map(|choices| choices.tokens());
        let mut ids = request.tokens.iter().chain(&request.score).copied().chain(choices);
        if let Some(id) = ids.find(|id| *id as usize >= vocab_size) {
            return Err(SubmitError::Invalid(format!("expected token ids under {vocab_size}, found {id}")));
        }
        let has_name = |served: &Arc<Served>| served.name == model.name;
        if !self.models().iter().any(|served| has_name(served) || served.members.iter().any(has_name)) {
            return Err(SubmitError::Gone(model.name.clone()));
        }
        let waiting = &self.shared.waiting;
        let counted = waiting
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| (n < limits.queue).then_some(n + 1));
        if let Err(waiting) = counted {
            return Err(SubmitError::Busy { waiting });
        }
        let (events, receiver) = unbounded_channel();
        let sent = self.commands.send(Command::Submit { model: model.name.clone(), request, events });
        match sent {
            Ok(()) => Ok(receiver),
            Err(_) => {
                waiting.fetch_sub(1, Ordering::Relaxed);
                Err(SubmitError::Ending)
            }
        }
    }

    /// Adds a tuned prompt under `served`'s name, or replaces the one of this name. Returns when its keys and values
    /// are computed.
    ///
    /// # Errors
    /// Returns an error if the prompt has another width than the model, the cache has no room for it, a device
    /// operation fails or the server is ending.
    pub fn load(&self, served: Served, adapter: Adapter) -> Result<()> {
        self.wait_for(|done| Command::Load { served, adapter: Box::new(adapter), done })
    }

    /// Adds an ensemble ([`Served::ensemble`]) with a prompt for each of its members. Returns when their keys and values are
    /// computed.
    ///
    /// # Errors
    /// As [`Client::load`]; also if another model has the ensemble's name.
    pub fn load_ensemble(&self, served: Served, adapters: Vec<Adapter>) -> Result<()> {
        self.wait_for(|done| Command::LoadEnsemble { served, adapters, done })
    }

    /// Sends a command and waits for its result.
    fn wait_for(&self, command: impl FnOnce(mpsc::Sender<Result<()>>) -> Command) -> Result<()> {
        let ending = || Error::Invalid(SubmitError::Ending.to_string());
        let (done, outcome) = mpsc::channel();
        self.commands.send(command(done)).map_err(|_| ending())?;
        outcome.recv().map_err(|_| ending())?
    }

    /// Removes the tuned prompt of this name. Requests in progress finish with it.
    pub fn unload(&self, name: &str) {
        // A thread that has ended has no prompts.
        let _ = self.commands.send(Command::Unload(name.to_owned()));
    }

    /// Ends the thread when its requests are complete.
    pub fn end(&self) {
        let _ = self.commands.send(Command::End);
    }
}
