//! Tokenizers from GGUF and from folders.

use candle_core::quantized::gguf_file::Value as Meta;
use gneiss::checkpoint::{GgufFile, TextTokenizer};
use serde_json::{Value, json};

use super::gguf::{Altered, text};
use super::{assert_says, fixture, fixture_json, smollm2};

#[test]
fn smollm2_gives_the_ids_of_its_own_tokenizer() {
    let tokenizer = TextTokenizer::open(&smollm2()).unwrap();
    // `<|im_end|>`; `<|endoftext|>` and `<reponame>` by their text, as llama.cpp's list of this file is.
    assert_eq!((tokenizer.eos_token_id, tokenizer.stop_token_ids.as_slice()), (2, &[2, 0, 4][..]));
    assert!(tokenizer.warnings.is_empty(), "{:?}", tokenizer.warnings);
    assert_eq!(tokenizer.encode("  12", true).unwrap(), [256, 33, 34]);
    let fixture = fixture_json("smollm2_tokens.json");
    let cases = fixture["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 65);
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let expected: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        // The model adds no tokens around a text.
        for add_special_tokens in [false, true] {
            assert_eq!(tokenizer.encode(text, add_special_tokens).unwrap(), expected, "{text:?}");
        }
        assert_eq!(tokenizer.decode(&expected, false).unwrap(), text);
    }
}

#[test]
fn special_tokens_are_left_out_of_a_text_on_request() {
    let tokenizer = TextTokenizer::open(&smollm2()).unwrap();
    let ids = tokenizer.encode("one<|im_end|> two", true).unwrap();
    assert!(ids.contains(&2), "{ids:?}");
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "one two");
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), "one<|im_end|> two");
    assert_eq!(tokenizer.token_text(2).as_deref(), Some("<|im_end|>"));
    assert_eq!(tokenizer.token_text(256).as_deref(), Some("  "));
    assert_eq!(tokenizer.token_text(49152), None);
}

fn open(copy: &Altered) -> gneiss::Result<TextTokenizer> {
    TextTokenizer::from_gguf(&copy.open().unwrap())
}

#[test]
fn control_and_user_defined_tokens_are_one_id() {
    let tokenizer = TextTokenizer::open(&fixture("granite.gguf")).unwrap();
    let ids = tokenizer.encode("he<tool> he<|start_of_role|>1", true).unwrap();
    let name = |id: &u32| tokenizer.tokenizer.id_to_token(*id).unwrap();
    let names: Vec<String> = ids.iter().map(name).collect();
    assert_eq!(names, ["he", "<tool>", "\u{120}he", "<|start_of_role|>", "1"]);
    // A user-defined token is text, a control token isn't.
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "he<tool> he1");
}

#[test]
fn tokens_around_a_text_follow_the_file_or_llama_cpp() {
    let llama = Altered::of("llama.gguf");
    let tokenizer = open(&llama).unwrap();
    assert_eq!((tokenizer.eos_token_id, tokenizer.stop_token_ids.as_slice()), (1, &[1, 2][..]));
    // llama.cpp adds the beginning of text for `llama-bpe` unless the file says otherwise.
    assert_eq!(tokenizer.encode("ab c", true).unwrap(), [0, 7, 6, 5]);
    assert_eq!(tokenizer.encode("ab c", false).unwrap(), [7, 6, 5]);
    let both = llama
        .set("tokenizer.ggml.add_bos_token", Meta::Bool(false))
        .set("tokenizer.ggml.add_eos_token", Meta::Bool(true));
    assert_eq!(open(&both).unwrap().encode("ab c", true).unwrap(), [7, 6, 5, 1]);
    let granite = Altered::of("granite.gguf").set("tokenizer.ggml.add_bos_token", Meta::Bool(true));
    assert_eq!(open(&granite).unwrap().encode("he", true).unwrap()[0], 0);
}

#[test]
fn unknown_tokenizers_are_named() {
    let with = |key: &str, value: &str| open(&Altered::of("granite.gguf").set(key, text(value)));
    assert_says(
        with("tokenizer.ggml.pre", "granite-9"),
        &["copy.gguf", "pre-tokenizer `granite-9`", "is not supported", "tokenizer.json"],
    );
    assert_says(with("tokenizer.ggml.model", "t5"), &["tokenizer model `t5` in GGUF is not supported"]);
}

#[test]
fn broken_vocabularies_are_named() {
    let without = |key: &str| open(&Altered::of("granite.gguf").without(key));
    assert_says(without("tokenizer.ggml.eos_token_id"), &["`tokenizer.ggml.eos_token_id`", "no such key"]);
    assert_says(without("tokenizer.ggml.merges"), &["`tokenizer.ggml.merges`", "no such key"]);
    assert_says(without("tokenizer.ggml.token_type"), &["`tokenizer.ggml.token_type`", "no such key"]);
    let set = |key: &str, value: Meta| open(&Altered::of("granite.gguf").set(key, value));
    let list = |items: &[&str]| Meta::Array(items.iter().map(|item| text(item)).collect());
    assert_says(
        set("tokenizer.ggml.eos_token_id", Meta::U32(37)),
        &["expected an id of the vocabulary, found 37"],
    );
    assert_says(
        set("tokenizer.ggml.merges", list(&["he"])),
        &["`tokenizer.ggml.merges`: expected two pieces"],
    );
    assert_says(set("tokenizer.ggml.merges", list(&["h x"])), &["copy.gguf", "out of vocabulary"]);
    assert_says(set("tokenizer.ggml.tokens", list(&["a", "a"])), &["each token once, found `a` as 0 and 1"]);
    assert_says(set("tokenizer.ggml.tokens", list(&["a"; 40])), &["at most 39 tokens", "found 40"]);
    let no_bos = Altered::of("llama.gguf").without("tokenizer.ggml.bos_token_id");
    assert_says(open(&no_bos), &["`tokenizer.ggml.bos_token_id`: expected the id of the token before"]);
}

/// A folder with the tokenizer of the GGUF fixture and these configuration files.
fn folder(files: &[(&str, Value)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = TextTokenizer::from_gguf(&GgufFile::open(&fixture("llama.gguf")).unwrap()).unwrap();
    tokenizer.tokenizer.save(dir.path().join("tokenizer.json"), false).unwrap();
    for (name, json) in files {
        std::fs::write(dir.path().join(name), json.to_string()).unwrap();
    }
    dir
}

fn ends(files: &[(&str, Value)]) -> gneiss::Result<(u32, Vec<u32>)> {
    let tokenizer = TextTokenizer::from_folder(folder(files).path())?;
    Ok((tokenizer.eos_token_id, tokenizer.stop_token_ids))
}

#[test]
fn end_of_text_comes_from_the_configuration_files() {
    let (tokenizer, generation, config) = ("tokenizer_config.json", "generation_config.json", "config.json");
    assert_eq!(ends(&[(tokenizer, json!({"eos_token": "<|end|>"}))]).unwrap(), (1, vec![1]));
    let object = json!({"eos_token": {"content": "<|eot|>", "lstrip": false}});
    let files = [
        (tokenizer, object),
        (generation, json!({"eos_token_id": [1, 2]})),
        (config, json!({"eos_token_id": 0})),
    ];
    assert_eq!(ends(&files).unwrap(), (2, vec![2, 1, 0]));
    // Without the tokenizer's own, the first id.
    assert_eq!(ends(&files[1..]).unwrap(), (1, vec![1, 2, 0]));
    assert_eq!(ends(&files[2..]).unwrap(), (0, vec![0]));
    let null = [(tokenizer, json!({"eos_token": null})), (config, json!({"eos_token_id": 2}))];
    assert_eq!(ends(&null).unwrap(), (2, vec![2]));
    // 50000 is no token here.
    assert_eq!(ends(&[(config, json!({"eos_token_id": [50000, 1]}))]).unwrap(), (1, vec![1]));
}

#[test]
fn end_of_text_that_is_not_there_is_an_error() {
    assert_says(ends(&[]), &["expected `eos_token` in tokenizer_config.json", "found none in []"]);
    let found = ends(&[("tokenizer_config.json", json!({"eos_token": "</s>"}))]);
    assert_says(
        found,
        &["tokenizer_config.json: `eos_token`: expected a token of tokenizer.json, found `</s>`"],
    );
    let found = ends(&[("tokenizer_config.json", json!({"eos_token": 3}))]);
    assert_says(found, &["`eos_token`: expected a string, or an object with `content`, found 3"]);
    let found = ends(&[("generation_config.json", json!({"eos_token_id": ["x"]}))]);
    assert_says(found, &["generation_config.json: `eos_token_id`: expected a token id, or a list of them"]);
}

#[test]
fn a_folders_tokenizer_encodes_as_the_file_says_without_truncation() {
    let files = [("config.json", json!({"eos_token_id": 1}))];
    let dir = folder(&files);
    let path = dir.path().join("tokenizer.json");
    let mut json: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    json["truncation"] =
        json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
    json["padding"] = json!({"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null,
                             "pad_id": 2, "pad_type_id": 0, "pad_token": "<|eot|>"});
    std::fs::write(&path, json.to_string()).unwrap();
    let tokenizer = TextTokenizer::open(dir.path()).unwrap();
    assert_eq!(tokenizer.encode("ab c<|eot|>", true).unwrap(), [0, 7, 6, 5, 2]);
    assert_eq!(tokenizer.decode(&[7, 6, 5], false).unwrap(), "ab c");
}

#[test]
fn a_folder_without_a_tokenizer_is_named() {
    let dir = tempfile::tempdir().unwrap();
    assert_says(TextTokenizer::open(dir.path()), &["expected `tokenizer.json`, found no such file"]);
    std::fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    assert_says(TextTokenizer::open(dir.path()), &["tokenizer: ", "tokenizer.json: "]);
}
