//! What all requests share: the store, the models that run, the profile, and which deployments are loaded.

use super::bases::{TunableModel, TunableModels};
use super::parameters::TuningProfile;
use super::records::{Deployment, StoredModel, Training, TrainingState};
use super::store::{Store, StoredRecord};
use crate::layout::ADAPTER;
use crate::prompt::peft::Adapter;
use crate::serve::Platform;
use crate::serve::api_error::ApiError;
use crate::serve::served::Served;
use crate::{Error, Result};
use axum::http::StatusCode;
use std::collections::{HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Semaphore;

/// Most uploads at a time.
const UPLOADS: usize = 4;

/// Most data assets that are read into memory at a time.
const READINGS: usize = 1;

/// Most WebSockets at a time.
const MONITORS: usize = 64;

/// Options of the service.
#[derive(Debug, Clone)]
pub struct ServiceOptions {
    /// Settings that are applied after a client's parameters.
    pub profile: TuningProfile,
    /// Most bytes of a data asset.
    pub max_asset_bytes: u64,
    /// Most bytes of all data assets.
    pub max_store_bytes: u64,
    /// Most records of each kind.
    pub max_records: usize,
}

/// Whether a deployment can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Loading {
    /// Its prompt is being loaded.
    Initializing,
    /// Requests can use it.
    Ready,
    /// It could not be loaded.
    Failed(String),
}

/// The service without its connections.
pub struct Service {
    /// The store.
    pub(super) store: Store,
    /// The options.
    pub(super) options: ServiceOptions,
    /// The base models.
    pub(super) bases: TunableModels,
    loading: Mutex<HashMap<String, Loading>>,
    /// Held while a prompt is loaded, so that the last change of a deployment is loaded last.
    load_order: Mutex<()>,
    /// Limits the uploads at a time, and so the space that unfinished ones take.
    pub(super) uploads: Semaphore,
    /// Limits the data assets that are read into memory at a time.
    pub(super) readings: Arc<Semaphore>,
    /// Limits the WebSockets at a time.
    pub(super) monitors: Arc<Semaphore>,
    /// Held while names and models of deployments are chosen.
    naming: Mutex<()>,
    /// Experiments of trainings that were deleted since the start: the SDK deletes an experiment after its training.
    experiments: Mutex<HashSet<String>>,
    /// The training that the tuner's thread works on: it may write into its folder.
    active: Mutex<Option<String>>,
    /// Notified when a training is added and when the service ends.
    changed: Condvar,
    queue: Mutex<()>,
    ending: AtomicBool,
}

impl Service {
    /// A service of base models. The stored deployments are loaded in the background.
    ///
    /// # Errors
    /// Returns an error if there is no base model, two have the same name, or the trainings that were deleted can't be
    /// removed.
    pub fn new(store: Store, bases: Vec<TunableModel>, options: ServiceOptions) -> Result<Arc<Self>> {
        let service = Arc::new(Self {
            store,
            options,
            bases: TunableModels::new(bases)?,
            loading: Mutex::default(),
            load_order: Mutex::default(),
            uploads: Semaphore::new(UPLOADS),
            readings: Arc::new(Semaphore::new(READINGS)),
            monitors: Arc::new(Semaphore::new(MONITORS)),
            naming: Mutex::default(),
            experiments: Mutex::default(),
            active: Mutex::default(),
            changed: Condvar::new(),
            queue: Mutex::default(),
            ending: AtomicBool::new(false),
        });
        for training in service.store.list(|training: &Training| training.deleted) {
            service.store.remove::<Training>(&training.id)?;
        }
        let mut deployments = service.store.list(|_: &Deployment| true);
        // The oldest first.
        deployments.reverse();
        service.load_all(deployments.into_iter().map(|deployment| deployment.id).collect());
        Ok(service)
    }

    /// The routes.
    pub fn platform(self: &Arc<Self>) -> Platform {
        super::api::platform(self)
    }

    /// The names of all models that can be tuned: the base models' own names and those they stand in for.
    pub(super) fn tunable(&self) -> impl Iterator<Item = &String> {
        self.bases.iter().flat_map(TunableModel::names)
    }

    /// The warning that the base model named `local` stands in for the one of this name, if it does.
    pub(super) fn stand_in(&self, local: &str, name: &str) -> Option<String> {
        let base = &self.bases.of_record(local, name).ok()?.name;
        (name != base)
            .then(|| format!("the local model {base} stands in for {name}, which this server does not have"))
    }

    /// The record of this id.
    ///
    /// # Errors
    /// Returns 404 if there is none.
    pub(super) fn find<T: StoredRecord>(&self, id: &str) -> std::result::Result<T, ApiError> {
        self.store.get(id).ok_or_else(|| {
            let message = format!("there is no {} `{id}`", T::WHAT);
            ApiError::new(StatusCode::NOT_FOUND, "not_found", message)
        })
    }

    /// Refuses a further record of a kind of which there are enough.
    ///
    /// # Errors
    /// Returns 400 if there are.
    pub(super) fn check_room<T: StoredRecord>(&self) -> std::result::Result<(), ApiError> {
        let (found, most) = (self.store.count::<T>(), self.options.max_records);
        if found < most {
            return Ok(());
        }
        let message =
            format!("expected at most {most} of each kind, found {found} of kind {}; delete some", T::WHAT);
        Err(ApiError::new(StatusCode::BAD_REQUEST, "limit_reached", message))
    }

    /// Whether a deployment can be used.
    pub(super) fn loading(&self, deployment: &str) -> Loading {
        self.all_loading().get(deployment).cloned().unwrap_or(Loading::Initializing)
    }

    fn all_loading(&self) -> MutexGuard<'_, HashMap<String, Loading>> {
        self.loading.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Loads the prompt of a deployment in the background.
    pub(super) fn load(self: &Arc<Self>, deployment: &Deployment) {
        self.load_all(vec![deployment.id.clone()]);
    }

    /// Loads the prompts of deployments in the background, one after the other.
    fn load_all(self: &Arc<Self>, ids: Vec<String>) {
        if ids.is_empty() {
            return;
        }
        let all_are = |state: Loading| {
            self.all_loading().extend(ids.iter().map(|id| (id.clone(), state.clone())));
        };
        all_are(Loading::Initializing);
        let (service, queue) = (self.clone(), ids.clone());
        let load = move || queue.iter().for_each(|id| service.load_current(id));
        if let Err(error) = std::thread::Builder::new().name("load".into()).spawn(load) {
            all_are(Loading::Failed(format!("the thread that loads the prompt could not start: {error}")));
        }
    }

    /// Loads what a deployment is now: it may have changed since the load was asked for.
    fn load_current(&self, id: &str) {
        let _order = self.load_order.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(deployment) = self.store.get::<Deployment>(id) else { return };
        // A panic must not leave the deployments after this one unloaded.
        let state = match catch_unwind(AssertUnwindSafe(|| self.load_now(&deployment))) {
            Ok(Ok(())) => Loading::Ready,
            Ok(Err(error)) => Loading::Failed(error.to_string()),
            Err(_) => Loading::Failed("its prompt could not be loaded; the server's log says why".into()),
        };
        let name = deployment.served_name();
        if self.store.get::<Deployment>(id).is_some_and(|current| current.served_name() == name) {
            self.all_loading().insert(id.to_owned(), state);
        } else if !self.store.any(|other: &Deployment| other.served_name() == name) {
            // It was deleted or renamed meanwhile, and no other deployment has its name.
            self.unload_everywhere(name);
        }
    }

    fn load_now(&self, deployment: &Deployment) -> Result<()> {
        let folder = self.model_folder(&deployment.model);
        let adapter = Adapter::read(&folder)?;
        let mut served = Served::tuned(deployment.served_name(), &folder, &adapter)?;
        served.deployment_id = Some(deployment.id.clone());
        let local = self.store.get(&deployment.model).map(|model: StoredModel| model.local_model);
        let base = self.bases.of_record(&local.unwrap_or_default(), &deployment.base_model)?;
        for other in self.bases.iter().filter(|other| other.name != base.name) {
            // The deployment may have had a model with another base before.
            other.client.unload(deployment.served_name());
        }
        base.client.load(served, adapter)
    }

    /// The adapter's folder of a stored model.
    pub(super) fn model_folder(&self, model: &str) -> PathBuf {
        self.store.folder::<StoredModel>(model).join(ADAPTER)
    }

    /// Stops serving a name.
    pub(super) fn unload(&self, deployment: &str, served_name: &str) {
        self.all_loading().remove(deployment);
        self.unload_everywhere(served_name);
    }

    fn unload_everywhere(&self, served_name: &str) {
        self.bases.iter().for_each(|base| base.client.unload(served_name));
    }

    /// Whether a model is served under this name.
    pub(super) fn has_name(&self, name: &str) -> bool {
        self.tunable().any(|other| other == name)
            || self.bases.iter().any(|base| base.client.models().iter().any(|served| served.name == name))
            || self.store.any(|other: &Deployment| other.served_name() == name || other.id == name)
    }

    /// The right to choose names and models of deployments.
    pub(super) fn lock_names(&self) -> MutexGuard<'_, ()> {
        self.naming.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers the experiment of a training that is deleted.
    pub(super) fn note_experiment(&self, id: String) {
        self.experiments.lock().unwrap_or_else(PoisonError::into_inner).insert(id);
    }

    /// Whether this was the experiment of a training that was deleted.
    pub(super) fn was_experiment(&self, id: &str) -> bool {
        self.experiments.lock().unwrap_or_else(PoisonError::into_inner).contains(id)
    }

    /// Sets the training that the tuner's thread works on.
    pub(super) fn set_active(&self, id: Option<&str>) {
        *self.active.lock().unwrap_or_else(PoisonError::into_inner) = id.map(str::to_owned);
    }

    /// Whether the tuner's thread works on this training.
    pub(super) fn is_active(&self, id: &str) -> bool {
        self.active.lock().unwrap_or_else(PoisonError::into_inner).as_deref() == Some(id)
    }

    /// Tells the tuner's thread of a new training.
    pub(super) fn wake(&self) {
        drop(self.queue.lock());
        self.changed.notify_all();
    }

    /// Ends the service: a run stops after its step and goes on after the next start.
    pub fn end(&self) {
        self.ending.store(true, Ordering::Relaxed);
        self.wake();
    }

    pub(super) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Relaxed)
    }

    /// The training that runs next: one that was interrupted, else the oldest that waits. Waits for one; `None` when the
    /// service ends.
    pub(super) fn next_training(&self) -> Option<Training> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        while !self.is_ending() {
            let mut open = self.store.list(|training: &Training| !training.state.is_final());
            open.sort_by_key(|training| (training.state == TrainingState::Pending, training.created));
            if let Some(training) = open.into_iter().next() {
                self.set_active(Some(&training.id));
                return Some(training);
            }
            let waited = self.changed.wait_timeout(queue, Duration::from_secs(1));
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        None
    }

    /// Stores the tuned prompt of a training as a model.
    ///
    /// # Errors
    /// Returns an error if a file can't be read or written.
    pub(super) fn store_model(
        &self,
        training: &Training,
        name: &str,
        description: &str,
    ) -> Result<StoredModel> {
        if let Some(model) = self.store.get::<StoredModel>(&training.model) {
            return Ok(model);
        }
        let model = StoredModel {
            id: training.model.clone(),
            name: name.to_owned(),
            description: description.to_owned(),
            place: training.place.clone(),
            local_model: training.local_model.clone(),
            training: training.id.clone(),
            training_data_references: training.training_data_references.clone(),
            base_model: training.base_model().to_owned(),
            created: super::records::Moment::now(),
        };
        let source = self.store.folder::<Training>(&training.id).join(super::tuner::RUN).join(ADAPTER);
        self.store.create(model.clone(), |folder| copy_folder(&source, &folder.join(ADAPTER)))?;
        Ok(model)
    }
}

/// Copies the files of a folder, and syncs them to the disk.
fn copy_folder(from: &std::path::Path, to: &std::path::Path) -> Result<()> {
    std::fs::create_dir(to).map_err(Error::io(to))?;
    for entry in std::fs::read_dir(from).map_err(Error::io(from))? {
        let source = entry.map_err(Error::io(from))?.path();
        let Some(name) = source.file_name().filter(|_| source.is_file()) else { continue };
        let mut input = std::fs::File::open(&source).map_err(Error::io(&source))?;
        crate::files::write_atomically(&to.join(name), |out| std::io::copy(&mut input, out).map(drop))?;
    }
    Ok(())
}
