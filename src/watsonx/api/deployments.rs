//! Deployments: create, list, describe, change, delete.

use super::{
    HandlerResult, QueryMap, Shared, blocking, checked_text, details, is_in, json_answer, place, resources,
    tags, text,
};
use crate::prompt::check_name;
use crate::serve::api_error::ApiError;
use crate::serve::body::{self, describe};
use crate::serve::params::Fields;
use crate::serve::state::AppState;
use crate::watsonx::records::{Deployment, Moment, StoredModel, new_id};
use crate::watsonx::service::Service;
use axum::extract::{Path, Query, Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::IntoResponse;
use axum::routing::{get, post};
use axum::{Extension, Router};
use serde_json::Value;
use std::sync::Arc;

pub fn routes() -> Router<Arc<AppState>> {
    Router::new()
        .route("/ml/v4/deployments", post(create).get(list))
        .route("/ml/v4/deployments/{id}", get(describe_deployment).patch(change).delete(delete))
}

async fn create(
    State(state): State<Arc<AppState>>,
    Extension(service): Shared,
    headers: HeaderMap,
    request: Request,
) -> HandlerResult {
    let body = state.read(request).await?;
    let deployment = record(&service, &Fields::new(&body.object))?;
    service.check_room::<Deployment>()?;
    let (shared, created) = (service.clone(), deployment.clone());
    blocking(move || {
        let _naming = shared.lock_names();
        shared.find::<StoredModel>(&created.model)?;
        if let Some(name) = &created.serving_name {
            check_serving_name(&shared, name)?;
        }
        shared.store.create(created.clone(), |_| Ok(()))?;
        shared.load(&created);
        Ok::<_, ApiError>(())
    })
    .await?;
    let origin = state.origin(&headers).unwrap_or_default();
    Ok(json_answer(StatusCode::ACCEPTED, details::deployment(&service, &deployment, &origin)))
}

/// The record of a new deployment.
fn record(service: &Service, fields: &Fields) -> Result<Deployment, ApiError> {
    let asset =
        fields.object("asset", "asset.")?.ok_or_else(|| ApiError::missing("asset", "an object with `id`"))?;
    let model = asset.string("id")?.ok_or_else(|| ApiError::missing("asset.id", "the id of a model"))?;
    let expected = "an object; this server has online deployments";
    let online = fields.object("online", "online.")?.ok_or_else(|| ApiError::missing("online", expected))?;
    let parameters = online.object("parameters", "online.parameters.")?;
    let serving_name = parameters.map(|parameters| parameters.string("serving_name")).transpose()?.flatten();
    for key in ["batch", "r_shiny", "hybrid_pipeline_hardware_specs", "base_model_id", "prompt_template"] {
        if fields.get(key).is_some() {
            return Err(ApiError::unsupported(key, "this server deploys tuned prompts online; leave it out"));
        }
    }
    let model: StoredModel = service.find(model)?;
    let now = Moment::now();
    Ok(Deployment {
        id: new_id(),
        name: text(fields, "name")?,
        description: text(fields, "description")?,
        tags: tags(fields)?,
        place: place(fields)?,
        model: model.id,
        base_model: model.base_model,
        serving_name: serving_name.map(str::to_owned),
        created: now,
        modified: now,
    })
}

fn check_serving_name(service: &Service, name: &str) -> Result<(), ApiError> {
    check_name(name).map_err(|error| ApiError::invalid("online.parameters.serving_name", error))?;
    if service.has_name(name) {
        let message = format!("the serving name `{name}` is taken; choose another one");
        return Err(ApiError::new(StatusCode::CONFLICT, "conflict", message));
    }
    Ok(())
}

/// All deployments, or those of a `serving_name` or an `asset_id`. With `conflict=true`: 409 if there is one.
async fn list(
    State(state): State<Arc<AppState>>,
    Extension(service): Shared,
    Query(query): QueryMap,
    headers: HeaderMap,
) -> HandlerResult {
    if query.get("conflict").is_some_and(|value| value == "true") {
        let name = query.get("serving_name").ok_or_else(|| ApiError::missing("serving_name", "a name"))?;
        check_serving_name(&service, name)?;
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    let found = service.store.list(|deployment: &Deployment| {
        is_in(&deployment.place, &query)
            && query.get("serving_name").is_none_or(|name| deployment.serving_name.as_ref() == Some(name))
            && query.get("asset_id").is_none_or(|id| deployment.model == *id)
    });
    let origin = state.origin(&headers).unwrap_or_default();
    Ok(resources(found.iter().map(|deployment| details::deployment(&service, deployment, &origin)).collect()))
}

async fn describe_deployment(
    State(state): State<Arc<AppState>>,
    Extension(service): Shared,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> HandlerResult {
    let deployment = service.find(&id)?;
    let origin = state.origin(&headers).unwrap_or_default();
    Ok(json_answer(StatusCode::OK, details::deployment(&service, &deployment, &origin)))
}

/// What a JSON patch changes of a deployment.
#[derive(Default)]
struct Changes {
    name: Option<String>,
    description: Option<String>,
    serving_name: Option<String>,
    model: Option<StoredModel>,
}

impl Changes {
    /// Reads a JSON patch (RFC 6902) of the paths that the SDK changes.
    fn read(service: &Service, patch: &Value) -> Result<Self, ApiError> {
        let expected =
            || ApiError::malformed("expected a JSON patch: a list of objects with `op`, `path` and `value`");
        let mut changes = Self::default();
        for entry in patch.as_array().ok_or_else(expected)? {
            let text = |key: &str| entry.get(key).and_then(Value::as_str).ok_or_else(expected);
            let (op, path) = (text("op")?, text("path")?);
            if !matches!(op, "add" | "replace") {
                return Err(ApiError::unsupported(
                    "op",
                    &format!("expected \"add\" or \"replace\", found {op:?}"),
                ));
            }
            let value = entry.get("value").ok_or_else(expected)?;
            let wrong =
                |what: &str| ApiError::invalid(path, format!("expected {what}, found {}", describe(value)));
            let string = || value.as_str().ok_or_else(|| wrong("a string"));
            match path {
                "/name" => changes.name = Some(checked_text(path, string()?)?),
                "/description" => changes.description = Some(checked_text(path, string()?)?),
                "/online/parameters" => {
                    let name = value.get("serving_name").and_then(Value::as_str);
                    changes.serving_name =
                        Some(name.ok_or_else(|| wrong("an object with `serving_name`"))?.to_owned());
                }
                "/online/parameters/serving_name" => changes.serving_name = Some(string()?.to_owned()),
                "/asset" => {
                    let id = value
                        .get("id")
                        .and_then(Value::as_str)
                        .ok_or_else(|| wrong("an object with `id`"))?;
                    changes.model = Some(service.find(id)?);
                }
                other => {
                    let problem = "expected /name, /description, /online/parameters or /asset";
                    return Err(ApiError::unsupported(other, problem));
                }
            }
        }
        Ok(changes)
    }
}

async fn change(
    State(state): State<Arc<AppState>>,
    Extension(service): Shared,
    Path(id): Path<String>,
    request: Request,
) -> HandlerResult {
    let (parts, body) = request.into_parts();
    let bytes = body::read(state.body_limits(), &parts.headers, body).await?;
    let patch: Value = serde_json::from_slice(&bytes)
        .map_err(|error| ApiError::malformed(format!("expected JSON as the body: {error}")))?;
    service.find::<Deployment>(&id)?;
    let changes = Changes::read(&service, &patch)?;
    let reloads = changes.serving_name.is_some() || changes.model.is_some();
    let shared = service.clone();
    let deployment = blocking(move || {
        let _naming = shared.lock_names();
        let old: Deployment = shared.find(&id)?;
        if let Some(name) =
            changes.serving_name.as_ref().filter(|name| old.serving_name.as_ref() != Some(name))
        {
            check_serving_name(&shared, name)?;
        }
        let changed = shared.store.update(&id, |deployment: &mut Deployment| {
            deployment.name = changes.name.unwrap_or_else(|| deployment.name.clone());
            deployment.description = changes.description.unwrap_or_else(|| deployment.description.clone());
            deployment.serving_name = changes.serving_name.or_else(|| deployment.serving_name.clone());
            if let Some(model) = changes.model {
                (deployment.model, deployment.base_model) = (model.id, model.base_model);
            }
            deployment.modified = Moment::now();
            Ok::<_, ApiError>(deployment.clone())
        })?;
        let changed = changed.unwrap_or_else(|| old.clone());
        if reloads {
            if changed.served_name() != old.served_name() {
                shared.unload(&old.id, old.served_name());
            }
            shared.load(&changed);
        }
        Ok::<_, ApiError>(changed)
    })
    .await?;
    let status = if reloads { StatusCode::ACCEPTED } else { StatusCode::OK };
    let origin = state.origin(&parts.headers).unwrap_or_default();
    Ok(json_answer(status, details::deployment(&service, &deployment, &origin)))
}

async fn delete(Extension(service): Shared, Path(id): Path<String>) -> HandlerResult {
    let deployment: Deployment = service.find(&id)?;
    blocking(move || {
        service.store.remove::<Deployment>(&deployment.id)?;
        service.unload(&deployment.id, deployment.served_name());
        Ok::<_, crate::Error>(())
    })
    .await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}
