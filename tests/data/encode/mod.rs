mod cut;
mod head;
mod tokenizer;

use gneiss::data::{Dataset, Encoder, Template, encode::without_limits};
use tokenizers::Tokenizer;

use self::tokenizer::{Adds, BOS, BOTH, EOS, NOTHING, byte_level, words};
use super::*;

/// An encoder without limits of length.
fn encoder<'a>(tokenizer: &'a Tokenizer, template: &'a Template) -> Encoder<'a> {
    Encoder {
        tokenizer,
        template,
        vocab_size: usize::MAX,
        eos_token_id: EOS,
        max_input_tokens: usize::MAX,
        max_output_tokens: usize::MAX,
        instruction: None,
    }
}

fn dataset(records: Vec<Record>) -> Dataset {
    Dataset { path: "d.csv".into(), records, notes: Vec::new(), warnings: Vec::new() }
}

fn template(verbalizer: &str) -> Template {
    Template::parse(verbalizer).unwrap()
}

#[test]
fn encodes_records_in_their_order() {
    let bytes = byte_level(NOTHING, false, false);
    let template = template("classify {0, 1} {{input}}\n Label:");
    let records: Vec<Record> =
        (0..300).map(|i| record(&format!("great dog {i}"), &i.to_string(), 2 * i + 2)).collect();
    let encoded = encoder(&bytes.tokenizer, &template).encode(&records).unwrap();
    assert_eq!((encoded.examples.len(), encoded.inputs_cut, encoded.targets_cut), (300, 0, 0));
    for (example, record) in encoded.examples.iter().zip(&records) {
        assert_eq!(bytes.text(&example.input), template.render(&record.input));
        assert_eq!(bytes.text(&example.target), format!("{}</s>", record.output));
        assert_eq!(example.line, record.line);
        let (alone, cut) = encoder(&bytes.tokenizer, &template).encode_input(&record.input).unwrap();
        assert_eq!((alone, cut), (example.input.clone(), false));
    }
}

#[test]
fn keeps_bos_and_strips_the_eos_that_a_post_processor_adds() {
    let template = template("Input {{input}}");
    let plain = byte_level(NOTHING, false, true);
    let ids = plain.tokenizer.encode("Input dog", false).unwrap().get_ids().to_vec();
    for (bos, eos) in [(false, false), (true, false), (false, true), (true, true)] {
        let bytes = byte_level(Adds { bos, eos }, false, true);
        let encoded = encoder(&bytes.tokenizer, &template).encode(&[record("dog", "1", 1)]).unwrap();
        let expected: Vec<u32> = bos.then_some(BOS).into_iter().chain(ids.iter().copied()).collect();
        assert_eq!(encoded.examples[0].input, expected, "bos {bos}, eos {eos}");
        assert_eq!(bytes.text(&encoded.examples[0].target), "1</s>");
    }
}

#[test]
fn keeps_an_eos_that_the_text_holds() {
    let template = template("Input {{input}}");
    for adds in [NOTHING, BOTH] {
        let bytes = byte_level(adds, false, false);
        let (ids, _) = encoder(&bytes.tokenizer, &template).encode_input("dog</s>").unwrap();
        assert_eq!(ids.iter().filter(|id| **id == EOS).count(), 1);
        assert_eq!(ids.last(), Some(&EOS));
    }
}

#[test]
fn puts_the_instruction_before_the_template() {
    let bytes = byte_level(BOTH, false, true);
    let template = template("Input {{input}} :)");
    let with = |instruction, max_input_tokens| {
        let encoder = Encoder { instruction, max_input_tokens, ..encoder(&bytes.tokenizer, &template) };
        encoder.encode_input("dog great dog").unwrap()
    };
    let instruction = "classify the great dog.";
    let (whole, cut) = with(Some(instruction), usize::MAX);
    assert_eq!((bytes.text(&whole[1..]), cut), (format!("{instruction} Input dog great dog :)"), false));
    assert_eq!(whole[0], BOS);
    // Its tokens and BOS don't count: what is left of the input is the same with and without it. " :)" is two
    // tokens here.
    for (max_input_tokens, own) in [(4, " dog"), (5, " great dog"), (6, " dog great dog")] {
        let (ids, cut) = with(Some(instruction), max_input_tokens);
        assert_eq!(bytes.text(&ids[1..]), format!("{instruction} Input{own} :)"));
        assert_eq!(cut, max_input_tokens < 6);
        for none in [None, Some("")] {
            let (ids, _) = with(none, max_input_tokens);
            assert_eq!(bytes.text(&ids[1..]), format!("Input{own} :)"));
        }
    }
}

#[test]
fn cuts_targets_and_counts_them() {
    let bytes = byte_level(BOTH, false, false);
    let template = template("{{input}}");
    let records = [record("dog", "123", 1), record("dog", "12", 2), record("dog", "1", 3)];
    let encode = |max_output_tokens| {
        let encoder = Encoder { max_output_tokens, ..encoder(&bytes.tokenizer, &template) };
        let encoded = encoder.encode(&records).unwrap();
        let targets: Vec<String> = encoded.examples.iter().map(|e| bytes.text(&e.target)).collect();
        (targets.join(" "), encoded.targets_cut)
    };
    assert_eq!(encode(4), ("123</s> 12</s> 1</s>".into(), 0));
    assert_eq!(encode(3), ("123 12</s> 1</s>".into(), 1));
    assert_eq!(encode(2), ("12 12 1</s>".into(), 2));
    assert_eq!(encode(1), ("1 1 1".into(), 3));
}

#[test]
fn counts_cut_inputs() {
    let tokenizer = words(&["label", "a", "b", "c", "d", ":"], true, BOTH);
    let template = template("label {{input}} :");
    let records = [record("a b c d", "a", 1), record("a b", "a", 2), record("b c d", "a", 3)];
    let encoder = Encoder { max_input_tokens: 4, ..encoder(&tokenizer, &template) };
    let encoded = encoder.encode(&records).unwrap();
    let id = |token| tokenizer.token_to_id(token).unwrap();
    let inputs: Vec<Vec<u32>> = encoded.examples.into_iter().map(|example| example.input).collect();
    assert_eq!(encoded.inputs_cut, 2);
    assert_eq!(
        inputs,
        [["c", "d"], ["a", "b"], ["c", "d"]]
            .map(|[first, second]| ["<s>", "label", first, second, ":"].map(id).to_vec())
    );
}

#[test]
fn no_room_for_the_input() {
    let tokenizer = words(&["label", "a", "b", ":"], true, BOTH);
    let template = template("label {{input}} :");
    for max_input_tokens in [0, 1, 2] {
        let encoder = Encoder { max_input_tokens, ..encoder(&tokenizer, &template) };
        let expected = format!(
            "the template's head and tail alone take 2 tokens and data.max_input_tokens is \
             {max_input_tokens}, which leaves none for the input; hint: raise data.max_input_tokens or \
             shorten the verbalizer"
        );
        assert_eq!(encoder.encode_input("a").unwrap_err().to_string(), expected);
        assert_eq!(encoder.encode(&[record("a b", "a", 1)]).unwrap_err().to_string(), expected);
    }
}

#[test]
fn texts_without_tokens() {
    let tokenizer = words(&["label", "a"], true, BOTH);
    let template = template("label {{input}}");
    let encoder = encoder(&tokenizer, &template);
    let why = "gives no token: it is blank, or the tokenizer knows none of it";
    let error = encoder.encode_input(" ").unwrap_err();
    assert_eq!(error.to_string(), format!("the input {why}"));
    let records = vec![record("a", "a", 2), record("\n", "a", 3), record("a", " ", 5), record(" ", " ", 7)];
    let expected = format!(
        "line 3: the input {why}\n  line 5: the output {why}\n  line 7: the input {why}; the output {why}"
    );
    assert_eq!(encoder.encode(&records).unwrap_err().to_string(), expected);
    let dataset = dataset(records);
    let error = encoder.encode_dataset(&dataset).unwrap_err();
    assert_eq!(error.to_string(), format!("d.csv: 3 problems\n  {expected}"));
    let many: Vec<Record> = (1..=25).map(|line| record("a", " ", line)).collect();
    let message = encoder.encode(&many).unwrap_err().to_string();
    assert!(message.ends_with("\n  and 5 more"), "{message}");
}

#[test]
fn a_token_without_a_row_is_refused_by_its_place() {
    // `late` is 6, and the embedding has rows for 0 to 5.
    let tokenizer = words(&["label", "a", "b", "late"], true, BOTH);
    let says = |place: &str| {
        format!(
            "{place}: expected token ids under 6, the rows of the model's embedding, found `late`, which is 6; hint: leave \
             that token out, or give it a row (transformers: `model.resize_token_embeddings(len(tokenizer))`)"
        )
    };
    let message = |verbalizer: &str, instruction: Option<&str>, records: &[Record]| {
        let template = template(verbalizer);
        let encoder = Encoder { vocab_size: 6, instruction, ..encoder(&tokenizer, &template) };
        encoder.encode(records).map(drop).unwrap_err().to_string()
    };
    let good = record("a b", "a", 2);
    let bad = |input: &str, output: &str| [good.clone(), record(input, output, 5)];
    assert_eq!(message("label {{input}}", None, &bad("a late", "b")), says("line 5: input"));
    assert_eq!(message("label {{input}}", None, &bad("a", "late")), says("line 5: output"));
    let both = format!("{}; {}", says("line 5: input"), says("output"));
    assert_eq!(message("label {{input}}", None, &bad("late", "late")), both);
    for verbalizer in ["late {{input}}", "{{input}} late"] {
        assert_eq!(message(verbalizer, None, std::slice::from_ref(&good)), says("verbalizer"));
    }
    assert_eq!(
        message("label {{input}}", Some("late b"), std::slice::from_ref(&good)),
        says("prompt.init_text")
    );

    let template = template("label {{input}}");
    let encoder = Encoder { vocab_size: 6, ..encoder(&tokenizer, &template) };
    let dataset = Dataset {
        path: "d.csv".into(),
        records: bad("late", "a").to_vec(),
        notes: Vec::new(),
        warnings: Vec::new(),
    };
    let error = encoder.encode_dataset(&dataset).unwrap_err().to_string();
    assert_eq!(error, format!("d.csv: {}", says("line 5: input")));
    assert_eq!(encoder.encode_input("late").unwrap_err().to_string(), says("input"));
    assert_eq!(encoder.encode_input("a b").unwrap().0.len(), 4);
}

#[test]
fn texts_that_a_tokenizer_drops() {
    let mut tokenizer = byte_level(BOTH, false, true).tokenizer;
    tokenizer.with_normalizer(Some(tokenizers::normalizers::Replace::new("x", "").unwrap())).unwrap();
    let template = template("Input {{input}}:)");
    let encoder = encoder(&tokenizer, &template);
    let message = encoder.encode(&[record("xx", "x", 4)]).unwrap_err().to_string();
    assert!(message.starts_with("line 4: the input gives no token: "), "{message}");
    assert!(message.contains("; the output gives no token: "), "{message}");
}

#[test]
fn a_dataset_gives_what_its_records_give() {
    let tokenizer = words(&["label", "a", "b"], true, NOTHING);
    let template = template("label {{input}}");
    let encoder = encoder(&tokenizer, &template);
    let dataset = dataset(vec![record("a", "b", 2), record("b", "a", 3)]);
    assert_eq!(encoder.encode_dataset(&dataset).unwrap(), encoder.encode(&dataset.records).unwrap());
}

#[test]
fn what_the_tokenizer_says_is_passed_on() {
    let tokenizer = words(&["label"], false, NOTHING);
    let template = template("label {{input}}");
    let error = encoder(&tokenizer, &template)
        .encode(&[record("label", "label", 1), record("a", "label", 2)])
        .unwrap_err();
    assert!(matches!(error, Error::Tokenizer(_)));
    assert_eq!(
        error.to_string(),
        "tokenizer: line 2: WordLevel error: Missing [UNK] token from the vocabulary"
    );
}

#[test]
fn no_room_for_the_target() {
    let tokenizer = words(&["label", "a"], true, NOTHING);
    let template = template("{{input}}");
    let encoder = Encoder { max_output_tokens: 0, ..encoder(&tokenizer, &template) };
    let error = encoder.encode(&[record("a", "a", 1)]).unwrap_err();
    assert_eq!(error.to_string(), "data.max_output_tokens: expected at least 1, found 0");
}

#[test]
fn a_tokenizer_that_truncates_or_pads_is_refused() {
    let plain = words(&["a", "b"], true, NOTHING);
    let template = template("{{input}}");
    let (expected, _) = encoder(&plain, &template).encode_input("a b a").unwrap();
    let mut truncates = plain.clone();
    truncates
        .with_truncation(Some(tokenizers::TruncationParams { max_length: 2, ..Default::default() }))
        .unwrap();
    let mut pads = plain.clone();
    pads.with_padding(Some(tokenizers::PaddingParams { pad_to_multiple_of: Some(8), ..Default::default() }));
    for tokenizer in [truncates, pads] {
        let error = encoder(&tokenizer, &template).encode_input("a b a").unwrap_err();
        assert_eq!(
            error.to_string(),
            "tokenizer: expected truncation and padding to be off, found one of them on; hint: load the \
             tokenizer through `without_limits`"
        );
        let tokenizer = without_limits(tokenizer).unwrap();
        assert_eq!(encoder(&tokenizer, &template).encode_input("a b a").unwrap().0, expected);
    }
}
