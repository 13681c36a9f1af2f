//! Text generation, of a deployment or of a model, whole or in pieces; and tokenization.

use super::parameters::GenerationParameters;
use super::{deployed, error_body};
use crate::calendar;
use crate::generate::Token;
use crate::generate::text_stream::token_label;
use crate::serve::api_error::ApiError;
use crate::serve::fields::{GENERATION, Ignored, TOKENIZATION};
use crate::serve::generation::{FinishReason, Generation, Piece};
use crate::serve::params::Fields;
use crate::serve::prompt::{PromptEncoding, not_empty};
use crate::serve::served::Served;
use crate::serve::sse::{ClientGone, Events, respond};
use crate::serve::state::{AppState, RequestBody};
use axum::extract::{Path, Request, State};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

/// What a request asks for.
struct TextGeneration {
    app: Arc<AppState>,
    model: Arc<Served>,
    input: String,
    tokens: Vec<u32>,
    parameters: GenerationParameters,
    created: String,
}

/// What a request is for.
enum Target {
    /// A deployment, whose verbalizer takes the input.
    Deployment(String),
    /// The model that the body names, which takes the text as it is.
    Model,
}

pub(super) async fn of_deployment(
    State(app): State<Arc<AppState>>,
    Path(deployment): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    let (text, generation, ignored) =
        TextGeneration::start(app, Target::Deployment(deployment), request).await?;
    Ok(ignored.tell(text.whole(generation).await?))
}

pub(super) async fn of_model(
    State(app): State<Arc<AppState>>,
    request: Request,
) -> Result<Response, ApiError> {
    let (text, generation, ignored) = TextGeneration::start(app, Target::Model, request).await?;
    Ok(ignored.tell(text.whole(generation).await?))
}

pub(super) async fn stream_of_deployment(
    State(app): State<Arc<AppState>>,
    Path(deployment): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    let (text, generation, ignored) =
        TextGeneration::start(app, Target::Deployment(deployment), request).await?;
    Ok(ignored.tell(respond(|events| text.stream(generation, events))))
}

pub(super) async fn stream_of_model(
    State(app): State<Arc<AppState>>,
    request: Request,
) -> Result<Response, ApiError> {
    let (text, generation, ignored) = TextGeneration::start(app, Target::Model, request).await?;
    Ok(ignored.tell(respond(|events| text.stream(generation, events))))
}

/// `POST /ml/v1/text/tokenization`: how many tokens a text has, and which, without virtual ones.
pub(super) async fn tokenize(
    State(app): State<Arc<AppState>>,
    request: Request,
) -> Result<Response, ApiError> {
    let asked = app.read(request).await?;
    let (fields, ignored) = Fields::checked(&asked.object, &TOKENIZATION)?;
    let model = named(&app, &fields)?;
    asked.label.set(&model);
    let parameters = fields.object("parameters", "parameters.")?;
    let return_tokens =
        parameters.map(|parameters| parameters.boolean("return_tokens")).transpose()?.flatten();
    let tokens = app
        .encode(input(&fields)?.to_owned(), PromptEncoding::Text { special: true }, Some(usize::MAX))
        .await?;
    let mut result = json!({"token_count": tokens.len()});
    if return_tokens == Some(true) {
        result["tokens"] = tokens.iter().map(|id| token_label(&app.tokenizer, *id)).collect();
    }
    Ok(ignored.tell(axum::Json(json!({"model_id": model.name, "result": result})).into_response()))
}

/// The model that `model_id` names.
fn named(app: &AppState, fields: &Fields) -> Result<Arc<Served>, ApiError> {
    match fields.string("model_id")? {
        Some(name) => app.model(name),
        None => Err(ApiError::missing("model_id", "the name of a model")),
    }
}

fn input<'a>(fields: &Fields<'a>) -> Result<&'a str, ApiError> {
    fields.string("input")?.ok_or_else(|| ApiError::missing("input", "a text"))
}

impl TextGeneration {
    async fn start(
        app: Arc<AppState>,
        of: Target,
        request: Request,
    ) -> Result<(Self, Generation, Ignored), ApiError> {
        let started = Instant::now();
        let RequestBody { object, label, .. } = app.read(request).await?;
        let (fields, ignored) = Fields::checked(&object, &GENERATION)?;
        let (model, template) = match of {
            Target::Deployment(name) => {
                let model = deployed(&app, &name)?;
                let template = model.template.clone();
                (model, template)
            }
            Target::Model => (named(&app, &fields)?, None),
        };
        label.set(&model);
        if fields.get("moderations").is_some_and(moderates) {
            return Err(ApiError::unsupported("moderations", "this server moderates nothing; leave it out"));
        }
        let input = input(&fields)?.to_owned();
        let parameters = GenerationParameters::read(&app, &fields)?;
        let how = match template {
            Some(template) => PromptEncoding::Verbalized { template, instruction: None },
            None => PromptEncoding::Text { special: true },
        };
        let tokens = app.encode(input.clone(), how, parameters.truncate).await?;
        not_empty("input", &tokens)?;
        let request = parameters.request(&app, tokens.clone());
        let generation = Generation::start(&app, &model, request, &parameters.stopping, started)?;
        let created = calendar::timestamp(SystemTime::now());
        Ok((Self { app, model, input, tokens, parameters, created }, generation, ignored))
    }

    fn answer(&self, result: Map<String, Value>) -> Value {
        let created = &self.created;
        json!({"model_id": self.model.name, "created_at": created, "results": [result]})
    }

    fn input_token_count(&self) -> usize {
        self.tokens.len() + self.model.virtual_tokens
    }

    /// What the request wants told of its own text: watsonx puts it before what is generated.
    fn of_input(&self, scored: &[Token], result: &mut Map<String, Value>) {
        let returned = self.parameters.returned;
        if returned.input_text
            && let Some(Value::String(text)) = result.get_mut("generated_text")
        {
            text.insert_str(0, &self.input);
        }
        if returned.input_tokens {
            let plain = self.tokens.iter().map(|id| Token { id: *id, logprob: None, top: Vec::new() });
            let plain: Vec<Token> = if scored.is_empty() { plain.collect() } else { scored.to_vec() };
            result.insert("input_tokens".into(), self.told(&plain));
        }
    }

    /// Tokens with what the request wants told of each.
    fn told(&self, tokens: &[Token]) -> Value {
        let returned = self.parameters.returned;
        let label = |id: u32| token_label(&self.app.tokenizer, id);
        let token = |token: &Token| {
            let mut told = json!({"text": label(token.id)});
            if returned.token_logprobs
                && let Some(logprob) = token.logprob
            {
                told["logprob"] = logprob.into();
            }
            if returned.top_n_tokens > 0 && token.logprob.is_some() {
                let top =
                    token.top.iter().map(|(id, logprob)| json!({"text": label(*id), "logprob": logprob}));
                told["top_tokens"] = top.collect();
            }
            told
        };
        tokens.iter().map(token).collect()
    }

    async fn whole(self, generation: Generation) -> Result<Response, ApiError> {
        let whole = generation.whole().await?;
        let mut result = Map::new();
        result.insert("generated_text".into(), whole.text.into());
        result.insert("generated_token_count".into(), whole.generated.into());
        result.insert("input_token_count".into(), self.input_token_count().into());
        result.insert("stop_reason".into(), whole.reason.as_ref().map(stop_reason).into());
        if let Some(seed) = self.parameters.seed {
            result.insert("seed".into(), seed.into());
        }
        self.of_input(&whole.scored, &mut result);
        if self.parameters.returned.generated_tokens {
            result.insert("generated_tokens".into(), self.told(&whole.tokens));
        }
        Ok(axum::Json(self.answer(result)).into_response())
    }

    /// Each event tells the text since the last one, and the tokens so far.
    async fn stream(self, mut generation: Generation, events: Events) -> Result<(), ClientGone> {
        let (mut id, mut scored, mut generated, mut first) = (0, Vec::new(), 0, true);
        while let Some(piece) = generation.next().await {
            let (text, tokens, reason) = match piece {
                Ok(Piece::Scored(tokens)) => {
                    scored = tokens;
                    continue;
                }
                Ok(Piece::First(_)) => continue,
                Ok(Piece::Text { text, tokens }) => {
                    generated += tokens.len();
                    (text, tokens, "not_finished")
                }
                Ok(Piece::End { reason, generated: all }) => {
                    generated = all;
                    (String::new(), Vec::new(), stop_reason(&reason))
                }
                Err(failure) => return events.named(id, "error", &error_body(&failure)).await,
            };
            let mut result = Map::new();
            result.insert("generated_text".into(), text.into());
            result.insert("generated_token_count".into(), generated.into());
            result.insert("input_token_count".into(), self.input_token_count().into());
            result.insert("stop_reason".into(), reason.into());
            if std::mem::take(&mut first) {
                if let Some(seed) = self.parameters.seed {
                    result.insert("seed".into(), seed.into());
                }
                self.of_input(&scored, &mut result);
            }
            if self.parameters.returned.generated_tokens && !tokens.is_empty() {
                result.insert("generated_tokens".into(), self.told(&tokens));
            }
            events.named(id, "message", &self.answer(result)).await?;
            id += 1;
        }
        Ok(())
    }
}

/// Whether `moderations` ask for any: under the name of each filter, each kind of text that it is for has a switch
/// `enabled`, which is on if it is not there (<https://ibm.github.io/watsonx-ai-node-sdk>, `TextModeration`).
fn moderates(value: &Value) -> bool {
    const KINDS: [&str; 2] = ["input", "output"];
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Object(map) => match map.get("enabled") {
            Some(enabled) => *enabled != Value::Bool(false),
            None => map.iter().any(|(key, value)| match value {
                Value::Object(switch) if KINDS.contains(&key.as_str()) && !switch.contains_key("enabled") => {
                    true
                }
                // What replaces a filtered text, and which part of it is looked at.
                _ => key != "mask" && key != "input_ranges" && moderates(value),
            }),
        },
        _ => true,
    }
}

/// watsonx's word for why a text ended.
fn stop_reason(reason: &FinishReason) -> &'static str {
    match reason {
        FinishReason::EndOfText => "eos_token",
        FinishReason::MaxTokens => "max_tokens",
        FinishReason::TimeLimit => "time_limit",
        FinishReason::Sequence(_) => "stop_sequence",
    }
}
