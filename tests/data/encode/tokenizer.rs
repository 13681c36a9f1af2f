//! Small tokenizers, written as the `tokenizer.json` that a checkpoint has.

use serde_json::{Value, json};
use tokenizers::Tokenizer;

pub const BOS: u32 = 0;
pub const EOS: u32 = 1;
const SPECIAL: [&str; 2] = ["<s>", "</s>"];

/// Which special tokens the post-processor adds.
#[derive(Debug, Clone, Copy)]
pub struct Adds {
    pub bos: bool,
    pub eos: bool,
}

pub const NOTHING: Adds = Adds { bos: false, eos: false };
pub const BOTH: Adds = Adds { bos: true, eos: true };

impl Adds {
    fn post_processor(self) -> Value {
        let special = |id: &str| json!({"SpecialToken": {"id": id, "type_id": 0}});
        let mut single = vec![json!({"Sequence": {"id": "A", "type_id": 0}})];
        if self.bos {
            single.insert(0, special(SPECIAL[0]));
        }
        if self.eos {
            single.push(special(SPECIAL[1]));
        }
        let entry = |id: usize| json!({"id": SPECIAL[id], "ids": [id], "tokens": [SPECIAL[id]]});
        json!({
            "type": "TemplateProcessing",
            "single": single,
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": entry(0), "</s>": entry(1)}
        })
    }
}

/// A byte-level BPE and the bytes that each id stands for.
pub struct Bytes {
    pub tokenizer: Tokenizer,
    tokens: Vec<Vec<u8>>,
}

impl Bytes {
    pub fn of(&self, ids: &[u32]) -> Vec<u8> {
        ids.iter().flat_map(|id| self.tokens[*id as usize].clone()).collect()
    }

    pub fn text(&self, ids: &[u32]) -> String {
        String::from_utf8(self.of(ids)).unwrap()
    }
}

/// Words that are one token, each with its beginnings.
const WORDS: [&str; 12] =
    ["classify", " dog", "dog", " great", "\n\n", "!\n", "  ", "Input", ":)", "é", " {", "\n Label"];
/// GPT-2's splits, and those of newer vocabularies, where a line's end sticks to what stands before it.
pub const NEWER: &str = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The printable character that byte-level vocabularies have for a byte.
fn byte_char(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|b| !printable(*b)).count();
    char::from_u32(256 + before as u32).unwrap()
}

pub fn byte_level(adds: Adds, newer: bool, trim_offsets: bool) -> Bytes {
    let mut tokens: Vec<Vec<u8>> = vec![SPECIAL[0].into(), SPECIAL[1].into()];
    tokens.extend((0..=255).map(|byte| vec![byte]));
    let text = |bytes: &[u8]| bytes.iter().map(|b| byte_char(*b)).collect::<String>();
    let mut merges = Vec::new();
    for word in WORDS.map(str::as_bytes) {
        for end in 2..=word.len() {
            if !tokens.iter().any(|token| token == &word[..end]) {
                tokens.push(word[..end].to_vec());
                merges.push(json!([text(&word[..end - 1]), text(&word[end - 1..end])]));
            }
        }
    }
    let vocab: serde_json::Map<_, _> = tokens.iter().enumerate().map(|(i, t)| (text(t), json!(i))).collect();
    let level = |use_regex: bool| {
        json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": trim_offsets,
            "use_regex": use_regex
        })
    };
    let split =
        json!({"type": "Split", "pattern": {"Regex": NEWER}, "behavior": "Isolated", "invert": false});
    let pre_tokenizer = match newer {
        true => json!({"type": "Sequence", "pretokenizers": [split, level(false)]}),
        false => level(true),
    };
    let model = json!({
        "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
        "vocab": vocab, "merges": merges
    });
    let post_processor = json!({"type": "Sequence", "processors": [level(false), adds.post_processor()]});
    Bytes { tokenizer: build(model, pre_tokenizer, post_processor), tokens }
}

/// Words split at white space; `<unk>` where `unk` asks for it, otherwise an unknown word is an error.
pub fn words(vocabulary: &[&str], unk: bool, adds: Adds) -> Tokenizer {
    let mut vocab: serde_json::Map<_, _> =
        SPECIAL.iter().enumerate().map(|(i, t)| (t.to_string(), json!(i))).collect();
    let known = if unk { vec!["<unk>"] } else { vec![] };
    for word in known.iter().chain(vocabulary) {
        vocab.insert(word.to_string(), json!(vocab.len()));
    }
    let model = json!({"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"});
    build(model, json!({"type": "WhitespaceSplit"}), adds.post_processor())
}

fn build(model: Value, pre_tokenizer: Value, post_processor: Value) -> Tokenizer {
    let added = |id: usize| {
        json!({
            "id": id, "content": SPECIAL[id], "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true
        })
    };
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [added(0), added(1)],
        "normalizer": null, "pre_tokenizer": pre_tokenizer, "post_processor": post_processor, "decoder": null,
        "model": model
    });
    Tokenizer::from_bytes(json.to_string()).unwrap()
}
