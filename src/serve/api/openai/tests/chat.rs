use super::{ids, refused};
use crate::serve::testing::{
    BASE, BEGIN, END, Fake, INVALID, LIMITS, MISSING, START, TOO_LONG, UNSUPPORTED, with_fields,
};
use serde_json::{Value, json};

#[tokio::test]
async fn a_chat_goes_through_the_checkpoints_template() {
    let fake = Fake::saying("hello");
    let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
    let body = json!({
        "model": "dogs", "chat_template_kwargs": {"greeting": "G"},
        "messages": [{"role": "developer", "content": "s"}, {"content": parts, "role": "user"}],
    });
    let answer = fake.post("/v1/chat/completions", body).await.ok();
    let message = json!({"role": "assistant", "content": "hello", "refusal": null});
    assert_eq!(answer["choices"][0]["message"], message);
    assert_eq!(
        (&answer["object"], &answer["choices"][0]["finish_reason"]),
        (&json!("chat.completion"), &json!("stop"))
    );
    let mut expected = vec![BEGIN];
    expected.extend(ids("G"));
    for part in ["system: s", "user: a\nb"] {
        expected.push(START);
        expected.extend(ids(part));
        expected.push(END);
    }
    expected.push(START);
    expected.extend(ids("assistant: "));
    let request = fake.request().1;
    assert_eq!(request.tokens, expected, "special tokens are one id each, and none is added");
    let prompt_tokens = expected.len() + 10;
    assert_eq!(request.max_new_tokens, LIMITS.sequence_tokens - prompt_tokens, "as far as there is room");
    assert_eq!(answer["usage"]["prompt_tokens"], prompt_tokens);
}

#[tokio::test]
async fn a_chat_streams_deltas_with_logprobs() {
    let fake = Fake::saying("h\u{e9}");
    let body = json!({
        "model": BASE, "stream": true, "logprobs": true, "top_logprobs": 1, "max_completion_tokens": 3, "n": 2,
        "messages": [{"role": "user", "content": "x"}], "stream_options": {"include_usage": true},
    });
    let events = fake.post("/v1/chat/completions", body).await.events();
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    let of = |index: u64| events.iter().map(|e| &e["choices"][0]).filter(move |c| c["index"] == index);
    for index in 0..2 {
        let text: String = of(index).filter_map(|c| c["delta"]["content"].as_str()).collect();
        assert_eq!(text, "h\u{e9}");
        let reasons: Vec<&Value> = of(index).map(|c| &c["finish_reason"]).filter(|r| !r.is_null()).collect();
        assert_eq!(reasons, ["length"]);
    }
    let tokens: Vec<&Value> = of(0).filter_map(|c| c["logprobs"]["content"].as_array()).flatten().collect();
    let bytes: Vec<&Value> = tokens.iter().map(|token| &token["bytes"]).collect();
    assert_eq!(bytes, [&json!([104]), &json!([0xc3]), &json!([0xa9])]);
    assert_eq!(tokens[0]["top_logprobs"], json!([{"token": "A", "logprob": -65.0 / 8.0, "bytes": [65]}]));
    assert_eq!(events.last().unwrap()["usage"]["completion_tokens"], 6);
}

#[tokio::test]
async fn invalid_chats_are_rejected_by_name() {
    let fake = Fake::saying("x");
    let with = |change: Value| {
        with_fields(json!({"model": BASE, "messages": [{"role": "user", "content": "x"}]}), change)
    };
    let image = json!([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]);
    for (change, code, param, words) in [
        (json!({"messages": null}), MISSING, "messages", &["role"][..]),
        (json!({"messages": []}), INVALID, "messages", &["one message or more"]),
        (json!({"messages": ["hi"]}), INVALID, "messages[0]", &["object"]),
        (json!({"messages": [{"content": "x"}]}), INVALID, "messages[0].role", &["null"]),
        (json!({"messages": [{"role": "user", "content": 5}]}), INVALID, "messages[0].content", &["found 5"]),
        (json!({"messages": image}), UNSUPPORTED, "messages[0].content", &["image_url"]),
        (json!({"tools": [{"type": "function"}]}), UNSUPPORTED, "tools", &["no tools"]),
        (json!({"tool_choice": "required"}), UNSUPPORTED, "tool_choice", &["no tools"]),
        (json!({"response_format": {"type": "json_object"}}), UNSUPPORTED, "response_format", &["text"]),
        (json!({"top_logprobs": 2}), INVALID, "top_logprobs", &["logprobs"]),
        (json!({"max_tokens": 0}), INVALID, "max_tokens", &["1 or more"]),
        (json!({"chat_template_kwargs": 1}), INVALID, "chat_template_kwargs", &["an object"]),
    ] {
        refused(&fake.post("/v1/chat/completions", with(change)).await, 400, code, Some(param), words);
    }
    let long = json!({"messages": [{"role": "user", "content": "x".repeat(300)}]});
    refused(&fake.post("/v1/chat/completions", with(long)).await, 400, TOO_LONG, None, &["200"]);
    assert!(fake.seen.lock().unwrap().is_empty());
    fake.post("/v1/chat/completions", with(json!({"tools": [], "tool_choice": "auto"}))).await.ok();
}

#[tokio::test]
async fn model_without_a_template_names_the_completions_route() {
    use crate::checkpoint::ChatTemplate;
    use crate::serve::ServerOptions;
    let body = json!({"model": BASE, "messages": [{"role": "user", "content": "x"}]});
    let none = Fake::with(ServerOptions::default(), None, |_, _| true);
    let answer = none.post("/v1/chat/completions", body.clone()).await;
    refused(&answer, 400, "no_chat_template", None, &["no chat template", "/v1/completions"]);
    let broken = ChatTemplate { template: "{% for %}".into(), ..ChatTemplate::default() };
    let broken = Fake::with(ServerOptions::default(), Some(broken), |_, _| true);
    assert!(broken.app.chat_problem().is_some());
    let answer = broken.post("/v1/chat/completions", body.clone()).await;
    refused(&answer, 400, "no_chat_template", None, &["can't be used", "line 1", "/v1/completions"]);
    let raising = ChatTemplate {
        template: "{{ raise_exception('roles must alternate') }}".into(),
        ..Default::default()
    };
    let raising = Fake::with(ServerOptions::default(), Some(raising), |_, _| true);
    let answer = raising.post("/v1/chat/completions", body).await;
    refused(&answer, 400, INVALID, Some("messages"), &["says: roles must alternate"]);
}
