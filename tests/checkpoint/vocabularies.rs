//! Tokenizers of GGUF files against those that the files are made from (`tests/fixtures/make_vocabularies.py`).
//! `GNEISS_VOCABULARIES` names another folder that the script wrote, with more texts.

use std::path::PathBuf;

use candle_core::quantized::gguf_file::Value as Meta;
use gneiss::checkpoint::TextTokenizer;
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
        assert!(
            found.is_empty(),
            "{name}: {} differ, such as {:?}",
            found.len(),
            &found[..found.len().min(3)]
        );
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

fn list(items: &[&str]) -> Meta {
    Meta::Array(items.iter().map(|item| text(item)).collect())
}

const TYPES: &str = "tokenizer.ggml.token_type";
const TOKENS: &str = "tokenizer.ggml.tokens";
const MERGES: &str = "tokenizer.ggml.merges";
const SCORES: &str = "tokenizer.ggml.scores";
const EOT: &str = "tokenizer.ggml.eot_token_id";

/// A file of eight tokens, the second of which ends a text, the third and those after it with these texts.
fn with_tokens(texts: &[&str]) -> Altered {
    let mut tokens = ["<begin>", "<end>", "c", "d", "e", "f", "g", "h"];
    tokens[2..2 + texts.len()].copy_from_slice(texts);
    let types = (0..8).map(|id| Meta::I32(if id < 2 + texts.len() { 3 } else { 1 })).collect();
    Altered::of("llama.gguf")
        .set(TOKENS, list(&tokens))
        .set(TYPES, Meta::Array(types))
        .set(MERGES, list(&[]))
        .without(EOT)
}

fn ends(copy: &Altered) -> Vec<u32> {
    let tokenizer = open(copy).unwrap();
    assert_eq!(tokenizer.eos_token_id, tokenizer.stop_token_ids[0]);
    tokenizer.stop_token_ids
}

/// The texts and rules of `llama_vocab::impl::load` (<https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp>).
#[test]
fn ends_are_found_by_their_texts() {
    let names = "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> \
                 <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> \
                 <\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}> [e~[ <|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] \
                 <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame> <|file_sep|>";
    assert_eq!(names.split_whitespace().count(), 33);
    for name in names.split_whitespace() {
        assert_eq!(ends(&with_tokens(&["<other>", name])), [1, 3], "{name}");
    }
    for name in ["<|im_start|>", "<|fim_prefix|>", "<fim_middle>", "<|eot|>", "</S>", "<pad>", "<repo_name>"]
    {
        assert_eq!(ends(&with_tokens(&[name])), [1], "{name}");
    }
    // Several at once; of the tokens that pad code completion one alone.
    assert_eq!(ends(&with_tokens(&["<|endoftext|>", "<|im_end|>", "<|eom_id|>"])), [1, 2, 3, 4]);
    assert_eq!(ends(&with_tokens(&["[PAD]", "<|fim_pad|>"])), [1, 3]);
}

#[test]
fn ends_that_a_key_names_come_first() {
    let file = with_tokens(&["<|endoftext|>", "<turn>", "<message>", "<pad>", "<PAD>"]);
    let file = file.set(EOT, Meta::U32(3)).set("tokenizer.ggml.eom_token_id", Meta::U32(4));
    let file = file.set("tokenizer.ggml.fim_pad_token_id", Meta::U32(5));
    assert_eq!(ends(&file), [1, 3, 4, 5, 2]);
    assert_says(
        open(&file.set(EOT, Meta::U32(8))),
        &["`tokenizer.ggml.eot_token_id`", "an id of the vocabulary", "8"],
    );
}

#[test]
fn ends_of_parts_of_an_answer_end_no_generation() {
    assert_eq!(ends(&with_tokens(&["<|end|>", "<|call|>", "<|return|>"])), [1, 3, 4]);
    assert_eq!(ends(&with_tokens(&["<|end|>", "<|calls|>", "<|flush|>"])), [1, 3, 4]);
    assert_eq!(ends(&with_tokens(&["<|end|>", "<|return|>"])), [1, 2, 3]);
    assert_eq!(ends(&with_tokens(&["</s>", "<|tool_response>"])), [1, 3]);
    // What the file itself calls the end of a text stays one.
    let file = with_tokens(&["<|end|>", "<|call|>", "<|return|>"]);
    assert_eq!(ends(&file.set("tokenizer.ggml.eos_token_id", Meta::U32(2))), [2, 3, 4]);
}

#[test]
fn an_end_that_is_typed_as_text_is_a_control_token_with_a_warning() {
    let types = [3, 3, 1, 1, 1, 1, 1, 1].map(Meta::I32);
    let file = with_tokens(&["<|im_end|>"]).set(TYPES, Meta::Array(types.into()));
    let tokenizer = open(&file).unwrap();
    assert_eq!(tokenizer.stop_token_ids, [1, 2]);
    assert_eq!(tokenizer.encode("c<|im_end|>d", false).unwrap(), [2, 3]);
    assert_eq!(tokenizer.decode(&[3, 2, 3], true).unwrap(), "dd");
    let [warning] = &tokenizer.warnings[..] else { panic!("{:?}", tokenizer.warnings) };
    assert!(warning.contains(TYPES) && warning.contains("`<|im_end|>`"), "{warning}");
}

#[test]
fn a_file_without_a_pre_tokenizer_is_split_as_llama_cpps_default_with_a_warning() {
    let (cases, file) = (cases(), Altered::at(&path("bpe.gguf")).without("tokenizer.ggml.pre"));
    let tokenizer = open(&file).unwrap();
    let [warning] = &tokenizer.warnings[..] else { panic!("{:?}", tokenizer.warnings) };
    assert!(warning.contains("`tokenizer.ggml.pre`") && warning.contains("`default`"), "{warning}");
    let position = cases["names"].as_array().unwrap().iter().position(|name| name == "default").unwrap();
    let expected = |case: &Value| usize::from(case["pre"].as_str().unwrap().as_bytes()[position] - b'a');
    for case in cases["cases"].as_array().unwrap().iter().take(220) {
        let found = tokenizer.encode(case["text"].as_str().unwrap(), false).unwrap();
        assert_eq!(found, ids(&case["ids"][expected(case)]));
    }
    let named = open(&file.set("tokenizer.ggml.pre", text("default"))).unwrap();
    assert!(named.warnings.is_empty(), "{:?}", named.warnings);
}

#[test]
fn unused_tokens_may_share_a_text_and_others_may_not() {
    let file = Altered::at(&path("bpe.gguf"));
    let tokenizer = open(&file).unwrap().tokenizer;
    let last = tokenizer.get_vocab_size(true) as u32 - 1;
    let texts = [last - 1, last].map(|id| tokenizer.id_to_token(id).unwrap());
    assert_eq!(texts, ["<unused>".to_string(), format!("[PAD{last}]")]);

    let tokens = list(&["<begin>", "<end>", "c", "d", "c", "f", "g", "h"]);
    let typed = |kinds: [i32; 8]| {
        open(
            &with_tokens(&[])
                .set(TOKENS, tokens.clone())
                .set(TYPES, Meta::Array(kinds.map(Meta::I32).into())),
        )
    };
    // An unused token gives way to one that is used, wherever it stands.
    assert_eq!(typed([3, 3, 5, 1, 1, 1, 1, 1]).unwrap().encode("cd", false).unwrap(), [4, 3]);
    assert_eq!(typed([3, 3, 1, 1, 5, 1, 1, 1]).unwrap().encode("cd", false).unwrap(), [2, 3]);
    assert_says(typed([3, 3, 1, 1, 1, 1, 1, 1]), &["each token once, found `c` as 2 and 4"]);
}

#[test]
fn merges_that_make_no_token_are_passed_over_with_a_warning() {
    let merges = list(&["c d", "e f", "ef g", "g h"]);
    let tokens = list(&["<begin>", "<end>", "c", "d", "e", "f", "g", "cd"]);
    let tokenizer =
        open(&with_tokens(&[]).set(TOKENS, tokens.clone()).set(MERGES, list(&["c d", "e f", "ef g"])));
    let tokenizer = tokenizer.unwrap();
    assert_eq!(tokenizer.encode("cdefg", false).unwrap(), [7, 4, 5, 6]);
    let [warning] = &tokenizer.warnings[..] else { panic!("{:?}", tokenizer.warnings) };
    assert!(warning.contains("2 make no token") && warning.contains("`e f`"), "{warning}");
    // `h` is no token at all.
    assert_says(open(&with_tokens(&[]).set(TOKENS, tokens).set(MERGES, merges)), &["out of vocabulary"]);
}

#[test]
fn keys_that_have_no_effect_are_warned_about() {
    let warnings = |copy: Altered| open(&copy).unwrap().warnings;
    let pieces = || Altered::at(&path("pieces.gguf"));
    let spaces = "tokenizer.ggml.remove_extra_whitespaces";
    let found = warnings(pieces().set(spaces, Meta::Bool(true)));
    assert!(found.len() == 1 && found[0].contains(spaces), "{found:?}");
    assert!(warnings(pieces().set(spaces, Meta::Bool(false))).is_empty());
    let prefix = "tokenizer.ggml.add_space_prefix";
    let bpe = || Altered::at(&path("bpe.gguf"));
    let found = warnings(bpe().set(prefix, Meta::Bool(true)));
    assert!(found.len() == 1 && found[0].contains(prefix), "{found:?}");
    let suppressed = "tokenizer.ggml.suppress_tokens";
    let found = warnings(bpe().set(suppressed, Meta::Array(vec![Meta::I32(7), Meta::I32(8)])));
    assert!(found.len() == 1 && found[0].contains(suppressed) && found[0].contains("2 tokens"), "{found:?}");
    assert!(warnings(bpe().set(prefix, Meta::Bool(false))).is_empty() && warnings(pieces()).is_empty());
}

#[test]
fn pieces_that_are_not_decided_are_refused() {
    let pieces = || Altered::at(&path("pieces.gguf"));
    let count = open(&pieces()).unwrap().tokenizer.get_vocab_size(true);
    // What `LlamaHfVocab` of llama.cpp's conversion writes for every token.
    let equal = pieces().set(SCORES, Meta::Array(vec![Meta::F32(-1000.0); count]));
    assert_says(
        open(&equal),
        &["`tokenizer.ggml.scores`: expected scores that say which", "-1000 for both", "hint: use"],
    );
    let nan = pieces().set(SCORES, Meta::Array(vec![Meta::F32(f32::NAN); count]));
    assert_says(open(&nan), &["`tokenizer.ggml.scores`: expected", "found NaN"]);
    let short = pieces().set(SCORES, Meta::Array(vec![Meta::F32(0.0); 3]));
    assert_says(open(&short), &[&format!("expected {count} numbers, one a token, found 3")]);
    assert_says(
        open(&pieces().without(SCORES)),
        &["`tokenizer.ggml.scores`: expected a list of numbers", "no such key"],
    );
    assert_says(
        open(&Altered::of("granite.gguf").set("tokenizer.ggml.model", text("llama"))),
        &["expected the 256 tokens of bytes", "no `<0x00>` and 255 others"],
    );
}

/// Logarithms of probabilities, which sentencepiece's unigram kind has for scores.
#[test]
fn pieces_of_the_unigram_kind_are_warned_about() {
    let file = Altered::at(&path("pieces.gguf"));
    let count = open(&file).unwrap().tokenizer.get_vocab_size(true);
    let scores = (0..count).map(|id| Meta::F32(-1.5 - id as f32)).collect();
    let found = open(&file.set(SCORES, Meta::Array(scores))).unwrap().warnings;
    assert!(found.len() == 1 && found[0].contains(SCORES) && found[0].contains("unigram"), "{found:?}");
}

#[test]
fn pieces_without_ids_of_begin_and_end_take_llama_cpps() {
    let file = Altered::at(&path("pieces.gguf"));
    let expected = ends(&file);
    let file = file.without("tokenizer.ggml.bos_token_id").without("tokenizer.ggml.eos_token_id");
    let tokenizer = open(&file).unwrap();
    assert_eq!((tokenizer.eos_token_id, &tokenizer.stop_token_ids), (2, &expected));
    assert_eq!(tokenizer.encode("", true).unwrap(), [1]);
}
