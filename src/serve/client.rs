//! The handle by which requests reach the thread that owns the model ([`super::worker`]).

use super::limits::ServerLimits;
use crate::generate::{Event, Request};
use crate::prompt::peft::Adapter;
use crate::serve::served::Served;
use crate::{Error, Result};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock, mpsc};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// Why a request was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// As many requests wait as the limits allow: try again later.
    #[error("{waiting} requests are waiting, which is as many as this server keeps; try again later")]
    Busy {
        /// Requests that wait.
        waiting: usize,
    },
    /// Virtual tokens, text and what is to be generated are longer together than a sequence may be.
    #[error("expected at most {most} virtual tokens, tokens of text and of answer together, found {found}")]
    TooLong {
        /// Tokens that there would be.
        found: usize,
        /// Tokens that a sequence may have.
        most: usize,
    },
    /// The request asks for what the model does not have.
    #[error("{0}")]
    Invalid(String),
    /// The model of that name was unloaded.
    #[error("the model {0} is not loaded any more")]
    Gone(String),
    /// The server is ending.
    #[error("the server is shutting down")]
    Ending,
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
    /// A tuned prompt, in the place of one of its name where there is one.
    Load {
        /// The name, and what is said of the prompt.
        served: Served,
        /// The prompt.
        adapter: Box<Adapter>,
        /// Where the outcome goes.
        done: mpsc::Sender<Result<()>>,
    },
    /// The tuned prompt of that name is to go; requests under way behind it end as they would have.
    Unload(String),
    /// The thread is to end when the requests that it has are done.
    End,
}

/// A handle on the thread that owns the model; cheap to clone.
#[derive(Clone)]
pub struct Client {
    pub(super) commands: mpsc::Sender<Command>,
    pub(super) shared: Arc<WorkerState>,
}

/// What the thread and its clients both see.
pub(super) struct WorkerState {
    pub(super) limits: ServerLimits,
    pub(super) vocab_size: usize,
    pub(super) hidden_size: usize,
    /// Requests that have not had their first step.
    pub(super) waiting: AtomicUsize,
    pub(super) models: RwLock<Arc<[Arc<Served>]>>,
    /// Whether the thread takes requests.
    pub(super) serving: AtomicBool,
}

impl Client {
    /// The models that requests may name now: the base first, then the tuned prompts by name.
    pub fn models(&self) -> Arc<[Arc<Served>]> {
        self.shared.models.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What this server keeps for requests.
    pub fn limits(&self) -> ServerLimits {
        self.shared.limits
    }

    /// Tokens of text and answer together that there is room for behind the model's virtual tokens.
    pub fn room(&self, model: &Served) -> usize {
        self.shared.limits.sequence_tokens.saturating_sub(model.virtual_tokens)
    }

    /// Requests that wait for their first step.
    pub fn waiting(&self) -> usize {
        self.shared.waiting.load(Ordering::Relaxed)
    }

    /// Whether requests are taken: false from the end of the thread on.
    pub fn is_serving(&self) -> bool {
        self.shared.serving.load(Ordering::Relaxed)
    }

    /// Hands a request over. Its events come through the receiver; when that is dropped, the request ends.
    ///
    /// # Errors
    /// A full queue, a sequence that is too long, tokens beyond the vocabulary, a model that is gone, a server that
    /// ends.
    pub fn submit(
        &self,
        model: &Served,
        request: Request,
    ) -> std::result::Result<UnboundedReceiver<Event>, SubmitError> {
        // The thread marks its end before it drops the commands that nobody takes any more.
        if !self.is_serving() {
            return Err(SubmitError::Ending);
        }
        let limits = self.shared.limits;
        let text = model.virtual_tokens + request.text_positions();
        let found = text.saturating_add(request.max_new_tokens);
        if found > limits.sequence_tokens {
            return Err(SubmitError::TooLong { found, most: limits.sequence_tokens });
        }
        let (vocab_size, hidden_size) = (self.shared.vocab_size, self.shared.hidden_size);
        if let Some(embeds) =
            request.embeds.as_ref().filter(|embeds| embeds.dims().get(1) != Some(&hidden_size))
        {
            let problem = format!("expected embeddings [T, {hidden_size}], found {:?}", embeds.dims());
            return Err(SubmitError::Invalid(problem));
        }
        let choices = request.choices.iter().flat_map(|choices| choices.tokens());
        let mut ids = request.tokens.iter().chain(&request.score).copied().chain(choices);
        if let Some(id) = ids.find(|id| *id as usize >= vocab_size) {
            return Err(SubmitError::Invalid(format!("expected token ids under {vocab_size}, found {id}")));
        }
        if !self.models().iter().any(|served| served.name == model.name) {
            return Err(SubmitError::Gone(model.name.clone()));
        }
        let waiting = &self.shared.waiting;
        let taken = waiting
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| (n < limits.queue).then_some(n + 1));
        if let Err(waiting) = taken {
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

    /// Offers a tuned prompt under `served`'s name, in the place of the one of that name where there is one. Returns when
    /// its keys and values are there.
    ///
    /// # Errors
    /// A prompt of another width than the model's, no room in the cache, the device's; a server that ends.
    pub fn load(&self, served: Served, adapter: Adapter) -> Result<()> {
        let ending = || Error::Invalid(SubmitError::Ending.to_string());
        let (done, outcome) = mpsc::channel();
        let command = Command::Load { served, adapter: Box::new(adapter), done };
        self.commands.send(command).map_err(|_| ending())?;
        outcome.recv().map_err(|_| ending())?
    }

    /// Offers the tuned prompt of that name no longer; requests under way behind it go on.
    pub fn unload(&self, name: &str) {
        // A thread that has ended offers nothing.
        let _ = self.commands.send(Command::Unload(name.to_owned()));
    }

    /// Has the thread end once the requests that it has are done.
    pub fn end(&self) {
        let _ = self.commands.send(Command::End);
    }
}
