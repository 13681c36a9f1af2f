//! `POST /v1/chat/completions`: messages in, through the checkpoint's chat template, a message out.

use super::logprobs::{LOGPROBS_RANGE, content};
use super::parameters::{CompletionParameters, truncation};
use super::{AnswerHead, Usage, error_body, finish, requested_model};
use crate::checkpoint::chat_template::{Chat, continuation};
use crate::generate::Token;
use crate::serve::api_error::ApiError;
use crate::serve::body::describe;
use crate::serve::fields::{CHAT, Ignored};
use crate::serve::generation::{Generation, Generations, Piece};
use crate::serve::params::Fields;
use crate::serve::prompt::{PromptEncoding, not_empty};
use crate::serve::served::Served;
use crate::serve::sse::{ClientGone, Events, respond};
use crate::serve::state::{AppState, RequestBody};
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use minijinja::Value as Templated;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Instant;

/// The values of a request.
pub(in crate::serve) struct ChatCompletion {
    state: Arc<AppState>,
    pub model: Arc<Served>,
    tokens: Vec<u32>,
    parameters: CompletionParameters,
    /// Number of likeliest tokens that are returned with each token.
    logprobs: Option<usize>,
    /// Most seconds; the server's own limit also applies.
    seconds: f64,
}

/// A conversation whose answers are being generated.
pub(in crate::serve) struct StartedChat {
    pub chat: ChatCompletion,
    pub generations: Vec<Generation>,
    pub ignored: Ignored,
}

/// Answers the request.
pub(super) async fn complete(
    State(state): State<Arc<AppState>>,
    request: Request,
) -> Result<Response, ApiError> {
    let started = Instant::now();
    let body = state.read(request).await?;
    let StartedChat { chat, generations, ignored } = begin(state, &body, f64::MAX, started).await?;
    let response = if chat.parameters.stream {
        respond(|events| chat.stream(generations, events))
    } else {
        axum::Json(chat.answer(generations).await?).into_response()
    };
    Ok(ignored.add_header(response))
}

/// Begins the answers to a body of `POST /v1/chat/completions`. They have `seconds` to complete.
///
/// # Errors
/// Returns an error if a value of the request is invalid or the worker refuses it.
pub(in crate::serve) async fn begin(
    state: Arc<AppState>,
    body: &RequestBody,
    seconds: f64,
    started: Instant,
) -> Result<StartedChat, ApiError> {
    let (fields, mut ignored) = Fields::checked(&body.object, &CHAT)?;
    let model = requested_model(&state, &fields, &body.label)?;
    check_kwargs(&state, &fields, &mut ignored)?;
    let parameters = CompletionParameters::read(&state, &fields)?;
    let logprobs = logprobs(&fields)?;
    let max_tokens_field = max_tokens(&fields)?;
    let special = fields.boolean("add_special_tokens")?.unwrap_or(false);
    let most = state.client.room(&model);
    let (key, requested) = max_tokens_field.unzip();
    let truncated = truncation(&fields, most, requested.unwrap_or(1))?;
    let text = rendered(&state, &fields, &body.bytes)?;
    // The template writes the special tokens that the tokenizer would add before a text.
    let tokens = state.encode(text, PromptEncoding::Text { special }, truncated).await?;
    not_empty("messages", &tokens)?;
    if tokens.len() >= most {
        let found = tokens.len();
        return Err(ApiError::too_long(format!(
            "expected messages of fewer than {most} tokens, found {found}"
        )));
    }
    let default = state.options.max_new_tokens.min(most - tokens.len());
    let max_tokens = parameters.max_tokens(key.unwrap_or("max_tokens"), requested, default)?;
    let chat = ChatCompletion { state, model, tokens, parameters, logprobs, seconds };
    let generations = chat.start(max_tokens, started)?;
    Ok(StartedChat { chat, generations, ignored })
}

impl ChatCompletion {
    fn start(&self, max_tokens: usize, started: Instant) -> Result<Vec<Generation>, ApiError> {
        let each = (0..self.parameters.n).map(|choice| {
            let mut request = self.parameters.request(&self.state, self.tokens.clone(), max_tokens, choice);
            request.logprobs = self.logprobs;
            request.deadline = self.state.deadline(self.seconds);
            Generation::start(&self.state, &self.model, request, &self.parameters.stopping, started)
        });
        each.collect()
    }

    /// Numbers of tokens of the conversation and its answers.
    pub fn usage(&self, completion: usize) -> Usage {
        let virtual_tokens = self.model.virtual_tokens;
        Usage { prompt: self.tokens.len() + virtual_tokens, virtual_tokens, completion }
    }

    /// Log-probabilities of tokens, if the request asks for them.
    pub fn logprobs(&self, tokens: &[Token]) -> Option<Value> {
        self.logprobs.map(|_| content(&self.state.tokenizer, tokens))
    }

    /// The complete answers.
    ///
    /// # Errors
    /// Returns an error if the device fails or the worker ends.
    pub async fn answer(&self, generations: Vec<Generation>) -> Result<Value, ApiError> {
        let (mut choices, mut generated) = (Vec::new(), 0);
        for (index, generation) in generations.into_iter().enumerate() {
            let generated_text = generation.collect().await?;
            generated += generated_text.generated;
            let ended = generated_text.reason.as_ref().map(finish);
            choices.push(json!({
                "index": index,
                "message": {"role": "assistant", "content": generated_text.text, "refusal": null},
                "logprobs": self.logprobs(&generated_text.tokens),
                "finish_reason": ended.as_ref().map(|(reason, _)| *reason),
                "stop_reason": ended.map(|(_, stop)| stop),
            }));
        }
        let mut answer = AnswerHead::new("chatcmpl", "chat.completion", &self.model).with(choices);
        answer["usage"] = self.usage(generated).json();
        Ok(answer)
    }

    async fn stream(self, generations: Vec<Generation>, events: Events) -> Result<(), ClientGone> {
        let answer = AnswerHead::new("chatcmpl", "chat.completion.chunk", &self.model);
        let chunk = |index: usize, delta: Value, logprobs: Option<Value>| {
            let choice = json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": null});
            let mut chunk = answer.with(vec![choice]);
            if self.parameters.include_usage {
                chunk["usage"] = Value::Null;
            }
            chunk
        };
        for index in 0..generations.len() {
            events.data(&chunk(index, json!({"role": "assistant", "content": ""}), None)).await?;
        }
        let (mut generations, mut generated) = (Generations::new(generations), 0);
        while let Some((index, piece)) = generations.next().await {
            let event = match piece {
                Ok(Piece::Scored(_) | Piece::First(_)) => continue,
                Ok(Piece::Text { text, tokens }) => {
                    chunk(index, json!({"content": text}), self.logprobs(&tokens))
                }
                Ok(Piece::End { reason, generated: tokens }) => {
                    generated += tokens;
                    let (reason, stop) = finish(&reason);
                    let mut last = chunk(index, json!({}), None);
                    last["choices"][0]["finish_reason"] = reason.into();
                    last["choices"][0]["stop_reason"] = stop;
                    last
                }
                Err(error) => return events.data(&error_body(&error)).await,
            };
            events.data(&event).await?;
        }
        if self.parameters.include_usage {
            let mut last = answer.with(Vec::new());
            last["usage"] = self.usage(generated).json();
            events.data(&last).await?;
        }
        events.done().await
    }
}

/// Most tokens of the answer, and the field that says so.
fn max_tokens(fields: &Fields) -> Result<Option<(&'static str, usize)>, ApiError> {
    let mut limit = None;
    for key in ["max_tokens", "max_completion_tokens"] {
        limit = fields.count(key, 1..=usize::MAX)?.map(|most| (key, most)).or(limit);
    }
    Ok(limit)
}

/// `logprobs` and `top_logprobs` as one number.
fn logprobs(fields: &Fields) -> Result<Option<usize>, ApiError> {
    let wanted = fields.boolean("logprobs")?.unwrap_or(false);
    let top = fields.count("top_logprobs", LOGPROBS_RANGE)?;
    if top.is_some_and(|top| top > 0) && !wanted {
        return Err(ApiError::invalid("top_logprobs", "expected `logprobs` true with it, found it without"));
    }
    Ok(wanted.then(|| top.unwrap_or(0)))
}

/// The parts of a body that the template reads, with their keys in the original order.
#[derive(serde::Deserialize)]
struct ForTemplate {
    messages: Vec<Templated>,
    #[serde(default)]
    chat_template_kwargs: Option<Templated>,
}

/// The conversation as one text.
fn rendered(state: &AppState, fields: &Fields, bytes: &[u8]) -> Result<String, ApiError> {
    let renderer = match &state.chat {
        Some(Ok(renderer)) => renderer,
        Some(Err(problem)) => {
            return Err(no_template(&format!("the checkpoint's chat template can't be used: {problem}")));
        }
        None => return Err(no_template("the checkpoint has no chat template")),
    };
    let continued = fields.boolean("continue_final_message")?.unwrap_or(false);
    let add_generation_prompt = fields.boolean("add_generation_prompt")?.unwrap_or(!continued);
    if continued && add_generation_prompt {
        let problem =
            "expected false with `continue_final_message`: an answer is begun or gone on with; found true";
        return Err(ApiError::invalid("add_generation_prompt", problem));
    }
    let mut contents = contents(fields)?;
    let last =
        if continued { contents.last_mut().map(|(_, content)| continuation::mark(content)) } else { None };
    let ordered: ForTemplate = serde_json::from_slice(bytes)
        .map_err(|error| ApiError::invalid("messages", format!("expected messages: {error}")))?;
    let messages = ordered.messages.iter().zip(contents).map(|(message, (role, content))| {
        let keys = message.try_iter().into_iter().flatten();
        let others = keys.filter_map(|key| Some((key.clone(), message.get_item(&key).ok()?)));
        let own = [("role", Templated::from(role)), ("content", Templated::from(content))];
        let own = own.map(|(key, value)| (Templated::from(key), value));
        // Of two entries with one key, the last value counts and the first position.
        Templated::from_pairs(others.chain(own))
    });
    let chat = Chat {
        messages: messages.collect(),
        add_generation_prompt,
        kwargs: ordered.chat_template_kwargs.filter(|kwargs| !kwargs.is_none()),
    };
    let text = renderer
        .render(&chat)
        .map_err(|problem| ApiError::invalid("messages", format!("the chat template says: {problem}")))?;
    match last {
        Some(last) => continuation::cut(&text, &last)
            .ok_or_else(|| ApiError::invalid("continue_final_message", continuation::LOST)),
        None => Ok(text),
    }
}

/// Fields of the request that are not values for the template.
const NO_KWARGS: [&str; 5] =
    ["messages", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize"];

/// Refuses template values that fields of the request override, and notes those that the template does not read.
fn check_kwargs(state: &AppState, fields: &Fields, ignored: &mut Ignored) -> Result<(), ApiError> {
    let Some(kwargs) = fields.object("chat_template_kwargs", "chat_template_kwargs.")? else { return Ok(()) };
    for (key, _) in kwargs.entries() {
        let name = kwargs.name(key);
        if NO_KWARGS.contains(&key.as_str()) {
            return Err(ApiError::unsupported(
                name,
                "the template's values don't set it; it is a field beside them",
            ));
        }
        if let Some(Ok(renderer)) = &state.chat
            && !renderer.reads(key)
        {
            ignored.note(name);
        }
    }
    Ok(())
}

fn no_template(problem: &str) -> ApiError {
    let message = format!("{problem}; ask for a completion of raw text at /v1/completions instead");
    ApiError { code: "no_chat_template", ..ApiError::malformed(message) }
}

/// Roles and contents of `messages`. The role `developer` becomes `system`, which templates know. If a content has
/// several parts, their texts are joined by line breaks.
fn contents(fields: &Fields) -> Result<Vec<(String, String)>, ApiError> {
    let Some(messages) = fields.get("messages") else {
        return Err(ApiError::missing("messages", "a list of messages with `role` and `content`"));
    };
    let list = messages.as_array().filter(|list| !list.is_empty());
    let Some(list) = list else {
        return Err(fields.wrong("messages", "a list of one message or more", messages));
    };
    let each = list.iter().enumerate().map(|(i, message)| {
        let key = |key: &str| format!("messages[{i}]{key}");
        if !message.is_object() {
            let problem =
                format!("expected an object with `role` and `content`, found {}", describe(message));
            return Err(ApiError::invalid(key(""), problem));
        }
        if message["prefix"] == true {
            let problem = "set `continue_final_message` of the request, which goes on with the last message";
            return Err(ApiError::unsupported(key(".prefix"), problem));
        }
        let role = match &message["role"] {
            Value::String(role) if role == "developer" => "system".to_owned(),
            Value::String(role) => role.clone(),
            other => {
                let problem = format!("expected system, user or assistant, found {}", describe(other));
                return Err(ApiError::invalid(key(".role"), problem));
            }
        };
        Ok((role, content_text(&message["content"], &key(".content"))?))
    });
    each.collect()
}

fn content_text(content: &Value, key: &str) -> Result<String, ApiError> {
    let part = |part: &Value| match (part["type"].as_str(), part["text"].as_str()) {
        (Some("text"), Some(text)) => Ok(text.to_owned()),
        (Some(kind), _) if kind != "text" => {
            Err(ApiError::unsupported(key, &format!("expected text, found a part of type {kind}")))
        }
        _ => Err(ApiError::invalid(
            key,
            format!("expected parts with `type` and `text`, found {}", describe(part)),
        )),
    };
    match content {
        Value::String(text) => Ok(text.clone()),
        // An assistant's message with tool calls only.
        Value::Null => Ok(String::new()),
        Value::Array(parts) => Ok(parts.iter().map(part).collect::<Result<Vec<_>, _>>()?.join("\n")),
        other => Err(ApiError::invalid(
            key,
            format!("expected a string or a list of text parts, found {}", describe(other)),
        )),
    }
}
