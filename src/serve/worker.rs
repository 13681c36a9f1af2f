//! The one thread that owns the model.

use super::client::{Client, Command, SubmitError, WorkerState};
use super::turns::{DeviceTurn, DeviceTurns};
use crate::generate::{Engine, Event, PrefixId, SequenceId};
use crate::model::Decoder;
use crate::prompt::peft::Adapter;
use crate::serve::limits::ServerLimits;
use crate::serve::served::Served;
use crate::{Error, Result};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::sync::{Arc, PoisonError, RwLock, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::UnboundedSender;

/// How long steps may follow each other while a tuning run waits for the device.
const LONGEST_TURN: Duration = Duration::from_secs(1);

/// Counts of a step, for the metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct StepMetrics {
    /// Number of sequences in the pass.
    pub sequences: usize,
    /// Number of token rows in the pass.
    pub rows: usize,
    /// Number of tokens generated.
    pub generated: usize,
    /// Number of requests that wait after it.
    pub waiting: usize,
    /// Duration in seconds.
    pub seconds: f64,
    /// The new limit of rows per step, if the device ran out of memory in this step.
    pub less_rows: Option<usize>,
}

/// Starts the thread. It owns `model`, which requests may name as `base`, and calls `on_step` after every step.
///
/// # Errors
/// Returns an error if the device has no memory for the cache, or the thread cannot start.
pub fn start(
    model: impl Into<Arc<Decoder>>,
    base: Served,
    limits: ServerLimits,
    on_step: impl Fn(StepMetrics) + Send + 'static,
) -> Result<(Client, JoinHandle<()>)> {
    start_sharing(model.into(), base, limits, DeviceTurns::new(), on_step)
}

/// As [`start`], with a model and a device that others use too, in `turns`.
///
/// # Errors
/// Returns the errors of [`start`].
pub fn start_sharing(
    model: Arc<Decoder>,
    base: Served,
    limits: ServerLimits,
    turns: Arc<DeviceTurns>,
    on_step: impl Fn(StepMetrics) + Send + 'static,
) -> Result<(Client, JoinHandle<()>)> {
    let (commands, inbox) = mpsc::channel();
    let positions = model.config().max_position_embeddings.min(limits.cache_rows);
    let limits = ServerLimits { sequence_tokens: limits.sequence_tokens.min(positions), ..limits };
    let shared = Arc::new(WorkerState {
        limits,
        vocab_size: model.config().vocab_size,
        hidden_size: model.config().hidden_size,
        waiting: AtomicUsize::new(0),
        models: RwLock::new(Arc::from([Arc::new(base.clone())])),
        serving: AtomicBool::new(true),
    });
    let client = Client { commands, shared: shared.clone() };
    let (ready, started) = mpsc::channel();
    let run = move || {
        let _guard = EndGuard(shared.clone());
        match Worker::new(&model, base, shared, turns, on_step) {
            Ok(worker) => {
                let _ = ready.send(Ok(()));
                worker.run(&inbox);
            }
            Err(error) => {
                let _ = ready.send(Err(error));
            }
        }
    };
    let spawned = std::thread::Builder::new().name("model".into()).spawn(run);
    let thread = spawned.map_err(|e| Error::Invalid(format!("the model's thread could not start: {e}")))?;
    match started.recv() {
        Ok(Ok(())) => Ok((client, thread)),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(Error::Invalid("the model's thread ended as it started".into())),
    }
}

/// Marks the end of the thread when it is dropped, also during a panic.
struct EndGuard(Arc<WorkerState>);

impl Drop for EndGuard {
    fn drop(&mut self) {
        self.0.serving.store(false, Ordering::Relaxed);
    }
}

struct Worker<'m, W> {
    engine: Engine<'m>,
    model: &'m Decoder,
    base: Served,
    shared: Arc<WorkerState>,
    on_step: W,
    prefixes: BTreeMap<String, PrefixId>,
    served: BTreeMap<String, Arc<Served>>,
    streams: HashMap<SequenceId, UnboundedSender<Event>>,
    /// Number of this thread's requests that are included in [`WorkerState::waiting`].
    counted_waiting: usize,
    ending: bool,
    turns: Arc<DeviceTurns>,
    /// The device is this thread's while there is a turn.
    turn: Option<DeviceTurn>,
}

impl<'m, W: Fn(StepMetrics)> Worker<'m, W> {
    fn new(
        model: &'m Decoder,
        base: Served,
        shared: Arc<WorkerState>,
        turns: Arc<DeviceTurns>,
        on_step: W,
    ) -> Result<Self> {
        let mut engine = Engine::new(model, shared.limits.cache_rows, shared.limits.step_rows)?;
        let prefixes = BTreeMap::from([(base.name.clone(), engine.add_prefix(None)?)]);
        Ok(Self {
            engine,
            model,
            base,
            shared,
            on_step,
            prefixes,
            served: BTreeMap::new(),
            streams: HashMap::new(),
            counted_waiting: 0,
            ending: false,
            turns,
            turn: None,
        })
    }

    fn run(mut self, inbox: &Receiver<Command>) {
        loop {
            if self.engine.is_idle() {
                self.turn = None;
                if self.ending {
                    return;
                }
                match inbox.recv() {
                    Ok(command) => self.handle(command),
                    // All clients were dropped.
                    Err(_) => return,
                }
            }
            loop {
                match inbox.try_recv() {
                    Ok(command) => self.handle(command),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => {
                        self.ending = true;
                        break;
                    }
                }
            }
            self.cancel_disconnected();
            if !self.engine.is_idle() {
                self.step();
            }
        }
    }

    fn handle(&mut self, command: Command) {
        match command {
            Command::Submit { model, request, events } => {
                self.counted_waiting += 1;
                let submitted = match self.prefixes.get(&model) {
                    Some(prefix) => self.engine.submit(*prefix, request).map_err(|error| error.to_string()),
                    None => Err(SubmitError::Gone(model).to_string()),
                };
                match submitted {
                    Ok(id) => {
                        self.streams.insert(id, events);
                    }
                    Err(problem) => {
                        let _ = events.send(Event::Failed(problem));
                    }
                }
                self.update_waiting();
            }
            Command::Load { served, adapter, done } => {
                let loaded = self.load(served, &adapter);
                let _ = done.send(loaded);
            }
            Command::LoadEnsemble { served, adapters, done } => {
                let loaded = self.load_ensemble(served, &adapters);
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
        let folder = served.folder.as_deref().unwrap_or(Path::new(&served.name));
        adapter.check_fits(folder, &self.base.name, self.model.config())?;
        self.take_turn();
        let prefix = self.engine.add_prefix(Some(&adapter.prompt))?;
        if let Some(old) = self.prefixes.insert(served.name.clone(), prefix) {
            self.engine.remove_prefix(old);
        }
        self.served.insert(served.name.clone(), Arc::new(served));
        self.publish();
        Ok(())
    }

    fn load_ensemble(&mut self, served: Served, adapters: &[Adapter]) -> Result<()> {
        let names = served.members.iter().map(|member| &member.name).chain([&served.name]);
        if let Some(name) = names.into_iter().find(|name| self.prefixes.contains_key(*name)) {
            return Err(Error::Invalid(format!(
                "ensemble {}: expected a name of its own, found that another model is called {name}",
                served.name
            )));
        }
        self.take_turn();
        let mut prefixes = Vec::with_capacity(adapters.len());
        for (member, adapter) in served.members.iter().zip(adapters) {
            let folder = member.folder.as_deref().unwrap_or(Path::new(&member.name));
            adapter.check_fits(folder, &self.base.name, self.model.config())?;
            prefixes.push((member.name.clone(), self.engine.add_prefix(Some(&adapter.prompt))?));
        }
        self.prefixes.extend(prefixes);
        self.served.insert(served.name.clone(), Arc::new(served));
        self.publish();
        Ok(())
    }

    fn publish(&self) {
        let base = std::iter::once(Arc::new(self.base.clone()));
        let models = base.chain(self.served.values().cloned()).collect();
        *self.shared.models.write().unwrap_or_else(PoisonError::into_inner) = models;
    }

    /// Updates the number of waiting requests, which clients increase.
    fn update_waiting(&mut self) {
        let waiting = self.engine.waiting();
        self.shared.waiting.fetch_sub(self.counted_waiting - waiting, Ordering::Relaxed);
        self.counted_waiting = waiting;
    }

    fn cancel_disconnected(&mut self) {
        let (engine, streams) = (&mut self.engine, &mut self.streams);
        streams.retain(|id, events| {
            let is_connected = !events.is_closed();
            if !is_connected {
                engine.cancel(*id);
            }
            is_connected
        });
        self.update_waiting();
    }

    /// Waits for the device. A tuning run that waits gets its turn after [`LONGEST_TURN`].
    fn take_turn(&mut self) {
        if self.turn.as_ref().is_some_and(|turn| turn.since.elapsed() > LONGEST_TURN)
            && self.turns.is_wanted()
        {
            self.turn = None;
        }
        if self.turn.is_none() {
            self.turn = Some(self.turns.take());
        }
    }

    fn step(&mut self) {
        self.take_turn();
        let started = Instant::now();
        let stepped = match self.engine.step() {
            Ok(stepped) => stepped,
            Err(error) => return self.fail(&error.to_string()),
        };
        self.update_waiting();
        let tokens = stepped.events.iter().filter(|(_, event)| matches!(event, Event::Token(_)));
        // Before the events are sent, so that a client that has its answer finds it counted.
        (self.on_step)(StepMetrics {
            sequences: stepped.sequences,
            rows: stepped.rows,
            generated: tokens.count(),
            waiting: self.counted_waiting,
            seconds: started.elapsed().as_secs_f64(),
            less_rows: stepped.less_rows,
        });
        for (id, event) in stepped.events {
            let is_last = event.is_last();
            if let Some(events) = self.streams.get(&id) {
                // A request whose client has disconnected is cancelled before the next step.
                let _ = events.send(event);
            }
            if is_last {
                self.streams.remove(&id);
            }
        }
    }

    /// Ends the requests of a step that failed. The server continues.
    fn fail(&mut self, problem: &str) {
        for id in self.engine.running() {
            self.engine.cancel(id);
            if let Some(events) = self.streams.remove(&id) {
                let _ = events.send(Event::Failed(problem.to_owned()));
            }
        }
        self.update_waiting();
    }
}

#[cfg(test)]
mod tests;
