//! OpenAI's API (<https://platform.openai.com/docs/api-reference>), with the further parameters that vLLM has.
//!
//! `usage.prompt_tokens` counts the tokens that the model attends to: those of the text, and the virtual tokens of a
//! tuned prompt. The latter are `usage.prompt_tokens_details.cached_tokens` too: their keys and values are computed once,
//! when the prompt is loaded.

pub(super) mod chat;
mod completions;
mod continuation;
mod logprobs;
mod parameters;
mod responses;
mod responses_input;
#[cfg(test)]
mod tests;

use super::adapters::Served;
use super::app::{Label, Shared};
use super::failure::Failure;
use super::generation::Reason;
use super::params::Fields;
use crate::calendar;
use axum::Router;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::SystemTime;

pub(super) fn routes() -> Router<Arc<Shared>> {
    Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/v1/completions", post(completions::complete))
        .route("/v1/chat/completions", post(chat::complete))
        .route("/v1/responses", post(responses::respond))
        .route("/v1/responses/{id}", get(responses::not_kept).delete(responses::not_kept))
}

async fn models(State(app): State<Arc<Shared>>) -> Response {
    let data: Vec<Value> = app.client.models().iter().map(|served| entry(&app, served)).collect();
    axum::Json(json!({"object": "list", "data": data})).into_response()
}

async fn model(State(app): State<Arc<Shared>>, Path(id): Path<String>) -> Result<Response, Failure> {
    // A name may have slashes, so one too many at its end gets here.
    let served =
        app.model(&id).or_else(|failure| app.model(id.trim_end_matches('/')).map_err(|_| failure))?;
    Ok(axum::Json(entry(&app, &served)).into_response())
}

/// A model in a list. `root` and `parent` say of a tuned prompt what it was tuned for, as vLLM does.
fn entry(app: &Shared, served: &Served) -> Value {
    let parent = served.folder.is_some().then_some(&app.model_id);
    json!({
        "id": served.name,
        "object": "model",
        "created": calendar::seconds(served.loaded),
        "owned_by": "gneiss",
        "root": parent.unwrap_or(&served.name),
        "parent": parent,
        "max_model_len": app.client.room(served),
    })
}

/// The model that a request names.
fn named(app: &Shared, fields: &Fields, label: &Label) -> Result<Arc<Served>, Failure> {
    let Some(name) = fields.string("model")? else {
        return Err(Failure::missing("model", "the name of a model; GET /v1/models lists them"));
    };
    let model = app.model(name)?;
    label.set(&model);
    Ok(model)
}

/// What all parts of an answer have.
pub(super) struct Answer {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
}

impl Answer {
    pub fn new(prefix: &str, object: &'static str, model: &Served) -> Self {
        let id = format!("{prefix}-{:032x}", rand::random::<u128>());
        Self { id, object, created: calendar::seconds(SystemTime::now()), model: model.name.clone() }
    }

    pub fn with(&self, choices: Vec<Value>) -> Value {
        let Self { id, object, created, model } = self;
        json!({"id": id, "object": object, "created": created, "model": model, "choices": choices})
    }
}

/// Tokens of a request and its answer.
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

/// `finish_reason`, and `stop_reason`, in which vLLM says what ended the text.
pub(super) fn finish(reason: &Reason) -> (&'static str, Value) {
    match reason {
        Reason::EndOfText => ("stop", Value::Null),
        Reason::Sequence(stop) => ("stop", json!(stop)),
        Reason::MaxTokens => ("length", Value::Null),
        Reason::TimeLimit => ("length", json!("time_limit")),
    }
}
