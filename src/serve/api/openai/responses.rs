//! `POST /v1/responses`: OpenAI's Responses API, text in, text out. A request is translated to a chat
//! ([`responses_input`](super::responses_input)), so its answer is that of `/v1/chat/completions`. Nothing is stored:
//! the client sends the complete conversation each time.

use super::Usage;
use super::chat::{ChatCompletion, StartedChat, begin};
use super::responses_input::{NAMES, chat};
use crate::calendar;
use crate::generate::Token;
use crate::serve::api_error::ApiError;
use crate::serve::fields::RESPONSES;
use crate::serve::generation::{FinishReason, GeneratedText, Generation, Piece};
use crate::serve::params::Fields;
use crate::serve::sse::{ClientGone, Events, respond as respond_with};
use crate::serve::state::{AppState, RequestBody};
use axum::extract::{Path, Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

/// A response that is being generated.
struct ResponseInProgress {
    chat: ChatCompletion,
    /// The response without status, output and usage.
    response: Value,
    message_id: String,
}

/// Answers the request.
pub(super) async fn respond(
    State(state): State<Arc<AppState>>,
    request: Request,
) -> Result<Response, ApiError> {
    let started = Instant::now();
    let RequestBody { object, label, .. } = state.read(request).await?;
    let (fields, ignored) = Fields::checked(&object, &RESPONSES)?;
    let stream = fields.boolean("stream")?.unwrap_or(false);
    let body = chat(&fields, &object)?;
    let bytes = Value::Object(body.clone()).to_string().into_bytes().into();
    let begun = begin(state, &RequestBody { object: body, bytes, label }, f64::MAX, started).await;
    let StartedChat { chat, mut generations, .. } = begun.map_err(|error| error.renamed(&NAMES))?;
    let generation = generations.pop().expect("a chat without `n` has one answer");
    let response = echo(&object, &chat);
    let responding = ResponseInProgress { chat, response, message_id: id("msg") };
    let response = if stream {
        respond_with(|events| responding.stream(generation, events))
    } else {
        axum::Json(responding.answer(generation).await?).into_response()
    };
    Ok(ignored.add_header(response))
}

/// The answer to requests about an earlier response.
pub(super) async fn not_kept(Path(id): Path<String>) -> ApiError {
    let message = format!("there is no response `{id}`: responses are not kept by this server");
    ApiError::new(StatusCode::NOT_FOUND, "not_found", message)
}

fn id(prefix: &str) -> String {
    format!("{prefix}_{:032x}", rand::random::<u128>())
}

/// The response before there is text: the request's values, and defaults.
fn echo(body: &Map<String, Value>, chat: &ChatCompletion) -> Value {
    let given =
        |key: &str, default: Value| body.get(key).filter(|v| !v.is_null()).cloned().unwrap_or(default);
    let format = body.get("text").and_then(|text| text.get("format")).filter(|format| !format.is_null());
    json!({
        "id": id("resp"),
        "object": "response",
        "created_at": calendar::seconds(SystemTime::now()),
        "status": "in_progress",
        "background": false,
        "error": null,
        "incomplete_details": null,
        "instructions": given("instructions", Value::Null),
        "max_output_tokens": given("max_output_tokens", Value::Null),
        "metadata": given("metadata", json!({})),
        "model": chat.model.name,
        "output": [],
        "parallel_tool_calls": given("parallel_tool_calls", true.into()),
        "previous_response_id": null,
        "reasoning": {"effort": null, "summary": null},
        "store": false,
        "temperature": given("temperature", 1.0.into()),
        "text": {"format": format.cloned().unwrap_or_else(|| json!({"type": "text"}))},
        "tool_choice": given("tool_choice", "auto".into()),
        "tools": [],
        "top_logprobs": given("top_logprobs", 0.into()),
        "top_p": given("top_p", 1.0.into()),
        "truncation": "disabled",
        "usage": null,
        "user": given("user", Value::Null),
    })
}

impl ResponseInProgress {
    fn logprobs(&self, tokens: &[Token]) -> Value {
        self.chat.logprobs(tokens).map_or_else(|| json!([]), |mut logprobs| logprobs["content"].take())
    }

    fn part(text: &str, logprobs: Value) -> Value {
        json!({"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs})
    }

    fn message(&self, status: &str, content: Vec<Value>) -> Value {
        let id = &self.message_id;
        json!({"id": id, "type": "message", "status": status, "role": "assistant", "content": content})
    }

    /// The complete response with its message.
    fn ended(&self, reason: Option<&FinishReason>, message: Value, generated: usize) -> Value {
        let mut response = self.response.clone();
        response["status"] = message["status"].clone();
        response["completed_at"] = calendar::seconds(SystemTime::now()).into();
        response["incomplete_details"] = match reason {
            Some(FinishReason::MaxTokens) => json!({"reason": "max_output_tokens"}),
            Some(FinishReason::TimeLimit) => json!({"reason": "time_limit"}),
            _ => Value::Null,
        };
        response["output"] = json!([message]);
        response["usage"] = usage(self.chat.usage(generated));
        response
    }

    async fn answer(&self, generation: Generation) -> Result<Value, ApiError> {
        let GeneratedText { text, tokens, reason, generated, .. } = generation.collect().await?;
        let part = Self::part(&text, self.logprobs(&tokens));
        let message = self.message(status(reason.as_ref()), vec![part]);
        Ok(self.ended(reason.as_ref(), message, generated))
    }

    async fn stream(self, mut generation: Generation, events: Events) -> Result<(), ClientGone> {
        let mut events = NumberedEvents { events, next: 0 };
        for kind in ["response.created", "response.in_progress"] {
            events.send(kind, json!({"response": self.response})).await?;
        }
        let position = json!({"item_id": self.message_id, "output_index": 0, "content_index": 0});
        let positioned = |more: Value| {
            let mut event = position.clone();
            event.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
            event
        };
        let item = |item: Value| json!({"output_index": 0, "item": item});
        events.send("response.output_item.added", item(self.message("in_progress", Vec::new()))).await?;
        let empty = positioned(json!({"part": Self::part("", json!([]))}));
        events.send("response.content_part.added", empty).await?;
        let (mut text, mut logprobs, mut ended) = (String::new(), Vec::new(), (None, 0));
        while let Some(piece) = generation.next().await {
            match piece {
                Ok(Piece::Scored(_) | Piece::First(_)) => {}
                Ok(Piece::Text { text: more, tokens }) => {
                    let piece_logprobs = self.logprobs(&tokens);
                    logprobs.extend(piece_logprobs.as_array().into_iter().flatten().cloned());
                    text.push_str(&more);
                    let delta = positioned(json!({"delta": more, "logprobs": piece_logprobs}));
                    events.send("response.output_text.delta", delta).await?;
                }
                Ok(Piece::End { reason, generated }) => ended = (Some(reason), generated),
                Err(error) => return events.send("response.failed", self.failed(&error)).await,
            }
        }
        let (reason, generated) = ended;
        let part = Self::part(&text, logprobs.into());
        let done = positioned(json!({"text": text, "logprobs": part["logprobs"]}));
        events.send("response.output_text.done", done).await?;
        events.send("response.content_part.done", positioned(json!({"part": part}))).await?;
        let message = self.message(status(reason.as_ref()), vec![part]);
        events.send("response.output_item.done", item(message.clone())).await?;
        let response = self.ended(reason.as_ref(), message, generated);
        let kind = format!("response.{}", status(reason.as_ref()));
        events.send(&kind, json!({"response": response})).await
    }

    fn failed(&self, error: &ApiError) -> Value {
        let mut response = self.response.clone();
        response["status"] = "failed".into();
        response["error"] = json!({"code": "server_error", "message": error.message});
        json!({"response": response})
    }
}

/// A stream's events, numbered.
struct NumberedEvents {
    events: Events,
    next: usize,
}

impl NumberedEvents {
    async fn send(&mut self, kind: &str, mut event: Value) -> Result<(), ClientGone> {
        event["type"] = kind.into();
        event["sequence_number"] = self.next.into();
        self.next += 1;
        self.events.event(kind, &event).await
    }
}

/// How a response ended: a response that reached a limit is incomplete.
fn status(reason: Option<&FinishReason>) -> &'static str {
    match reason {
        Some(FinishReason::MaxTokens | FinishReason::TimeLimit) => "incomplete",
        _ => "completed",
    }
}

fn usage(usage: Usage) -> Value {
    let Usage { prompt, virtual_tokens, completion } = usage;
    json!({
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": virtual_tokens, "cache_write_tokens": 0},
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + completion,
    })
}

#[cfg(test)]
mod tests;
