use crate::generate::{Event, Request, StopReason};
use crate::serve::api::openai::tests::refused;
use crate::serve::testing::{
    BASE, Fake, INVALID, MISSING, TOO_LONG, UNKNOWN, UNSUPPORTED, say, token, with_fields,
};
use serde_json::{Value, json};

const RESPONSES: &str = "/v1/responses";

fn with(change: Value) -> Value {
    with_fields(json!({"model": "dogs", "input": "x"}), change)
}

/// What the worker is asked for a body of one of the routes.
async fn worked(path: &str, body: Value) -> Request {
    let fake = Fake::saying("x");
    fake.post(path, body).await.ok();
    let mut request = fake.request().1;
    // Each request has a deadline of its own.
    request.deadline = None;
    request
}

#[tokio::test]
async fn a_response_is_the_answer_of_a_chat() {
    let sampling = json!({"temperature": 0.5, "top_p": 0.25, "seed": 7, "stop": ["b", "c"], "top_k": 3});
    let pairs = [
        (json!({"input": "hi"}), json!({"messages": [{"role": "user", "content": "hi"}]})),
        (
            json!({"input": "hi", "instructions": "be kind", "max_output_tokens": 9}),
            json!({"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}],
                   "max_completion_tokens": 9}),
        ),
        (
            json!({"input": [
                {"role": "developer", "content": [{"type": "input_text", "text": "s"}]},
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"},
                                                                {"type": "input_text", "text": "b"}]},
                {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
                 "content": [{"type": "output_text", "text": "c", "annotations": []}]},
                {"role": "user", "content": "d"}],
                "include": ["message.output_text.logprobs"], "top_logprobs": 2}),
            json!({"messages": [
                {"role": "developer", "content": "s"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}],
                "logprobs": true, "top_logprobs": 2}),
        ),
        (
            json!({"input": "hi", "text": {"format": {"type": "json_schema", "name": "label", "strict": true,
                                                      "schema": {"enum": ["yes", "no"]}}}}),
            json!({"messages": [{"role": "user", "content": "hi"}], "response_format": {"type": "json_schema",
                   "json_schema": {"name": "label", "strict": true, "schema": {"enum": ["yes", "no"]}}}}),
        ),
    ];
    for (mut response, mut chat) in pairs {
        for body in [&mut response, &mut chat] {
            let body = body.as_object_mut().unwrap();
            body.insert("model".into(), "dogs".into());
            body.extend(sampling.as_object().unwrap().clone());
        }
        let (ours, chats) =
            (worked(RESPONSES, response.clone()).await, worked("/v1/chat/completions", chat).await);
        assert_eq!(format!("{ours:?}"), format!("{chats:?}"), "{response}");
    }
}

#[tokio::test]
async fn a_response_has_its_message_and_usage() {
    let fake = Fake::saying("h\u{e9}llo");
    let body =
        with(json!({"model": BASE, "metadata": {"k": "v"}, "user": "me", "temperature": 0, "store": true,
                           "instructions": "be kind", "max_output_tokens": 20}));
    let answer = fake.post(RESPONSES, body).await.ok();
    assert_eq!(
        (&answer["object"], &answer["status"], &answer["model"]),
        (&json!("response"), &json!("completed"), &json!(BASE))
    );
    assert!(answer["id"].as_str().unwrap().starts_with("resp_"));
    let message = &answer["output"][0];
    assert!(message["id"].as_str().unwrap().starts_with("msg_"));
    assert_eq!(
        (&message["type"], &message["role"], &message["status"]),
        (&json!("message"), &json!("assistant"), &json!("completed"))
    );
    let part = json!({"type": "output_text", "text": "h\u{e9}llo", "annotations": [], "logprobs": []});
    assert_eq!(message["content"], json!([part]));
    let prompt = fake.request().1.tokens.len();
    let usage = json!({"input_tokens": prompt, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                       "output_tokens": 6, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": prompt + 6});
    assert_eq!(answer["usage"], usage);
    for (key, value) in [
        ("metadata", json!({"k": "v"})),
        ("user", json!("me")),
        ("temperature", json!(0)),
        ("top_p", json!(1.0)),
        ("instructions", json!("be kind")),
        ("max_output_tokens", json!(20)),
        ("store", json!(false)),
        ("previous_response_id", Value::Null),
        ("tools", json!([])),
        ("error", Value::Null),
        ("incomplete_details", Value::Null),
        ("text", json!({"format": {"type": "text"}})),
    ] {
        assert_eq!(answer[key], value, "{key}");
    }
    let cut = Fake::saying("hello").post(RESPONSES, with(json!({"max_output_tokens": 3}))).await.ok();
    assert_eq!((&cut["status"], &cut["output"][0]["status"]), (&json!("incomplete"), &json!("incomplete")));
    assert_eq!(cut["incomplete_details"], json!({"reason": "max_output_tokens"}));
    assert_eq!(cut["output"][0]["content"][0]["text"], "hel");
}

#[tokio::test]
async fn log_probabilities_come_with_the_text() {
    let fake = Fake::saying("hi");
    let body = with(
        json!({"include": ["message.output_text.logprobs", "reasoning.encrypted_content"], "top_logprobs": 1}),
    );
    let answer = fake.post(RESPONSES, body.clone()).await.ok();
    let top = json!([{"token": "A", "logprob": -65.0 / 8.0, "bytes": [65]}]);
    let expected = json!([{"token": "h", "logprob": -13.0, "bytes": [104], "top_logprobs": top},
                          {"token": "i", "logprob": -105.0 / 8.0, "bytes": [105], "top_logprobs": top}]);
    assert_eq!(answer["output"][0]["content"][0]["logprobs"], expected);
    let mut streamed = body;
    streamed["stream"] = true.into();
    let events = fake.post(RESPONSES, streamed).await.events();
    let deltas: Vec<&Value> = events.iter().filter(|e| e["type"] == "response.output_text.delta").collect();
    assert_eq!(json!([deltas[0]["logprobs"][0], deltas[1]["logprobs"][0]]), expected);
    let done = events.iter().find(|e| e["type"] == "response.output_text.done").unwrap();
    assert_eq!(done["logprobs"], expected);
}

#[tokio::test]
async fn a_stream_has_numbered_events_in_openais_order() {
    let fake = Fake::saying("h\u{e9}y");
    let answer = fake
        .post(RESPONSES, with(json!({"stream": true, "stream_options": {"include_obfuscation": false}})))
        .await;
    assert!(answer.text.starts_with("event: response.created\ndata: {"), "{}", answer.text);
    let events = answer.events();
    let kinds: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    let expected = [
        "response.created", "response.in_progress", "response.output_item.added",
        "response.content_part.added", "response.output_text.delta", "response.output_text.delta",
        "response.output_text.delta", "response.output_text.done", "response.content_part.done",
        "response.output_item.done", "response.completed",
    ];
    assert_eq!(kinds, expected);
    let numbers: Vec<u64> = events.iter().map(|event| event["sequence_number"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (0..11).collect::<Vec<u64>>());
    let deltas: String = events[4..7].iter().map(|event| event["delta"].as_str().unwrap()).collect();
    assert_eq!((deltas.as_str(), &events[7]["text"]), ("h\u{e9}y", &json!("h\u{e9}y")));
    for event in &events[3..9] {
        assert_eq!((&event["item_id"], &event["content_index"]), (&events[2]["item"]["id"], &json!(0)));
    }
    let last = &events[10]["response"];
    assert_eq!((&last["id"], &last["output"][0]), (&events[0]["response"]["id"], &events[9]["item"]));
    assert_eq!((&last["usage"]["output_tokens"], &events[0]["response"]["usage"]), (&json!(4), &Value::Null));
    let cut = fake.post(RESPONSES, with(json!({"stream": true, "max_output_tokens": 1}))).await.events();
    assert_eq!(cut.last().unwrap()["type"], "response.incomplete");
}

#[tokio::test]
async fn a_stream_that_fails_says_so() {
    let fake = Fake::new(|request, events| {
        drop(events.send(Event::Token(token(65, request))));
        events.send(Event::Failed("the device is lost".into())).is_ok()
    });
    let events = fake.post(RESPONSES, with(json!({"stream": true}))).await.events();
    let last = events.last().unwrap();
    assert_eq!((&last["type"], &last["response"]["status"]), (&json!("response.failed"), &json!("failed")));
    assert_eq!(last["response"]["error"], json!({"code": "server_error", "message": "the device is lost"}));
}

#[tokio::test]
async fn response_at_its_time_limit_is_incomplete() {
    let fake = Fake::new(|request, events| {
        drop(events.send(Event::Token(token(65, request))));
        events.send(Event::Finished(StopReason::TimeLimit)).is_ok()
    });
    let answer = fake.post(RESPONSES, with(json!({}))).await.ok();
    assert_eq!(answer["incomplete_details"], json!({"reason": "time_limit"}));
}

#[tokio::test]
async fn unsupported_fields_of_responses_are_rejected_by_name() {
    let fake = Fake::saying("x");
    let image = json!([{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}]);
    let json_object = json!({"format": {"type": "json_object"}});
    for (change, code, param, words) in [
        (json!({"input": null}), MISSING, "input", "a list of messages"),
        (json!({"input": []}), INVALID, "input", "one message or more"),
        (json!({"input": [5]}), INVALID, "input[0]", "found 5"),
        (
            json!({"input": [{"type": "function_call_output"}]}),
            UNSUPPORTED,
            "input[0]",
            "function_call_output",
        ),
        (
            json!({"input": [{"type": "item_reference", "id": "x"}]}),
            UNSUPPORTED,
            "input[0]",
            "item_reference",
        ),
        (json!({"input": [{"role": "tool", "content": "x"}]}), INVALID, "input[0].role", "\"tool\""),
        (json!({"input": [{"role": "user", "content": 5}]}), INVALID, "input[0].content", "found 5"),
        (json!({"input": image}), UNSUPPORTED, "input[0].content[0]", "input_image"),
        (
            json!({"previous_response_id": "resp_1"}),
            UNSUPPORTED,
            "previous_response_id",
            "whole conversation",
        ),
        (json!({"conversation": "conv_1"}), UNSUPPORTED, "conversation", "whole conversation"),
        (json!({"background": true}), UNSUPPORTED, "background", "at once"),
        (json!({"truncation": "auto"}), UNSUPPORTED, "truncation", "not cut"),
        (json!({"tools": [{"type": "web_search"}]}), UNSUPPORTED, "tools", "no tools"),
        (json!({"reasoning": {"effort": "low"}}), UNSUPPORTED, "reasoning", ""),
        (json!({"prompt": {"id": "pmpt_1"}}), UNSUPPORTED, "prompt", "`input`"),
        (json!({"messages": [{"role": "user"}]}), UNSUPPORTED, "messages", "`input`"),
        (json!({"max_tokens": 3}), UNSUPPORTED, "max_tokens", "`max_output_tokens`"),
        (json!({"max_output_tokens": 0}), INVALID, "max_output_tokens", "1 or more"),
        (json!({"include": ["everything"]}), UNSUPPORTED, "include", "everything"),
        (json!({"text": json_object}), UNSUPPORTED, "text.format", ""),
        (json!({"text": {"verbosity": "low"}}), UNSUPPORTED, "text.verbosity", ""),
        (json!({"context_management": [{"type": "compaction"}]}), UNSUPPORTED, "context_management", ""),
        (json!({"inputs": "x"}), UNSUPPORTED, "inputs", ""),
        (json!({"instruction": "x"}), UNKNOWN, "instruction", "`instructions`"),
    ] {
        refused(&fake.post(RESPONSES, with(change)).await, 400, code, Some(param), &[words]);
    }
    assert!(fake.seen.lock().unwrap().is_empty());
}

#[tokio::test]
async fn unknown_models_and_responses_are_rejected() {
    let fake = Fake::saying("x");
    refused(&fake.post(RESPONSES, json!({"input": "x"})).await, 400, MISSING, Some("model"), &[]);
    refused(
        &fake.post(RESPONSES, with(json!({"model": "cats"}))).await,
        404,
        "model_not_found",
        Some("model"),
        &[],
    );
    refused(&fake.get("/v1/responses/resp_1").await, 404, "not_found", None, &["not kept"]);
    assert!(fake.seen.lock().unwrap().is_empty());
}

#[tokio::test]
async fn fields_that_are_off_are_accepted_and_unknown_ones_named() {
    let fake = Fake::saying("x");
    let off = json!({"tools": [], "tool_choice": "auto", "truncation": "disabled", "background": false, "n": 1,
                     "previous_response_id": null, "reasoning": null, "text": {"format": {"type": "text"}}, "mystery": 1});
    let answer = fake.post(RESPONSES, with(off)).await;
    assert_eq!(
        (answer.status.as_u16(), &answer.headers["x-gneiss-ignored-fields"]),
        (200, &"mystery".parse().unwrap())
    );
}

/// A template that refuses the conversation is about `input` here.
#[tokio::test]
async fn errors_of_chats_have_the_names_of_responses() {
    use crate::checkpoint::ChatTemplate;
    use crate::serve::ServerOptions;
    let template = ChatTemplate { template: "{{ raise_exception('no') }}".into(), ..ChatTemplate::default() };
    let fake =
        Fake::with(ServerOptions::default(), Some(template), |request, events| say(b"x", request, &events));
    refused(
        &fake.post(RESPONSES, with(json!({}))).await,
        400,
        INVALID,
        Some("input"),
        &["`input`: the chat template"],
    );
    let long = Fake::saying("x").post(RESPONSES, with(json!({"input": "x".repeat(300)}))).await;
    refused(&long, 400, TOO_LONG, None, &["fewer than 190 tokens"]);
}
