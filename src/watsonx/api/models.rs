//! Stored models: the tuned prompts of trainings.

use super::{
    HandlerResult, QueryMap, Shared, blocking, checked_text, details, is_in, json_answer, resources,
};
use crate::serve::api_error::ApiError;
use crate::serve::params::Fields;
use crate::serve::state::AppState;
use crate::watsonx::records::{Asset, Deployment, StoredModel, Training, TrainingState};
use crate::watsonx::service::Service;
use axum::extract::{Path, Query, Request, State};
use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::routing::{get, post};
use axum::{Extension, Router};
use serde_json::json;
use std::sync::Arc;

pub fn routes() -> Router<Arc<AppState>> {
    Router::new()
        .route("/ml/v4/models", post(create).get(list))
        .route("/ml/v4/models/{id}", get(describe_model).delete(delete))
        .route("/projects/api/rest/catalogs/assets/{id}/promote", post(promote))
}

/// Stores the model of a training that did not store it by itself.
async fn create(
    State(state): State<Arc<AppState>>,
    Extension(service): Shared,
    request: Request,
) -> HandlerResult {
    let body = state.read(request).await?;
    let fields = Fields::new(&body.object);
    let id = fields
        .string("training_id")?
        .ok_or_else(|| ApiError::missing("training_id", "the id of a training"))?;
    let training: Training = service.find(id)?;
    if training.state != TrainingState::Completed {
        let problem = format!("expected a completed training, found one that is {}", training.state.word());
        return Err(ApiError::invalid("training_id", problem));
    }
    let name = checked_text("name", fields.string("name")?.unwrap_or(&training.name))?;
    let description = checked_text("description", fields.string("description")?.unwrap_or_default())?;
    service.check_room::<StoredModel>()?;
    let model = blocking(move || service.store_model(&training, &name, &description)).await?;
    Ok(json_answer(StatusCode::ACCEPTED, details::model(&model)))
}

async fn list(Extension(service): Shared, Query(query): QueryMap) -> HandlerResult {
    let found = service.store.list(|model: &StoredModel| is_in(&model.place, &query));
    Ok(resources(found.iter().map(details::model).collect()))
}

async fn describe_model(Extension(service): Shared, Path(id): Path<String>) -> HandlerResult {
    Ok(json_answer(StatusCode::OK, details::model(&service.find(&id)?)))
}

async fn delete(Extension(service): Shared, Path(id): Path<String>) -> HandlerResult {
    service.find::<StoredModel>(&id)?;
    remove(service, id).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Removes a model that no deployment uses.
pub async fn remove(service: Arc<Service>, id: String) -> Result<(), ApiError> {
    blocking(move || {
        let _naming = service.lock_names();
        let users = service.store.list(|deployment: &Deployment| deployment.model == id);
        if let Some(user) = users.first() {
            let message =
                format!("the model `{id}` is used by the deployment `{}`; delete that first", user.id);
            return Err(ApiError::new(StatusCode::CONFLICT, "conflict", message));
        }
        service.store.remove::<StoredModel>(&id)?;
        Ok(())
    })
    .await
}

/// Promotes an asset of a project to a space: there is one place for all, so it is there already.
async fn promote(Extension(service): Shared, Path(id): Path<String>) -> HandlerResult {
    if service.store.get::<StoredModel>(&id).is_none() {
        service.find::<Asset>(&id)?;
    }
    Ok(json_answer(StatusCode::OK, json!({"promotedAsset": {"asset_id": id}})))
}
