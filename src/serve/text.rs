//! From tokens to text, piece by piece: whole characters only, and nothing of a stop sequence.

use crate::model::TextTokenizer;
use crate::{Error, Result};
use tokenizers::Tokenizer;

/// Tokens of the text before, behind which a decoder knows whether a leading space belongs to the text.
const CONTEXT: usize = 6;
/// Tokens that wait for the rest of their last character, after which it is taken for garbage. Only garbage gets here:
/// a character has at most 4 bytes.
const WAITING: usize = 64;
/// Replacement characters at the end that may become a character yet: of one that lacks its last byte, 3 bytes are
/// there, and byte-fallback decoders show each as one.
const INCOMPLETE: usize = 3;
const REPLACEMENT: char = char::REPLACEMENT_CHARACTER;

/// Decodes tokens as they come. What it gives, one after the other, is the text; it has no part of a character.
pub(super) struct TextStream {
    /// Tokens already given, then those that wait.
    ids: Vec<u32>,
    /// How many are given.
    given: usize,
    /// Their text.
    context: String,
    /// Bytes given of the text of those that wait.
    sent: usize,
}

impl TextStream {
    /// Begins behind `before`, the token ids that the text goes on from.
    ///
    /// # Errors
    /// The tokenizer's.
    pub fn new(tokenizer: &Tokenizer, before: &[u32]) -> Result<Self> {
        let ids = before[before.len().saturating_sub(CONTEXT)..].to_vec();
        let context = decode(tokenizer, &ids)?;
        Ok(Self { given: ids.len(), ids, context, sent: 0 })
    }

    /// Takes a token; gives the text that is now certain.
    ///
    /// # Errors
    /// The tokenizer's.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String> {
        self.ids.push(id);
        let waiting = self.waiting(tokenizer)?;
        let garbage = self.ids.len() - self.given > WAITING;
        let certain = if garbage { waiting.len() } else { certain(&waiting) };
        let text = waiting.get(self.sent..certain).unwrap_or_default().to_owned();
        self.sent = self.sent.max(certain);
        if garbage || !waiting.ends_with(REPLACEMENT) {
            self.ids.drain(..self.given);
            self.given = self.ids.len();
            self.context = decode(tokenizer, &self.ids)?;
            self.sent = 0;
        }
        Ok(text)
    }

    /// Text of the tokens that wait.
    fn waiting(&self, tokenizer: &Tokenizer) -> Result<String> {
        let all = decode(tokenizer, &self.ids)?;
        match all.strip_prefix(&self.context) {
            Some(rest) => Ok(rest.to_owned()),
            // A decoder may show what it showed before in another way, once more bytes stand behind it.
            None => decode(tokenizer, &self.ids[self.given..]),
        }
    }
}

/// How many bytes of a text stay what they are, whatever comes behind it.
fn certain(text: &str) -> usize {
    let without = text.trim_end_matches(REPLACEMENT).len();
    let replaced = (text.len() - without) / REPLACEMENT.len_utf8();
    without + replaced.saturating_sub(INCOMPLETE) * REPLACEMENT.len_utf8()
}

fn decode(tokenizer: &Tokenizer, ids: &[u32]) -> Result<String> {
    tokenizer.decode(ids, true).map_err(|error| Error::Tokenizer(error.to_string()))
}

/// Holds text back that may be the beginning of a stop sequence.
#[derive(Default)]
pub(super) struct StopFilter {
    sequences: Vec<String>,
    held: String,
}

/// What a piece of text came to.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Passed {
    /// Text that is no part of a stop sequence, those before the sequence included.
    pub text: String,
    /// The sequence that ended the text.
    pub stop: Option<String>,
}

impl StopFilter {
    pub fn new(sequences: Vec<String>) -> Self {
        Self { sequences, held: String::new() }
    }

    /// Takes a piece of text. The text ends with the first stop sequence that is complete; of several that end at the
    /// same place the longest counts. So it is the same however the text is cut into pieces.
    pub fn push(&mut self, piece: &str) -> Passed {
        self.held.push_str(piece);
        let ends = self.sequences.iter().filter_map(|s| Some((self.held.find(s.as_str())?, s)));
        if let Some((start, stop)) = ends.min_by_key(|(start, s)| (start + s.len(), *start)) {
            let stop = stop.clone();
            self.held.truncate(start);
            return Passed { text: std::mem::take(&mut self.held), stop: Some(stop) };
        }
        let keep = self.sequences.iter().map(|s| begun(&self.held, s)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        Passed { text: std::mem::replace(&mut self.held, rest), stop: None }
    }

    /// What is held back, which no stop sequence came of.
    pub fn rest(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes at the end of `text` that begin `sequence`.
fn begun(text: &str, sequence: &str) -> usize {
    let lengths = (1..sequence.len()).rev().filter(|n| sequence.is_char_boundary(*n));
    lengths.into_iter().find(|n| text.ends_with(&sequence[..*n])).unwrap_or(0)
}

/// The bytes of one token: those of a byte-level vocabulary, whose tokens need be no whole characters, or of its text.
pub(super) fn token_bytes(tokenizer: &TextTokenizer, id: u32) -> Vec<u8> {
    let text = tokenizer.token_text(id).unwrap_or_default();
    if !text.contains(REPLACEMENT) {
        return text.into_bytes();
    }
    let piece = tokenizer.tokenizer.id_to_token(id).unwrap_or_default();
    let fallback = piece.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    if let Some(byte) = fallback.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
        return vec![byte];
    }
    piece.chars().map(byte_level).collect::<Option<_>>().unwrap_or_else(|| text.into_bytes())
}

/// A token's text as answers show it; of one that is no whole characters, its bytes, as OpenAI shows them.
pub(super) fn token_label(tokenizer: &TextTokenizer, id: u32) -> String {
    String::from_utf8(token_bytes(tokenizer, id)).unwrap_or_else(|error| {
        let bytes = error.as_bytes().iter().map(|byte| format!("\\x{byte:02x}"));
        std::iter::once("bytes:".to_owned()).chain(bytes).collect()
    })
}

/// The byte that a letter of GPT-2's byte-level vocabularies stands for: printable bytes for themselves, the 68 others,
/// in their order, for the letters from U+0100 on.
fn byte_level(letter: char) -> Option<u8> {
    let itself = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    match u32::from(letter) {
        code @ 0..=0xFF => u8::try_from(code).ok().filter(|byte| itself(*byte)),
        code => (0..=u8::MAX).filter(|byte| !itself(*byte)).nth(code as usize - 0x100),
    }
}
