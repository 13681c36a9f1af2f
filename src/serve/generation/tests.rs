//! Special tokens in what is generated, and tokens that the model's embedding has no row for.

use crate::checkpoint::TextTokenizer;
use crate::generate::{Event, Request, StopReason};
use crate::serve::ServerOptions;
use crate::serve::testing::{BASE, BEGIN, END, Fake, START, byte_level, say, template, token};
use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedSender;

const WATSONX: &str = "/ml/v1/text/generation?version=2023-05-29";

/// A server whose model generates `yes`, a special token, a token that the tokenizer does not know, and `no`.
fn generating_special_tokens() -> Fake {
    let ids =
        [u32::from(b'y'), u32::from(b'e'), u32::from(b's'), END, 5000, u32::from(b'n'), u32::from(b'o')];
    Fake::new(move |request: &Request, events: UnboundedSender<Event>| {
        let tokens = ids.iter().map(|id| Event::Token(token(*id, request)));
        // A client that has gone is no concern of the script's.
        tokens.chain([Event::Finished(StopReason::MaxTokens)]).for_each(|event| drop(events.send(event)));
        true
    })
}

#[tokio::test]
async fn stop_sequences_see_special_tokens() {
    let end = "<|end|>";
    for (stop, include, text, reason) in [
        (json!(null), false, "yesno", "length"),
        (json!(end), false, "yes", "stop"),
        (json!(end), true, "yes<|end|>", "stop"),
        (json!(["zzz", "s<|end|>"]), false, "ye", "stop"),
        (json!(["<|start|>", "|>"]), false, "yesno", "length"),
        (json!(["<|end|>no"]), false, "yes", "stop"),
        (json!(["sno"]), false, "ye", "stop"),
    ] {
        let body = json!({"model": BASE, "prompt": "x", "max_tokens": 7, "stop": stop,
                          "include_stop_str_in_output": include});
        let answer = generating_special_tokens().post("/v1/completions", body.clone()).await.ok();
        let choice = &answer["choices"][0];
        assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!(text), &json!(reason)), "{stop}");
        let mut streamed = body;
        streamed["stream"] = true.into();
        let events = generating_special_tokens().post("/v1/completions", streamed).await.events();
        let found: String = events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect();
        assert_eq!(found, text, "{stop}");
    }
    let chat = json!({"model": BASE, "messages": [{"role": "user", "content": "x"}], "stop": [end]});
    let answer = generating_special_tokens().post("/v1/chat/completions", chat).await.ok();
    assert_eq!(answer["choices"][0]["message"]["content"], "yes");
    let body = json!({"model_id": BASE, "project_id": "p", "input": "x",
                      "parameters": {"stop_sequences": [end], "include_stop_sequence": false}});
    let answer = generating_special_tokens().post(WATSONX, body).await.ok();
    assert_eq!(answer["results"][0]["generated_text"], "yes");
    assert_eq!(answer["results"][0]["stop_reason"], "stop_sequence");
}

/// A server of a model whose embedding has rows up to that of `<|end|>`.
fn without_rows() -> Fake {
    let tokenizer = TextTokenizer { vocab_size: END as usize + 1, ..byte_level() };
    Fake::over(tokenizer, ServerOptions::default(), Some(template()), |request, events| {
        say(b"ok", request, &events)
    })
}

#[tokio::test]
async fn a_text_with_a_token_without_a_row_is_400() {
    let text = "a<|begin|>b";
    let chat = json!([{"role": "user", "content": "x"}]);
    let says = format!(
        "expected token ids under 257, the rows of the model's embedding, found `<|begin|>`, which is {BEGIN}"
    );
    let classify = json!({"model": BASE, "input": "x", "labels": ["<|begin|>", "b"]});
    for (path, body, words) in [
        ("/v1/completions", json!({"model": BASE, "prompt": text}), says.as_str()),
        ("/v1/completions", json!({"model": BASE, "prompt": [65, START]}), "token ids from 0 to 256"),
        ("/v1/completions", json!({"model": BASE, "prompt": "a", "logit_bias": {"258": 1}}), "from 0 to 256"),
        ("/v1/completions", json!({"model": BASE, "prompt": "a", "stop_token_ids": [258]}), "from 0 to 256"),
        // The template itself begins with such a token.
        ("/v1/chat/completions", json!({"model": BASE, "messages": chat}), &says),
        ("/v1/classify", classify, &says),
        ("/v1/classify", json!({"model": "dogs", "input": text}), &says),
        (WATSONX, json!({"model_id": BASE, "project_id": "p", "input": text}), &says),
        (
            "/ml/v1/deployments/dogs/text/generation?version=2023-05-29",
            json!({"input": text}),
            &format!("input: {says}"),
        ),
    ] {
        let answer = without_rows().post(path, body.clone()).await;
        assert_eq!(answer.status.as_u16(), 400, "{path} {body}: {}", answer.text);
        assert!(answer.text.contains(words), "{path} {body}: {}", answer.text);
    }
    let plain: Value = json!({"model": BASE, "prompt": "a<|end|>b"});
    assert_eq!(without_rows().post("/v1/completions", plain).await.ok()["choices"][0]["text"], "ok");
}
