//! `POST /v1/chat/completions`: messages in, through the checkpoint's chat template, a message out.

use super::logprobs::{LOGPROBS_RANGE, content};
use super::parameters::{CompletionParameters, truncation};
use super::{AnswerHead, Usage, error_body, finish, named};
use crate::checkpoint::chat_template::Chat;
use crate::checkpoint::chat_template::continuation;
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

/// What a request asks for.
pub(in crate::serve) struct ChatCompletion {
    app: Arc<AppState>,
    pub model: Arc<Served>,
    tokens: Vec<u32>,
    parameters: CompletionParameters,
    /// So many likeliest tokens with each.
    logprobs: Option<usize>,
    /// Most seconds, beside the server's own limit.
    seconds: f64,
}

/// A conversation whose answers are under way.
pub(in crate::serve) struct StartedChat {
    pub chat: ChatCompletion,
    pub generations: Vec<Generation>,
    pub ignored: Ignored,
}

/// Answers the request.
pub(super) async fn complete(
    State(app): State<Arc<AppState>>,
    request: Request,
) -> Result<Response, ApiError> {
    let started = Instant::now();
    let asked = app.read(request).await?;
    let StartedChat { chat, generations, ignored } = begin(app, &asked, f64::MAX, started).await?;
    let response = if chat.parameters.stream {
        respond(|events| chat.stream(generations, events))
    } else {
        axum::Json(chat.whole(generations).await?).into_response()
    };
    Ok(ignored.tell(response))
}

/// Begins the answers to a body of `POST /v1/chat/completions`, which have `seconds` to end.
///
/// # Errors
/// What can't be taken of the request, and what the worker refuses.
pub(in crate::serve) async fn begin(
    app: Arc<AppState>,
    asked: &RequestBody,
    seconds: f64,
    started: Instant,
) -> Result<StartedChat, ApiError> {
    let (fields, mut ignored) = Fields::checked(&asked.object, &CHAT)?;
    let model = named(&app, &fields, &asked.label)?;
    check_kwargs(&app, &fields, &mut ignored)?;
    let parameters = CompletionParameters::read(&app, &fields)?;
    let logprobs = logprobs(&fields)?;
    let asked_tokens = max_tokens(&fields)?;
    let special = fields.boolean("add_special_tokens")?.unwrap_or(false);
    let most = app.client.room(&model);
    let (key, asked_most) = asked_tokens.unzip();
    let truncated = truncation(&fields, most, asked_most.unwrap_or(1))?;
    let text = rendered(&app, &fields, &asked.bytes)?;
    // The template writes what the tokenizer would put before a text.
    let tokens = app.encode(text, PromptEncoding::Text { special }, truncated).await?;
    not_empty("messages", &tokens)?;
    if tokens.len() >= most {
        let found = tokens.len();
        return Err(ApiError::too_long(format!(
            "expected messages of fewer than {most} tokens, found {found}"
        )));
    }
    let default = app.options.max_new_tokens.min(most - tokens.len());
    let max_tokens = parameters.max_tokens(key.unwrap_or("max_tokens"), asked_most, default)?;
    let chat = ChatCompletion { app, model, tokens, parameters, logprobs, seconds };
    let generations = chat.start(max_tokens, started)?;
    Ok(StartedChat { chat, generations, ignored })
}

impl ChatCompletion {
    fn start(&self, max_tokens: usize, started: Instant) -> Result<Vec<Generation>, ApiError> {
        let each = (0..self.parameters.n).map(|choice| {
            let mut request = self.parameters.request(&self.app, self.tokens.clone(), max_tokens, choice);
            request.logprobs = self.logprobs;
            request.deadline = self.app.deadline(self.seconds);
            Generation::start(&self.app, &self.model, request, &self.parameters.stopping, started)
        });
        each.collect()
    }

    /// Tokens of the conversation and of its answers.
    pub fn usage(&self, completion: usize) -> Usage {
        let virtual_tokens = self.model.virtual_tokens;
        Usage { prompt: self.tokens.len() + virtual_tokens, virtual_tokens, completion }
    }

    /// Log-probabilities of tokens, if the request asks for them.
    pub fn logprobs(&self, tokens: &[Token]) -> Option<Value> {
        self.logprobs.map(|_| content(&self.app.tokenizer, tokens))
    }

    /// The answers, when all have ended.
    ///
    /// # Errors
    /// The device's, and a worker that ends.
    pub async fn whole(&self, generations: Vec<Generation>) -> Result<Value, ApiError> {
        let (mut choices, mut generated) = (Vec::new(), 0);
        for (index, generation) in generations.into_iter().enumerate() {
            let whole = generation.whole().await?;
            generated += whole.generated;
            let ended = whole.reason.as_ref().map(finish);
            choices.push(json!({
                "index": index,
                "message": {"role": "assistant", "content": whole.text, "refusal": null},
                "logprobs": self.logprobs(&whole.tokens),
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
                Err(failure) => return events.data(&error_body(&failure)).await,
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

/// Tokens of the answer at most, and the field that says so.
fn max_tokens(fields: &Fields) -> Result<Option<(&'static str, usize)>, ApiError> {
    let mut found = None;
    for key in ["max_tokens", "max_completion_tokens"] {
        found = fields.count(key, 1..=usize::MAX)?.map(|most| (key, most)).or(found);
    }
    Ok(found)
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

/// The parts of a body that go into the template, with the order of their keys.
#[derive(serde::Deserialize)]
struct ForTemplate {
    messages: Vec<Templated>,
    #[serde(default)]
    chat_template_kwargs: Option<Templated>,
}

/// The conversation as one text.
fn rendered(app: &AppState, fields: &Fields, bytes: &[u8]) -> Result<String, ApiError> {
    let renderer = match &app.chat {
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
        let rest = keys.filter_map(|key| Some((key.clone(), message.get_item(&key).ok()?)));
        let own = [("role", Templated::from(role)), ("content", Templated::from(content))];
        let own = own.map(|(key, value)| (Templated::from(key), value));
        // Of two entries of one key the last counts, and the first has the place.
        Templated::from_pairs(rest.chain(own))
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

/// Fields that are the request's own, and no values for the template.
const NO_KWARGS: [&str; 5] =
    ["messages", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize"];

/// Refuses template values that would be overruled, and notes those that the template does not read.
fn check_kwargs(app: &AppState, fields: &Fields, ignored: &mut Ignored) -> Result<(), ApiError> {
    let Some(kwargs) = fields.object("chat_template_kwargs", "chat_template_kwargs.")? else { return Ok(()) };
    for (key, _) in kwargs.entries() {
        let name = kwargs.name(key);
        if NO_KWARGS.contains(&key.as_str()) {
            return Err(ApiError::unsupported(
                name,
                "the template's values don't set it; it is a field beside them",
            ));
        }
        if let Some(Ok(renderer)) = &app.chat
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

/// Roles and contents of `messages`. What a developer says is the system's, as templates have it; of contents in
/// parts, the texts are joined by line breaks.
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
        // An assistant's message with nothing but tool calls.
        Value::Null => Ok(String::new()),
        Value::Array(parts) => Ok(parts.iter().map(part).collect::<Result<Vec<_>, _>>()?.join("\n")),
        other => Err(ApiError::invalid(
            key,
            format!("expected a string or a list of text parts, found {}", describe(other)),
        )),
    }
}
