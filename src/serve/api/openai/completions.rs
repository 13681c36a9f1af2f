//! `POST /v1/completions`: raw text in, text out.

use super::logprobs::{LOGPROBS_RANGE, LogprobLists};
use super::parameters::{CompletionParameters, truncation};
use super::{AnswerHead, Usage, error_body, finish, requested_model};
use crate::serve::api_error::ApiError;
use crate::serve::embeds;
use crate::serve::fields::COMPLETIONS;
use crate::serve::generation::{FinishReason, Generation, Generations, Piece};
use crate::serve::params::{Fields, token_ids};
use crate::serve::prompt::{PromptEncoding, not_empty};
use crate::serve::served::Served;
use crate::serve::sse::{ClientGone, Events, respond};
use crate::serve::state::AppState;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use candle_core::Tensor;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Instant;

/// Most tokens of an answer if the request does not say, as with OpenAI.
const DEFAULT_MAX_TOKENS: usize = 16;

/// A text to continue.
struct TextPrompt {
    text: String,
    tokens: Vec<u32>,
    /// Embeddings instead of the text.
    embeds: Option<Tensor>,
}

impl TextPrompt {
    fn positions(&self) -> usize {
        self.embeds.as_ref().map_or(self.tokens.len(), |embeds| embeds.dims()[0])
    }
}

/// The values of a request.
struct Completion {
    state: Arc<AppState>,
    model: Arc<Served>,
    prompts: Vec<TextPrompt>,
    parameters: CompletionParameters,
    max_tokens: usize,
    /// Whether the answer begins with the prompt's text.
    echo: bool,
    /// Number of likeliest tokens that are returned with each token.
    logprobs: Option<usize>,
}

/// Answers the request.
pub(super) async fn complete(
    State(state): State<Arc<AppState>>,
    request: Request,
) -> Result<Response, ApiError> {
    let started = Instant::now();
    let body = state.read(request).await?;
    let (fields, ignored) = Fields::checked(&body.object, &COMPLETIONS)?;
    let model = requested_model(&state, &fields, &body.label)?;
    let parameters = CompletionParameters::read(&state, &fields)?;
    let max_tokens = fields.count("max_tokens", 0..=usize::MAX)?;
    let echo = fields.boolean("echo")?.unwrap_or(false);
    if max_tokens == Some(0) && !echo {
        return Err(ApiError::invalid("max_tokens", "expected 1 or more without `echo`, found 0"));
    }
    let max_tokens = parameters.max_tokens("max_tokens", max_tokens, DEFAULT_MAX_TOKENS)?;
    let logprobs = match fields.get("logprobs") {
        Some(Value::Bool(false)) => None,
        _ => fields.count("logprobs", LOGPROBS_RANGE)?,
    };
    let prompts = prompts(&state, &fields, state.client.room(&model), max_tokens).await?;
    let completion = Completion { state, model, prompts, parameters, max_tokens, echo, logprobs };
    let generations = completion.start(started)?;
    let response = if completion.parameters.stream {
        respond(|events| completion.stream(generations, events))
    } else {
        completion.answer(generations).await?
    };
    Ok(ignored.add_header(response))
}

impl Completion {
    /// Submits all choices of all prompts to the worker.
    fn start(&self, started: Instant) -> Result<Vec<Generation>, ApiError> {
        let all = self.prompts.len().saturating_mul(self.parameters.n);
        let most = self.state.client.limits().queue.max(1);
        if all > most {
            let message = format!("expected at most {most} choices of all prompts together, found {all}");
            return Err(ApiError::invalid("n", message));
        }
        let each = (0..all).map(|index| {
            let tokens = self.prompt(index).tokens.clone();
            let choice = index % self.parameters.n;
            let mut request = self.parameters.request(&self.state, tokens, self.max_tokens, choice);
            request.logprobs = self.logprobs;
            request.embeds = self.prompt(index).embeds.clone();
            // A request that generates nothing must score something.
            if self.echo && (self.logprobs.is_some() || self.max_tokens == 0) {
                request.scored = request.tokens.len();
            }
            Generation::start(&self.state, &self.model, request, &self.parameters.stopping, started)
        });
        each.collect()
    }

    fn prompt(&self, index: usize) -> &TextPrompt {
        &self.prompts[index / self.parameters.n]
    }

    fn usage(&self, completion: usize) -> Usage {
        let virtual_tokens = self.model.virtual_tokens * self.prompts.len();
        let text: usize = self.prompts.iter().map(TextPrompt::positions).sum();
        Usage { prompt: text + virtual_tokens, virtual_tokens, completion }
    }

    async fn answer(&self, generations: Vec<Generation>) -> Result<Response, ApiError> {
        let (mut choices, mut generated) = (Vec::new(), 0);
        for (index, generation) in generations.into_iter().enumerate() {
            let generated_text = generation.collect().await?;
            generated += generated_text.generated;
            let (mut text, mut tokens) = (String::new(), Vec::new());
            if self.echo {
                text.push_str(&self.prompt(index).text);
                tokens = generated_text.scored;
            }
            text.push_str(&generated_text.text);
            tokens.extend(generated_text.tokens);
            let lists = self.logprobs.map(|_| LogprobLists::new().entry(&self.state.tokenizer, &tokens));
            choices.push(choice(index, &text, lists, generated_text.reason.as_ref()));
        }
        let mut answer = AnswerHead::new("cmpl", "text_completion", &self.model).with(choices);
        answer["usage"] = self.usage(generated).json();
        Ok(axum::Json(answer).into_response())
    }

    async fn stream(self, generations: Vec<Generation>, events: Events) -> Result<(), ClientGone> {
        let answer = AnswerHead::new("cmpl", "text_completion", &self.model);
        let chunk = |choices| {
            let mut chunk = answer.with(choices);
            if self.parameters.include_usage {
                chunk["usage"] = Value::Null;
            }
            chunk
        };
        let mut lists: Vec<LogprobLists> = generations.iter().map(|_| LogprobLists::new()).collect();
        if self.echo && self.logprobs.is_none() {
            for index in 0..generations.len() {
                events.data(&chunk(vec![choice(index, &self.prompt(index).text, None, None)])).await?;
            }
        }
        let (mut generations, mut generated) = (Generations::new(generations), 0);
        while let Some((index, piece)) = generations.next().await {
            let mut logprobs =
                |tokens: &[_]| self.logprobs.map(|_| lists[index].entry(&self.state.tokenizer, tokens));
            let choice = match piece {
                Ok(Piece::Scored(tokens)) if self.logprobs.is_some() => {
                    choice(index, &self.prompt(index).text, logprobs(&tokens), None)
                }
                Ok(Piece::Scored(_) | Piece::First(_)) => continue,
                Ok(Piece::Text { text, tokens }) => choice(index, &text, logprobs(&tokens), None),
                Ok(Piece::End { reason, generated: tokens }) => {
                    generated += tokens;
                    choice(index, "", None, Some(&reason))
                }
                Err(error) => return events.data(&error_body(&error)).await,
            };
            events.data(&chunk(vec![choice])).await?;
        }
        if self.parameters.include_usage {
            let mut last = answer.with(Vec::new());
            last["usage"] = self.usage(generated).json();
            events.data(&last).await?;
        }
        events.done().await
    }
}

fn choice(index: usize, text: &str, logprobs: Option<Value>, reason: Option<&FinishReason>) -> Value {
    let (finish_reason, stop_reason) = match reason.map(finish) {
        Some((reason, stop)) => (Some(reason), stop),
        None => (None, Value::Null),
    };
    json!({
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
        "stop_reason": stop_reason,
    })
}

/// `prompt`: one text or several, or one list of token ids or several; `room` is the number of tokens for text and
/// answer together.
async fn prompts(
    state: &Arc<AppState>,
    fields: &Fields<'_>,
    room: usize,
    max_tokens: usize,
) -> Result<Vec<TextPrompt>, ApiError> {
    let special = fields.boolean("add_special_tokens")?.unwrap_or(true);
    let most = truncation(fields, room, max_tokens)?;
    let mut prompts = embedded(state, fields)?;
    // Clients that cannot leave the prompt out send an empty one in addition to embeddings.
    let prompt = fields.get("prompt").filter(|prompt| prompts.is_empty() || **prompt != "");
    let Some(prompt) = prompt else {
        if !prompts.is_empty() {
            return Ok(prompts);
        }
        return Err(ApiError::missing(
            "prompt",
            "a string, a list of strings, token ids, or a list of such lists",
        ));
    };
    let single = std::slice::from_ref(prompt);
    let each = match prompt.as_array() {
        Some(items) if items.first().is_some_and(|item| !item.is_number()) => items.as_slice(),
        _ => single,
    };
    let embedded_count = prompts.len();
    for one in each {
        prompts.push(match one {
            Value::String(text) => {
                let tokens = state.encode(text.clone(), PromptEncoding::Text { special }, most).await?;
                TextPrompt { text: text.clone(), tokens, embeds: None }
            }
            ids => {
                let tokens = token_ids(ids, state.vocabulary).ok_or_else(|| wrong(state, fields, prompt))?;
                let tokens =
                    most.map_or(&tokens[..], |most| &tokens[tokens.len().saturating_sub(most)..]).to_vec();
                TextPrompt { text: state.tokenizer.decode(&tokens, false)?, tokens, embeds: None }
            }
        });
    }
    prompts[embedded_count..].iter().try_for_each(|prompt| not_empty("prompt", &prompt.tokens))?;
    Ok(prompts)
}

/// `prompt_embeds`: additional prompts, before those of `prompt`, as with vLLM.
fn embedded(state: &AppState, fields: &Fields) -> Result<Vec<TextPrompt>, ApiError> {
    let all = embeds::read(state, fields)?;
    if !all.is_empty() {
        for key in ["echo", "truncate_prompt_tokens"] {
            if fields.get(key).is_some_and(|value| *value != false) {
                let problem = "expected it without `prompt_embeds`, which have no text; found both";
                return Err(ApiError::invalid(key, problem));
            }
        }
    }
    let prompt = |tensor| TextPrompt { text: String::new(), tokens: Vec::new(), embeds: Some(tensor) };
    Ok(all.into_iter().map(prompt).collect())
}

fn wrong(state: &AppState, fields: &Fields, found: &Value) -> ApiError {
    let last = state.vocabulary.saturating_sub(1);
    let expected =
        format!("a string, a list of strings, or token ids from 0 to {last}, one list or several of them");
    fields.wrong("prompt", &expected, found)
}
