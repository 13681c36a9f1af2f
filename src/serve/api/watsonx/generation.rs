//! Text generation, of a deployment or of a model, as one answer or as a stream; and tokenization.

use super::parameters::GenerationParameters;
use super::{deployed, error_body, requested_model};
use crate::calendar;
use crate::generate::Token;
use crate::generate::text_stream::token_label;
use crate::serve::api_error::ApiError;
use crate::serve::ensemble::label_choices;
use crate::serve::fields::{GENERATION, Ignored, TOKENIZATION};
use crate::serve::generation::{FinishReason, GeneratedText, Generation, Piece};
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

/// The values of a request.
struct TextGeneration {
    state: Arc<AppState>,
    model: Arc<Served>,
    input: String,
    tokens: Vec<u32>,
    parameters: GenerationParameters,
    created: String,
    /// The name by which the request asked for the base model, if it is another model's.
    alias: Option<String>,
}

/// The answer of a deployment, or of the model that the body names.
pub(super) async fn generate(
    State(state): State<Arc<AppState>>,
    deployment: Option<Path<String>>,
    request: Request,
) -> Result<Response, ApiError> {
    let (text, generation, ignored) = TextGeneration::start(state, deployment, request).await?;
    Ok(ignored.add_header(text.complete(generation).await?))
}

/// The same in pieces.
pub(super) async fn generate_stream(
    State(state): State<Arc<AppState>>,
    deployment: Option<Path<String>>,
    request: Request,
) -> Result<Response, ApiError> {
    let (text, generation, ignored) = TextGeneration::start(state, deployment, request).await?;
    Ok(ignored.add_header(respond(|events| text.stream(generation, events))))
}

/// `POST /ml/v1/text/tokenization`: the number of tokens of a text, and the tokens, without virtual ones.
pub(super) async fn tokenize(
    State(state): State<Arc<AppState>>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = state.read(request).await?;
    let (fields, ignored) = Fields::checked(&body.object, &TOKENIZATION)?;
    let model = requested_model(&state, &fields)?;
    body.label.set(&model);
    let parameters = fields.object("parameters", "parameters.")?;
    let return_tokens =
        parameters.map(|parameters| parameters.boolean("return_tokens")).transpose()?.flatten();
    let tokens = state
        .encode(input(&fields)?.to_owned(), PromptEncoding::Text { special: true }, Some(usize::MAX))
        .await?;
    let mut result = json!({"token_count": tokens.len()});
    if return_tokens == Some(true) {
        result["tokens"] = tokens.iter().map(|id| token_label(&state.tokenizer, *id)).collect();
    }
    Ok(ignored.add_header(axum::Json(json!({"model_id": model.name, "result": result})).into_response()))
}

fn input<'a>(fields: &Fields<'a>) -> Result<&'a str, ApiError> {
    fields.string("input")?.ok_or_else(|| ApiError::missing("input", "a text"))
}

impl TextGeneration {
    /// Begins the text of a deployment, whose verbalizer the input is inserted into, or of the model that the body names.
    async fn start(
        state: Arc<AppState>,
        deployment: Option<Path<String>>,
        request: Request,
    ) -> Result<(Self, Generation, Ignored), ApiError> {
        let started = Instant::now();
        let RequestBody { object, label, .. } = state.read(request).await?;
        let (fields, ignored) = Fields::checked(&object, &GENERATION)?;
        let by_name = deployment.is_none();
        let (model, template) = match deployment {
            Some(Path(name)) => {
                let model = deployed(&state, &name)?;
                let template = model.template.clone();
                (model, template)
            }
            None => (requested_model(&state, &fields)?, None),
        };
        label.set(&model);
        if fields.get("moderations").is_some_and(requests_moderation) {
            return Err(ApiError::unsupported("moderations", "this server moderates nothing; leave it out"));
        }
        let input = input(&fields)?.to_owned();
        let parameters = GenerationParameters::read(&state, &fields)?;
        let encoding = match template {
            Some(template) => PromptEncoding::Verbalized { template, instruction: None },
            None => PromptEncoding::Text { special: true },
        };
        let tokens = state.encode(input.clone(), encoding, parameters.truncate).await?;
        not_empty("input", &tokens)?;
        let mut request = parameters.request(&state, tokens.clone());
        if !by_name {
            request.choices = label_choices(&state, &model, &request, "parameters.max_new_tokens")?;
        }
        let generation = Generation::start(&state, &model, request, &parameters.stopping, started)?;
        let created = calendar::timestamp(SystemTime::now());
        let alias =
            fields.string("model_id")?.filter(|name| by_name && *name != model.name).map(str::to_owned);
        Ok((Self { state, model, input, tokens, parameters, created, alias }, generation, ignored))
    }

    fn answer(&self, result: Map<String, Value>) -> Value {
        let created = &self.created;
        let mut answer = json!({"model_id": self.model.name, "created_at": created, "results": [result]});
        if let Some(alias) = &self.alias {
            let message = format!("the local model {} stands in for {alias}", self.model.name);
            answer["system"] = json!({"warnings": [{"message": message, "id": "gneiss", "more_info": ""}]});
        }
        answer
    }

    /// Adds the seed and the parts of the input that the request asks for. watsonx puts the text before the generated one.
    fn add_input(&self, scored: &[Token], result: &mut Map<String, Value>) {
        let returned = self.parameters.returned;
        if let Some(seed) = self.parameters.seed {
            result.insert("seed".into(), seed.into());
        }
        if returned.input_text
            && let Some(Value::String(text)) = result.get_mut("generated_text")
        {
            text.insert_str(0, &self.input);
        }
        if returned.input_tokens {
            let tokens = self.tokens.iter().map(|id| Token { id: *id, logprob: None, top: Vec::new() });
            let tokens: Vec<Token> = if scored.is_empty() { tokens.collect() } else { scored.to_vec() };
            result.insert("input_tokens".into(), self.token_entries(&tokens));
        }
    }

    /// Tokens with the values that the request asks for.
    fn token_entries(&self, tokens: &[Token]) -> Value {
        let returned = self.parameters.returned;
        let label = |id: u32| token_label(&self.state.tokenizer, id);
        let token = |token: &Token| {
            let mut entry = json!({"text": label(token.id)});
            if returned.token_logprobs
                && let Some(logprob) = token.logprob
            {
                entry["logprob"] = logprob.into();
            }
            if returned.top_n_tokens > 0 && token.logprob.is_some() {
                let top =
                    token.top.iter().map(|(id, logprob)| json!({"text": label(*id), "logprob": logprob}));
                entry["top_tokens"] = top.collect();
            }
            entry
        };
        tokens.iter().map(token).collect()
    }

    /// An answer with some of the text, and the number of tokens so far.
    fn result(&self, text: String, generated: usize, reason: Option<&str>) -> Map<String, Value> {
        let mut result = Map::new();
        result.insert("generated_text".into(), text.into());
        result.insert("generated_token_count".into(), generated.into());
        result.insert("input_token_count".into(), (self.tokens.len() + self.model.virtual_tokens).into());
        result.insert("stop_reason".into(), reason.into());
        result
    }

    async fn complete(self, generation: Generation) -> Result<Response, ApiError> {
        let GeneratedText { text, generated, reason, tokens, scored, .. } = generation.collect().await?;
        let mut result = self.result(text, generated, reason.as_ref().map(stop_reason));
        self.add_input(&scored, &mut result);
        if self.parameters.returned.generated_tokens {
            result.insert("generated_tokens".into(), self.token_entries(&tokens));
        }
        Ok(axum::Json(self.answer(result)).into_response())
    }

    /// Each event has the text since the last one.
    async fn stream(self, mut generation: Generation, events: Events) -> Result<(), ClientGone> {
        let (mut id, mut scored, mut generated) = (0, Vec::new(), 0);
        while let Some(piece) = generation.next().await {
            let (text, tokens, reason) = match piece {
                Ok(Piece::Scored(tokens)) => {
                    scored = tokens;
                    continue;
                }
                Ok(Piece::First(_)) => continue,
                Ok(Piece::Text { text, tokens }) => {
                    generated += tokens.len();
                    (text, tokens, Some("not_finished"))
                }
                Ok(Piece::End { reason, generated: total }) => {
                    generated = total;
                    (String::new(), Vec::new(), Some(stop_reason(&reason)))
                }
                Err(error) => return events.named(id, "error", &error_body(&error)).await,
            };
            let mut result = self.result(text, generated, reason);
            if id == 0 {
                self.add_input(&scored, &mut result);
            }
            if self.parameters.returned.generated_tokens && !tokens.is_empty() {
                result.insert("generated_tokens".into(), self.token_entries(&tokens));
            }
            events.named(id, "message", &self.answer(result)).await?;
            id += 1;
        }
        Ok(())
    }
}

/// Whether `moderations` ask for any. Under the name of each filter, each kind of text that it applies to has a switch
/// `enabled`, which is on if it is absent (<https://ibm.github.io/watsonx-ai-node-sdk>, `TextModeration`).
fn requests_moderation(value: &Value) -> bool {
    const KINDS: [&str; 2] = ["input", "output"];
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Object(map) => match map.get("enabled") {
            Some(enabled) => *enabled != Value::Bool(false),
            None => map.iter().any(|(key, value)| match value {
                Value::Object(switch) if KINDS.contains(&key.as_str()) && !switch.contains_key("enabled") => {
                    true
                }
                // The replacement of a filtered text, and the part of a text that is examined.
                _ => key != "mask" && key != "input_ranges" && requests_moderation(value),
            }),
        },
        _ => true,
    }
}

/// watsonx's name of the reason why a text ended.
fn stop_reason(reason: &FinishReason) -> &'static str {
    match reason {
        FinishReason::EndOfText => "eos_token",
        FinishReason::MaxTokens => "max_tokens",
        FinishReason::TimeLimit => "time_limit",
        FinishReason::Sequence(_) => "stop_sequence",
    }
}
