//! Tokens that configuration files add to tokenizer.json, against transformers (tests/fixtures/make_configured.py); and
//! tokens without a row of the embedding.

use super::{assert_says, fixture_json};
use gneiss::checkpoint::TextTokenizer;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// A folder with these files and their texts.
fn folder(files: impl IntoIterator<Item = (String, String)>) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    dir
}

fn differences(dir: &Path, texts: &[String], case: &Value, first: &Value) -> Vec<String> {
    let tokenizer = match TextTokenizer::open(dir) {
        Ok(tokenizer) => tokenizer,
        Err(error) => return vec![error.to_string()],
    };
    let mut wrong = Vec::new();
    let names: BTreeMap<String, String> = serde_json::from_value(case["names"].clone()).unwrap();
    let found = TextTokenizer::named_tokens(dir).unwrap();
    if found != names {
        wrong.push(format!("names: {found:?}, expected {names:?}"));
    }
    if json!(tokenizer.eos_token_id) != case["eos_token_id"] {
        wrong.push(format!("end of text: {}, expected {}", tokenizer.eos_token_id, case["eos_token_id"]));
    }
    for (i, text) in texts.iter().enumerate() {
        let key = i.to_string();
        let expected = case["seen"].get(&key).unwrap_or(&first["seen"][&key]);
        let ids = tokenizer.encode(text, true).unwrap();
        let [whole, shown] = [false, true].map(|skip| tokenizer.decode(&ids, skip).unwrap());
        let found = json!([ids, whole, shown]);
        if found != *expected {
            wrong.push(format!("{text:?}: {found}, expected {expected}"));
        }
    }
    wrong
}

#[test]
fn configured_tokens_are_those_of_transformers() {
    let golden = fixture_json("configured_tokens.json");
    let texts: Vec<String> = serde_json::from_value(golden["texts"].clone()).unwrap();
    assert_eq!(texts.len(), 27);
    let mut wrong = Vec::new();
    for (kind, made) in golden["tokenizers"].as_object().unwrap() {
        let cases = made["cases"].as_array().unwrap();
        assert_eq!(cases.len(), 41);
        for case in cases {
            let files: BTreeMap<String, String> = serde_json::from_value(case["files"].clone()).unwrap();
            let dir =
                folder(files.into_iter().chain([("tokenizer.json".into(), made["tokenizer"].to_string())]));
            let found = differences(dir.path(), &texts, case, &cases[0]);
            wrong.extend(found.into_iter().map(|found| format!("{kind}, {}: {found}", case["name"])));
        }
    }
    assert!(wrong.is_empty(), "{} differ\n{}", wrong.len(), wrong[..wrong.len().min(20)].join("\n"));
}

/// The byte-level tokenizer of the fixture in a folder of its own.
fn configured(files: &[(&str, Value)]) -> tempfile::TempDir {
    let golden = fixture_json("configured_tokens.json");
    let tokenizer = golden["tokenizers"]["byte_level"]["tokenizer"].to_string();
    let files = files.iter().map(|(name, json)| ((*name).to_owned(), json.to_string()));
    folder(files.chain([("tokenizer.json".to_owned(), tokenizer)]))
}

#[test]
fn an_id_that_tokenizer_json_does_not_give_is_a_warning() {
    let token = json!({"content": "<|tool|>", "special": true});
    let open = |id: &str| {
        let decoder = json!({"eos_token": "</s>", "added_tokens_decoder": {id: token}});
        let dir = configured(&[("tokenizer_config.json", decoder)]);
        TextTokenizer::open(dir.path()).unwrap()
    };
    let tokenizer = open("5000");
    let id = tokenizer.tokenizer.token_to_id("<|tool|>").unwrap();
    let warning = &tokenizer.warnings[0];
    assert!(warning.contains("5000 for the token `<|tool|>`, which is") && warning.contains(&id.to_string()));
    assert_eq!(tokenizer.warnings.len(), 1);
    assert_eq!(open(&id.to_string()).warnings, Vec::<String>::new());
}

#[test]
fn values_that_are_no_tokens_are_named() {
    let says = |file: &str, value: Value, expected: &[&str]| {
        let files = [("config.json", json!({"eos_token_id": 1})), (file, value)];
        assert_says(TextTokenizer::open(configured(&files).path()), expected);
    };
    let config = "tokenizer_config.json";
    let token = "a string, or an object with `content`";
    says(
        config,
        json!({"pad_token": 3}),
        &["tokenizer_config.json: `pad_token`: expected", token, "found 3"],
    );
    says(
        config,
        json!({"extra_special_tokens": [1]}),
        &["`extra_special_tokens`: expected", token, "found 1"],
    );
    says(config, json!({"additional_special_tokens": "<a>"}), &["a list of tokens, or an object", "\"<a>\""]);
    says(config, json!({"split_special_tokens": "yes"}), &["`split_special_tokens`: expected true or false"]);
    says(
        config,
        json!({"added_tokens_decoder": {"x": {"content": "a"}}}),
        &["a token id as the key, found `x`"],
    );
    says(
        config,
        json!({"added_tokens_decoder": {"7": "a"}}),
        &["`added_tokens_decoder.7`: expected an object"],
    );
    says(
        config,
        json!({"added_tokens_decoder": {"7": {"content": "a", "lstrip": 1}}}),
        &["`added_tokens_decoder.7`: expected true or false for `lstrip`, found 1"],
    );
    says("added_tokens.json", json!({"<a>": "x"}), &["added_tokens.json: `<a>`: expected a token id"]);
    says(
        "special_tokens_map.json",
        json!({"eos_token": "<none>"}),
        &["special_tokens_map.json: `eos_token`: expected a token of tokenizer.json, found `<none>`"],
    );
}

/// The fixture's tokenizer over an embedding of so many rows less than tokens.
fn short_of(rows: usize) -> TextTokenizer {
    let config =
        json!({"eos_token": "</s>", "pad_token": "[PAD]", "additional_special_tokens": ["<|tool|>"]});
    let all = TextTokenizer::open(configured(&[("tokenizer_config.json", config.clone())]).path()).unwrap();
    let vocab_size = all.tokenizer.get_vocab_size(true) - rows;
    let files = [
        ("tokenizer_config.json", config),
        ("config.json", json!({"vocab_size": vocab_size, "eos_token_id": [1, vocab_size + 1]})),
    ];
    TextTokenizer::open(configured(&files).path()).unwrap()
}

#[test]
fn a_token_without_a_row_is_refused() {
    let tokenizer = short_of(2);
    let rows = tokenizer.vocab_size;
    assert_eq!(tokenizer.encode("my </s> parcel", true).unwrap().len(), 4);
    for (text, token, id) in [("my <|tool|> parcel", "<|tool|>", rows + 1), ("[PAD]", "[PAD]", rows)] {
        assert_says(
            tokenizer.encode(text, true),
            &[
                &format!("expected token ids under {rows}, the rows of the model's embedding"),
                &format!("found `{token}`, which is {id}; hint:"),
            ],
        );
    }
    // One of config.json's ends of text has no row, and is never generated.
    assert_eq!(tokenizer.stop_token_ids, [1]);
}

#[test]
fn tokens_against_rows() {
    let warning = short_of(2).rows_warning().unwrap();
    let rows = short_of(2).vocab_size;
    let expected = format!(
        "the tokenizer has {} tokens and the model's embedding {rows} rows: a text with one of the tokens without a row is \
         refused: `[PAD]` ({rows}), `<|tool|>` ({})",
        rows + 2,
        rows + 1
    );
    assert_eq!(warning, expected);
    let many = short_of(12).rows_warning().unwrap();
    assert!(many.ends_with(" and 4 more"), "{many}");
    // As many rows as tokens, and more, as embeddings are padded.
    assert_eq!(short_of(0).rows_warning(), None);
    let mut padded = short_of(0);
    padded.vocab_size += 64;
    assert_eq!(padded.rows_warning(), None);
    // A row that has no token decodes to nothing.
    let unknown = padded.vocab_size as u32 - 1;
    let ids = padded.encode("my parcel", true).unwrap();
    let with_unknown = [&ids[..1], &[unknown], &ids[1..]].concat();
    assert_eq!(padded.decode(&with_unknown, true).unwrap(), "my parcel");
    assert_eq!(padded.token_text(unknown), None);
}
