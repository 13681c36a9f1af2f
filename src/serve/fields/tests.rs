use super::*;
use serde_json::json;

const ALL: [&FieldTable; 7] =
    [&COMPLETIONS, &CHAT, &RESPONSES, &GENERATION, &CLASSIFY, &WATSONX_CHAT, &TOKENIZATION];

#[track_caller]
fn object(value: &Value) -> &Map<String, Value> {
    value.as_object().unwrap()
}

fn refusal(table: &FieldTable, fields: Value) -> ApiError {
    table.check(object(&fields)).expect_err(&fields.to_string())
}

fn ignored(table: &FieldTable, fields: Value) -> Vec<String> {
    table.check(object(&fields)).unwrap_or_else(|failure| panic!("{}", failure.message)).0
}

/// A table, and all tables of fields that are objects.
fn with_nested(table: &'static FieldTable) -> Vec<&'static FieldTable> {
    let below = table.nested.iter().flat_map(|(_, nested)| with_nested(nested));
    std::iter::once(table).chain(below).collect()
}

#[test]
fn a_table_lists_each_field_once() {
    for table in ALL.into_iter().flat_map(with_nested) {
        let plain = table.obeyed.iter().chain(table.without_effect).flat_map(|list| list.iter().copied());
        let refused = table.refusals().map(|(name, _)| name);
        let mut seen = std::collections::BTreeSet::new();
        for name in plain.chain(refused) {
            // What all routes refuse stays in its list, though one route obeys it.
            let obeyed = lists(table.obeyed, name) && table.refusal(name).is_some();
            assert!(seen.insert(name) || obeyed, "{}: {name} is listed twice", table.request);
        }
        for (name, _) in table.nested {
            assert!(lists(table.obeyed, name), "{}: {name} has a table and is not obeyed", table.request);
        }
    }
}

#[test]
fn off_values_are_taken_and_others_refused_by_name() {
    let nothing = [json!(null), json!(false), json!(""), json!([]), json!({})];
    for table in ALL.into_iter().flat_map(with_nested) {
        for (name, refused) in table.refusals() {
            let name = name.replace('*', "x");
            if lists(table.obeyed, &name) || lists(table.without_effect, &name) {
                continue;
            }
            let (off, on) = match refused.off {
                Off::Null | Off::True => (&nothing[..1], json!(false)),
                Off::False => (&nothing[..2], json!({})),
                Off::Empty => (&nothing[..], json!(0)),
                Off::Number(_) => (&nothing[..], json!(7.5)),
                Off::Words(_) => (&nothing[..], json!("another word")),
            };
            for value in off {
                assert_eq!(ignored(table, json!({&name: value})), [] as [&str; 0], "{name}: {value}");
            }
            if let Off::Number(number) = refused.off {
                ignored(table, json!({&name: number}));
            }
            if let Off::Words(words) = refused.off {
                words.iter().for_each(|word| drop(ignored(table, json!({&name: [word]}))));
            }
            let failure = refusal(table, json!({&name: on}));
            assert_eq!(
                (failure.code, failure.param.as_deref()),
                ("unsupported_parameter", Some(name.as_str()))
            );
            assert!(failure.message.contains(refused.hint), "{}", failure.message);
        }
    }
}

#[test]
fn slips_are_refused_with_the_field_that_was_meant() {
    for (table, slip, meant) in [
        (&COMPLETIONS, "temprature", "temperature"),
        (&COMPLETIONS, "maxTokens", "max_tokens"),
        (&COMPLETIONS, "max_token", "max_tokens"),
        (&CHAT, "Seed", "seed"),
        (&CHAT, "logprob", "logprobs"),
        (&CHAT, "frequency-penalty", "frequency_penalty"),
        (&GENERATION, "parameter", "parameters"),
        (&CLASSIFY, "lables", "labels"),
    ] {
        let failure = refusal(table, json!({slip: 1}));
        assert_eq!((failure.code, failure.param.as_deref()), ("unknown_parameter", Some(slip)));
        assert!(failure.message.contains(&format!("did you mean `{meant}`?")), "{}", failure.message);
        assert!(ignored(table, json!({slip: null})).is_empty());
    }
    let failure = refusal(&GENERATION, json!({"parameters": {"max_new_token": 3}}));
    assert_eq!(failure.param.as_deref(), Some("parameters.max_new_token"));
    assert!(failure.message.contains("`parameters.max_new_tokens`"), "{}", failure.message);
    let failure = refusal(&GENERATION, json!({"parameters": {"return_options": {"input_texts": true}}}));
    assert!(failure.message.contains("`parameters.return_options.input_text`"), "{}", failure.message);
}

#[test]
fn unknown_fields_are_named_in_the_header() {
    // What Open WebUI sends; `tools` and `tool_ids` are off.
    let sent = json!({"num_ctx": 2048, "options": {}, "chat_id": "x", "features": {}, "tool_ids": null, "tools": [],
                      "stream_options": {"include_usage": true, "pace": 1}, "session_id": "x", "\u{e9}, b\n": 1});
    let found = CHAT.check(object(&sent)).unwrap();
    let response = found.add_header(Response::default());
    let named = response.headers()[IGNORED].to_str().unwrap();
    assert_eq!(named, "chat_id, features, num_ctx, session_id, stream_options.pace, ???b?");
    assert!(Ignored::default().add_header(Response::default()).headers().is_empty());
    let many: Map<String, Value> =
        (0..20).map(|i| (format!("z{i:02}{}", "y".repeat(90)), json!(1))).collect();
    let response = CHAT.check(&many).unwrap().add_header(Response::default());
    let named = response.headers()[IGNORED].to_str().unwrap();
    let names: Vec<&str> = named.split(", ").collect();
    assert_eq!((names.len(), names[0].len(), names[16]), (MAX_NAMES + 1, MAX_NAME_CHARS, "..."));
}
