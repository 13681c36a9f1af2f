//! IBM watsonx.ai's API for text generation and chats (<https://cloud.ibm.com/apidocs/watsonx-ai>), as the Cloud Pak
//! for Data has it, and the requests that its SDK `ibm-watsonx-ai` makes first.
//!
//! A deployment is a model of this server, by its name or by an id that is computed from the name: the SDK accepts only
//! ids of 36 characters. The input of a deployed prompt is inserted into the verbalizer that it was tuned with, as
//! watsonx does it; `/ml/v1/text/generation` uses the text as it is. `input_token_count` includes virtual tokens.

mod chat;
mod cloud_pak;
mod generation;
mod parameters;
#[cfg(test)]
mod tests;

use super::Api;
use crate::serve::api_error::ApiError;
use crate::serve::params::Fields;
use crate::serve::served::Served;
use crate::serve::state::AppState;
use axum::Router;
use axum::http::StatusCode;
use axum::routing::{get, post};
use serde_json::{Value, json};
use std::sync::Arc;
use uuid::Uuid;

/// The path where clients exchange a key for a token.
pub(super) const AUTHORIZE: &str = "/icp4d-api/v1/authorize";
/// The path that clients request first.
pub(super) const VERSION: &str = "/ml/wml_services/v2/version";

pub(super) const API: Api = Api { name: "watsonx", error_body };

/// Its paths begin with one of these.
pub(super) const PREFIXES: [&str; 6] = ["/ml/", "/icp4d-api/", "/v2/", "/identity/", "/projects/", "/wx/"];

/// The list of errors.
fn error_body(error: &ApiError) -> Value {
    let entry = json!({"code": error.code, "message": error.message, "more_info": ""});
    let trace = format!("{:032x}", rand::random::<u128>());
    json!({"errors": [entry], "trace": trace, "status_code": error.status.as_u16()})
}

pub(super) fn routes() -> Router<Arc<AppState>> {
    Router::new()
        .route("/ml/v1/deployments/{deployment}/text/generation", post(generation::generate))
        .route("/ml/v1/deployments/{deployment}/text/generation_stream", post(generation::generate_stream))
        .route("/ml/v1/deployments/{deployment}/generation_stream", post(generation::generate_stream))
        .route("/ml/v1/text/generation", post(generation::generate))
        .route("/ml/v1/text/generation_stream", post(generation::generate_stream))
        .route("/ml/v1/deployments/{deployment}/text/chat", post(chat::chat))
        .route("/ml/v1/deployments/{deployment}/text/chat_stream", post(chat::chat_stream))
        .route("/ml/v1/text/chat", post(chat::chat))
        .route("/ml/v1/text/chat_stream", post(chat::chat_stream))
        .route("/ml/v1/text/tokenization", post(generation::tokenize))
        .route(AUTHORIZE, post(cloud_pak::authorize))
        .route(VERSION, get(cloud_pak::version))
}

/// Projects, models and deployments that no request changes.
pub(super) fn fixed_routes() -> Router<Arc<AppState>> {
    Router::new()
        .route("/ml/v1/foundation_model_specs", get(cloud_pak::specs))
        .route("/ml/v4/deployments", get(cloud_pak::deployments))
        .route("/ml/v4/deployments/{deployment}", get(cloud_pak::deployment))
        .route("/v2/spaces/{id}", get(cloud_pak::space))
        .route("/v2/projects/{id}", get(cloud_pak::space))
}

/// The model of a deployment, by its name or id.
///
/// # Errors
/// Returns 404 if there is none.
fn deployed(state: &AppState, deployment: &str) -> Result<Arc<Served>, ApiError> {
    state.deployed(deployment).ok_or_else(|| {
        let models = state.client.models();
        let names: Vec<&str> = models.iter().map(|served| served.name.as_str()).collect();
        let message = format!("there is no deployment `{deployment}`; this server has {}", names.join(", "));
        ApiError::new(StatusCode::NOT_FOUND, "deployment_not_found", message)
    })
}

/// The model that `model_id` names.
fn requested_model(state: &AppState, fields: &Fields) -> Result<Arc<Served>, ApiError> {
    match fields.string("model_id")? {
        Some(name) => state.model(name),
        None => Err(ApiError::missing("model_id", "the name of a model")),
    }
}

impl AppState {
    /// The model of a deployment among those of this state, by its name or id.
    pub(in crate::serve) fn deployed(&self, deployment: &str) -> Option<Arc<Served>> {
        let is_its = |served: &&Arc<Served>| served.name == deployment || deployment_id(served) == deployment;
        self.client.models().iter().find(is_its).cloned()
    }
}

/// The id of a model's deployment.
fn deployment_id(served: &Served) -> String {
    served.deployment_id.clone().unwrap_or_else(|| id(&served.name))
}

/// The id of a deployment that has no other: a UUID of version 8 (RFC 9562) with the 128-bit FNV-1a hash of the name, the same in every
/// run.
fn id(name: &str) -> String {
    const OFFSET: u128 = 0x6c62272e07bb014262b821756295c58d;
    const PRIME: u128 = 0x0000000001000000000000000000013b;
    let hash = name.bytes().fold(OFFSET, |hash, byte| (hash ^ u128::from(byte)).wrapping_mul(PRIME));
    Uuid::new_v8(hash.to_be_bytes()).to_string()
}
