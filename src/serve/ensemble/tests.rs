//! An ensemble of two prompts whose worker is a script.

use super::*;
use crate::serve::testing::{Fake, UNSUPPORTED, models, with_fields};
use axum::http::StatusCode;
use serde_json::{Value, json};

/// A server with the ensemble `pack` of two prompts, after which the labels 0 and 1 have these probabilities.
fn fake(probabilities: [[f64; 2]; 2]) -> Fake {
    let mut requests = 0;
    let fake = Fake::new(move |request, events| {
        assert_eq!(request.score, [48, 49]);
        let scores = probabilities[requests % 2].map(f64::ln).to_vec();
        requests += 1;
        events.send(Event::FirstScores(scores)).is_ok()
    });
    let served = |name: &str| Arc::new(Served { name: name.into(), ..(*models()[1]).clone() });
    let members = vec![served("pack: a"), served("pack: b")];
    let pack = Served { name: "pack".into(), folder: None, members, ..(*models()[1]).clone() };
    *fake.app.0.client.shared.models.write().unwrap() = Arc::from([models()[0].clone(), Arc::new(pack)]);
    fake
}

/// A request that lets the answer be 0 or 1.
fn body(more: Value) -> Value {
    let body = json!({"model": "pack", "prompt": "good", "temperature": 0, "max_tokens": 1, "guided_choice": ["0", "1"]});
    with_fields(body, more)
}

#[tokio::test]
async fn classification_has_votes_and_mean_likelihoods() {
    let fake = fake([[0.9, 0.1], [0.4, 0.6]]);
    let answer = fake.post("/v1/classify", json!({"model": "pack", "input": "good"})).await.ok();
    let label = |i: usize| &answer["labels"][i];
    for (i, (mean, votes)) in [(0.65, 1), (0.35, 1)].into_iter().enumerate() {
        assert!((label(i)["probability"].as_f64().unwrap() - mean).abs() < 1e-12, "{answer}");
        assert!((label(i)["logprob"].as_f64().unwrap() - f64::ln(mean)).abs() < 1e-12, "{answer}");
        assert_eq!((&label(i)["votes"], &label(i)["label"]), (&json!(votes), &json!(i.to_string())));
    }
    assert_eq!((&answer["vote"], &answer["mean_likelihood"]), (&json!("0"), &json!("0")));
    let each: Vec<_> = answer["members"].as_array().unwrap().iter().map(|member| &member["label"]).collect();
    assert_eq!(each, ["0", "1"]);
    let seen = fake.seen.lock().unwrap();
    assert_eq!(seen.iter().map(|(model, _)| model.as_str()).collect::<Vec<_>>(), ["pack: a", "pack: b"]);
}

#[tokio::test]
async fn constrained_answers_are_the_choice_of_the_highest_mean_likelihood() {
    // By votes the answer could be either.
    let fake = fake([[0.3, 0.7], [0.6, 0.4]]);
    let answer = fake.post("/v1/completions", body(json!({}))).await.ok();
    let choice = &answer["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("1"), &json!("stop")));
    assert_eq!(answer["usage"]["completion_tokens"], json!(1));
    let messages = json!([{"role": "user", "content": "good"}]);
    let chat = json!({"model": "pack", "messages": messages, "temperature": 0, "guided_choice": ["0", "1"]});
    let answer = fake.post("/v1/chat/completions", chat.clone()).await.ok();
    assert_eq!(answer["choices"][0]["message"]["content"], json!("1"));
    let streamed = fake.post("/v1/chat/completions", with_fields(chat, json!({"stream": true}))).await;
    let text = |event: &Value| event["choices"][0]["delta"]["content"].as_str().unwrap_or("").to_owned();
    assert_eq!(streamed.events().iter().map(text).collect::<String>(), "1");
}

#[tokio::test]
async fn what_an_ensemble_does_not_have_is_refused_by_name() {
    let fake = fake([[0.5, 0.5]; 2]);
    for (more, word) in [
        (json!({"guided_choice": []}), "`pack` is an ensemble of 2 prompts, each of which would continue"),
        (json!({"logprobs": 1}), "no log-probabilities of tokens"),
        (json!({"temperature": 1, "top_p": 0.5}), "`top_p`"),
        (json!({"presence_penalty": 0.5}), "penalties"),
    ] {
        let answer = fake.post("/v1/completions", body(more)).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{}", answer.text);
        let error = &answer.json()["error"];
        assert_eq!((&error["code"], &error["param"]), (&json!(UNSUPPORTED), &json!("model")));
        assert!(error["message"].as_str().unwrap().contains(word), "{error}");
    }
    assert!(fake.seen.lock().unwrap().is_empty());
    // The prompts of an ensemble have no names of their own.
    let answer = fake.post("/v1/completions", body(json!({"model": "pack: a"}))).await;
    assert_eq!(answer.status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn every_list_of_models_names_the_ensemble() {
    let fake = fake([[0.5, 0.5]; 2]);
    let models = fake.get("/v1/models").await.ok();
    let names: Vec<_> = models["data"].as_array().unwrap().iter().map(|model| &model["id"]).collect();
    assert_eq!(names, ["org/base", "pack"]);
    assert_eq!(models["data"][1]["parent"], json!("org/base"));
    let tasks = fake.get("/v1/tasks").await.ok();
    assert_eq!((&tasks["tasks"][0]["model"], &tasks["tasks"][0]["ensemble"]), (&json!("pack"), &json!(2)));
}

#[test]
fn a_temperature_draws_by_mean_probabilities() {
    let share = |temperature: f64| {
        let draws =
            (0..4000).map(|seed| choose(&[0.2, 0.8], &Sampling { temperature, seed, ..Sampling::default() }));
        draws.filter(|choice| *choice == 0).count() as f64 / 4000.0
    };
    assert_eq!(share(0.0), 0.0);
    // 0.2 and 0.2^2 / (0.2^2 + 0.8^2); four standard errors are at most 0.026.
    assert!((share(1.0) - 0.2).abs() < 0.026 && (share(0.5) - 1.0 / 17.0).abs() < 0.015);
}

#[tokio::test]
async fn an_error_of_a_prompt_is_the_answer() {
    let fake = fake([[0.5, 0.5], [f64::NAN, 0.5]]);
    let answer = fake.post("/v1/completions", body(json!({}))).await;
    assert_eq!((answer.status.as_u16(), answer.text.contains("NaN")), (500, true), "{}", answer.text);
}
