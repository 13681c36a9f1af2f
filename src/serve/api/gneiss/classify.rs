//! `POST /v1/classify`: how likely each label is after a text.

use crate::data::ensemble::{largest, probabilities};
use crate::data::{Template, labels};
use crate::prompt::peft::PromptTask;
use crate::serve::api_error::ApiError;
use crate::serve::ensemble::{self, MemberScores};
use crate::serve::fields::CLASSIFY;
use crate::serve::label_scores::{LabelQuery, LabelScores};
use crate::serve::params::Fields;
use crate::serve::prompt::{PromptEncoding, not_empty};
use crate::serve::served::Served;
use crate::serve::state::AppState;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Instant;

/// Most labels of a request.
const MAX_LABELS: usize = 256;

/// `POST /v1/classify`.
pub(super) async fn classify(
    State(state): State<Arc<AppState>>,
    request: Request,
) -> Result<Response, ApiError> {
    let started = Instant::now();
    let body = state.read(request).await?;
    let (fields, ignored) = Fields::checked(&body.object, &CLASSIFY)?;
    let Some(name) = fields.string("model")? else {
        return Err(ApiError::missing("model", "the name of a model; GET /v1/tasks lists them"));
    };
    let model = state.model(name)?;
    body.label.set(&model);
    let Some(input) = fields.string("input")? else {
        return Err(ApiError::missing("input", "the text to classify"));
    };
    let (task, template) = task(&state, &model, &fields)?;
    let labels = requested_labels(&fields, task.as_ref())?;
    let targets = label_targets(&state, &labels)?;
    // The base model gets the instruction instead of the prompt, unless the request says otherwise.
    let base = model.is_base();
    let instruction = match fields.boolean("hard_prompt")?.unwrap_or(base && task.is_some()) {
        false => None,
        true => match task.map(|task| task.hard_prompt).filter(|instruction| !instruction.is_empty()) {
            None if fields.get("hard_prompt").is_some() => {
                return Err(ApiError::invalid(
                    "hard_prompt",
                    "expected a task with an instruction in plain words, found none",
                ));
            }
            instruction => instruction,
        },
    };
    let encoding = match template {
        Some(template) => PromptEncoding::Verbalized { template, instruction },
        None => PromptEncoding::Text { special: true },
    };
    let tokens = state.encode(input.to_owned(), encoding, None).await?;
    not_empty("input", &tokens)?;
    let query = LabelQuery { tokens, targets, deadline: state.deadline(f64::MAX), started };
    let mut answer = match model.members.is_empty() {
        true => {
            let logprobs = LabelScores::start(&state, &model, &query)?.collect().await?;
            json!({"model": model.name, "labels": entries(&labels, &logprobs)})
        }
        false => {
            let logprobs = MemberScores::start(&state, &model, &query)?.collect().await?;
            ensemble_answer(&model, &labels, &logprobs)
        }
    };
    answer["seconds"] = started.elapsed().as_secs_f64().into();
    Ok(ignored.add_header(axum::Json(answer).into_response()))
}

/// The task and template of the request's model, or of the model whose task the base model is to do.
fn task(
    state: &AppState,
    model: &Served,
    fields: &Fields,
) -> Result<(Option<PromptTask>, Option<Template>), ApiError> {
    let Some(name) = fields.string("task")? else { return Ok((model.task.clone(), model.template.clone())) };
    let models = state.client.models();
    let served = models.iter().find(|served| served.name == name && served.task.is_some());
    match served {
        Some(served) => Ok((served.task.clone(), served.template.clone())),
        None => Err(ApiError::invalid(
            "task",
            format!("expected a model with a task, as GET /v1/tasks lists them; found {name:?}"),
        )),
    }
}

fn requested_labels(fields: &Fields, task: Option<&PromptTask>) -> Result<Vec<String>, ApiError> {
    let given = fields.strings("labels", MAX_LABELS)?;
    let labels = given.or_else(|| task.map(|task| task.labels.clone())).unwrap_or_default();
    match labels.len() {
        0 => Err(ApiError::missing(
            "labels",
            "the labels to choose from, as the model has no task with labels",
        )),
        1 => Err(ApiError::invalid("labels", "expected two labels or more, found 1")),
        _ => Ok(labels),
    }
}

/// The labels' token sequences; see [`labels::targets`].
fn label_targets(state: &AppState, labels: &[String]) -> Result<Vec<Vec<u32>>, ApiError> {
    let encode = |label: &String| {
        let ids = state.tokenizer.encode(label, false);
        let ids = ids.map_err(|error| ApiError::invalid("labels", error.in_text(&format!("{label:?}"))))?;
        match ids.is_empty() {
            true => {
                let problem = format!("expected labels of a token or more, found {label:?}");
                Err(ApiError::invalid("labels", problem))
            }
            false => Ok(ids),
        }
    };
    let tokens = labels.iter().map(encode).collect::<Result<Vec<_>, _>>()?;
    labels::targets(&tokens, state.tokenizer.eos_token_id).map_err(|(i, j)| {
        let problem = format!(
            "expected labels with tokens of their own, found that {:?} and {:?} have the same",
            labels[i], labels[j]
        );
        ApiError::invalid("labels", problem)
    })
}

/// The labels with their probabilities relative to each other.
fn entries(labels: &[String], logprobs: &[f64]) -> Vec<Value> {
    let entry = |((label, logprob), probability): ((&String, &f64), f64)| json!({"label": label, "probability": probability, "logprob": logprob});
    labels.iter().zip(logprobs).zip(probabilities(logprobs)).map(entry).collect()
}

/// What the prompts of an ensemble answer together, and each by itself. A label's `logprob` is the logarithm of its mean
/// likelihood.
fn ensemble_answer(model: &Served, labels: &[String], logprobs: &[Vec<f64>]) -> Value {
    let together = ensemble::together(logprobs);
    let mean_logprob = |label: usize| {
        let most = logprobs.iter().map(|member| member[label]).fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = logprobs.iter().map(|member| (member[label] - most).exp()).sum();
        most + (sum / logprobs.len() as f64).ln()
    };
    let entry = |(i, label): (usize, &String)| {
        let (probability, votes) = (together.means[i], together.votes[i]);
        json!({"label": label, "probability": probability, "logprob": mean_logprob(i), "votes": votes})
    };
    let member = |(member, logprobs): (&Arc<Served>, &Vec<f64>)| {
        let adapter = member.folder.as_ref().map(|folder| folder.display().to_string());
        let probabilities = probabilities(logprobs);
        json!({"adapter": adapter, "label": labels[largest(&probabilities)], "probabilities": probabilities})
    };
    json!({
        "model": model.name,
        "labels": labels.iter().enumerate().map(entry).collect::<Vec<_>>(),
        "vote": labels[together.vote()],
        "mean_likelihood": labels[together.mean_likelihood()],
        "members": model.members.iter().zip(logprobs).map(member).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use crate::generate::{Event, StopReason, Token};
    use crate::serve::testing::{BASE, END, Fake};
    use serde_json::{Value, json};

    fn ids(text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }

    /// Probabilities of log-likelihoods, by their definition.
    fn shares(logprobs: &[f64]) -> Vec<f64> {
        logprobs.iter().map(|x| 1.0 / logprobs.iter().map(|y| (y - x).exp()).sum::<f64>()).collect()
    }

    #[track_caller]
    fn check(answer: &Value, expected: &[(&str, f64)]) {
        let logprobs: Vec<f64> = expected.iter().map(|(_, logprob)| *logprob).collect();
        let labels = answer["labels"].as_array().unwrap();
        assert_eq!(labels.len(), expected.len());
        for ((entry, (label, logprob)), share) in labels.iter().zip(expected).zip(shares(&logprobs)) {
            assert_eq!((&entry["label"], &entry["logprob"]), (&json!(label), &json!(logprob)));
            assert!((entry["probability"].as_f64().unwrap() - share).abs() < 1e-12, "{entry} is not {share}");
        }
        assert!(answer["seconds"].as_f64().unwrap() >= 0.0);
    }

    #[tokio::test]
    async fn labels_of_one_token_are_scored_by_one_pass() {
        let fake = Fake::saying("x");
        let answer = fake.post("/v1/classify", json!({"model": "dogs", "input": "good"})).await.ok();
        // The script's log-probability of byte 48 is -6.
        check(&answer, &[("0", -6.0), ("1", -6.125)]);
        assert_eq!(answer["model"], "dogs");
        let (model, request) = fake.request();
        assert_eq!((model.as_str(), request.tokens), ("dogs", ids("classify good Label:")));
        assert_eq!((request.score, request.scored), (vec![48, 49], 0));
    }

    #[tokio::test]
    async fn labels_of_several_tokens_are_scored_each_as_a_target() {
        // The log-probability of a target's token is its byte, negative, by 100.
        let fake = Fake::new(|request, events| {
            let scored = request.tokens[request.tokens.len() - request.scored..].iter();
            let token = |id: &u32| Token { id: *id, logprob: Some(-f64::from(*id) / 128.0), top: Vec::new() };
            events.send(Event::Scored(scored.map(token).collect())).unwrap();
            events.send(Event::Finished(StopReason::MaxTokens)).is_ok()
        });
        let body = json!({"model": "dogs", "input": "good", "labels": ["no", "yes"]});
        let (no, yes) = (-221.0 / 128.0, -337.0 / 128.0);
        check(&fake.post("/v1/classify", body).await.ok(), &[("no", no), ("yes", yes)]);
        let seen = std::mem::take(&mut *fake.seen.lock().unwrap());
        assert_eq!(seen.len(), 2);
        assert_eq!(seen[0].1.tokens, ids("classify good Label:no"));
        assert_eq!((seen[1].1.scored, seen[1].1.max_new_tokens), (3, 0));
        // Where one label begins as another ends, an end of text tells them apart.
        let body = json!({"model": "dogs", "input": "good", "labels": ["no", "none"]});
        let none = -(110.0 + 111.0 + 110.0 + 101.0 + 256.0) / 128.0;
        check(&fake.post("/v1/classify", body).await.ok(), &[("no", no - 2.0), ("none", none)]);
        assert_eq!(fake.seen.lock().unwrap()[0].1.tokens.last(), Some(&END));
    }

    #[tokio::test]
    async fn base_model_classifies_with_the_instruction() {
        for (body, expected) in [
            (json!({"model": BASE, "task": "dogs", "input": "a"}), "Say 0 or 1. classify a Label:"),
            (json!({"model": BASE, "task": "dogs", "input": "a", "hard_prompt": false}), "classify a Label:"),
            (json!({"model": "dogs", "input": "a", "hard_prompt": true}), "Say 0 or 1. classify a Label:"),
            (json!({"model": "plain", "task": "dogs", "input": "a"}), "classify a Label:"),
            (json!({"model": BASE, "input": "a", "labels": ["x", "y"]}), "a"),
        ] {
            let fake = Fake::saying("x");
            fake.post("/v1/classify", body).await.ok();
            assert_eq!(fake.request().1.tokens, ids(expected));
        }
    }

    #[tokio::test]
    async fn invalid_classifications_are_rejected_by_name() {
        let fake = Fake::saying("x");
        for (body, word) in [
            (json!({"input": "a"}), "`model`"),
            (json!({"model": "dogs"}), "`input`"),
            (json!({"model": "dogs", "input": "  "}), "blank"),
            (json!({"model": BASE, "input": "a"}), "no task"),
            (json!({"model": BASE, "input": "a", "labels": ["x"]}), "two labels or more"),
            (json!({"model": BASE, "input": "a", "labels": ["x", "x"]}), "have the same"),
            (json!({"model": BASE, "input": "a", "labels": ["x", "y"], "hard_prompt": true}), "found none"),
            (json!({"model": BASE, "input": "a", "task": "plain"}), "`task`"),
        ] {
            let answer = fake.post("/v1/classify", body).await;
            assert_eq!(answer.status, 400, "{}", answer.text);
            let message = answer.json()["error"]["message"].as_str().unwrap().to_owned();
            assert!(message.contains(word), "{word} is not in {message}");
        }
        assert!(fake.seen.lock().unwrap().is_empty());
        let nan = Fake::new(|_, events| events.send(Event::FirstScores(vec![f64::NAN, 0.0])).is_ok());
        let answer = nan.post("/v1/classify", json!({"model": "dogs", "input": "a"})).await;
        assert_eq!((answer.status.as_u16(), answer.text.contains("NaN")), (500, true), "{}", answer.text);
    }

    #[tokio::test]
    async fn tasks_tell_what_each_prompt_is_for() {
        let fake = Fake::saying("");
        let tasks = fake.get("/v1/tasks").await.ok();
        let task = json!({"task": "classification", "verbalizer": "classify {{input}} Label:", "labels": ["0", "1"],
                          "hard_prompt": "Say 0 or 1.", "max_output_tokens": 2, "examples": []});
        let expected = json!([{"model": "dogs", "base": BASE, "virtual_tokens": 10, "task": task},
                              {"model": "plain", "base": BASE, "virtual_tokens": 4, "task": null}]);
        assert_eq!(tasks, json!({"base": BASE, "tasks": expected}));
    }
}
