//! Trainings: start, list, describe, end, delete.

use super::{
    HandlerResult, QueryMap, Shared, blocking, details, files, is_in, json_answer, monitor, place, resources,
    tags, text,
};
use crate::Error;
use crate::config::InitMethod;
use crate::files::write_atomically;
use crate::serve::api_error::ApiError;
use crate::serve::body::describe;
use crate::serve::params::Fields;
use crate::serve::state::AppState;
use crate::watsonx::bases::TunableModel;
use crate::watsonx::parameters::{TRAINING, TuningParameters};
use crate::watsonx::records::{Asset, Moment, Training, TrainingState, new_id};
use crate::watsonx::service::Service;
use axum::extract::ws::WebSocketUpgrade;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::{Path, Query, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::{get, post};
use axum::{Extension, Router};
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// Most trainings of a list.
const MAX_LISTED: usize = 200;

pub fn routes() -> Router<Arc<AppState>> {
    Router::new()
        .route("/ml/v4/trainings", post(create).get(list))
        .route("/ml/v4/trainings/{id}", get(describe_training).delete(delete))
        .route("/v2/asset_files/wx_prompt_tune/{id}/{*name}", get(run_file))
}

async fn create(
    State(state): State<Arc<AppState>>,
    Extension(service): Shared,
    request: Request,
) -> HandlerResult {
    let body = state.read(request).await?;
    let (fields, ignored) = Fields::checked(&body.object, &TRAINING)?;
    let (base, mut parameters) = parameters(&service, &fields)?;
    let no_effect = |name: &String| format!("`{name}`: there is no such field, and it has no effect");
    parameters.warnings.extend(ignored.names().iter().map(no_effect));
    let references = fields.get("training_data_references").cloned().unwrap_or_default();
    let asset = training_data(&service, &references)?;
    service.check_room::<Training>()?;
    let mut training = record(&fields, parameters, references)?;
    training.data_name.clone_from(&asset.name);
    training.local_model = base;
    let shared = service.clone();
    let training = blocking(move || {
        let (name, mut content) = files::dataset(&shared, &asset.id)?;
        training.data_file.clone_from(&name);
        shared.store.create(training.clone(), |into| {
            write_atomically(&into.join(&name), |out| std::io::copy(&mut content, out).map(drop))
        })?;
        Ok::<_, Error>(training)
    })
    .await?;
    service.wake();
    Ok(json_answer(StatusCode::CREATED, details::training(&service, &training, false)))
}

/// The local model's name and the parameters of a request.
fn parameters(service: &Service, fields: &Fields) -> Result<(String, TuningParameters), ApiError> {
    let tuning = fields
        .object("prompt_tuning", "prompt_tuning.")?
        .ok_or_else(|| ApiError::missing("prompt_tuning", "the object with the parameters"))?;
    let (name, base) = base_model(service, tuning.get("base_model"))?;
    let mut parameters = TuningParameters::read(&tuning, &name, &service.options.profile)?;
    let prompt = &parameters.config.prompt;
    if prompt.init_method == InitMethod::Text && prompt.num_virtual_tokens == 0 {
        let ids = base.tokenizer.encode(&prompt.init_text, true)?;
        parameters.prompt_tuning.insert("num_virtual_tokens".into(), ids.len().into());
    }
    Ok((base.name.clone(), parameters))
}

/// The record of a new training, without its data.
fn record(fields: &Fields, parameters: TuningParameters, references: Value) -> Result<Training, ApiError> {
    let results = match fields.get("results_reference") {
        Some(Value::Object(results)) => results.clone(),
        None => Map::new(),
        Some(other) => {
            let problem = format!("expected an object, found {}", describe(other));
            return Err(ApiError::invalid("results_reference", problem));
        }
    };
    let experiment = new_id();
    let mut tags = tags(fields)?;
    // The SDK finds the experiment's id in the second tag.
    tags.push(format!("wx_prompt_tune.{experiment}"));
    let now = Moment::now();
    Ok(Training {
        id: new_id(),
        name: text(fields, "name")?,
        description: text(fields, "description")?,
        place: place(fields)?,
        local_model: String::new(),
        tags,
        experiment,
        training_data_references: with_connections(references),
        results_reference: results,
        prompt_tuning: parameters.prompt_tuning,
        config: parameters.config,
        data_file: String::new(),
        data_name: String::new(),
        auto_update_model: fields.boolean("auto_update_model")?.unwrap_or(false),
        model: new_id(),
        state: TrainingState::Pending,
        deleted: false,
        failure: None,
        warnings: parameters.warnings,
        created: now,
        modified: now,
        started: None,
        ended: None,
    })
}

/// The name of the base model in a request, and the local model of that name.
fn base_model<'a>(
    service: &'a Service,
    value: Option<&Value>,
) -> Result<(String, &'a TunableModel), ApiError> {
    const KEY: &str = "prompt_tuning.base_model.model_id";
    let name = value.and_then(|value| value.get("model_id")).and_then(Value::as_str);
    let name = name.ok_or_else(|| ApiError::missing(KEY, "the name of a model"))?;
    if let Some(base) = service.bases.get(name) {
        return Ok((name.to_owned(), base));
    }
    let known: Vec<&str> = service.tunable().map(String::as_str).collect();
    Err(ApiError::invalid(KEY, format!("expected one of {}, found {name:?}", known.join(", "))))
}

/// The data asset of a training.
fn training_data(service: &Service, references: &Value) -> Result<Asset, ApiError> {
    const KEY: &str = "training_data_references";
    let Some([reference]) = references.as_array().map(Vec::as_slice) else {
        let problem = format!("expected a list of one data asset, found {}", describe(references));
        return Err(ApiError::invalid(KEY, problem));
    };
    if let Some(kind) = reference.get("type").filter(|kind| *kind != "data_asset") {
        let problem = format!("expected \"data_asset\", found {}; upload the data first", describe(kind));
        return Err(ApiError::invalid(format!("{KEY}[0].type"), problem));
    }
    let location = reference.get("location");
    let id = location.and_then(|location| location.get("id")).and_then(Value::as_str);
    let href = location.and_then(|location| location.get("href")).and_then(Value::as_str);
    let of_href =
        href.and_then(|href| href.rsplit_once("/assets/")).map(|(_, id)| id.split('?').next().unwrap_or(id));
    let key = format!("{KEY}[0].location.id");
    let id = id.or(of_href).ok_or_else(|| ApiError::missing(&key, "the id of a data asset"))?;
    let asset: Asset = service.find(id).map_err(|error| ApiError::invalid(&key, error.message))?;
    if asset.attachment.as_ref().is_some_and(|attachment| attachment.bytes.is_some()) {
        return Ok(asset);
    }
    Err(ApiError::invalid(key, format!("expected a data asset with content, found none in {:?}", asset.name)))
}

/// The references with the key `connection`, as the service writes them.
fn with_connections(mut references: Value) -> Value {
    for reference in references.as_array_mut().into_iter().flatten() {
        if let Some(reference) = reference.as_object_mut() {
            reference.entry("connection").or_insert_with(|| json!({}));
        }
    }
    references
}

/// Trainings, the newest first; a query may name states, and tags that each must have.
async fn list(Extension(service): Shared, Query(pairs): Query<Vec<(String, String)>>) -> HandlerResult {
    let query = pairs.iter().cloned().collect();
    let values =
        |key: &'static str| pairs.iter().filter(move |(name, _)| name == key).map(|(_, value)| value);
    let limit = values("limit").next().and_then(|text| text.parse().ok()).unwrap_or(MAX_LISTED);
    let wanted = |training: &Training| {
        !training.deleted
            && is_in(&training.place, &query)
            && values("state").all(|state| state == training.state.word())
            && values("tag.value").all(|tag| training.tags.contains(tag))
            && values("type").all(|kind| kind == "prompt_tuning")
    };
    let found = service.store.list(wanted);
    let details =
        found.iter().take(limit.min(MAX_LISTED)).map(|training| details::training(&service, training, false));
    Ok(resources(details.collect()))
}

/// The training of this id.
pub fn find(service: &Service, id: &str) -> Result<Training, ApiError> {
    let training: Training = service.find(id)?;
    if training.deleted {
        let message = format!("there is no training `{id}`; it was deleted");
        return Err(ApiError::new(StatusCode::NOT_FOUND, "not_found", message));
    }
    Ok(training)
}

/// A training, or a WebSocket with its steps.
async fn describe_training(
    Extension(service): Shared,
    Path(id): Path<String>,
    headers: HeaderMap,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> HandlerResult {
    if headers.contains_key(header::UPGRADE) {
        let upgrade = upgrade.map_err(|error| ApiError::invalid("Upgrade", error.body_text()))?;
        return monitor::open(service, id, upgrade);
    }
    let training = find(&service, &id)?;
    let details = blocking(move || Ok::<_, ApiError>(details::training(&service, &training, true))).await?;
    Ok(json_answer(StatusCode::OK, details))
}

/// Ends a training; with `hard_delete=true` it is also removed.
async fn delete(Extension(service): Shared, Path(id): Path<String>, Query(query): QueryMap) -> HandlerResult {
    let hard = query.get("hard_delete").is_some_and(|value| value == "true");
    find(&service, &id)?;
    let shared = service.clone();
    let gone = || ApiError::new(StatusCode::NOT_FOUND, "not_found", "there is no such training any more");
    blocking(move || {
        let ended = shared.store.update(&id, |training: &mut Training| {
            let state = training.state;
            if state.is_final() && !hard {
                let message = format!("Job already completed with state {}", state.word());
                return Err(ApiError::new(StatusCode::BAD_REQUEST, "already_completed", message));
            }
            if !state.is_final() {
                training.set_state(TrainingState::Canceled);
            }
            training.deleted |= hard;
            Ok(training.experiment.clone())
        })?;
        let experiment = ended.ok_or_else(gone)?;
        if hard {
            shared.note_experiment(experiment);
            // The tuner removes it after its step.
            if !shared.is_active(&id) {
                shared.store.remove::<Training>(&id)?;
            }
        }
        Ok::<_, ApiError>(())
    })
    .await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Files of a run that the SDK asks for: the request that stores the model.
async fn run_file(Extension(service): Shared, Path((id, name)): Path<(String, String)>) -> HandlerResult {
    let training = find(&service, &id)?;
    if name.ends_with("request.json") {
        return Ok(json_answer(StatusCode::OK, details::model_request(&training)));
    }
    let message = format!("there is no file `{name}` of the training `{id}`");
    Err(ApiError::new(StatusCode::NOT_FOUND, "not_found", message))
}
