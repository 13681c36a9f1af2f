//! Tokenizers of GGUF files against those that the files are made from (`tests/fixtures/make_vocabularies.py`).
//! `GNEISS_VOCABULARIES` names another folder that the script wrote, with more texts.

use std::path::PathBuf;

use candle_core::quantized::gguf_file::Value as Meta;
use gneiss::model::{GgufFile, TextTokenizer};
use serde_json::Value;

use super::gguf::{Altered, text};
use super::{assert_says, fixture};

fn path(name: &str) -> PathBuf {
    match std::env::var_os("GNEISS_VOCABULARIES") {
        Some(folder) => PathBuf::from(folder).join(name),
        None => fixture(name),
    }
}

fn cases() -> Value {
    serde_json::from_str(&std::fs::read_to_string(path("vocabularies.json")).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn open(copy: &Altered) -> gneiss::Result<TextTokenizer> {
    TextTokenizer::from_gguf(&copy.open()?)
}

/// Texts that give other tokens than expected, the shortest first.
fn differing<'a>(
    tokenizer: &TextTokenizer,
    cases: &'a Value,
    expected: impl Fn(&'a Value) -> &'a Value,
) -> Vec<(&'a str, Vec<u32>, Vec<u32>)> {
    let mut differing = Vec::new();
    for case in cases["cases"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let (found, expected) = (tokenizer.encode(text, false).unwrap(), ids(expected(case)));
        if found != expected {
            differing.push((text, found, expected));
        }
    }
    differing.sort_by_key(|(text, ..)| text.len());
    differing
}

#[test]
fn byte_level_vocabularies_give_the_tokens_of_their_own_tokenizers() {
    let cases = cases();
    let names: Vec<&str> =
        cases["names"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    assert!(names.len() == 14 && cases["cases"].as_array().unwrap().len() >= 220);
    let mut file = Altered::at(&path("bpe.gguf"));
    for (i, name) in names.iter().enumerate() {
        file = file.set("tokenizer.ggml.pre", text(name));
        let tokenizer = open(&file).unwrap();
        let found = differing(&tokenizer, &cases, |case| {
            let kind = case["pre"].as_str().unwrap().as_bytes()[i] - b'a';
            &case["ids"][usize::from(kind)]
        });
        assert!(found.is_empty(), "{name}: {} differ, such as {:?}", found.len(), &found[..found.len().min(3)]);
    }
}

#[test]
fn pieces_give_the_tokens_of_sentencepiece() {
    let cases = cases();
    assert!(cases["by_sentencepiece_alone"].as_u64().unwrap() >= 180);
    let file = Altered::at(&path("pieces.gguf"));
    let tokenizer = open(&file).unwrap();
    let found = differing(&tokenizer, &cases, |case| &case["pieces"]);
    assert!(found.is_empty(), "{} differ, such as {:?}", found.len(), &found[..found.len().min(3)]);
    // A text begins with <s> unless the file says otherwise; its tokens are the text again.
    assert_eq!(tokenizer.encode("", true).unwrap(), [1]);
    for case in cases["cases"].as_array().unwrap() {
        let (text, ids) = (case["text"].as_str().unwrap(), ids(&case["pieces"]));
        if !["<", "\u{2581}"].iter().any(|mark| text.contains(mark)) {
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        }
    }

    let bare = open(&file.set("tokenizer.ggml.add_space_prefix", Meta::Bool(false))).unwrap();
    let found = differing(&bare, &cases, |case| &case["bare"]);
    assert!(found.is_empty(), "{} differ, such as {:?}", found.len(), &found[..found.len().min(3)]);
    assert_eq!(bare.decode(&bare.encode(" two  spaces", false).unwrap(), false).unwrap(), " two  spaces");
}
