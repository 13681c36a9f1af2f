//! `POST /ml/v1/text/chat` and `chat_stream`, of a model or of a deployment. The body is that of OpenAI's chats with a
//! few fields of watsonx, and the answer is that of `/v1/chat/completions` with watsonx's fields added.

use super::{deployed, error_body, requested_model};
use crate::calendar;
use crate::serve::api::openai::chat::{ChatCompletion, StartedChat, begin};
use crate::serve::api::openai::{AnswerHead, finish};
use crate::serve::api_error::ApiError;
use crate::serve::fields::WATSONX_CHAT;
use crate::serve::generation::{Generation, Generations, Piece};
use crate::serve::params::Fields;
use crate::serve::sse::{ClientGone, Events, respond};
use crate::serve::state::{AppState, RequestBody};
use axum::extract::{Path, Request, State};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

/// Names of fields in OpenAI's chats and here, if they differ.
const NAMES: [(&str, &str); 1] = [("model", "model_id")];

/// The answer of a deployment, or of the model that the body names.
pub(super) async fn chat(
    State(state): State<Arc<AppState>>,
    deployment: Option<Path<String>>,
    request: Request,
) -> Result<Response, ApiError> {
    let StartedChat { chat, generations, ignored } = start(state, deployment, request).await?;
    let mut answer = chat.answer(generations).await?;
    for choice in answer["choices"].as_array_mut().into_iter().flatten() {
        set_time_limit_reason(choice);
    }
    with_own_fields(&mut answer, SystemTime::now());
    Ok(ignored.add_header(axum::Json(answer).into_response()))
}

/// The same in pieces.
pub(super) async fn chat_stream(
    State(state): State<Arc<AppState>>,
    deployment: Option<Path<String>>,
    request: Request,
) -> Result<Response, ApiError> {
    let StartedChat { chat, generations, ignored } = start(state, deployment, request).await?;
    Ok(ignored.add_header(respond(|events| stream(chat, generations, events))))
}

/// Begins the answers of a deployment, or of the model that the body names.
async fn start(
    state: Arc<AppState>,
    deployment: Option<Path<String>>,
    request: Request,
) -> Result<StartedChat, ApiError> {
    let started = Instant::now();
    let RequestBody { object, bytes, label } = state.read(request).await?;
    let (own, mut chat): (Map<String, Value>, Map<String, Value>) =
        object.into_iter().partition(|(key, _)| WATSONX_CHAT.knows(key));
    let (fields, _) = Fields::checked(&own, &WATSONX_CHAT)?;
    let model = match deployment {
        Some(Path(deployment)) => deployed(&state, &deployment)?,
        None => requested_model(&state, &fields)?,
    };
    let milliseconds = fields.count("time_limit", 1..=usize::MAX)?;
    let seconds = milliseconds.map_or(f64::MAX, |milliseconds| milliseconds as f64 / 1000.0);
    chat.insert("model".into(), model.name.clone().into());
    for key in ["max_tokens", "max_completion_tokens"] {
        // In watsonx, 0 means the model's own limit.
        if chat.get(key).is_some_and(|most| most.as_u64() == Some(0)) {
            chat.remove(key);
        }
    }
    let begun = begin(state, &RequestBody { object: chat, bytes, label }, seconds, started).await;
    begun.map_err(|error| error.renamed(&NAMES))
}

/// Adds the model and the time under watsonx's names.
fn with_own_fields(answer: &mut Value, created: SystemTime) {
    answer["model_id"] = answer["model"].clone();
    answer["created_at"] = calendar::timestamp(created).into();
}

/// watsonx has a reason of its own for a text that reached its time limit.
fn set_time_limit_reason(choice: &mut Value) {
    if choice["stop_reason"] == "time_limit" {
        choice["finish_reason"] = "time_limit".into();
    }
}

/// Each event has the text since the last one; the last event has the numbers of tokens.
async fn stream(
    chat: ChatCompletion,
    generations: Vec<Generation>,
    events: Events,
) -> Result<(), ClientGone> {
    let (answer, created) =
        (AnswerHead::new("chatcmpl", "chat.completion.chunk", &chat.model), SystemTime::now());
    let chunk = |choices: Vec<Value>| {
        let mut chunk = answer.with(choices);
        with_own_fields(&mut chunk, created);
        chunk
    };
    let choice = |index: usize, delta: Value, logprobs: Option<Value>| json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": null});
    let mut id = 0;
    for index in 0..generations.len() {
        let first = chunk(vec![choice(index, json!({"role": "assistant", "content": ""}), None)]);
        events.named(id, "message", &first).await?;
        id += 1;
    }
    let (mut generations, mut generated) = (Generations::new(generations), 0);
    while let Some((index, piece)) = generations.next().await {
        let choice = match piece {
            Ok(Piece::Scored(_) | Piece::First(_)) => continue,
            Ok(Piece::Text { text, tokens }) => {
                choice(index, json!({"content": text}), chat.logprobs(&tokens))
            }
            Ok(Piece::End { reason, generated: tokens }) => {
                generated += tokens;
                let (reason, stop) = finish(&reason);
                let mut last = choice(index, json!({"content": ""}), None);
                last["finish_reason"] = reason.into();
                last["stop_reason"] = stop;
                set_time_limit_reason(&mut last);
                last
            }
            Err(error) => return events.named(id, "error", &error_body(&error)).await,
        };
        events.named(id, "message", &chunk(vec![choice])).await?;
        id += 1;
    }
    let mut last = chunk(Vec::new());
    last["usage"] = chat.usage(generated).json();
    events.named(id, "message", &last).await
}

#[cfg(test)]
mod tests;
