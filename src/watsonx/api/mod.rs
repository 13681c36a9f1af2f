//! The routes of the service.

mod assets;
mod deployments;
mod details;
mod examples;
mod files;
mod models;
mod monitor;
mod platform;
mod trainings;

use super::page;
use super::records::ProjectOrSpace;
use super::service::Service;
use crate::serve::Platform;
use crate::serve::api_error::ApiError;
use crate::serve::params::Fields;
use axum::Extension;
use axum::extract::Query;
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::Arc;

/// Most characters of a name, a description or a tag.
const MAX_TEXT_CHARS: usize = 4096;
/// Most tags of a training or a deployment.
const MAX_TAGS: usize = 64;

/// The service, as handlers get it.
type Shared = Extension<Arc<Service>>;
/// The query of a request; of a repeated key the last value.
type QueryMap = Query<HashMap<String, String>>;
/// What a handler answers.
type HandlerResult = Result<Response, ApiError>;

/// The path where clients of IBM Cloud exchange a key for a token.
const IDENTITY: &str = "/identity/token";
/// The list of tasks, which IBM's SDK requests without a token.
const TASKS: &str = "/ml/v1/foundation_model_tasks";
/// Uploads and downloads, whose addresses have a signature.
const FILES: &str = "/v2/asset_files/data_asset/";

/// The routes with the service.
pub fn platform(service: &Arc<Service>) -> Platform {
    let routes = page::routes()
        .merge(platform::routes())
        .merge(assets::routes())
        .merge(trainings::routes())
        .merge(models::routes())
        .merge(deployments::routes());
    Platform { routes: routes.layer(Extension(service.clone())), needs_no_key }
}

fn needs_no_key(method: &Method, path: &str) -> bool {
    let is_file = path.starts_with(FILES) && matches!(*method, Method::PUT | Method::GET);
    is_file || path == IDENTITY || path == TASKS || path == page::TRY
}

/// Does something that waits for the disk on a thread that may wait.
async fn blocking<R: Send + 'static, E: Into<ApiError> + Send + 'static>(
    work: impl FnOnce() -> Result<R, E> + Send + 'static,
) -> Result<R, ApiError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(Into::into),
        Err(_) => Err(ApiError::internal("the server failed at this request; its log says how")),
    }
}

/// A JSON answer.
fn json_answer(status: StatusCode, value: Value) -> Response {
    (status, axum::Json(value)).into_response()
}

/// A list as watsonx writes it.
fn resources(found: Vec<Value>) -> Response {
    json_answer(StatusCode::OK, json!({"total_count": found.len(), "limit": found.len(), "resources": found}))
}

/// The place that a query names.
fn place_of(query: &HashMap<String, String>) -> Result<ProjectOrSpace, ApiError> {
    let text = |key: &str| query.get(key).map(|text| checked_text(key, text)).transpose();
    Ok(ProjectOrSpace { project_id: text("project_id")?, space_id: text("space_id")? })
}

/// The place that a body names.
fn place(fields: &Fields) -> Result<ProjectOrSpace, ApiError> {
    let id = |key: &str| fields.string(key)?.map(|text| checked_text(key, text)).transpose();
    Ok(ProjectOrSpace { project_id: id("project_id")?, space_id: id("space_id")? })
}

/// A text of a body; empty if there is none.
fn text(fields: &Fields, key: &str) -> Result<String, ApiError> {
    checked_text(key, fields.string(key)?.unwrap_or_default())
}

/// The tags of a body.
fn tags(fields: &Fields) -> Result<Vec<String>, ApiError> {
    let tags = fields.strings("tags", MAX_TAGS)?.unwrap_or_default();
    tags.iter().map(|tag| checked_text("tags", tag)).collect()
}

/// Whether a record is in the place that the query names; every record is if it names none.
fn is_in(place: &ProjectOrSpace, query: &HashMap<String, String>) -> bool {
    let agrees =
        |key: &str, own: &Option<String>| query.get(key).is_none_or(|text| own.as_ref() == Some(text));
    agrees("project_id", &place.project_id) && agrees("space_id", &place.space_id)
}

/// A text of limited length, without NUL.
fn checked_text(key: &str, text: &str) -> Result<String, ApiError> {
    let chars = text.chars().count();
    if chars > MAX_TEXT_CHARS {
        return Err(ApiError::invalid(
            key,
            format!("expected at most {MAX_TEXT_CHARS} characters, found {chars}"),
        ));
    }
    if text.contains('\0') {
        return Err(ApiError::invalid(key, "expected a text without NUL"));
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests;
