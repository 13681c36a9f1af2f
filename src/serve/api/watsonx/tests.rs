use crate::serve::ServerOptions;
use crate::serve::testing::{
    Answer, BASE, Fake, INVALID, KEY, MISSING, TOO_LONG, UNKNOWN, UNSUPPORTED, say, with_fields,
};
use serde_json::{Value, json};

fn ids(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

const DOGS: &str = "/ml/v1/deployments/dogs/text/generation?version=2023-05-29";
const MODEL: &str = "/ml/v1/text/generation?version=2023-05-29";

/// Asserts a refusal in watsonx's form.
#[track_caller]
pub(super) fn refused(answer: &Answer, status: u16, code: &str, words: &[&str]) {
    assert_eq!(answer.status.as_u16(), status, "{}", answer.text);
    let json = answer.json();
    assert_eq!((&json["status_code"], json["trace"].as_str().unwrap().len()), (&json!(status), 32));
    assert_eq!(json["errors"][0]["code"], code, "{json}");
    let message = json["errors"][0]["message"].as_str().unwrap();
    words.iter().for_each(|word| assert!(message.contains(word), "{word} is not in {message}"));
}

#[tokio::test]
async fn deployment_inserts_the_input_into_its_verbalizer() {
    let fake = Fake::saying("1");
    let answer = fake.post(DOGS, json!({"input": "good dog"})).await.ok();
    let result = json!({"generated_text": "1", "generated_token_count": 1, "input_token_count": 24 + 10,
                        "stop_reason": "eos_token"});
    assert_eq!(answer["results"], json!([result]));
    assert_eq!(answer["model_id"], "dogs");
    assert!(answer["created_at"].as_str().unwrap().ends_with('Z'));
    let (model, request) = fake.request();
    assert_eq!((model.as_str(), request.tokens), ("dogs", ids("classify good dog Label:")));
    assert_eq!((request.max_new_tokens, request.sampling.temperature), (20, 0.0));
    // A prompt without a verbalizer, and a model by its name, get the text as it is; an id is as good as a name.
    let raw = Fake::saying("1");
    raw.post("/ml/v1/deployments/plain/text/generation", json!({"input": "a"})).await.ok();
    raw.post(MODEL, json!({"input": "b", "model_id": "dogs", "project_id": "p"})).await.ok();
    raw.post(&format!("/ml/v1/deployments/{}/text/generation", super::id("plain")), json!({"input": "c"}))
        .await
        .ok();
    let seen: Vec<(String, Vec<u32>)> = raw
        .seen
        .lock()
        .unwrap()
        .iter()
        .map(|(name, request)| (name.clone(), request.tokens.clone()))
        .collect();
    assert_eq!(seen, [("plain", "a"), ("dogs", "b"), ("plain", "c")].map(|(n, t)| (n.to_owned(), ids(t))));
}

#[tokio::test]
async fn every_parameter_reaches_the_worker() {
    let fake = Fake::saying("x");
    let parameters = json!({
        "decoding_method": "sample", "max_new_tokens": 30, "min_new_tokens": 2, "temperature": 0.5, "top_p": 0.25,
        "top_k": 3, "random_seed": 33, "repetition_penalty": 1.5, "time_limit": 1500,
    });
    let before = std::time::Instant::now();
    let answer =
        fake.post(MODEL, json!({"input": "Hi", "model_id": BASE, "parameters": parameters})).await.ok();
    assert_eq!(answer["results"][0]["seed"], 33);
    let request = fake.request().1;
    assert_eq!((request.max_new_tokens, request.min_new_tokens), (30, 2));
    let sampling = request.sampling;
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed), (0.5, 0.25, 3, 33));
    assert_eq!(sampling.repetition_penalty, 1.5);
    let limit = request.deadline.unwrap() - before;
    assert!((1.5..3.0).contains(&limit.as_secs_f64()), "{limit:?}");
    // Greedy: what is for drawing is without effect.
    let greedy = Fake::saying("x");
    let parameters = json!({"temperature": 0.5, "top_k": 3, "random_seed": 33});
    let answer =
        greedy.post(MODEL, json!({"input": "Hi", "model_id": BASE, "parameters": parameters})).await.ok();
    assert_eq!(answer["results"][0]["seed"], Value::Null);
    assert_eq!(greedy.request().1.sampling, crate::generate::Sampling::default());
}

#[tokio::test]
async fn stop_sequence_is_part_of_the_text_unless_it_is_excluded() {
    for (include, expected) in [(json!(null), "one two"), (json!(true), "one two"), (json!(false), "one ")] {
        let fake = Fake::saying("one two three");
        let parameters = json!({"stop_sequences": ["two", "three"], "include_stop_sequence": include});
        let answer = fake.post(DOGS, json!({"input": "x", "parameters": parameters})).await.ok();
        assert_eq!(answer["results"][0]["generated_text"], expected);
        assert_eq!(answer["results"][0]["stop_reason"], "stop_sequence");
    }
    let fake = Fake::saying("one two three");
    let answer = fake.post(DOGS, json!({"input": "x", "parameters": {"max_new_tokens": 4}})).await.ok();
    assert_eq!(answer["results"][0]["generated_text"], "one ");
    assert_eq!(answer["results"][0]["stop_reason"], "max_tokens");
}

#[tokio::test]
async fn an_input_is_cut_from_the_left_and_its_verbalizer_is_not() {
    let fake = Fake::saying("x");
    let parameters = json!({"truncate_input_tokens": 20});
    let body = json!({"input": "0123456789", "model_id": BASE, "parameters": parameters});
    fake.post(DOGS, body.clone()).await.ok();
    fake.post(MODEL, json!({"input": "x".repeat(50), "model_id": BASE, "parameters": parameters})).await.ok();
    let seen = fake.seen.lock().unwrap();
    assert_eq!(seen[0].1.tokens, ids("classify 6789 Label:"));
    assert_eq!(seen[1].1.tokens, ids(&"x".repeat(20)));
}

#[tokio::test]
async fn answer_has_the_values_of_return_options() {
    let fake = Fake::saying("h\u{e9}");
    let options = json!({"input_text": true, "input_tokens": true, "generated_tokens": true, "token_logprobs": true,
                         "top_n_tokens": 1, "token_ranks": false});
    let body = json!({"input": "Hi", "model_id": BASE, "parameters": {"return_options": options}});
    let answer = fake.post(MODEL, body.clone()).await.ok();
    let result = &answer["results"][0];
    assert_eq!(result["generated_text"], "Hih\u{e9}", "the input stands before the answer");
    let top = json!([{"text": "A", "logprob": -65.0 / 8.0}]);
    let expected = json!([{"text": "H"}, {"text": "i", "logprob": -105.0 / 8.0, "top_tokens": top}]);
    assert_eq!(result["input_tokens"], expected);
    let generated = result["generated_tokens"].as_array().unwrap();
    assert_eq!(generated[0], json!({"text": "h", "logprob": -13.0, "top_tokens": top}));
    assert_eq!(generated[1]["text"], "bytes:\\xc3");
    // Without log-probabilities nothing is scored.
    let plain = Fake::saying("h");
    let options = json!({"input_tokens": true, "generated_tokens": true, "top_n_tokens": false});
    let body = json!({"input": "Hi", "model_id": BASE, "parameters": {"return_options": options}});
    let answer = plain.post(MODEL, body).await.ok();
    assert_eq!(answer["results"][0]["input_tokens"], json!([{"text": "H"}, {"text": "i"}]));
    assert_eq!(answer["results"][0]["generated_tokens"], json!([{"text": "h"}]));
    assert_eq!((plain.request().1.scored, plain.request().1.logprobs), (0, None));
}

#[tokio::test]
async fn stream_has_text_and_counts_as_they_are_generated() {
    let fake = Fake::saying("a\u{20ac}b");
    let body = json!({"input": "x", "parameters": {"max_new_tokens": 5}});
    for path in
        ["/ml/v1/deployments/dogs/text/generation_stream", "/ml/v1/deployments/dogs/generation_stream"]
    {
        let answer = fake.post(path, body.clone()).await;
        let events = answer.events();
        let of = |key: &str| events.iter().map(|e| e["results"][0][key].clone()).collect::<Vec<_>>();
        assert_eq!(of("generated_text"), ["a", "\u{20ac}", "b", ""]);
        assert_eq!(of("generated_token_count"), [1, 4, 5, 5]);
        assert_eq!(of("stop_reason"), ["not_finished", "not_finished", "not_finished", "max_tokens"]);
        assert!(answer.text.starts_with("id: 0\nevent: message\ndata: {"), "{}", answer.text);
        assert!(answer.text.contains("\n\nid: 3\nevent: message\n"));
    }
    let body = json!({"input": "x", "model_id": BASE});
    assert_eq!(fake.post("/ml/v1/text/generation_stream", body).await.events().len(), 4);
}

#[tokio::test]
async fn invalid_parameters_are_rejected_by_name() {
    let fake = Fake::saying("x");
    for (parameters, code, words) in [
        (json!([]), INVALID, &["`parameters`", "an object"][..]),
        (json!({"decoding_method": "beam"}), INVALID, &["parameters.decoding_method", "greedy", "beam"]),
        (json!({"max_new_tokens": 201}), INVALID, &["parameters.max_new_tokens", "at most 200"]),
        (json!({"min_new_tokens": 21}), INVALID, &["parameters.min_new_tokens", "at most 20"]),
        (json!({"temperature": 2.5}), INVALID, &["parameters.temperature", "0 to 2"]),
        (json!({"repetition_penalty": 0.5}), INVALID, &["1 to 2"]),
        (json!({"time_limit": 0}), INVALID, &["1 or more"]),
        (json!({"stop_sequences": [""]}), INVALID, &["none of them empty"]),
        (json!({"length_penalty": {"decay_factor": 2}}), UNSUPPORTED, &["length_penalty", "max_new_tokens"]),
        (json!({"return_options": {"token_ranks": true}}), UNSUPPORTED, &["return_options.token_ranks"]),
        (json!({"return_options": {"top_n_tokens": 6}}), INVALID, &["0 to 5"]),
    ] {
        refused(&fake.post(DOGS, json!({"input": "x", "parameters": parameters})).await, 400, code, words);
    }
    refused(&fake.post(DOGS, json!({})).await, 400, MISSING, &["`input`"]);
    refused(&fake.post(DOGS, json!({"input": " "})).await, 400, INVALID, &["blank"]);
    refused(&fake.post(MODEL, json!({"input": "x"})).await, 400, MISSING, &["`model_id`"]);
    refused(
        &fake.post(MODEL, json!({"input": "x", "model_id": "y"})).await,
        404,
        "model_not_found",
        &["`y`"],
    );
    let cats = fake.post("/ml/v1/deployments/cats/text/generation", json!({"input": "x"})).await;
    refused(&cats, 404, "deployment_not_found", &["`cats`", "dogs"]);
    refused(&fake.post(DOGS, json!({"input": "x".repeat(190)})).await, 400, TOO_LONG, &["at most 200"]);
    refused(&fake.get("/ml/v1/text/embeddings").await, 404, "not_found", &["/ml/v1/text/embeddings"]);
    assert!(fake.seen.lock().unwrap().is_empty());
}

/// `enabled` is true if its parent is there and it is not, as IBM's API has it.
#[tokio::test]
async fn moderations_are_accepted_if_they_are_off() {
    let fake = Fake::saying("x");
    let ask = |moderations: Value| {
        let (fake, body) = (&fake, json!({"input": "x", "moderations": moderations}));
        async move { fake.post(DOGS, body).await }
    };
    for off in [
        json!(null),
        json!({}),
        json!({"hap": {}}),
        json!({"hap": {"input": {"enabled": false, "threshold": 0.5}, "output": {"enabled": false}}}),
        json!({"pii": {"input": {"enabled": false}, "mask": {"remove_entity_value": true}}, "input_ranges": []}),
        json!({"granite_guardian": {"input": null}}),
    ] {
        ask(off).await.ok();
    }
    for on in [
        json!({"hap": {"input": {"enabled": true}}}),
        json!({"hap": {"input": {}}}),
        json!({"hap": {"input": {"enabled": false}, "output": {"threshold": 0.5}}}),
        json!({"granite_guardian": {"input": {"enabled": true}}}),
        json!({"social_bias": {"output": true}}),
        json!(true),
    ] {
        refused(&ask(on).await, 400, UNSUPPORTED, &["`moderations`"]);
    }
}

#[tokio::test]
async fn fields_are_obeyed_refused_or_named() {
    let fake = Fake::saying("x");
    let ask = |more: Value| with_fields(json!({"input": "x", "model_id": BASE}), more);
    let on = json!({"hap": {"input": {"enabled": false}, "output": {"enabled": true, "threshold": 0.5}}});
    for (more, code, word) in [
        (json!({"moderations": on}), UNSUPPORTED, "`moderations`"),
        (json!({"moderations": {"pii": true}}), UNSUPPORTED, "`moderations`"),
        (json!({"moderations": {"hap": {"input": {"threshold": 0.5}}}}), UNSUPPORTED, "`moderations`"),
        (json!({"parameters": {"guided_choice": ["a"]}}), UNSUPPORTED, "`parameters.guided_choice`"),
        (json!({"parameters": {"typical_p": 0.5}}), UNSUPPORTED, "`parameters.typical_p`"),
        (
            json!({"parameters": {"prompt_variables": {"a": "b"}}}),
            UNSUPPORTED,
            "`parameters.prompt_variables`",
        ),
        (json!({"parameters": {"max_tokens": 3}}), UNSUPPORTED, "max_new_tokens"),
        (json!({"max_new_tokens": 3}), UNSUPPORTED, "`parameters`"),
        (json!({"parameters": {"stop_sequence": ["a"]}}), UNKNOWN, "`parameters.stop_sequences`"),
    ] {
        refused(&fake.post(MODEL, ask(more)).await, 400, code, &[word]);
    }
    assert!(fake.seen.lock().unwrap().is_empty());
    let off = json!({"hap": {"input": {"enabled": false, "threshold": 0.5}, "mask": {"remove_entity_value": true}}});
    for (more, named) in [
        (json!({"moderations": {}, "project_id": "p"}), None),
        (
            json!({"moderations": off, "parameters": {"length_penalty": {}, "prompt_variables": {}, "typical_p": 1}}),
            None,
        ),
        (json!({"color": 1, "parameters": {"sound": 2}}), Some("color, parameters.sound")),
    ] {
        for path in [MODEL, "/ml/v1/text/generation_stream"] {
            let answer = fake.post(path, ask(more.clone())).await;
            assert_eq!(answer.status, 200, "{}", answer.text);
            let header = answer.headers.get("x-gneiss-ignored-fields");
            assert_eq!(header.map(|value| value.to_str().unwrap()), named);
        }
    }
}

#[tokio::test]
async fn an_error_in_a_stream_is_an_event_of_its_own() {
    use crate::generate::Event;
    let fake = Fake::new(|_, events| events.send(Event::Failed("the device is lost".into())).is_ok());
    let answer = fake.post("/ml/v1/deployments/dogs/text/generation_stream", json!({"input": "x"})).await;
    assert!(answer.text.starts_with("id: 0\nevent: error\ndata: {"), "{}", answer.text);
    assert_eq!(answer.events()[0]["errors"][0]["message"], "the device is lost");
}

#[tokio::test]
async fn tokenization_does_not_need_the_model() {
    let fake = Fake::saying("");
    let body = json!({"model_id": BASE, "input": "h\u{e9}", "parameters": {"return_tokens": true}});
    let answer = fake.post("/ml/v1/text/tokenization", body).await.ok();
    let result = json!({"token_count": 3, "tokens": ["h", "bytes:\\xc3", "bytes:\\xa9"]});
    assert_eq!(answer, json!({"model_id": BASE, "result": result}));
    let long = json!({"model_id": BASE, "input": "x".repeat(10_000)});
    assert_eq!(
        fake.post("/ml/v1/text/tokenization", long).await.ok()["result"],
        json!({"token_count": 10_000})
    );
}

#[tokio::test]
async fn sdk_gets_version_token_space_and_deployment() {
    let options = ServerOptions { api_key: Some(KEY.into()), ..ServerOptions::default() };
    let fake = Fake::with(options, None, |request, events| say(b"1", request, &events));
    assert_eq!(fake.get("/ml/wml_services/v2/version").await.ok()["version"], "5.2.0");
    let wrong = fake.post("/icp4d-api/v1/authorize", json!({"username": "me", "password": "no"})).await;
    refused(&wrong, 401, "invalid_api_key", &["password"]);
    for key in ["password", "api_key"] {
        let answer = fake.post("/icp4d-api/v1/authorize", json!({"username": "me", key: KEY})).await.ok();
        let token = answer["token"].as_str().unwrap();
        let bearer = format!("Bearer {token}");
        let get = |path: String| {
            let (fake, bearer) = (&fake, bearer.as_str());
            async move { fake.send("GET", &path, &[("authorization", bearer)], Vec::new()).await.ok() }
        };
        assert_eq!(get("/v2/spaces/s".into()).await["metadata"]["id"], "s");
        assert_eq!(get("/v2/projects/p".into()).await["entity"]["storage"]["type"], "local");
        let specs = get("/ml/v1/foundation_model_specs?limit=200".into()).await;
        assert_eq!(specs["resources"][0]["model_id"], BASE);
        let listed = get("/ml/v4/deployments?serving_name=dogs&version=2023".into()).await;
        assert_eq!(listed["resources"].as_array().unwrap().len(), 1);
        let id = listed["resources"][0]["metadata"]["id"].as_str().unwrap().to_owned();
        assert_eq!(id.len(), 36);
        let details = get(format!("/ml/v4/deployments/{id}")).await;
        assert_eq!(
            (&details["entity"]["base_model_id"], &details["metadata"]["name"]),
            (&json!(BASE), &json!("dogs"))
        );
        let path = format!("/ml/v1/deployments/{id}/text/generation");
        let body = json!({"input": "x"}).to_string().into_bytes();
        let answer = fake.send("POST", &path, &[("authorization", bearer.as_str())], body.clone()).await;
        assert_eq!(answer.ok()["results"][0]["generated_text"], "1");
        refused(&fake.send("POST", &path, &[], body).await, 401, "invalid_api_key", &["Authorization"]);
    }
}

/// FNV-1a's published values of "" and "a", with the bits of version and variant set.
#[test]
fn an_id_is_a_uuid_made_of_the_name() {
    assert_eq!(super::id(""), "6c62272e-07bb-8142-a2b8-21756295c58d");
    assert_eq!(super::id("a"), "d228cb69-6f1a-8caf-b891-2b704e4a8964");
}
