//! Tokens, projects and spaces, and what can be tuned.

use super::{HandlerResult, IDENTITY, Shared, TASKS, checked_text, json_answer, resources};
use crate::calendar;
use crate::serve::api_error::ApiError;
use crate::serve::auth::Product;
use crate::serve::body::{self, BodyLimits};
use crate::serve::state::AppState;
use crate::watsonx::bases::TunableModel;
use crate::watsonx::service::Service;
use axum::extract::{Path, Query, Request, State};
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::response::Response;
use axum::routing::{get, post};
use axum::{Extension, Router};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Most bytes of a form with a key.
const MAX_FORM_BYTES: usize = 16 << 10;
/// Seconds that a token is said to be valid at least.
const TOKEN_SECONDS: u64 = 3600;

/// watsonx's tasks: ids and labels.
const ALL_TASKS: [(&str, &str); 7] = [
    ("question_answering", "Question answering"),
    ("summarization", "Summarization"),
    ("retrieval_augmented_generation", "Retrieval Augmented Generation"),
    ("classification", "Classification"),
    ("generation", "Generation"),
    ("code", "Code generation and conversion"),
    ("extraction", "Extraction"),
];

pub fn routes() -> Router<Arc<AppState>> {
    Router::new()
        .route(IDENTITY, post(identity))
        .route(TASKS, get(tasks))
        .route("/v2/projects/{id}", get(place))
        .route("/v2/spaces/{id}", get(place))
        .route("/v2/software_specifications", get(software))
        .route("/ml/v1/foundation_model_specs", get(specs))
}

/// A token for a client of IBM Cloud.
async fn identity(State(state): State<Arc<AppState>>, request: Request) -> HandlerResult {
    let (parts, body) = request.into_parts();
    let limits = BodyLimits { bytes: MAX_FORM_BYTES, seconds: state.options.body_seconds };
    let bytes = body::read(limits, &parts.headers, body).await?;
    let expected = || ApiError::malformed("expected a form with `apikey`, as `apikey=KEY&grant_type=...`");
    let text = std::str::from_utf8(&bytes).map_err(|_| expected())?;
    let uri: Uri = format!("/?{text}").parse().map_err(|_| expected())?;
    let Query(form) = Query::<HashMap<String, String>>::try_from_uri(&uri).map_err(|_| expected())?;
    let key = form.get("apikey").ok_or_else(expected)?;
    let token = state.auth.authorize(key, Product::Cloud)?;
    let expires = calendar::seconds(SystemTime::now() + Duration::from_secs(TOKEN_SECONDS));
    let answer = json!({"access_token": token, "refresh_token": "not_supported", "token_type": "Bearer",
                        "expires_in": TOKEN_SECONDS, "expiration": expires});
    Ok(json_answer(StatusCode::OK, answer))
}

/// A project or space: whichever the client asks for exists. The storage is one that the SDK's clients of IBM Cloud accept;
/// nothing is stored there.
async fn place(
    State(state): State<Arc<AppState>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> HandlerResult {
    let id = checked_text("id", &id)?;
    let origin = state.origin(&headers).unwrap_or_default();
    let credentials = json!({"access_key_id": "none", "secret_access_key": "none"});
    let properties = json!({"bucket_name": "none", "endpoint_url": origin, "shared": false,
                            "credentials": {"admin": credentials, "editor": credentials}});
    let storage = json!({"type": "bmcos_object_storage", "properties": properties});
    let compute = json!([{"type": "machine_learning", "name": "gneiss", "guid": "gneiss"}]);
    let entity = json!({"name": id, "storage": storage, "compute": compute});
    Ok(json_answer(StatusCode::OK, json!({"metadata": {"id": id, "guid": id}, "entity": entity})))
}

/// Environments of models: none, because prompts need none.
async fn software() -> Response {
    resources(Vec::new())
}

async fn tasks() -> Response {
    let task =
        |(rank, (id, label)): (usize, &(&str, &str))| json!({"task_id": id, "label": label, "rank": rank});
    resources(ALL_TASKS.iter().enumerate().map(task).collect())
}

/// The models that can be tuned and asked: the base models, and those for which they stand in.
async fn specs(State(state): State<Arc<AppState>>, Extension(service): Shared) -> Response {
    let of_one = |base: &TunableModel| -> Vec<Value> {
        base.names().map(|name| specification(&service, base, name, &calendar::date(state.started))).collect()
    };
    resources(service.bases.iter().flat_map(of_one).collect())
}

/// What is known of a base model under one of its names.
fn specification(service: &Service, base: &TunableModel, name: &str, since: &str) -> Value {
    let tokens = base.client.limits().sequence_tokens;
    let chat = base.chats.then_some("text_chat");
    let functions =
        ["text_generation", "prompt_tune_trainable", "prompt_tune_inferable"].into_iter().chain(chat);
    let functions: Vec<Value> = functions.map(|id| json!({"id": id})).collect();
    let (provider, label) = name.split_once('/').unwrap_or(("", name));
    let stand_in = service.stand_in(&base.name, name);
    let description =
        stand_in.unwrap_or_else(|| "A base model of this server, and of its tuned prompts.".into());
    json!({
        "model_id": name,
        "label": label,
        "provider": provider,
        "source": provider,
        "short_description": description,
        "functions": functions,
        "tasks": ALL_TASKS.map(|(id, _)| json!({"id": id})),
        "model_limits": {"max_sequence_length": tokens, "max_output_tokens": tokens},
        "lifecycle": [{"id": "available", "start_date": since}],
    })
}
