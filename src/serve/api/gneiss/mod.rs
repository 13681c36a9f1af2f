//! gneiss's own API: `POST /v1/classify` says how likely each label is, `GET /v1/tasks` says what each prompt was tuned for.

mod classify;

use super::{Api, openai};
use crate::serve::served::Served;
use crate::serve::state::AppState;
use axum::Router;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};
use std::sync::Arc;

/// Its errors have OpenAI's form.
pub(super) const API: Api = Api { name: "gneiss", error_body: openai::error_body };

/// All of its paths.
pub(super) const PATHS: [&str; 2] = ["/v1/classify", "/v1/tasks"];

pub(super) fn routes() -> Router<Arc<AppState>> {
    Router::new().route("/v1/classify", post(classify::classify)).route("/v1/tasks", get(tasks))
}

/// The first base model's name, and base model and task of each tuned prompt.
async fn tasks(State(state): State<Arc<AppState>>) -> Response {
    let of_one = |one: &AppState| -> Vec<Value> {
        let models = one.client.models();
        let tuned = models.iter().filter(|served| !served.is_base());
        let task = |served: &Arc<Served>| {
            let mut entry = json!({"model": served.name, "base": one.model_id, "virtual_tokens": served.virtual_tokens,
                                   "task": served.task});
            if !served.members.is_empty() {
                entry["ensemble"] = served.members.len().into();
            }
            entry
        };
        tuned.map(task).collect()
    };
    let tasks: Vec<Value> = state.all().flat_map(of_one).collect();
    axum::Json(json!({"base": state.model_id, "tasks": tasks})).into_response()
}
