//! Prompts that stand after a text: a request must begin with it.

use super::{ids, refused};
use crate::data::{InputHead, Template};
use crate::serve::served::Served;
use crate::serve::testing::{BEGIN, END, Fake, INVALID, START, task};
use serde_json::json;
use std::sync::Arc;

/// A server with the prompt `kind` after the tokens of a text.
fn fake(text: &str, token_ids: Vec<u32>) -> Fake {
    let fake = Fake::saying("1");
    let mut task = task();
    task.verbalizer = format!("{text}{{{{input}}}}.");
    task.before = Some(InputHead { text: text.into(), token_ids });
    let served = Served {
        name: "kind".into(),
        deployment_id: None,
        folder: Some("kind".into()),
        virtual_tokens: 4,
        template: Some(Template::parse(&task.verbalizer).unwrap()),
        task: Some(task),
        loaded: std::time::SystemTime::UNIX_EPOCH,
        members: Vec::new(),
    };
    *fake.app.0.client.shared.models.write().unwrap() = Arc::from([Arc::new(served)]);
    fake
}

#[tokio::test]
async fn completion_must_begin_with_the_text_before_the_prompt() {
    let fake = fake("be kind: ", ids("be kind: "));
    let body = |prompt: &str| json!({"model": "kind", "prompt": prompt});
    fake.post("/v1/completions", body("be kind: go")).await.ok();
    for prompt in ["be brief: go", "be", "be kind: "] {
        let answer = fake.post("/v1/completions", body(prompt)).await;
        refused(&answer, 400, INVALID, None, &["begins with \"be kind: \"", "soft prompt"]);
    }
    assert_eq!(fake.seen.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn chat_must_begin_with_the_system_turn_of_the_prompt() {
    let text = "<|start|>system: be kind<|end|>";
    let mut tokens = vec![BEGIN, START];
    tokens.extend(ids("system: be kind"));
    tokens.push(END);
    let fake = fake(text, tokens.clone());
    let body = |system: &str| {
        let messages =
            [json!({"role": "system", "content": system}), json!({"role": "user", "content": "go"})];
        json!({"model": "kind", "messages": messages})
    };
    fake.post("/v1/chat/completions", body("be kind")).await.ok();
    assert!(fake.request().1.tokens.starts_with(&tokens));
    let answer = fake.post("/v1/chat/completions", body("be brief")).await;
    refused(&answer, 400, INVALID, None, &[text, "in a chat the same system turn"]);
}

#[tokio::test]
async fn watsonx_inserts_the_input_after_the_prompt() {
    let fake = fake("be kind: ", ids("be kind: "));
    let deployment = "/ml/v1/deployments/kind/text/generation?version=2023-05-29";
    fake.post(deployment, json!({"input": "go"})).await.ok();
    assert_eq!(fake.request().1.tokens, ids("be kind: go."));
    let body = json!({"input": "go", "model_id": "kind", "project_id": "p"});
    let answer = fake.post("/ml/v1/text/generation?version=2023-05-29", body).await;
    assert_eq!(answer.status.as_u16(), 400, "{}", answer.text);
    let error = &answer.json()["errors"][0];
    assert!(error["message"].as_str().unwrap().contains("begins with \"be kind: \""), "{error}");
}
