//! OpenAI's API (<https://platform.openai.com/docs/api-reference>), with vLLM's additional parameters.
//!
//! `usage.prompt_tokens` counts the tokens that the model attends to: those of the text, and the virtual tokens of a
//! tuned prompt. The virtual tokens are also counted as `usage.prompt_tokens_details.cached_tokens`, because their keys
//! and values are computed once, when the prompt is loaded.

pub(super) mod chat;
mod completions;
mod logprobs;
mod parameters;
mod responses;
mod responses_input;
#[cfg(test)]
mod tests;

use super::Api;
use crate::calendar;
use crate::serve::api_error::ApiError;
use crate::serve::generation::FinishReason;
use crate::serve::params::Fields;
use crate::serve::served::Served;
use crate::serve::state::{AppState, ModelLabel};
use axum::Router;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::SystemTime;

pub(super) const API: Api = Api { name: "openai", error_body };

/// Its paths begin with this.
pub(super) const PREFIX: &str = "/v1/";

/// The `error` object.
pub(super) fn error_body(error: &ApiError) -> Value {
    let kind = match error.status {
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
        StatusCode::SERVICE_UNAVAILABLE => "service_unavailable_error",
        status if status.is_server_error() => "server_error",
        _ => "invalid_request_error",
    };
    json!({"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}})
}

pub(super) fn routes() -> Router<Arc<AppState>> {
    Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/v1/completions", post(completions::complete))
        .route("/v1/chat/completions", post(chat::complete))
        .route("/v1/responses", post(responses::respond))
        .route("/v1/responses/{id}", get(responses::not_kept).delete(responses::not_kept))
}

async fn models(State(state): State<Arc<AppState>>) -> Response {
    let entries = |one: &AppState| -> Vec<Value> {
        one.client.models().iter().map(|served| entry(one, served)).collect()
    };
    let data: Vec<Value> = state.all().flat_map(entries).collect();
    axum::Json(json!({"object": "list", "data": data})).into_response()
}

async fn model(State(state): State<Arc<AppState>>, Path(id): Path<String>) -> Result<Response, ApiError> {
    // A name may contain slashes, so a path with an additional slash at its end matches too.
    let served = |one: &AppState| {
        let served = one.own_model(&id).or_else(|| one.own_model(id.trim_end_matches('/')))?;
        Some(entry(one, &served))
    };
    match state.all().find_map(served) {
        Some(entry) => Ok(axum::Json(entry).into_response()),
        None => Err(state.model(&id).err().unwrap_or_else(ApiError::ending)),
    }
}

/// A model in a list. For a tuned prompt, `root` and `parent` name its base model, as in vLLM.
fn entry(state: &AppState, served: &Served) -> Value {
    let parent = (!served.is_base()).then_some(&state.model_id);
    json!({
        "id": served.name,
        "object": "model",
        "created": calendar::seconds(served.loaded),
        "owned_by": "gneiss",
        "root": parent.unwrap_or(&served.name),
        "parent": parent,
        "max_model_len": state.client.room(served),
    })
}

/// The model that a request names.
fn requested_model(state: &AppState, fields: &Fields, label: &ModelLabel) -> Result<Arc<Served>, ApiError> {
    let Some(name) = fields.string("model")? else {
        return Err(ApiError::missing("model", "the name of a model; GET /v1/models lists them"));
    };
    let model = state.model(name)?;
    label.set(&model);
    Ok(model)
}

/// The fields that all parts of an answer have.
pub(super) struct AnswerHead {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
}

impl AnswerHead {
    pub fn new(prefix: &str, object: &'static str, model: &Served) -> Self {
        let id = format!("{prefix}-{:032x}", rand::random::<u128>());
        Self { id, object, created: calendar::seconds(SystemTime::now()), model: model.name.clone() }
    }

    pub fn with(&self, choices: Vec<Value>) -> Value {
        let Self { id, object, created, model } = self;
        json!({"id": id, "object": object, "created": created, "model": model, "choices": choices})
    }
}

/// Numbers of tokens of a request and its answer.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Usage {
    pub prompt: usize,
    pub virtual_tokens: usize,
    pub completion: usize,
}

impl Usage {
    pub fn json(self) -> Value {
        let Self { prompt, virtual_tokens, completion } = self;
        json!({
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": virtual_tokens},
        })
    }
}

/// `finish_reason`, and vLLM's `stop_reason`, which says what ended the text.
pub(super) fn finish(reason: &FinishReason) -> (&'static str, Value) {
    match reason {
        FinishReason::EndOfText => ("stop", Value::Null),
        FinishReason::Sequence(stop) => ("stop", json!(stop)),
        FinishReason::MaxTokens => ("length", Value::Null),
        FinishReason::TimeLimit => ("length", json!("time_limit")),
    }
}
