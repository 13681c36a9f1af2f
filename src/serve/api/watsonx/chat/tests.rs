use crate::generate::{Event, Request, StopReason};
use crate::serve::api::watsonx::tests::refused;
use crate::serve::testing::{BASE, Fake, INVALID, MISSING, UNKNOWN, UNSUPPORTED, token, with_fields};
use serde_json::{Value, json};

const CHAT: &str = "/ml/v1/text/chat?version=2024-10-08";
const STREAM: &str = "/ml/v1/text/chat_stream?version=2024-10-08";
const DOGS: &str = "/ml/v1/deployments/dogs/text/chat?version=2024-10-08";

/// The body of `ModelInference.chat` of the SDK, with this changed.
fn with(change: Value) -> Value {
    let parts = json!([{"type": "text", "text": "hi"}]);
    let messages = json!([{"role": "system", "content": "be kind"}, {"role": "user", "content": parts}]);
    with_fields(json!({"model_id": BASE, "messages": messages, "project_id": "p", "max_tokens": 20}), change)
}

async fn worked(path: &str, body: Value) -> (String, Request) {
    let fake = Fake::saying("x");
    fake.post(path, body).await.ok();
    let (model, mut request) = fake.request();
    // Each request has a deadline of its own.
    request.deadline = None;
    (model, request)
}

#[tokio::test]
async fn a_chat_is_that_of_openais_api() {
    let more = json!({"temperature": 0.5, "top_p": 0.5, "seed": 3, "stop": ["a"], "logprobs": true, "top_logprobs": 2,
                      "presence_penalty": 1, "repetition_penalty": 1.5, "guided_choice": ["yes", "no"]});
    let ours = with(more);
    let mut openais = ours.clone();
    openais.as_object_mut().unwrap().remove("project_id");
    openais["model"] = openais.as_object_mut().unwrap().remove("model_id").unwrap();
    let expected = worked("/v1/chat/completions", openais).await;
    assert_eq!(format!("{:?}", worked(CHAT, ours.clone()).await), format!("{expected:?}"));
    let mut deployment = ours;
    deployment.as_object_mut().unwrap().remove("model_id");
    let (model, request) = worked(DOGS, deployment).await;
    assert_eq!((model.as_str(), request.tokens), ("dogs", expected.1.tokens));
}

#[tokio::test]
async fn an_answer_has_watsonxs_names() {
    let fake = Fake::saying("hello");
    let answer = fake.post(CHAT, with(json!({}))).await.ok();
    assert_eq!((&answer["model_id"], &answer["object"]), (&json!(BASE), &json!("chat.completion")));
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-") && answer["created"].is_u64());
    assert!(answer["created_at"].as_str().unwrap().ends_with('Z'));
    let choice = &answer["choices"][0];
    assert_eq!(
        (&choice["message"]["role"], &choice["message"]["content"]),
        (&json!("assistant"), &json!("hello"))
    );
    assert_eq!((&choice["index"], &choice["finish_reason"]), (&json!(0), &json!("stop")));
    let prompt = fake.request().1.tokens.len();
    let usage = &answer["usage"];
    assert_eq!((&usage["prompt_tokens"], &usage["completion_tokens"]), (&json!(prompt), &json!(5)));
    // 0 is as many as the server gives by itself.
    for key in ["max_tokens", "max_completion_tokens"] {
        let fake = Fake::saying("x");
        fake.post(CHAT, with(json!({"max_tokens": null, key: 0}))).await.ok();
        assert!(fake.request().1.max_new_tokens > 20);
    }
}

#[tokio::test]
async fn a_time_limit_ends_a_text() {
    let script = |request: &Request, events: tokio::sync::mpsc::UnboundedSender<Event>| {
        drop(events.send(Event::Token(token(65, request))));
        events.send(Event::Finished(StopReason::TimeLimit)).is_ok()
    };
    let fake = Fake::new(script);
    let before = std::time::Instant::now();
    let answer = fake.post(CHAT, with(json!({"time_limit": 1500}))).await.ok();
    assert_eq!(answer["choices"][0]["finish_reason"], "time_limit");
    let limit = fake.request().1.deadline.unwrap() - before;
    assert!((1.5..9.0).contains(&limit.as_secs_f64()), "{limit:?}");
    let events = Fake::new(script).post(STREAM, with(json!({}))).await.events();
    assert_eq!(events[events.len() - 2]["choices"][0]["finish_reason"], "time_limit");
}

#[tokio::test]
async fn a_stream_has_deltas_and_ends_with_usage() {
    let fake = Fake::saying("h\u{e9}y");
    for path in [STREAM, "/ml/v1/deployments/dogs/text/chat_stream"] {
        let answer = fake.post(path, with(json!({}))).await;
        assert!(answer.text.starts_with("id: 0\nevent: message\ndata: {"), "{}", answer.text);
        assert!(!answer.text.contains("[DONE]"), "the SDK reads JSON alone");
        let events = answer.events();
        assert!(events.iter().all(|event| event["model_id"].is_string() && event["created_at"].is_string()));
        let (last, chunks) = events.split_last().unwrap();
        assert_eq!((&last["choices"], &last["usage"]["completion_tokens"]), (&json!([]), &json!(4)));
        assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
        let text: String =
            chunks.iter().map(|chunk| chunk["choices"][0]["delta"]["content"].as_str().unwrap()).collect();
        assert_eq!(text, "h\u{e9}y");
        let reasons: Vec<&Value> = chunks.iter().map(|chunk| &chunk["choices"][0]["finish_reason"]).collect();
        assert_eq!((reasons.len(), reasons[4]), (5, &json!("stop")));
    }
    let lost = Fake::new(|_, events| events.send(Event::Failed("the device is lost".into())).is_ok());
    let answer = lost.post(STREAM, with(json!({}))).await;
    assert!(answer.text.contains("event: error\ndata: {\"errors\":"), "{}", answer.text);
}

#[tokio::test]
async fn invalid_parameters_are_rejected_by_name() {
    let fake = Fake::saying("x");
    for (change, code, words) in [
        (json!({"model_id": null}), MISSING, "`model_id`"),
        (json!({"messages": null}), MISSING, "`messages`"),
        (json!({"tools": [{"type": "function"}]}), UNSUPPORTED, "`tools`"),
        (json!({"tool_choice_option": "required"}), UNSUPPORTED, "`tool_choice_option`"),
        (json!({"guided_regex": "a+"}), UNSUPPORTED, "`guided_regex`"),
        (json!({"guided_grammar": "root ::= \"a\""}), UNSUPPORTED, "`guided_grammar`"),
        (json!({"response_format": {"type": "json_object"}}), UNSUPPORTED, "`response_format`"),
        (json!({"reasoning_effort": "high"}), UNSUPPORTED, "`reasoning_effort`"),
        (json!({"length_penalty": 1.5}), UNSUPPORTED, "`length_penalty`"),
        (json!({"context": "x"}), UNSUPPORTED, "`context`"),
        (json!({"crypto": {"key_ref": "x"}}), UNSUPPORTED, "`crypto`"),
        (json!({"parameters": {"max_tokens": 3}}), UNSUPPORTED, "beside `messages`"),
        (json!({"moderations": {"hap": {}}}), UNSUPPORTED, "`moderations`"),
        (json!({"stream": true}), UNSUPPORTED, "/ml/v1/text/chat_stream"),
        (json!({"temperature": 3}), INVALID, "`temperature`"),
        (json!({"time_limit": 0}), INVALID, "`time_limit`"),
        (json!({"temprature": 1}), UNKNOWN, "`temperature`"),
    ] {
        refused(&fake.post(CHAT, with(change)).await, 400, code, &[words]);
    }
    refused(&fake.post(CHAT, with(json!({"model_id": "cats"}))).await, 404, "model_not_found", &["`cats`"]);
    let cats = fake.post("/ml/v1/deployments/cats/text/chat", with(json!({}))).await;
    refused(&cats, 404, "deployment_not_found", &["`cats`"]);
    assert!(fake.seen.lock().unwrap().is_empty());
    let off = json!({"tool_choice_option": "none", "tools": [], "length_penalty": 1.0, "mystery": 1});
    let answer = fake.post(CHAT, with(off)).await;
    assert_eq!(
        (answer.status.as_u16(), &answer.headers["x-gneiss-ignored-fields"]),
        (200, &"mystery".parse().unwrap())
    );
}

#[tokio::test]
async fn sdk_sees_that_chats_are_supported() {
    use crate::serve::ServerOptions;
    let kinds = |details: &Value| {
        let urls = details["entity"]["status"]["inference"].as_array().unwrap().iter();
        urls.filter(|url| url["url"].as_str().unwrap().contains("/text/chat")).count()
    };
    let with_template = Fake::saying("x");
    let specs = with_template.get("/ml/v1/foundation_model_specs").await.ok();
    assert_eq!(specs["resources"][0]["functions"], json!([{"id": "text_generation"}, {"id": "text_chat"}]));
    assert_eq!(kinds(&with_template.get("/ml/v4/deployments/dogs").await.ok()), 2);
    let without = Fake::with(ServerOptions::default(), None, |_, _| true);
    let specs = without.get("/ml/v1/foundation_model_specs").await.ok();
    assert_eq!(specs["resources"][0]["functions"], json!([{"id": "text_generation"}]));
    assert_eq!(kinds(&without.get("/ml/v4/deployments/dogs").await.ok()), 0);
}

/// The SDK sends a model's parameters of generation with `return_tokens`.
#[tokio::test]
async fn tokenization_takes_what_the_sdk_sends() {
    let fake = Fake::saying("");
    let parameters = json!({"decoding_method": "greedy", "max_new_tokens": 9, "return_tokens": true});
    let body = json!({"model_id": BASE, "input": "ab", "project_id": "p", "parameters": parameters});
    let result = json!({"token_count": 2, "tokens": ["a", "b"]});
    assert_eq!(fake.post("/ml/v1/text/tokenization", body).await.ok()["result"], result);
    let outside = json!({"model_id": BASE, "input": "ab", "return_tokens": true});
    let answer = fake.post("/ml/v1/text/tokenization", outside).await;
    refused(&answer, 400, UNSUPPORTED, &["`return_tokens`"]);
}
