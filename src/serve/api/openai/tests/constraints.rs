use super::{ids, refused};
use crate::generate::Choices;
use crate::serve::fields::{CHAT, COMPLETIONS, FieldTable};
use crate::serve::testing::{
    BASE, BEGIN, END, Fake, INVALID, MISSING, START, UNKNOWN, UNSUPPORTED, with_fields,
};
use serde_json::{Value, json};
use std::sync::Arc;

const CHATS: &str = "/v1/chat/completions";
const TEXTS: &str = "/v1/completions";

/// A request to either route, with more fields.
fn asking(path: &str, more: Value) -> Value {
    let body = match path {
        CHATS => json!({"model": BASE, "messages": [{"role": "user", "content": "x"}]}),
        _ => json!({"model": BASE, "prompt": "x"}),
    };
    with_fields(body, more)
}

fn choices(texts: &[&str]) -> Option<Arc<Choices>> {
    let sequences: Vec<Vec<u32>> = texts.iter().map(|text| ids(text)).collect();
    Some(Arc::new(Choices::new(&sequences, Arc::from([END]))))
}

#[tokio::test]
async fn choices_reach_the_worker_whatever_the_field() {
    let schema =
        json!({"type": "object", "properties": {"label": {"enum": ["no", "yes"]}}, "required": ["label"]});
    let objects = ["{\"label\":\"no\"}", "{\"label\":\"yes\"}"];
    let format = |format: Value| json!({"response_format": format});
    for (more, expected) in [
        (json!({"guided_choice": ["no", "none", "yes"]}), &["no", "none", "yes"][..]),
        (json!({"structured_outputs": {"choice": ["a b", "c"]}}), &["a b", "c"]),
        (json!({"structured_outputs": {"json": {"const": "a"}}}), &["\"a\""]),
        (json!({"guided_json": schema}), &objects),
        (json!({"guided_json": schema.to_string()}), &objects),
        (json!({"json_schema": {"type": "boolean"}}), &["true", "false"]),
        (
            format(
                json!({"type": "json_schema", "json_schema": {"name": "n", "strict": true, "schema": schema}}),
            ),
            &objects,
        ),
        (format(json!({"type": "json_schema", "schema": {"enum": ["0", "1"]}})), &["\"0\"", "\"1\""]),
        (format(json!({"type": "json_object", "schema": {"enum": [0, 1]}})), &["0", "1"]),
    ] {
        for path in [TEXTS, CHATS] {
            let fake = Fake::saying("x");
            fake.post(path, asking(path, more.clone())).await.ok();
            assert_eq!(fake.request().1.choices, choices(expected), "{path} {more}");
        }
    }
    let fake = Fake::saying("x");
    let off = json!({"guided_choice": [], "structured_outputs": {"choice": null, "regex": ""}, "guided_json": {},
                     "response_format": {"type": "text"}, "json_schema": null, "guided_regex": null});
    fake.post(TEXTS, asking(TEXTS, off)).await.ok();
    assert_eq!(fake.request().1.choices, None);
}

#[tokio::test]
async fn an_answer_has_room_for_the_longest_choice() {
    let long = "0123456789 0123456789 0123456789";
    let guided = json!({"guided_choice": ["a", long]});
    for (path, longest) in [(TEXTS, 32), (CHATS, 190)] {
        let fake = Fake::saying("x");
        fake.post(path, asking(path, guided.clone())).await.ok();
        let most = fake.request().1.max_new_tokens;
        assert!(most >= 32 && (path == CHATS || most == longest), "{path}: {most}");
        for key in ["max_tokens", "max_completion_tokens"]
            .into_iter()
            .filter(|key| path == CHATS || *key == "max_tokens")
        {
            let short = json!({"guided_choice": ["a", long], key: 31});
            let answer = fake.post(path, asking(path, short)).await;
            refused(&answer, 400, INVALID, Some(key), &["32 or more", "`guided_choice`", "found 31"]);
        }
    }
    // Choices of too few tokens can't be the answer.
    let fake = Fake::saying("x");
    let body = json!({"guided_choice": ["a", "abc", "abcd"], "min_tokens": 3});
    fake.post(TEXTS, asking(TEXTS, body)).await.ok();
    assert_eq!(fake.request().1.choices, choices(&["abc", "abcd"]));
}

/// Sends fields with both routes, and checks the errors' codes, fields and words.
async fn are_rejected(cases: Vec<(Value, &str, &str, &[&str])>) {
    let fake = Fake::saying("x");
    for (more, code, param, words) in cases {
        for path in [TEXTS, CHATS] {
            refused(&fake.post(path, asking(path, more.clone())).await, 400, code, Some(param), words);
        }
    }
    assert!(fake.seen.lock().unwrap().is_empty());
}

#[tokio::test]
async fn invalid_choices_are_rejected_by_name() {
    are_rejected(vec![
        (json!({"guided_choice": "yes"}), INVALID, "guided_choice", &["list"][..]),
        (json!({"guided_choice": ["a", ""]}), INVALID, "guided_choice", &["none of them empty"]),
        (json!({"guided_choice": ["a", 1]}), INVALID, "guided_choice", &["strings"]),
        (json!({"guided_choice": ["a<|end|>"]}), INVALID, "guided_choice", &["gives back"]),
        (json!({"guided_choice": ["ab"], "stop_token_ids": [98]}), INVALID, "guided_choice", &["stop token"]),
        (json!({"guided_choice": ["ab"], "min_tokens": 3}), INVALID, "guided_choice", &["3 tokens or more"]),
        (json!({"guided_choice": ["x".repeat(40_000)]}), INVALID, "guided_choice", &["40000"]),
        (
            json!({"guided_choice": ["a"], "structured_outputs": {"choice": ["b"]}}),
            INVALID,
            "structured_outputs.choice",
            &["`guided_choice` too"],
        ),
        (
            json!({"guided_choice": ["a"], "allowed_token_ids": [1]}),
            INVALID,
            "allowed_token_ids",
            &["`guided_choice`"],
        ),
        (json!({"guided_choice": ["a"], "bad_words": ["b"]}), INVALID, "bad_words", &["`guided_choice`"]),
    ])
    .await;
}

#[tokio::test]
async fn unsupported_constraints_are_rejected_by_name() {
    let format = |format: Value| json!({"response_format": format});
    are_rejected(vec![
        (json!({"guided_regex": "[0-9]"}), UNSUPPORTED, "guided_regex", &["guided_choice"]),
        (
            json!({"structured_outputs": {"regex": "a"}}),
            UNSUPPORTED,
            "structured_outputs.regex",
            &["list of texts"],
        ),
        (
            json!({"structured_outputs": {"choices": ["a"]}}),
            UNKNOWN,
            "structured_outputs.choices",
            &["`structured_outputs.choice`"],
        ),
        (json!({"guided_json": {"type": "object"}}), UNSUPPORTED, "guided_json", &["lists its values"]),
        (json!({"guided_json": "{"}), INVALID, "guided_json", &["expected JSON"]),
        (
            json!({"json_schema": {"type": "string", "pattern": "a"}}),
            UNSUPPORTED,
            "json_schema",
            &["`pattern`"],
        ),
        (
            format(json!({"type": "json_object"})),
            UNSUPPORTED,
            "response_format",
            &["json_schema", "json_object"],
        ),
        (format(json!({"type": "json_schema"})), MISSING, "response_format.json_schema", &["schema"]),
        (
            format(json!({"type": "grammar", "grammar": "a"})),
            UNSUPPORTED,
            "response_format",
            &["found \"grammar\""],
        ),
        (format(json!("json")), INVALID, "response_format", &["object"]),
    ])
    .await;
}

#[tokio::test]
async fn token_lists_reach_the_worker() {
    let fake = Fake::saying("x");
    let body = json!({"min_p": 0.25, "allowed_token_ids": [5, 7], "bad_words": [" no", "a b"]});
    fake.post(TEXTS, asking(TEXTS, body)).await.ok();
    let sampling = fake.request().1.sampling;
    assert_eq!((sampling.min_p, sampling.allowed), (0.25, Some(Arc::from([5, 7]))));
    // A byte-level space is a token of its own, so the words behind a space are the words.
    assert_eq!(sampling.banned[..], [ids("no"), ids("a b")]);
    let off = Fake::saying("x");
    let body = json!({"min_p": 0, "allowed_token_ids": [], "bad_words": []});
    off.post(TEXTS, asking(TEXTS, body)).await.ok();
    let sampling = off.request().1.sampling;
    assert_eq!((sampling.min_p, sampling.allowed, sampling.banned.len()), (0.0, None, 0));
    for (more, param) in [
        (json!({"min_p": 1.5}), "min_p"),
        (json!({"allowed_token_ids": [259]}), "allowed_token_ids"),
        (json!({"bad_words": ["  "]}), "bad_words"),
        (json!({"bad_words": "no"}), "bad_words"),
    ] {
        refused(&fake.post(TEXTS, asking(TEXTS, more)).await, 400, INVALID, Some(param), &[]);
    }
}

#[tokio::test]
async fn special_tokens_are_shown_or_stop_on_request() {
    use crate::generate::{Event, StopReason};
    let script = || {
        Fake::new(|request, events| {
            for id in [104, BEGIN, 105] {
                events.send(Event::Token(crate::serve::testing::token(id, request))).unwrap();
            }
            events.send(Event::Finished(StopReason::MaxTokens)).is_ok()
        })
    };
    for (skip, expected) in [(json!(null), "hi"), (json!(true), "hi"), (json!(false), "h<|begin|>i")] {
        let body = asking(TEXTS, json!({"skip_special_tokens": skip}));
        assert_eq!(script().post(TEXTS, body.clone()).await.ok()["choices"][0]["text"], expected);
        let body = asking(CHATS, json!({"skip_special_tokens": skip, "stream": true}));
        let events = script().post(CHATS, body).await.events();
        let text: String =
            events.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str()).collect();
        assert_eq!(text, expected);
    }
    // A stop sequence that is a special token ends the text, though the text does not show the token.
    let fake = Fake::saying("x");
    fake.post(TEXTS, asking(TEXTS, json!({"stop": ["<|start|>", "a"]}))).await.ok();
    assert_eq!(fake.request().1.stop_token_ids[..], [END, START]);
}

#[tokio::test]
async fn a_conversation_ends_with_its_last_message_on_request() {
    let messages =
        json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "The answer is "}]);
    let body = |more: Value| with_fields(json!({"model": BASE, "messages": messages}), more);
    for more in [
        json!({"continue_final_message": true, "add_generation_prompt": false}),
        json!({"continue_final_message": true}),
    ] {
        let fake = Fake::saying("x");
        fake.post(CHATS, body(more)).await.ok();
        let mut expected = vec![BEGIN, START];
        expected.extend(ids("user: q"));
        expected.extend([END, START]);
        expected.extend(ids("assistant: The answer is "));
        assert_eq!(fake.request().1.tokens, expected);
    }
    let fake = Fake::saying("x");
    for (more, code, param) in [
        (
            json!({"continue_final_message": true, "add_generation_prompt": true}),
            INVALID,
            "add_generation_prompt",
        ),
        (json!({"continue_final_message": "content"}), INVALID, "continue_final_message"),
        (
            json!({"messages": [{"role": "assistant", "content": "a", "prefix": true}]}),
            UNSUPPORTED,
            "messages[0].prefix",
        ),
        (
            json!({"chat_template_kwargs": {"add_generation_prompt": false}}),
            UNSUPPORTED,
            "chat_template_kwargs.add_generation_prompt",
        ),
    ] {
        refused(&fake.post(CHATS, body(more)).await, 400, code, Some(param), &[]);
    }
    // What the template does not read is named, and the last tokens alone are taken on request.
    let more = json!({"chat_template_kwargs": {"greeting": "g", "enable_thinking": false}, "truncate_prompt_tokens": 4});
    let answer = fake.post(CHATS, body(more)).await;
    assert_eq!(answer.headers["x-gneiss-ignored-fields"], "chat_template_kwargs.enable_thinking");
    assert_eq!(fake.request().1.tokens.len(), 4);
}

/// The tables against the code: each field that a table calls obeyed is read, which its wrong values tell.
#[tokio::test]
async fn obeyed_fields_are_read() {
    let routes: [(&str, &FieldTable); 2] = [(TEXTS, &COMPLETIONS), (CHATS, &CHAT)];
    let fake = Fake::saying("x");
    for (path, table) in routes {
        for key in table.obeyed.iter().flat_map(|list| list.iter().copied()) {
            let mut named = false;
            for wrong in [json!({"\u{1}": 0}), json!(["", {}]), json!(-5.5), json!("\u{1}")] {
                let answer = fake.post(path, asking(path, json!({key: wrong, "logprobs": null}))).await;
                let answer = match key {
                    "logprobs" => fake.post(path, asking(path, json!({key: wrong}))).await,
                    _ => answer,
                };
                let error = answer.json()["error"].clone();
                named |= error["param"].as_str().is_some_and(|param| param.starts_with(key));
            }
            assert!(named, "{path}: no value of {key} is refused by its name");
        }
    }
}

/// What LangChain, Open WebUI, LiteLLM and SillyTavern send by themselves.
#[tokio::test]
async fn fields_of_clients_are_accepted() {
    for (path, more, ignored) in [
        (
            TEXTS,
            json!({"logit_bias": {}, "n": 1, "best_of": 1, "presence_penalty": 0, "stop": null, "user": ""}),
            None,
        ),
        (
            CHATS,
            json!({"num_ctx": 2048, "options": {}, "chat_id": "x", "features": {}, "tool_ids": null, "tools": []}),
            Some("chat_id, features, num_ctx"),
        ),
        (
            CHATS,
            json!({"metadata": {"a": "b"}, "store": false, "parallel_tool_calls": true, "service_tier": "auto"}),
            None,
        ),
        (
            TEXTS,
            json!({"typical_p": 1, "tfs": 1, "top_a": 0, "mirostat_mode": 0, "mirostat_tau": 5, "mirostat_eta": 0.1,
                   "dry_multiplier": 0, "dry_base": 1.75, "dry_allowed_length": 2, "dry_sequence_breakers": ["\n"],
                   "xtc_probability": 0, "xtc_threshold": 0.1, "min_p": 0, "top_k": -1, "smoothing_factor": 0,
                   "guidance_scale": 1, "negative_prompt": "", "grammar_string": "", "json_schema": {}, "no_repeat_ngram_size": 0}),
            None,
        ),
        (
            CHATS,
            json!({"modalities": ["text"], "tool_choice": "none", "reasoning_effort": "none", "verbosity": "medium"}),
            None,
        ),
    ] {
        let answer = Fake::saying("x").post(path, asking(path, more)).await;
        answer.ok();
        let named = answer.headers.get("x-gneiss-ignored-fields").map(|value| value.to_str().unwrap());
        assert_eq!(named, ignored);
    }
}
