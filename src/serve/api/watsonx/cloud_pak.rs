//! What the SDK requests from a Cloud Pak for Data before it generates: a version, a token, a space, a deployment's
//! details.

use super::{deployed, deployment_id};
use crate::calendar;
use crate::serve::api_error::ApiError;
use crate::serve::auth::Product;
use crate::serve::params::Fields;
use crate::serve::served::Served;
use crate::serve::state::AppState;
use axum::extract::{Path, Query, Request, State};
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::Arc;

/// The release of Cloud Pak for Data whose API this is.
const RELEASE: &str = "5.2.0";

pub(super) async fn version() -> Response {
    axum::Json(json!({"version": RELEASE})).into_response()
}

/// A token for the server's key, which the client sends as `api_key` or `password`; any user name is accepted.
pub(super) async fn authorize(
    State(state): State<Arc<AppState>>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = state.read(request).await?;
    let fields = Fields::new(&body.object);
    let key = fields.string("api_key")?.or(fields.string("password")?).unwrap_or_default();
    let token = state.auth.authorize(key, Product::CloudPak)?;
    Ok(axum::Json(json!({"token": token, "_messageCode_": "200", "message": "Success"})).into_response())
}

/// A space or a project: whichever the client asks for exists.
pub(super) async fn space(Path(id): Path<String>) -> Response {
    let entity = json!({"name": id, "storage": {"type": "local"}});
    axum::Json(json!({"metadata": {"id": id, "guid": id}, "entity": entity})).into_response()
}

/// All deployments, or the one of a `serving_name`.
pub(super) async fn deployments(
    State(state): State<Arc<AppState>>,
    Query(query): Query<HashMap<String, String>>,
) -> Response {
    let models = state.client.models();
    let wanted = |served: &&Arc<Served>| query.get("serving_name").is_none_or(|name| *name == served.name);
    let resources: Vec<Value> =
        models.iter().filter(wanted).map(|served| details(&state, served, "")).collect();
    axum::Json(json!({"total_count": resources.len(), "limit": 200, "resources": resources})).into_response()
}

pub(super) async fn deployment(
    State(state): State<Arc<AppState>>,
    Path(deployment): Path<String>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let served = deployed(&state, &deployment)?;
    let origin = state.origin(&headers).unwrap_or_default();
    Ok(axum::Json(details(&state, &served, &origin)).into_response())
}

/// A model as a deployment of the server at `origin`.
fn details(state: &AppState, served: &Served, origin: &str) -> Value {
    let id = deployment_id(served);
    let created = calendar::timestamp(served.loaded);
    let url = |kind: &str| format!("{origin}/ml/v1/deployments/{}/text/{kind}", served.name);
    let mut inference =
        vec![json!({"url": url("generation")}), json!({"url": url("generation_stream"), "sse": true})];
    if state.chats() {
        inference.extend([json!({"url": url("chat")}), json!({"url": url("chat_stream"), "sse": true})]);
    }
    let asset_type = if served.is_base() { "foundation_model" } else { "prompt_tune" };
    json!({
        "metadata": {
            "id": id,
            "name": served.name,
            "created_at": created,
            "modified_at": created,
        },
        "entity": {
            "name": served.name,
            "asset": {"id": id},
            "base_model_id": state.model_id,
            "deployed_asset_type": asset_type,
            "online": {"parameters": {"serving_name": served.name}},
            "status": {"state": "ready", "serving_urls": [url("generation")], "inference": inference},
        },
    })
}

/// The base model's specification, by which the SDK knows that there is such a model.
pub(super) async fn specs(State(state): State<Arc<AppState>>) -> Response {
    let tokens = state.client.limits().sequence_tokens;
    let (provider, label) = state.model_id.split_once('/').unwrap_or(("", &state.model_id));
    let since = calendar::date(state.started);
    let mut functions = vec![json!({"id": "text_generation"})];
    if state.chats() {
        functions.push(json!({"id": "text_chat"}));
    }
    let resource = json!({
        "model_id": state.model_id,
        "label": label,
        "provider": provider,
        "source": provider,
        "short_description": "The base model of this server, and of its tuned prompts.",
        "functions": functions,
        "tasks": [],
        "model_limits": {"max_sequence_length": tokens, "max_output_tokens": tokens},
        "lifecycle": [{"id": "available", "start_date": since}],
    });
    axum::Json(json!({"total_count": 1, "limit": 100, "resources": [resource]})).into_response()
}
