//! An ensemble's answers: one of the choices of a request, by the choices' likelihoods after each of its prompts.
//!
//! ```text
//!   text ─┬ prompt 1 ─ likelihoods of the choices ─┐
//!         ├ prompt 2 ─ likelihoods of the choices ─┼ mean probability of each choice ─ the answer's tokens
//!         └ prompt 3 ─ likelihoods of the choices ─┘
//! ```
//!
//! The sequences of all prompts run in the same steps of the worker.

use super::api_error::ApiError;
use super::choices::{AnswerConstraint, check_room};
use super::label_scores::{LabelQuery, LabelScores};
use super::served::Served;
use super::state::AppState;
use crate::data::ensemble::{LabelEnsemble, largest, probabilities};
use crate::data::labels;
use crate::generate::{Choices, Event, Request, Sampling, StopReason, Token};
use axum::http::StatusCode;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// Log-likelihoods of labels after each prompt of an ensemble, which are being computed.
pub(super) struct MemberScores(Vec<LabelScores>);

impl MemberScores {
    /// Submits the query for each prompt.
    ///
    /// # Errors
    /// Returns the errors of [`LabelScores::start`].
    pub fn start(state: &Arc<AppState>, model: &Served, query: &LabelQuery) -> Result<Self, ApiError> {
        let members = model.members.iter();
        members.map(|member| LabelScores::start(state, member, query)).collect::<Result<_, _>>().map(Self)
    }

    /// Log-likelihood of each label after each prompt, nats.
    ///
    /// # Errors
    /// Returns the errors of [`LabelScores::collect`].
    pub async fn collect(self) -> Result<Vec<Vec<f64>>, ApiError> {
        let mut all = Vec::with_capacity(self.0.len());
        for member in self.0 {
            all.push(member.collect().await?);
        }
        Ok(all)
    }
}

/// The labels of a text by an ensemble, from [`MemberScores::collect`].
pub(super) fn together(log_likelihoods: &[Vec<f64>]) -> LabelEnsemble {
    let of_members: Vec<Vec<f64>> = log_likelihoods.iter().map(|values| probabilities(values)).collect();
    LabelEnsemble::new(&of_members.iter().map(Vec::as_slice).collect::<Vec<_>>())
}

/// Submits a request to an ensemble. The events are those of a model that generates the answer.
///
/// # Errors
/// Returns an error if the answer has no choices, or the request asks for something that an ensemble does not have; and the
/// errors of [`LabelScores::start`].
pub(super) fn submit(
    state: &Arc<AppState>,
    model: &Served,
    request: Request,
    started: Instant,
) -> Result<UnboundedReceiver<Event>, ApiError> {
    check(model, &request)?;
    let sequences = request.choices.as_ref().map_or(&[][..], |choices| choices.sequences()).to_vec();
    let targets = labels::targets(&sequences, state.tokenizer.eos_token_id)
        .map_err(|_| ApiError::internal("two choices have the same tokens"))?;
    let query = LabelQuery { tokens: request.tokens, targets, deadline: request.deadline, started };
    let answer = PendingAnswer {
        scores: MemberScores::start(state, model, &query)?,
        sequences,
        sampling: request.sampling,
        deadline: request.deadline,
    };
    let (events, receiver) = unbounded_channel();
    tokio::spawn(answer.send(events));
    Ok(receiver)
}

/// The labels of an ensemble's task as the choices of `request`, for an API whose requests have no choices; `None` of another model
/// and without a task.
///
/// # Errors
/// Returns 400 if a label cannot be a choice, or `key`, the limit of new tokens, is too low for the longest one.
pub(super) fn label_choices(
    state: &AppState,
    model: &Served,
    request: &Request,
    key: &str,
) -> Result<Option<Arc<Choices>>, ApiError> {
    let labels = model.task.as_ref().filter(|_| !model.members.is_empty()).map(|task| &task.labels);
    let Some(labels) = labels.filter(|labels| !labels.is_empty()) else { return Ok(None) };
    let field = format!("labels of {}", model.name);
    let constraint = AnswerConstraint { field, texts: labels.clone() };
    let choices = constraint.tokenized(state, request.min_new_tokens, &request.stop_token_ids)?;
    check_room(key, request.max_new_tokens, &constraint.field, &choices)?;
    Ok(Some(choices))
}

/// An answer whose likelihoods are being computed.
struct PendingAnswer {
    scores: MemberScores,
    /// The choices as tokens.
    sequences: Vec<Vec<u32>>,
    sampling: Sampling,
    deadline: Option<Instant>,
}

impl PendingAnswer {
    /// Waits for the likelihoods, and sends the answer.
    async fn send(self, events: UnboundedSender<Event>) {
        let collected = tokio::select! {
            collected = self.scores.collect() => collected,
            // The client has disconnected.
            () = events.closed() => return,
        };
        let is_late = self.deadline.is_some_and(|deadline| deadline <= Instant::now());
        let all = match collected {
            Ok(log_likelihoods) => {
                let choice = choose(&together(&log_likelihoods).means, &self.sampling);
                let tokens = self.sequences[choice].iter();
                let tokens = tokens.map(|id| Event::Token(Token { id: *id, logprob: None, top: Vec::new() }));
                tokens.chain([Event::Finished(StopReason::StopToken)]).collect()
            }
            Err(_) if is_late => vec![Event::Finished(StopReason::TimeLimit)],
            Err(error) if error.status == StatusCode::SERVICE_UNAVAILABLE => {
                vec![Event::NoMemory(error.message)]
            }
            Err(error) => vec![Event::Failed(error.message)],
        };
        // A client that has disconnected needs no answer.
        all.into_iter().for_each(|event| drop(events.send(event)));
    }
}

/// The likeliest choice; with a temperature one that is drawn.
fn choose(means: &[f64], sampling: &Sampling) -> usize {
    let likeliest = largest(means);
    if sampling.temperature == 0.0 {
        return likeliest;
    }
    let weight = |mean: &f64| (mean / means[likeliest]).powf(1.0 / sampling.temperature);
    let weights: Vec<f64> = means.iter().map(weight).collect();
    let drawn = ChaCha8Rng::seed_from_u64(sampling.seed).random::<f64>() * weights.iter().sum::<f64>();
    let mut sum = 0.0;
    let ends_after = |weight: &f64| {
        sum += weight;
        sum > drawn
    };
    weights.iter().position(ends_after).unwrap_or(likeliest)
}

/// Refuses what an ensemble does not have, by name.
fn check(model: &Served, request: &Request) -> Result<(), ApiError> {
    let (name, members) = (&model.name, model.members.len());
    let refused = |problem: &str| {
        let problem = format!("`{name}` is an ensemble of {members} prompts, {problem}");
        Err(ApiError::unsupported("model", &problem))
    };
    if request.choices.is_none() {
        return refused(
            "each of which would continue the text by another one: it answers with one of given choices alone; hint: \
             `guided_choice`, another field that constrains the answer, or POST /v1/classify",
        );
    }
    if request.embeds.is_some() {
        return refused("which reads text alone, found `prompt_embeds`");
    }
    if request.logprobs.is_some() || request.scored > 0 {
        return refused(
            "which has no log-probabilities of tokens: expected a request without them; POST /v1/classify has the \
             probability of each label",
        );
    }
    let Sampling { temperature, seed, top_p, top_k, min_p, .. } = request.sampling.clone();
    let known = match temperature > 0.0 {
        true => Sampling { temperature, seed, ..Sampling::default() },
        // Nothing is drawn.
        false => Sampling { temperature, seed, top_p, top_k, min_p, ..Sampling::default() },
    };
    if request.sampling != known {
        return refused(
            "whose answer is the likeliest choice or, with a temperature, drawn by the choices' mean probabilities: \
             expected a request without `top_p`, `top_k`, `min_p`, penalties, biases and banned words",
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests;
