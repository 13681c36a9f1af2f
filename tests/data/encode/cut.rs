//! Cutting long inputs: from the left of the input's own text, to the exact length, and nowhere else.

use std::sync::LazyLock;

use proptest::prelude::*;

use super::tokenizer::Bytes;
use super::*;

/// GPT-2's splits and newer ones, offsets with and without spaces, with and without special tokens.
static TOKENIZERS: LazyLock<Vec<(Bytes, Adds)>> = LazyLock::new(|| {
    let mut all = Vec::new();
    for adds in [NOTHING, BOTH] {
        for newer in [false, true] {
            for trim_offsets in [false, true] {
                all.push((byte_level(adds, newer, trim_offsets), adds));
            }
        }
    }
    all
});

const PIECES: [&str; 17] = [
    "dog", " dog", " great", "classify", " ", "  ", "\n", "\n\n", "!", ":", ")", "é", "\u{301}", "🐩",
    " {0, 1}", "7", "\t",
];

fn text(pieces: std::ops::Range<usize>) -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(PIECES.to_vec()), pieces).prop_map(|pieces| pieces.concat())
}

fn input() -> impl Strategy<Value = String> {
    text(1..9).prop_filter("blank", |input| !input.trim().is_empty())
}

/// Indices of the input's own tokens in the rendered template, from the bytes that the tokens stand for.
fn own(bytes: &Bytes, ids: &[u32], head: &str, input: &str) -> Vec<usize> {
    let (from, to) = (head.len(), head.len() + input.len());
    let mut start = 0;
    let mut own = Vec::new();
    for (i, id) in ids.iter().enumerate() {
        let token = bytes.of(&[*id]);
        let end = start + token.len();
        let border = |at: usize| at.saturating_sub(start).min(token.len());
        let spaces = |part: &[u8]| part.iter().all(|b| *b == b' ');
        let (of_head, of_input) = (&token[..border(from)], &token[border(from)..border(to)]);
        let of_tail = &token[border(to)..];
        if !of_input.is_empty() && spaces(of_head) && (of_tail.is_empty() || !spaces(of_input)) {
            own.push(i);
        }
        start = end;
    }
    own
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn drops_the_left_of_the_input_and_nothing_else(
        head in text(0..5),
        input in input(),
        tail in text(0..4),
        instruction in prop::option::of(text(1..4)),
    ) {
        let template = template(&format!("{head}{{{{input}}}}{tail}"));
        for (bytes, adds) in TOKENIZERS.iter() {
            let encoder = encoder(&bytes.tokenizer, &template);
            let (whole, cut) = encoder.encode_input(&input).unwrap();
            prop_assert!(!cut);
            let special = usize::from(adds.bos);
            let tokens = &whole[special..];
            let rendered = template.render(&input);
            prop_assert_eq!(bytes.of(tokens), rendered.as_bytes());
            let own = own(bytes, tokens, &head, &input);
            let fixed = tokens.len() - own.len();
            for max_input_tokens in 0..=tokens.len() + 1 {
                let limited = Encoder { max_input_tokens, ..encoder };
                let result = limited.encode_input(&input);
                if max_input_tokens >= tokens.len() {
                    prop_assert_eq!(result.unwrap(), (whole.clone(), false));
                } else if max_input_tokens <= fixed {
                    let message = result.unwrap_err().to_string();
                    let counts = format!(" {fixed} tokens and data.max_input_tokens is {max_input_tokens},");
                    prop_assert!(message.contains(&counts), "{}", message);
                } else {
                    let (ids, cut) = result.unwrap();
                    prop_assert!(cut);
                    prop_assert_eq!(ids.len(), special + max_input_tokens);
                    let dropped = &own[..tokens.len() - max_input_tokens];
                    let mut expected = whole[..special].to_vec();
                    let kept = tokens.iter().enumerate().filter(|(i, _)| !dropped.contains(i));
                    expected.extend(kept.map(|(_, id)| id));
                    prop_assert_eq!(&ids, &expected);
                    // The same in bytes: head and tail are whole, up to a space that the next word brings.
                    let rest = bytes.of(&ids[special..]);
                    prop_assert!(rest.starts_with(head.trim_end_matches(' ').as_bytes()));
                    prop_assert!(rest.ends_with(tail.as_bytes()));
                }
            }
            if let Some(instruction) = &instruction {
                let encoder = Encoder { instruction: Some(instruction), ..encoder };
                let (whole, _) = encoder.encode_input(&input).unwrap();
                let expected = format!("{instruction} {rendered}");
                prop_assert_eq!(bytes.of(&whole[special..]), expected.as_bytes());
            }
        }
    }

    /// With an instruction the limit counts the template's tokens only.
    #[test]
    fn the_instruction_does_not_count(input in input(), instruction in text(1..6), max in 6usize..12) {
        let template = template("Input {{input}}\n Label:");
        for (bytes, adds) in TOKENIZERS.iter() {
            let special = usize::from(adds.bos);
            let instruction = format!("{instruction}.");
            let encoder = Encoder { instruction: Some(&instruction), ..encoder(&bytes.tokenizer, &template) };
            let (whole, _) = encoder.encode_input(&input).unwrap();
            let before = instruction.len();
            let mut end = 0;
            // Tokens that end after the instruction and the space.
            let counted = whole[special..].iter().filter(|id| {
                end += bytes.of(&[**id]).len();
                end > before + 1
            }).count();
            let limited = Encoder { max_input_tokens: max, ..encoder };
            match limited.encode_input(&input) {
                Ok((ids, cut)) => {
                    prop_assert_eq!(ids.len(), whole.len() - counted.saturating_sub(max));
                    prop_assert_eq!(cut, counted > max);
                    let text = bytes.of(&ids[special..]);
                    let start = format!("{instruction} Input");
                    prop_assert!(text.starts_with(start.as_bytes()));
                    prop_assert!(text.ends_with(b"\n Label:"));
                }
                Err(e) => {
                    prop_assert!(counted > max);
                    prop_assert!(e.to_string().contains("data.max_input_tokens"), "{}", e);
                }
            }
        }
    }
}

#[test]
fn a_newline_of_the_head_stays() {
    // "\n\n" is one token across the border of head and input.
    for (bytes, adds) in TOKENIZERS.iter() {
        let template = template("Input\n{{input}}!");
        let encoder = encoder(&bytes.tokenizer, &template);
        let (whole, _) = encoder.encode_input("\n\tdog dog dog").unwrap();
        let special = usize::from(adds.bos);
        let limited = Encoder { max_input_tokens: whole.len() - special - 2, ..encoder };
        let (ids, cut) = limited.encode_input("\n\tdog dog dog").unwrap();
        assert!(cut);
        let text = bytes.text(&ids[special..]);
        assert!(text.starts_with("Input\n") && text.ends_with(" dog!"), "{text:?}");
    }
}
