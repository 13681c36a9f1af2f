//! Decodes tokens to text as they are generated, in complete characters.

use crate::checkpoint::TextTokenizer;
use crate::{Error, Result};
use tokenizers::Tokenizer;

/// Number of preceding tokens that are decoded too, so that a decoder knows whether a leading space belongs to the text.
const CONTEXT: usize = 6;
/// Number of pending tokens after which an incomplete last character is returned as it is. Only invalid bytes reach this
/// number, because a character has at most 4 bytes.
const MAX_PENDING: usize = 64;
/// Number of replacement characters at the end that may still become a character. If the last byte of a character is
/// missing, up to 3 bytes are there, and byte-fallback decoders show each as one replacement character.
const INCOMPLETE: usize = 3;
const REPLACEMENT: char = char::REPLACEMENT_CHARACTER;

/// Decodes tokens as they are generated. The returned pieces together are the text. No piece ends inside a character.
pub struct TextStream {
    /// Tokens whose text has been returned, then pending tokens.
    ids: Vec<u32>,
    /// Number of tokens whose text has been returned.
    returned: usize,
    /// Their text.
    context: String,
    /// Number of bytes of the pending tokens' text that have been returned.
    sent: usize,
    /// Whether special tokens are left out of the text.
    skip_special: bool,
}

impl TextStream {
    /// A stream for the text that follows the token ids `before`.
    ///
    /// # Errors
    /// Returns an error if the tokenizer cannot decode the tokens.
    pub fn new(tokenizer: &Tokenizer, before: &[u32], skip_special: bool) -> Result<Self> {
        let ids = before[before.len().saturating_sub(CONTEXT)..].to_vec();
        let context = decode(tokenizer, &ids, skip_special)?;
        Ok(Self { returned: ids.len(), ids, context, sent: 0, skip_special })
    }

    /// Adds a token. Returns the text that later tokens cannot change.
    ///
    /// # Errors
    /// Returns an error if the tokenizer cannot decode the tokens.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String> {
        self.ids.push(id);
        let pending = self.pending(tokenizer)?;
        let invalid = self.ids.len() - self.returned > MAX_PENDING;
        let certain = if invalid { pending.len() } else { certain(&pending) };
        let text = pending.get(self.sent..certain).unwrap_or_default().to_owned();
        self.sent = self.sent.max(certain);
        if invalid || !pending.ends_with(REPLACEMENT) {
            self.ids.drain(..self.returned);
            self.returned = self.ids.len();
            self.context = decode(tokenizer, &self.ids, self.skip_special)?;
            self.sent = 0;
        }
        Ok(text)
    }

    /// Text of the pending tokens.
    fn pending(&self, tokenizer: &Tokenizer) -> Result<String> {
        let all = decode(tokenizer, &self.ids, self.skip_special)?;
        match all.strip_prefix(&self.context) {
            Some(pending) => Ok(pending.to_owned()),
            // A decoder may change earlier text once more bytes follow.
            None => decode(tokenizer, &self.ids[self.returned..], self.skip_special),
        }
    }
}

/// Number of bytes of a text that later tokens cannot change.
fn certain(text: &str) -> usize {
    let without = text.trim_end_matches(REPLACEMENT).len();
    let replaced = (text.len() - without) / REPLACEMENT.len_utf8();
    without + replaced.saturating_sub(INCOMPLETE) * REPLACEMENT.len_utf8()
}

fn decode(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> Result<String> {
    tokenizer.decode(ids, skip_special).map_err(|error| Error::Tokenizer(error.to_string()))
}

/// The bytes of one token. A token of a byte-level vocabulary may end inside a character.
pub fn token_bytes(tokenizer: &TextTokenizer, id: u32) -> Vec<u8> {
    let piece = tokenizer.tokenizer.id_to_token(id).unwrap_or_default();
    let fallback = piece.strip_prefix("<0x").and_then(|hex| hex.strip_suffix('>'));
    if let Some(byte) = fallback.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
        return vec![byte];
    }
    let text = tokenizer.token_text(id).unwrap_or_default();
    if !text.contains(REPLACEMENT) {
        return text.into_bytes();
    }
    piece.chars().map(byte_level).collect::<Option<_>>().unwrap_or_else(|| text.into_bytes())
}

/// A token's text as answers show it: its bytes in OpenAI's form if it does not consist of complete characters, and
/// `token_id:` with its id if the tokenizer does not know it, as an embedding may have more rows than there are tokens.
pub fn token_label(tokenizer: &TextTokenizer, id: u32) -> String {
    if tokenizer.tokenizer.id_to_token(id).is_none() {
        return format!("token_id:{id}");
    }
    String::from_utf8(token_bytes(tokenizer, id)).unwrap_or_else(|error| {
        let bytes = error.as_bytes().iter().map(|byte| format!("\\x{byte:02x}"));
        std::iter::once("bytes:".to_owned()).chain(bytes).collect()
    })
}

/// The byte that a character of GPT-2's byte-level vocabularies stands for: a printable byte is written as itself, and the
/// 68 others are written, in their order, as the characters from U+0100 on.
fn byte_level(letter: char) -> Option<u8> {
    let itself = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    match u32::from(letter) {
        code @ 0..=0xFF => u8::try_from(code).ok().filter(|byte| itself(*byte)),
        code => (0..=u8::MAX).filter(|byte| !itself(*byte)).nth(code as usize - 0x100),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::tokenizer::testing::{byte_fallback, byte_level};
    use proptest::prelude::*;

    /// Texts that a stream gives, token by token.
    fn pieces(tokenizer: &TextTokenizer, before: &[u32], ids: &[u32]) -> Vec<String> {
        let mut stream = TextStream::new(&tokenizer.tokenizer, before, true).unwrap();
        ids.iter().map(|id| stream.push(&tokenizer.tokenizer, *id).unwrap()).collect()
    }

    fn bytes(text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }

    #[test]
    fn a_character_comes_when_it_is_whole() {
        let tokenizer = byte_level();
        let expected = ["a", "", "\u{e9}", "", "", "", "\u{1f600}", "!"];
        assert_eq!(pieces(&tokenizer, &bytes("x"), &bytes("a\u{e9}\u{1f600}!")), expected);
        // The first space of a text is text, and an end without its last byte is left out.
        assert_eq!(pieces(&tokenizer, &[], &bytes(" a\u{e9}")[..3]), [" ", "a", ""]);
        let special = |skip| {
            let mut stream = TextStream::new(&tokenizer.tokenizer, &[], skip).unwrap();
            [97, 256, 98].map(|id| stream.push(&tokenizer.tokenizer, id).unwrap()).concat()
        };
        assert_eq!((special(true), special(false)), ("ab".into(), "a<|end|>b".into()));
        // Bytes that are no text show, once it is certain.
        let broken = pieces(&tokenizer, &[], &[0xFF, 65]).concat();
        assert_eq!(broken, "\u{fffd}A");
    }

    #[test]
    fn text_stream_returns_endless_invalid_bytes_in_constant_time() {
        let tokenizer = byte_level();
        let mut stream = TextStream::new(&tokenizer.tokenizer, &[], true).unwrap();
        let mut text = String::new();
        for _ in 0..1000 {
            text += &stream.push(&tokenizer.tokenizer, 0xFF).unwrap();
            assert!(stream.ids.len() <= 2 * (MAX_PENDING + 1), "{}", stream.ids.len());
        }
        assert!(text.chars().count() > 900, "{}", text.chars().count());
        assert!(text.chars().all(|letter| letter == REPLACEMENT));
    }

    #[test]
    fn text_stream_keeps_a_leading_space_after_another_text() {
        let tokenizer = byte_fallback();
        let id = |piece: &str| tokenizer.tokenizer.token_to_id(piece).unwrap();
        let (space_a, b) = (id("\u{2581}a"), id("b"));
        assert_eq!(pieces(&tokenizer, &[b], &[space_a, b]), [" a", "b"]);
        // A text by itself, as a choice is, has none.
        assert_eq!(pieces(&tokenizer, &[], &[space_a, b, space_a]), ["a", "b", " a"]);
        // Behind a euro in bytes, one more byte makes its decoder show all four as broken: what was given stays.
        let euro = [0xE2, 0x82, 0xAC];
        let text = pieces(&tokenizer, &[b], &[&euro[..], &[0xFF, b, b]].concat()).concat();
        assert!(text.starts_with('\u{20ac}') && text.ends_with("bb"), "{text:?}");
    }

    #[test]
    fn a_token_that_is_no_character_shows_its_bytes() {
        let (level, fallback) = (byte_level(), byte_fallback());
        for byte in 0..=255u8 {
            assert_eq!(token_bytes(&level, byte.into()), [byte]);
            assert_eq!(token_bytes(&fallback, byte.into()), [byte]);
        }
        assert_eq!(token_label(&level, 0xE2), "bytes:\\xe2");
        assert_eq!(token_label(&level, 65), "A");
        assert_eq!(token_label(&fallback, fallback.tokenizer.token_to_id("\u{2581}a").unwrap()), " a");
        assert_eq!(token_label(&level, 256), "<|end|>");
    }

    #[test]
    fn a_token_that_the_tokenizer_does_not_know_has_no_text() {
        let tokenizer = byte_level();
        let unknown = 5000;
        assert_eq!(pieces(&tokenizer, &bytes("x"), &[65, unknown, 66]), ["A", "", "B"]);
        assert_eq!(token_label(&tokenizer, unknown), "token_id:5000");
        assert_eq!(token_bytes(&tokenizer, unknown), Vec::<u8>::new());
        assert!(!tokenizer.is_special(unknown) && tokenizer.is_special(256));
    }

    proptest! {
        /// The pieces together are the decoded text, except for an incomplete character at the end.
        #[test]
        fn text_stream_pieces_are_the_decoded_text(text in ".{0,40}", cut in 0usize..4, before in "[ab ]{0,9}") {
            let tokenizer = byte_level();
            let ids = bytes(&text);
            let ids = &ids[..ids.len().saturating_sub(cut)];
            let given = pieces(&tokenizer, &bytes(&before), ids);
            let expected = String::from_utf8_lossy(&ids.iter().map(|id| *id as u8).collect::<Vec<_>>()).into_owned();
            // The text may end in a replacement character of its own, which cannot be distinguished from an incomplete one.
            let all = given.concat();
            prop_assert_eq!(all.trim_end_matches(REPLACEMENT), expected.trim_end_matches(REPLACEMENT));
            for piece in given.iter().filter(|_| !text.contains(REPLACEMENT)) {
                prop_assert!(!piece.contains(REPLACEMENT), "{piece:?}");
            }
        }

        /// Bytes of any kind come out as a lossy decoder shows them, but for an end that may be incomplete.
        #[test]
        fn text_stream_decodes_any_bytes(ids in prop::collection::vec(0u32..259, 0..60)) {
            let tokenizer = byte_level();
            let given = pieces(&tokenizer, &[], &ids).concat();
            let expected = tokenizer.decode(&ids, true).unwrap();
            prop_assert_eq!(given.trim_end_matches(REPLACEMENT), expected.trim_end_matches(REPLACEMENT));
            prop_assert!(expected.starts_with(&given));
        }

        /// Byte-fallback decoders change earlier text; the stream does not, and loses no complete character.
        #[test]
        fn text_stream_decodes_byte_fallback(text in "[ab\u{e9}\u{20ac}\u{1f600} ]{0,20}") {
            let tokenizer = byte_fallback();
            let ids = tokenizer.encode(&text, false).unwrap();
            let b = tokenizer.tokenizer.token_to_id("b").unwrap();
            let given = pieces(&tokenizer, &[b], &ids).concat();
            prop_assert_eq!(given, if ids.is_empty() { String::new() } else { format!(" {text}") });
        }
    }
}
