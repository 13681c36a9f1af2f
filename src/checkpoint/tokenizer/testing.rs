//! Small tokenizers for tests.

use super::TextTokenizer;
use serde_json::{Value, json};

pub const END: u32 = 256;
pub const BEGIN: u32 = 257;
pub const START: u32 = 258;
/// A byte-level vocabulary: the id of a byte is the byte. So a character of several bytes is several tokens.
pub fn byte_level() -> TextTokenizer {
    let itself = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let others: Vec<u8> = (0..=255).filter(|byte| !itself(*byte)).collect();
    let letter = |byte: u8| match others.iter().position(|other| *other == byte) {
        Some(place) => char::from_u32(0x100 + place as u32).unwrap(),
        None => char::from(byte),
    };
    let vocabulary: serde_json::Map<String, Value> =
        (0..=255u8).map(|byte| (letter(byte).to_string(), json!(byte))).collect();
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false})
    };
    let json = json!({
        "version": "1.0",
        "added_tokens": [special(END, "<|end|>"), special(BEGIN, "<|begin|>"), special(START, "<|start|>")],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    });
    let tokenizer = json.to_string().parse().unwrap();
    TextTokenizer {
        tokenizer,
        eos_token_id: END,
        stop_token_ids: vec![END],
        vocab_size: usize::MAX,
        warnings: Vec::new(),
    }
}

/// A sentencepiece vocabulary with byte fallback, which strips the space before a text.
pub fn byte_fallback() -> TextTokenizer {
    let mut vocabulary: serde_json::Map<String, Value> =
        (0..=255).map(|byte| (format!("<0x{byte:02X}>"), json!(byte))).collect();
    let letters = ["</s>", "<unk>", "\u{2581}", "a", "b", "\u{e9}", "\u{20ac}", "\u{2581}a", "ab"];
    vocabulary.extend(letters.iter().zip(256..).map(|(letter, id)| ((*letter).to_owned(), json!(id))));
    let json = json!({
        "version": "1.0",
        "added_tokens": [{"id": 256, "content": "</s>", "special": true, "single_word": false, "lstrip": false,
                          "rstrip": false, "normalized": false}],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u{2581}"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"}]},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": true, "vocab": vocabulary,
                  "merges": [["\u{2581}", "a"], ["a", "b"]]},
    });
    TextTokenizer {
        tokenizer: json.to_string().parse().unwrap(),
        eos_token_id: 256,
        stop_token_ids: vec![256],
        vocab_size: usize::MAX,
        warnings: Vec::new(),
    }
}
