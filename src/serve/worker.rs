//! The one thread that owns the model, and the handle by which requests reach it.

use super::adapters::Served;
use crate::adapter::Adapter;
use crate::generate::{Engine, Event, PrefixId, Request, SequenceId};
use crate::model::Granite;
use crate::{Error, Result};
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::sync::{Arc, PoisonError, RwLock, mpsc};
use std::thread::JoinHandle;
use std::time::Instant;
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
    /// Most tokens of a sequence: virtual tokens, text and answer together. No more than the model has positions.
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
    pub(super) shared: Arc<Shared>,
}

/// What the thread and its clients both see.
pub(super) struct Shared {
    pub(super) limits: Limits,
    pub(super) vocab_size: usize,
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
    pub fn limits(&self) -> Limits {
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
    ) -> std::result::Result<UnboundedReceiver<Event>, Refused> {
        let limits = self.shared.limits;
        let text = model.virtual_tokens + request.tokens.len();
        let found = text.saturating_add(request.max_new_tokens);
        if found > limits.sequence_tokens {
            return Err(Refused::TooLong { found, most: limits.sequence_tokens });
        }
        let vocab_size = self.shared.vocab_size;
        if let Some(id) = request.tokens.iter().chain(&request.score).find(|id| **id as usize >= vocab_size) {
            return Err(Refused::Invalid(format!("expected token ids under {vocab_size}, found {id}")));
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

    /// Offers a tuned prompt under `served`'s name, in the place of the one of that name where there is one. Returns when
    /// its keys and values are there.
    ///
    /// # Errors
    /// A prompt of another width than the model's, no room in the cache, the device's; a server that ends.
    pub fn load(&self, served: Served, adapter: Adapter) -> Result<()> {
        let ending = || Error::Invalid(Refused::Ending.to_string());
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

/// Starts the thread: it owns `model`, which is offered as `base`, and tells `watch` of every step.
///
/// # Errors
/// The device's, where it has no room for the cache.
pub fn start(
    model: Granite,
    base: Served,
    limits: Limits,
    watch: impl Fn(Step) + Send + 'static,
) -> Result<(Client, JoinHandle<()>)> {
    let (commands, inbox) = mpsc::channel();
    let positions = model.config().max_position_embeddings.min(limits.cache_rows);
    let limits = Limits { sequence_tokens: limits.sequence_tokens.min(positions), ..limits };
    let shared = Arc::new(Shared {
        limits,
        vocab_size: model.config().vocab_size,
        waiting: AtomicUsize::new(0),
        models: RwLock::new(Arc::from([Arc::new(base.clone())])),
        serving: AtomicBool::new(true),
    });
    let client = Client { commands, shared: shared.clone() };
    let (ready, started) = mpsc::channel();
    let body = move || {
        let _ends = Ends(shared.clone());
        match Worker::new(&model, base, shared, watch) {
            Ok(worker) => {
                let _ = ready.send(Ok(()));
                worker.run(&inbox);
            }
            Err(error) => {
                let _ = ready.send(Err(error));
            }
        }
    };
    let spawned = std::thread::Builder::new().name("model".into()).spawn(body);
    let thread = spawned.map_err(|e| Error::Invalid(format!("the model's thread could not start: {e}")))?;
    match started.recv() {
        Ok(Ok(())) => Ok((client, thread)),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(Error::Invalid("the model's thread ended as it started".into())),
    }
}

/// Says that the thread has ended, by a panic too.
struct Ends(Arc<Shared>);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.serving.store(false, Ordering::Relaxed);
    }
}

struct Worker<'m, W> {
    engine: Engine<'m>,
    model: &'m Granite,
    base: Served,
    shared: Arc<Shared>,
    watch: W,
    prefixes: BTreeMap<String, PrefixId>,
    served: BTreeMap<String, Arc<Served>>,
    streams: HashMap<SequenceId, UnboundedSender<Event>>,
    /// Requests that are counted as waiting.
    counted: usize,
    ending: bool,
}

impl<'m, W: Fn(Step)> Worker<'m, W> {
    fn new(model: &'m Granite, base: Served, shared: Arc<Shared>, watch: W) -> Result<Self> {
        let mut engine = Engine::new(model, shared.limits.cache_rows, shared.limits.step_rows)?;
        let prefixes = BTreeMap::from([(base.name.clone(), engine.add_prefix(None)?)]);
        Ok(Self {
            engine,
            model,
            base,
            shared,
            watch,
            prefixes,
            served: BTreeMap::new(),
            streams: HashMap::new(),
            counted: 0,
            ending: false,
        })
    }

    fn run(mut self, inbox: &Receiver<Command>) {
        loop {
            if self.engine.is_idle() {
                if self.ending {
                    return;
                }
                match inbox.recv() {
                    Ok(command) => self.take(command),
                    // All clients are gone.
                    Err(_) => return,
                }
            }
            loop {
                match inbox.try_recv() {
                    Ok(command) => self.take(command),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => {
                        self.ending = true;
                        break;
                    }
                }
            }
            self.forget_who_hung_up();
            if !self.engine.is_idle() {
                self.step();
            }
        }
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Submit { model, request, events } => {
                self.counted += 1;
                let submitted = match self.prefixes.get(&model) {
                    Some(prefix) => self.engine.submit(*prefix, request).map_err(|error| error.to_string()),
                    None => Err(Refused::Gone(model).to_string()),
                };
                match submitted {
                    Ok(id) => {
                        self.streams.insert(id, events);
                    }
                    Err(problem) => {
                        let _ = events.send(Event::Failed(problem));
                    }
                }
                self.count();
            }
            Command::Load { served, adapter, done } => {
                let loaded = self.load(served, &adapter);
                let _ = done.send(loaded);
            }
            Command::Unload(name) => {
                if name != self.base.name
                    && let Some(prefix) = self.prefixes.remove(&name)
                {
                    self.engine.remove_prefix(prefix);
                    self.served.remove(&name);
                    self.publish();
                }
            }
            Command::End => self.ending = true,
        }
    }

    fn load(&mut self, served: Served, adapter: &Adapter) -> Result<()> {
        let (width, found) = (self.model.config().hidden_size, adapter.prompt.dims()[1]);
        if found != width {
            return Err(Error::Checkpoint {
                path: served.folder.unwrap_or_default(),
                problem: format!(
                    "expected a prompt of width {width}, the hidden size of {}, found {found}; it was tuned on {}",
                    self.base.name,
                    adapter.config.base_model_name_or_path.as_deref().unwrap_or("another model")
                ),
            });
        }
        let prefix = self.engine.add_prefix(Some(&adapter.prompt))?;
        if let Some(old) = self.prefixes.insert(served.name.clone(), prefix) {
            self.engine.remove_prefix(old);
        }
        self.served.insert(served.name.clone(), Arc::new(served));
        self.publish();
        Ok(())
    }

    fn publish(&self) {
        let base = std::iter::once(Arc::new(self.base.clone()));
        let models = base.chain(self.served.values().cloned()).collect();
        *self.shared.models.write().unwrap_or_else(PoisonError::into_inner) = models;
    }

    /// Brings the number of waiting requests, which clients raise, up to date.
    fn count(&mut self) {
        let waiting = self.engine.waiting();
        self.shared.waiting.fetch_sub(self.counted - waiting, Ordering::Relaxed);
        self.counted = waiting;
    }

    fn forget_who_hung_up(&mut self) {
        let (engine, streams) = (&mut self.engine, &mut self.streams);
        streams.retain(|id, events| {
            let there = !events.is_closed();
            if !there {
                engine.cancel(*id);
            }
            there
        });
        self.count();
    }

    fn step(&mut self) {
        let started = Instant::now();
        let stepped = match self.engine.step() {
            Ok(stepped) => stepped,
            Err(error) => return self.fail(&error.to_string()),
        };
        self.count();
        let mut generated = 0;
        for (id, event) in stepped.events {
            generated += usize::from(matches!(event, Event::Token(_)));
            let over = matches!(event, Event::Finished(_) | Event::Failed(_));
            if let Some(events) = self.streams.get(&id) {
                // Whoever hung up is forgotten before the next step.
                let _ = events.send(event);
            }
            if over {
                self.streams.remove(&id);
            }
        }
        (self.watch)(Step {
            sequences: stepped.sequences,
            rows: stepped.rows,
            generated,
            waiting: self.counted,
            seconds: started.elapsed().as_secs_f64(),
        });
    }

    /// The device failed: the requests that were in the step end, and the server goes on.
    fn fail(&mut self, problem: &str) {
        for id in self.engine.running() {
            self.engine.cancel(id);
            if let Some(events) = self.streams.remove(&id) {
                let _ = events.send(Event::Failed(problem.to_owned()));
            }
        }
        self.count();
    }
}
