//! The beginning of every input, for a prompt that stands after it.

use super::tokenizer::{Adds, BOS, BOTH, NOTHING, byte_level};
use super::*;
use gneiss::data::InputHead;

fn records_of(inputs: &[&str]) -> Vec<Record> {
    inputs.iter().zip(2..).map(|(input, line)| record(input, "1", line)).collect()
}

fn head(adds: Adds, verbalizer: &str, inputs: &[&str]) -> Result<InputHead> {
    let bytes = byte_level(adds, true, true);
    let template = template(verbalizer);
    let encoder = encoder(&bytes.tokenizer, &template);
    let examples = encoder.encode(&records_of(inputs)).unwrap().examples;
    let head = InputHead::find(&encoder, &examples)?;
    for example in &examples {
        assert!(example.input.len() > head.token_ids.len());
        head.check(&example.input).unwrap();
    }
    Ok(head)
}

#[test]
fn input_head_is_the_text_before_the_input() {
    for adds in [NOTHING, BOTH, Adds { bos: true, eos: false }] {
        let found = head(adds, "classify {0, 1}\n{{input}}\n Label:", &["dog", "great dog", "dog"]).unwrap();
        assert_eq!(found.text, "classify {0, 1}\n");
        let bytes = byte_level(NOTHING, true, true);
        let own = bytes.tokenizer.encode("classify {0, 1}\n", false).unwrap().get_ids().to_vec();
        let expected: Vec<u32> = adds.bos.then_some(BOS).into_iter().chain(own).collect();
        assert_eq!(found.token_ids, expected);
    }
}

/// A token that holds some of an input is none of the head, though all inputs of the data begin with it.
#[test]
fn input_head_ends_before_tokens_of_inputs() {
    for inputs in [["dog", "dog!", "dog dog"], ["dog", "great", "dog"]] {
        let found = head(NOTHING, "Input {{input}}", &inputs).unwrap();
        assert_eq!(found.text, "Input", "the space belongs to the word after it");
    }
    let found = head(NOTHING, "Input:{{input}}", &["dog", ")"]).unwrap();
    assert_eq!(found.text, "Input", "`:)` is a token");
}

#[test]
fn input_head_may_be_what_the_tokenizer_adds() {
    let found = head(BOTH, "{{input}} Label:", &["dog", "dog dog"]).unwrap();
    assert_eq!((found.text.as_str(), &found.token_ids[..]), ("", &[BOS][..]));
}

#[test]
fn input_head_that_is_empty_is_refused_by_the_key() {
    for verbalizer in ["{{input}} Label:", " {{input}}"] {
        let message = head(NOTHING, verbalizer, &["dog", "dog"]).unwrap_err().to_string();
        for part in ["prompt.position", "data.verbalizer", "a system turn", "\"start\"", verbalizer] {
            assert!(message.contains(part), "{part} is not in {message}");
        }
    }
}

#[test]
fn text_that_begins_otherwise_is_named() {
    let head = InputHead { text: "be kind\n".into(), token_ids: vec![4, 5] };
    assert_eq!(head.check(&[4, 5, 9]), Ok(()));
    for (tokens, word) in
        [(&[4, 6, 9][..], "system turn"), (&[4], "system turn"), (&[4, 5], "this text alone")]
    {
        let problem = head.check(tokens).unwrap_err();
        assert!(problem.contains("\"be kind\\n\"") && problem.contains(word), "{problem}");
    }
}
