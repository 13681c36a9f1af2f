use super::refused;
use crate::serve::ServerOptions;
use crate::serve::testing::{BASE, Fake, INVALID, UNSUPPORTED, say, with_fields};
use serde_json::{Value, json};

const PATH: &str = "/v1/completions";

/// A file of `torch.save` by the name of its case, with the values.
fn file(name: &str) -> (String, Value) {
    let golden: Value =
        serde_json::from_str(include_str!("../../../../../tests/golden/torch_files.json")).unwrap();
    let case = golden["cases"].as_array().unwrap().iter().find(|case| case["name"] == name).unwrap();
    (case["file"].as_str().unwrap().to_owned(), case["values"].clone())
}

fn taking_embeds() -> Fake {
    let options = ServerOptions { prompt_embeds: true, ..ServerOptions::default() };
    Fake::with(options, None, |request, events| say(b"ok", request, &events))
}

#[tokio::test]
async fn embeddings_are_prompts_of_their_own() {
    let ((f32s, values), (batch, _)) = (file("f32"), file("three dimensions"));
    for prompt in [json!(""), Value::Null] {
        let fake = taking_embeds();
        let body = json!({"model": "dogs", "prompt": prompt, "prompt_embeds": f32s, "logprobs": 1, "n": 2});
        let answer = fake.post(PATH, body).await.ok();
        assert_eq!(answer["choices"].as_array().unwrap().len(), 2);
        assert_eq!(answer["choices"][1]["text"], "ok");
        // Two rows and the ten virtual tokens.
        assert_eq!(answer["usage"]["prompt_tokens"], 12);
        let seen = fake.seen.lock().unwrap();
        let (model, request) = &seen[0];
        assert_eq!((model.as_str(), request.tokens.len()), ("dogs", 0));
        let embeds: Vec<f32> = request.embeds.as_ref().unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let expected: Vec<f32> =
            values.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect();
        assert_eq!(embeds, expected);
    }
    // Before the text prompts.
    let fake = taking_embeds();
    let body = json!({"model": BASE, "prompt": ["a", "bc"], "prompt_embeds": [f32s, batch]});
    let answer = fake.post(PATH, body).await.ok();
    assert_eq!(
        (answer["choices"].as_array().unwrap().len(), &answer["usage"]["prompt_tokens"]),
        (4, &json!(7))
    );
    let seen = fake.seen.lock().unwrap();
    let positions: Vec<usize> = seen.iter().map(|(_, request)| request.text_positions()).collect();
    assert_eq!(positions, [2, 2, 1, 2]);
}

#[tokio::test]
async fn invalid_embeddings_are_rejected_with_the_reason() {
    let (good, _) = file("f32");
    let closed = Fake::saying("x");
    let body = json!({"model": BASE, "prompt": "", "prompt_embeds": good});
    let answer = closed.post(PATH, body).await;
    refused(&answer, 400, UNSUPPORTED, Some("prompt_embeds"), &["--enable-prompt-embeds"]);
    closed.post(PATH, json!({"model": BASE, "prompt": "x", "prompt_embeds": null})).await.ok();
    let chat = json!({"model": BASE, "messages": [{"role": "user", "content": "x"}], "prompt_embeds": good});
    let answer = closed.post("/v1/chat/completions", chat).await;
    refused(&answer, 400, UNSUPPORTED, Some("prompt_embeds"), &["/v1/completions"]);

    let fake = taking_embeds();
    let of = |name: &str| json!({"prompt_embeds": file(name).0});
    for (more, param, words) in [
        (json!({"prompt_embeds": "UEsDBA=="}), "prompt_embeds", &["the archive"][..]),
        (json!({"prompt_embeds": "?"}), "prompt_embeds", &["base64"]),
        (json!({"prompt_embeds": 5}), "prompt_embeds", &["base64", "found 5"]),
        (json!({"prompt_embeds": [good, null]}), "prompt_embeds", &["found null"]),
        (of("one dimension"), "prompt_embeds", &["[T, C]", "[3]"]),
        (of("no rows"), "prompt_embeds", &["a row or more"]),
        (of("whole numbers"), "prompt_embeds", &["LongStorage"]),
        (of("a dictionary"), "prompt_embeds", &["found a dictionary"]),
        (json!({"prompt_embeds": good, "echo": true}), "echo", &["no text"]),
        (json!({"prompt_embeds": good, "truncate_prompt_tokens": 2}), "truncate_prompt_tokens", &["no text"]),
    ] {
        let body = with_fields(json!({"model": BASE, "prompt": ""}), more);
        refused(&fake.post(PATH, body).await, 400, INVALID, Some(param), words);
    }
    // The script's model is 3 wide.
    let body = json!({"model": BASE, "prompt_embeds": file("a part that begins at value 300").0});
    refused(&fake.post(PATH, body).await, 400, INVALID, None, &["[T, 3]", "[2, 5]"]);
    assert!(fake.seen.lock().unwrap().is_empty());
}
