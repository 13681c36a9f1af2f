//! The thread that runs trainings, one at a time.

use super::records::{Training, TrainingState};
use super::service::Service;
use crate::config::Config;
use crate::device::PeakMemory;
use crate::layout::{ADAPTER, CHECKPOINT};
use crate::run::resumable;
use crate::run::{Run, RunFolder, Status, Tuning};
use crate::serve::turns::{DeviceTurn, DeviceTurns};
use crate::session::Session;
use crate::tune::{Limits, Observer, StepRecord};
use crate::{Error, Result, report};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

/// The run folder in a training's folder.
pub const RUN: &str = "run";

/// What the thread needs.
pub struct Tuner {
    /// The service whose trainings it runs.
    pub service: Arc<Service>,
    /// The models of the service, which the server uses too.
    pub sessions: Vec<Session>,
    /// Whose turn it is to use the device.
    pub turns: Arc<DeviceTurns>,
    /// Measures the peak of a run.
    pub memory: Box<dyn PeakMemory + Send>,
}

impl Tuner {
    /// Starts the thread. It ends after [`Service::end`].
    ///
    /// # Errors
    /// Returns an error if the thread can't start.
    pub fn start(self) -> Result<JoinHandle<()>> {
        let spawned = std::thread::Builder::new().name("tuner".into()).spawn(move || self.run());
        spawned.map_err(|error| Error::Invalid(format!("the tuner's thread could not start: {error}")))
    }

    fn run(mut self) {
        while let Some(training) = self.service.next_training() {
            let id = training.id.clone();
            let outcome = catch_unwind(AssertUnwindSafe(|| self.advance(&training))).unwrap_or_else(|_| {
                Err(Error::Invalid("the tuner failed; the server's log says how".into()))
            });
            let Err(error) = outcome.and_then(|()| self.finish(&id)) else { continue };
            eprintln!("warning: training {id}: {error}");
            let failed = self.service.store.update(&id, |training: &mut Training| {
                if !training.state.is_final() {
                    training.failure = Some(self.without_paths(training, &error));
                    training.set_state(TrainingState::Failed);
                }
                Ok::<_, Error>(())
            });
            if let Err(error) = failed.and_then(|_| self.finish(&id)) {
                // The disk is full or gone. Trainings that can't be marked as failed would be tried forever.
                eprintln!(
                    "warning: training {id}: {error}; no more trainings run until the server is started again"
                );
                return;
            }
        }
    }

    /// The message without the store's folder, which does not concern clients.
    fn without_paths(&self, training: &Training, error: &Error) -> String {
        let folder = self.service.store.folder::<Training>(&training.id);
        let data = folder.join(&training.data_file).display().to_string();
        error.to_string().replace(&data, &training.data_name).replace(&folder.display().to_string(), "")
    }

    /// Runs a training to its end, from where it is.
    fn advance(&mut self, training: &Training) -> Result<()> {
        let (service, id) = (self.service.clone(), &training.id);
        let run = service.store.folder::<Training>(id).join(RUN);
        if training.state != TrainingState::Storing {
            if !self.change(id, TrainingState::Running)? {
                return Ok(());
            }
            if !is_complete(&run) && !self.tune(training, &run)? {
                return Ok(());
            }
            report::write(&Run::read(&run)?)?;
            if !self.change(id, TrainingState::Storing)? {
                return Ok(());
            }
        }
        if training.auto_update_model {
            service.store_model(training, &training.name, &training.description)?;
        }
        self.change(id, TrainingState::Completed)?;
        Ok(())
    }

    /// Sets the state, unless a client has ended the training; whether it was set.
    fn change(&self, id: &str, state: TrainingState) -> Result<bool> {
        let changed = self.service.store.update(id, |training: &mut Training| {
            let goes_on = !training.state.is_final();
            if goes_on {
                training.set_state(state);
            }
            Ok::<_, Error>(goes_on)
        })?;
        Ok(changed.unwrap_or(false))
    }

    /// Runs the steps; false if the run was interrupted.
    fn tune(&mut self, training: &Training, run: &Path) -> Result<bool> {
        let session = session_of(&self.sessions, &self.service, training)?;
        let turn = self.turns.take();
        let (config, state) = if run.join(CHECKPOINT).is_file() {
            let (config, state) = resumable(run, &[])?;
            (config, Some(state))
        } else {
            (self.config(training, session), None)
        };
        let tuning = Tuning::prepare(&config, session, state)?;
        let mut trainer = tuning.trainer()?;
        let mut folder = RunFolder::go_on(run, tuning.state.as_ref(), &config.to_toml()?)?;
        let (service, turns) = (&self.service, &self.turns);
        let mut watch = StepTurns { service, id: &training.id, turns, turn: Some(turn) };
        self.memory.forget();
        let summary = tuning.run(&mut trainer, &mut folder, self.memory.as_mut(), &mut watch)?;
        Ok(summary.status != Status::Interrupted)
    }

    /// The configuration with its files and the model.
    fn config(&self, training: &Training, session: &Session) -> Config {
        let folder = self.service.store.folder::<Training>(&training.id);
        let mut config = training.config.clone();
        config.name = RUN.into();
        config.runs = folder.display().to_string();
        config.data.train = folder.join(&training.data_file).display().to_string();
        config.model.id.clone_from(&session.id);
        config
    }

    /// Removes the training if a client has deleted it while it ran.
    fn finish(&self, id: &str) -> Result<()> {
        self.service.set_active(None);
        if self.service.store.get(id).is_some_and(|training: Training| training.deleted) {
            self.service.store.remove::<Training>(id)?;
        }
        Ok(())
    }
}

/// The base model of a training.
fn session_of<'a>(sessions: &'a [Session], service: &Service, training: &Training) -> Result<&'a Session> {
    let base = service.bases.of_record(&training.local_model, training.base_model())?;
    let session = sessions.iter().find(|session| session.id == base.name);
    session.ok_or_else(|| Error::Invalid(format!("expected the base model {}, found none", base.name)))
}

/// Whether all steps of a run were done before, and its adapter was written.
fn is_complete(run: &Path) -> bool {
    let ended = |run: Run| matches!(run.summary.status, Status::Completed | Status::StoppedEarly);
    run.join(ADAPTER).is_dir() && Run::read(run).is_ok_and(ended)
}

/// Holds the device during a step, and gives it to the server between two steps.
struct StepTurns<'a> {
    service: &'a Service,
    id: &'a str,
    turns: &'a Arc<DeviceTurns>,
    turn: Option<DeviceTurn>,
}

impl Observer for StepTurns<'_> {
    fn step(&mut self, _: &StepRecord) -> Result<()> {
        self.turn = None;
        self.turn = Some(self.turns.take());
        Ok(())
    }

    fn skipped(&mut self, step: usize, what: &str, value: f64) -> Result<()> {
        eprintln!("warning: training {}: step {step}: skipped, {what} is {value}", self.id);
        Ok(())
    }

    fn out_of_memory(&mut self, limits: Limits) -> Result<()> {
        eprintln!("warning: training {}: the device ran out of memory; it goes on with {limits:?}", self.id);
        Ok(())
    }

    fn warning(&mut self, text: &str) -> Result<()> {
        let added = self.service.store.update(self.id, |training: &mut Training| {
            if !training.warnings.iter().any(|other| other == text) {
                training.warnings.push(text.to_owned());
            }
            Ok::<_, Error>(())
        });
        added.map(drop)
    }

    fn interrupted(&self) -> bool {
        let ended = |training: Training| training.state.is_final();
        self.service.is_ending() || self.service.store.get(self.id).is_none_or(ended)
    }
}
