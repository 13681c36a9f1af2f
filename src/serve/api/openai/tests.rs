use crate::serve::testing::{
    Answer, BASE, END, Fake, INVALID, LIMITS, MISSING, TOO_LONG, UNSUPPORTED, say, with_fields,
};
use axum::http::StatusCode;
use serde_json::{Value, json};

mod chat;
mod constraints;
mod embeds;
mod position;

fn ids(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

/// Asserts a refusal with this status and code, about this key, with all of these words.
#[track_caller]
pub(super) fn refused(answer: &Answer, status: u16, code: &str, param: Option<&str>, words: &[&str]) {
    assert_eq!(answer.status.as_u16(), status, "{}", answer.text);
    let error = &answer.json()["error"];
    assert_eq!(error["code"], code, "{error}");
    assert_eq!(error["param"], json!(param), "{error}");
    let message = error["message"].as_str().unwrap();
    words.iter().for_each(|word| assert!(message.contains(word), "{word} is not in {message}"));
}

#[tokio::test]
async fn models_are_listed_and_found_by_names_with_slashes() {
    let fake = Fake::saying("");
    let list = fake.get("/v1/models").await.ok();
    let names: Vec<&str> =
        list["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(names, [BASE, "dogs", "plain"]);
    assert_eq!(list["object"], "list");
    let base = fake.get("/v1/models/org/base").await.ok();
    assert_eq!(
        (&base["id"], &base["created"], &base["parent"]),
        (&json!(BASE), &json!(1_700_000_000), &Value::Null)
    );
    assert_eq!(fake.get("/v1/models/org%2Fbase").await.ok()["id"], BASE);
    assert_eq!(fake.get("/v1/models/dogs").await.ok()["parent"], BASE);
    refused(
        &fake.get("/v1/models/cats").await,
        404,
        "model_not_found",
        Some("model"),
        &["`cats`", "org/base, dogs"],
    );
}

#[tokio::test]
async fn completion_continues_the_text_as_it_is() {
    let fake = Fake::saying(" ok\u{e9}!");
    let body = json!({"model": "dogs", "prompt": "Hi", "max_tokens": 9, "temperature": 0, "seed": 7, "unknown": [1]});
    let answer = fake.post("/v1/completions", body).await.ok();
    assert_eq!(answer["choices"][0]["text"], " ok\u{e9}!");
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(answer["choices"][0]["logprobs"], Value::Null);
    assert_eq!((&answer["object"], &answer["model"]), (&json!("text_completion"), &json!("dogs")));
    assert!(answer["id"].as_str().unwrap().starts_with("cmpl-"));
    let usage = json!({"prompt_tokens": 12, "completion_tokens": 6, "total_tokens": 18,
                       "prompt_tokens_details": {"cached_tokens": 10}});
    assert_eq!(answer["usage"], usage);
    let (model, request) = fake.request();
    assert_eq!((model.as_str(), request.tokens), ("dogs", ids("Hi")));
    assert_eq!((request.max_new_tokens, request.sampling.temperature, request.sampling.seed), (9, 0.0, 7));
    assert_eq!((&request.stop_token_ids[..], request.scored, request.logprobs), (&[END][..], 0, None));
    assert!(request.deadline.is_some());
}

#[tokio::test]
async fn defaults_are_openais() {
    let fake = Fake::saying("0123456789abcdefghij");
    let answer = fake.post("/v1/completions", json!({"model": BASE, "prompt": "x"})).await.ok();
    assert_eq!(answer["choices"][0]["text"], "0123456789abcdef");
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    let sampling = fake.request().1.sampling;
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k), (1.0, 1.0, 0));
    assert_eq!((sampling.repetition_penalty, sampling.presence_penalty), (1.0, 0.0));
}

#[tokio::test]
async fn every_parameter_reaches_the_worker() {
    let fake = Fake::saying("x");
    let body = json!({
        "model": BASE, "prompt": [72, 105], "max_tokens": 30, "temperature": 0.5, "top_p": 0.25, "top_k": 3,
        "repetition_penalty": 1.5, "presence_penalty": -1, "frequency_penalty": 2, "logit_bias": {"65": -100, "7": 1.5},
        "min_tokens": 2, "stop_token_ids": [10, 13], "ignore_eos": true, "seed": -1, "user": "me", "best_of": 1,
    });
    fake.post("/v1/completions", body).await.ok();
    let request = fake.request().1;
    assert_eq!(request.tokens, ids("Hi"));
    assert_eq!((request.min_new_tokens, &request.stop_token_ids[..]), (2, &[10, 13][..]));
    let sampling = request.sampling;
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k), (0.5, 0.25, 3));
    assert_eq!(
        (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty),
        (1.5, -1.0, 2.0)
    );
    assert_eq!((sampling.logit_bias, sampling.seed), (vec![(65, -100.0), (7, 1.5)], u64::MAX));
}

#[tokio::test]
async fn several_prompts_with_several_choices_keep_their_order() {
    let fake = Fake::new(|request, events| {
        let text = format!("{}{}", request.tokens[0], request.sampling.seed);
        say(text.as_bytes(), request, &events)
    });
    let body = json!({"model": BASE, "prompt": ["A", "B"], "n": 2, "seed": 5});
    let texts = |choices: &Value| -> Vec<(u64, String)> {
        let choices = choices.as_array().unwrap().iter();
        choices.map(|c| (c["index"].as_u64().unwrap(), c["text"].as_str().unwrap().to_owned())).collect()
    };
    let answer = fake.post("/v1/completions", body.clone()).await.ok();
    let expected = [(0, "655"), (1, "656"), (2, "665"), (3, "666")].map(|(i, text)| (i, text.to_owned()));
    assert_eq!(texts(&answer["choices"]), expected);
    assert_eq!(answer["usage"]["prompt_tokens"], 2);
    let lists = json!({"model": BASE, "prompt": [[65], [66, 1]], "n": 1});
    assert_eq!(fake.post("/v1/completions", lists).await.ok()["choices"].as_array().unwrap().len(), 2);
    // The same in pieces.
    let mut streamed = body;
    streamed["stream"] = true.into();
    let mut whole = vec![String::new(); 4];
    for event in fake.post("/v1/completions", streamed).await.events() {
        for (index, text) in texts(&event["choices"]) {
            whole[index as usize].push_str(&text);
        }
    }
    assert_eq!(whole, expected.map(|(_, text)| text));
}

#[tokio::test]
async fn a_stream_ends_with_its_reason_its_usage_and_done() {
    let fake = Fake::saying("a\u{20ac}b");
    let body =
        json!({"model": "plain", "prompt": "x", "stream": true, "stream_options": {"include_usage": true}});
    let answer = fake.post("/v1/completions", body).await;
    assert_eq!(answer.headers["content-type"], "text/event-stream; charset=utf-8");
    assert!(answer.text.ends_with("\n\ndata: [DONE]\n\n"));
    let events = answer.events();
    let texts: Vec<&str> = events.iter().filter_map(|e| e["choices"][0]["text"].as_str()).collect();
    assert_eq!(texts, ["a", "\u{20ac}", "b", ""]);
    assert_eq!(events[3]["choices"][0]["finish_reason"], "stop");
    assert!(events[..4].iter().all(|event| event["usage"].is_null()));
    assert_eq!((&events[4]["choices"], &events[4]["usage"]["total_tokens"]), (&json!([]), &json!(5 + 5)));
    let without =
        fake.post("/v1/completions", json!({"model": "plain", "prompt": "x", "stream": true})).await;
    assert!(!without.text.contains("usage"));
}

#[tokio::test]
async fn a_stop_sequence_ends_the_text_and_the_request() {
    for (stop, min_tokens, expected, reason) in [
        (json!("END"), 0, "one E two ", json!("END")),
        (json!(["zzz", "two E"]), 0, "one E ", json!("two E")),
        (json!(["one"]), 4, "one E two END more", Value::Null),
    ] {
        let fake = Fake::saying("one E two END more");
        let body =
            json!({"model": BASE, "prompt": "x", "max_tokens": 50, "stop": stop, "min_tokens": min_tokens});
        let choice = fake.post("/v1/completions", body.clone()).await.ok()["choices"][0].clone();
        assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!(expected), &json!("stop")));
        assert_eq!(choice["stop_reason"], reason);
        let mut streamed = body;
        streamed["stream"] = true.into();
        let events = fake.post("/v1/completions", streamed).await.events();
        let text: String = events.iter().filter_map(|e| e["choices"][0]["text"].as_str()).collect();
        assert_eq!(text, expected);
    }
}

#[tokio::test]
async fn logprobs_have_tokens_likeliest_tokens_and_offsets() {
    let fake = Fake::saying("h\u{e9}");
    let body = json!({"model": BASE, "prompt": "Hi", "logprobs": 2, "echo": true});
    let answer = fake.post("/v1/completions", body.clone()).await.ok();
    let choice = &answer["choices"][0];
    assert_eq!(choice["text"], "Hih\u{e9}");
    let logprobs = &choice["logprobs"];
    assert_eq!(logprobs["tokens"], json!(["H", "i", "h", "bytes:\\xc3", "bytes:\\xa9"]));
    assert_eq!(logprobs["token_logprobs"], json!([null, -105.0 / 8.0, -13.0, -195.0 / 8.0, -169.0 / 8.0]));
    assert_eq!(logprobs["top_logprobs"][2], json!({"A": -65.0 / 8.0, "B": -66.0 / 8.0, "h": -13.0}));
    assert_eq!(logprobs["top_logprobs"][0], Value::Null);
    assert_eq!(logprobs["text_offset"], json!([0, 1, 2, 3, 4]));
    assert_eq!(fake.request().1.scored, 2);
    // In pieces: the same lists, one after the other.
    let mut streamed = body;
    streamed["stream"] = true.into();
    let mut tokens = Vec::new();
    for event in fake.post("/v1/completions", streamed).await.events() {
        tokens.extend(event["choices"][0]["logprobs"]["tokens"].as_array().into_iter().flatten().cloned());
    }
    assert_eq!(json!(tokens), logprobs["tokens"]);
}

#[tokio::test]
async fn text_can_be_scored_without_generating() {
    let fake = Fake::saying("never");
    let body = json!({"model": BASE, "prompt": "abc", "max_tokens": 0, "echo": true, "logprobs": 0});
    let answer = fake.post("/v1/completions", body).await.ok();
    assert_eq!(answer["choices"][0]["text"], "abc");
    let logprobs = &answer["choices"][0]["logprobs"];
    assert_eq!(logprobs["token_logprobs"], json!([null, -98.0 / 8.0, -99.0 / 8.0]));
    assert_eq!(answer["usage"]["completion_tokens"], 0);
    let body = json!({"model": BASE, "prompt": "abc", "max_tokens": 1, "echo": true});
    assert_eq!(fake.post("/v1/completions", body).await.ok()["choices"][0]["text"], "abcn");
}

#[tokio::test]
async fn prompts_are_cut_from_the_left_on_request() {
    let fake = Fake::saying("x");
    let long = "0123456789".repeat(1000);
    let body = json!({"model": BASE, "prompt": long, "truncate_prompt_tokens": 3});
    fake.post("/v1/completions", body).await.ok();
    assert_eq!(fake.request().1.tokens, ids("789"));
    let body =
        json!({"model": BASE, "prompt": [long.clone()], "truncate_prompt_tokens": -1, "max_tokens": 20});
    fake.post("/v1/completions", body).await.ok();
    assert_eq!(fake.seen.lock().unwrap()[1].1.tokens.len(), LIMITS.sequence_tokens - 20);
}

#[tokio::test]
async fn invalid_parameters_are_rejected_by_name() {
    let fake = Fake::saying("x");
    let with = |change: Value| with_fields(json!({"model": BASE, "prompt": "x"}), change);
    for (change, code, param, words) in [
        (json!({"model": null}), MISSING, "model", &["GET /v1/models"][..]),
        (json!({"prompt": null}), MISSING, "prompt", &["a string"]),
        (json!({"prompt": ""}), INVALID, "prompt", &["at least one token"]),
        (json!({"prompt": []}), INVALID, "prompt", &["one token"]),
        (json!({"prompt": {"a": 1}}), INVALID, "prompt", &["found an object"]),
        (json!({"prompt": [1, 999]}), INVALID, "prompt", &["0 to 258"]),
        (json!({"prompt": ["a", 1]}), INVALID, "prompt", &["list"]),
        (json!({"temperature": 2.5}), INVALID, "temperature", &["0 to 2", "2.5"]),
        (json!({"temperature": "hot"}), INVALID, "temperature", &["\"hot\""]),
        (json!({"top_p": 0}), INVALID, "top_p", &["over 0"]),
        (json!({"n": 0}), INVALID, "n", &["1 to 128"]),
        (json!({"n": 9}), INVALID, "n", &["at most 8", "found 9"]),
        (json!({"best_of": 3}), INVALID, "best_of", &["`n`"]),
        (json!({"max_tokens": 0}), INVALID, "max_tokens", &["echo"]),
        (json!({"max_tokens": -1}), INVALID, "max_tokens", &["found -1"]),
        (json!({"stop": vec!["a"; 17]}), INVALID, "stop", &["at most 16"]),
        (json!({"stop": ""}), INVALID, "stop", &["not empty"]),
        (json!({"logprobs": 21}), INVALID, "logprobs", &["0 to 20"]),
        (json!({"logit_bias": {"259": 1}}), INVALID, "logit_bias", &["258"]),
        (json!({"logit_bias": {"1": 101}}), INVALID, "logit_bias.1", &["-100 to 100"]),
        (json!({"stop_token_ids": [-1]}), INVALID, "stop_token_ids", &["token ids"]),
        (json!({"seed": 1.5}), INVALID, "seed", &["whole number"]),
        (json!({"suffix": "s"}), UNSUPPORTED, "suffix", &["suffix"]),
        (json!({"stream_options": {}}), INVALID, "stream_options", &["stream"]),
        (json!({"stream": 1}), INVALID, "stream", &["true or false"]),
    ] {
        refused(&fake.post("/v1/completions", with(change)).await, 400, code, Some(param), words);
    }
    let unknown = fake.post("/v1/completions", with(json!({"model": "cats"}))).await;
    refused(&unknown, 404, "model_not_found", Some("model"), &["`cats` does not exist"]);
    for (change, words) in [
        (json!({"max_tokens": 200}), &["at most 200", "found 201"][..]),
        (json!({"max_tokens": u64::MAX / 2}), &["at most 200"]),
        (json!({"prompt": "x".repeat(150_000)}), &["at most 200", "150000 bytes"]),
    ] {
        refused(&fake.post("/v1/completions", with(change)).await, 400, TOO_LONG, None, words);
    }
    assert!(fake.seen.lock().unwrap().is_empty());
}

#[tokio::test]
async fn full_queue_is_429_and_finished_requests_leave_it() {
    // A worker that begins nothing.
    let mut kept = Vec::new();
    let fake = Fake::new(move |_, events| {
        kept.push(events);
        false
    });
    let body = json!({"model": BASE, "prompt": "x", "n": 8, "stream": true});
    let request = |body: &Value| {
        let request = axum::http::Request::post("/v1/completions");
        request.body(axum::body::Body::from(body.to_string())).unwrap()
    };
    use hyper::service::Service;
    let service = hyper_util::service::TowerToHyperService::new(crate::serve::router::router(&fake.app.0));
    let streaming = service.call(request(&body)).await.unwrap();
    assert_eq!(streaming.status(), StatusCode::OK);
    let turned_away = fake.post("/v1/completions", json!({"model": BASE, "prompt": "x"})).await;
    refused(&turned_away, 429, "queue_full", None, &["8 requests are waiting"]);
    assert_eq!(turned_away.headers["retry-after"], "1");
}

#[tokio::test]
async fn a_device_that_fails_is_500_and_in_a_stream_an_error() {
    let fake = Fake::new(|request, events| {
        use crate::generate::Event;
        let token = crate::serve::testing::token(65, request);
        events.send(Event::Token(token)).unwrap();
        events.send(Event::Failed("the device is lost".into())).unwrap();
        true
    });
    let mut body = json!({"model": BASE, "prompt": "x"});
    refused(
        &fake.post("/v1/completions", body.clone()).await,
        500,
        "server_error",
        None,
        &["the device is lost"],
    );
    body["stream"] = true.into();
    let events = fake.post("/v1/completions", body).await.events();
    assert_eq!(events[0]["choices"][0]["text"], "A");
    assert_eq!(events[1]["error"]["message"], "the device is lost");
    assert_eq!(events.len(), 2);
}

#[tokio::test]
async fn worker_that_has_ended_is_500() {
    let fake = Fake::new(|_, _| true);
    let answer = fake.post("/v1/completions", json!({"model": BASE, "prompt": "x"})).await;
    refused(&answer, 500, "server_error", None, &["without an answer"]);
}
