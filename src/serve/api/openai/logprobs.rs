//! Log-probabilities as completions and as chats have them.

use crate::checkpoint::TextTokenizer;
use crate::generate::Token;
use crate::generate::text_stream::{token_bytes, token_label};
use serde_json::{Map, Value, json};
use std::ops::RangeInclusive;

/// Range of the number of likeliest tokens that a request may ask for.
pub(super) const LOGPROBS_RANGE: RangeInclusive<usize> = 0..=20;

/// Lists of tokens, as completions have them. `text_offset` counts characters and continues from piece to piece.
pub(super) struct LogprobLists {
    offset: usize,
}

impl LogprobLists {
    pub fn new() -> Self {
        Self { offset: 0 }
    }

    pub fn entry(&mut self, tokenizer: &TextTokenizer, tokens: &[Token]) -> Value {
        let labels: Vec<String> = tokens.iter().map(|token| token_label(tokenizer, token.id)).collect();
        let offset = |token: &Token| {
            let start = self.offset;
            // A character belongs to the token with its first byte.
            self.offset +=
                token_bytes(tokenizer, token.id).iter().filter(|byte| **byte & 0xC0 != 0x80).count();
            start
        };
        let offsets: Vec<usize> = tokens.iter().map(offset).collect();
        let top: Vec<Value> = tokens.iter().map(|token| top(tokenizer, token)).collect();
        let logprobs: Vec<Option<f64>> = tokens.iter().map(|token| token.logprob.map(finite)).collect();
        json!({"tokens": labels, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets})
    }
}

/// The likeliest tokens by their text, and the chosen one.
fn top(tokenizer: &TextTokenizer, token: &Token) -> Value {
    let Some(logprob) = token.logprob else { return Value::Null };
    let taken = std::iter::once((token.id, logprob));
    // Of two tokens with the same text, the first one, which is the likelier, is kept.
    let mut map = Map::new();
    for (id, logprob) in token.top.iter().copied().chain(taken) {
        map.entry(token_label(tokenizer, id)).or_insert(json!(finite(logprob)));
    }
    Value::Object(map)
}

/// A list of objects, as chat completions have it.
pub(super) fn content(tokenizer: &TextTokenizer, tokens: &[Token]) -> Value {
    let entry = |id: u32, logprob: Option<f64>| {
        let bytes = token_bytes(tokenizer, id);
        json!({"token": token_label(tokenizer, id), "logprob": logprob.map(finite), "bytes": bytes})
    };
    let token = |token: &Token| {
        let top: Vec<Value> = token.top.iter().map(|(id, logprob)| entry(*id, Some(*logprob))).collect();
        let mut object = entry(token.id, token.logprob);
        object["top_logprobs"] = top.into();
        object
    };
    json!({"content": tokens.iter().map(token).collect::<Vec<_>>(), "refusal": null})
}

/// JSON cannot represent minus infinity; OpenAI writes this number.
fn finite(logprob: f64) -> f64 {
    logprob.max(-9999.0)
}
