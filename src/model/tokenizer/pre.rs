//! How llama.cpp's names of pre-tokenizers (`tokenizer.ggml.pre`) split a text, as the pipelines of the
//! tokenizer.json files that the names stand for.
//!
//! The names come from `get_vocab_base_pre` of llama.cpp's conversion, what they do from
//! <https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp>. Granite Code and Granite 3
//! are `refact`, Granite 4 is `dbrx`.

use tokenizers::models::ModelWrapper;
use tokenizers::normalizers::{NFC, NormalizerWrapper};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::{
    NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer,
    SplitDelimiterBehavior, Tokenizer,
};

use crate::{Error, Result};

/// GPT-4's words (cl100k): digits in groups of up to three.
const CL100K: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// The same with single digits.
const QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// llama.cpp's `default`, applied one after the other around GPT-2's words.
const DEFAULT_BEFORE: &str = r"[\p{P}\$\+<=>\^~\|]+";
const DEFAULT_AFTER: [&str; 2] = [r"\p{N}+", r"[0-9][0-9][0-9]"];

/// The parts of a tokenizer that its pre-tokenizer's name decides.
pub(super) struct Pipeline {
    /// What changes the text first.
    pub normalizer: Option<NormalizerWrapper>,
    /// What splits it into words and maps bytes to characters; no space is put before the text.
    pub pre_tokenizer: PreTokenizerWrapper,
    /// Whether a word that is a token is taken as it is.
    pub ignore_merges: bool,
    /// Whether a beginning-of-text token is added unless the file says otherwise.
    pub add_bos: bool,
}

/// The pipeline of a name; `None` for a name that isn't known.
pub(super) fn pipeline(name: &str) -> Result<Option<Pipeline>> {
    let gpt2_words = || PreTokenizerWrapper::from(ByteLevel::new(false, true, true));
    let bytes = || PreTokenizerWrapper::from(ByteLevel::new(false, true, false));
    let sequence = |parts| PreTokenizerWrapper::from(Sequence::new(parts));
    let plain =
        |pre_tokenizer| Pipeline { normalizer: None, pre_tokenizer, ignore_merges: false, add_bos: false };
    Ok(Some(match name {
        "refact" | "starcoder" | "smollm" => plain(sequence(vec![Digits::new(true).into(), gpt2_words()])),
        "gpt-2" | "granite-docling" => plain(gpt2_words()),
        "dbrx" | "smaug-bpe" => plain(sequence(vec![words(CL100K)?, bytes()])),
        "llama-bpe" | "llama3" | "llama-v3" => {
            Pipeline { ignore_merges: true, add_bos: true, ..plain(sequence(vec![words(CL100K)?, bytes()])) }
        }
        "qwen2" => Pipeline { normalizer: Some(NFC.into()), ..plain(sequence(vec![words(QWEN2)?, bytes()])) },
        "default" => {
            let [digits, triples] = DEFAULT_AFTER;
            let gpt2 = words(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")?;
            plain(sequence(vec![words(DEFAULT_BEFORE)?, gpt2, words(digits)?, words(triples)?, bytes()]))
        }
        _ => return Ok(None),
    }))
}

/// The name of the pipeline that splits and normalises `texts` as `tokenizer` does; `None` where no known one does.
pub(crate) fn name_of(tokenizer: &Tokenizer, texts: &[&str]) -> Result<Option<&'static str>> {
    let ignores = match tokenizer.get_model() {
        ModelWrapper::BPE(bpe) => bpe.ignore_merges,
        _ => return Ok(None),
    };
    let theirs = words_of(tokenizer.get_normalizer(), tokenizer.get_pre_tokenizer(), texts)?;
    // One name for each pipeline.
    for name in ["refact", "gpt-2", "dbrx", "llama-bpe", "qwen2", "default"] {
        let Some(pipeline) = pipeline(name)? else { continue };
        let ours = words_of(pipeline.normalizer.as_ref(), Some(&pipeline.pre_tokenizer), texts)?;
        if pipeline.ignore_merges == ignores && ours == theirs {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// The words of each text, in the characters that stand for bytes.
fn words_of(
    normalizer: Option<&NormalizerWrapper>,
    pre_tokenizer: Option<&PreTokenizerWrapper>,
    texts: &[&str],
) -> Result<Vec<Vec<String>>> {
    let failed = |error: tokenizers::Error| Error::Tokenizer(error.to_string());
    let words = |text: &&str| {
        let mut normalized = NormalizedString::from(*text);
        if let Some(normalizer) = normalizer {
            normalizer.normalize(&mut normalized).map_err(failed)?;
        }
        let mut words = PreTokenizedString::from(normalized);
        if let Some(pre_tokenizer) = pre_tokenizer {
            pre_tokenizer.pre_tokenize(&mut words).map_err(failed)?;
        }
        let words = words.get_splits(OffsetReferential::Normalized, OffsetType::Byte);
        Ok(words.into_iter().map(|(word, ..)| word.to_string()).filter(|word| !word.is_empty()).collect())
    };
    texts.iter().map(words).collect()
}

/// Splits a text at the matches of a regular expression; each match is a word, and so is what lies
/// between two of them.
fn words(pattern: &str) -> Result<PreTokenizerWrapper> {
    let pattern = SplitPattern::Regex(pattern.to_string());
    let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
    Ok(split.map_err(|error| Error::Tokenizer(error.to_string()))?.into())
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn fixture(name: &str) -> Value {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    /// Where the pipeline cuts a text, in the text's own characters.
    fn cut<'a>(pre_tokenizer: &PreTokenizerWrapper, text: &'a str) -> Vec<&'a str> {
        let mut words = PreTokenizedString::from(text);
        pre_tokenizer.pre_tokenize(&mut words).unwrap();
        let words = words.get_splits(OffsetReferential::Original, OffsetType::Byte);
        let words = words.into_iter().map(|(_, (from, to), _)| &text[from..to]);
        words.filter(|word| !word.is_empty()).collect()
    }

    /// Against llama.cpp's own regular expressions, run by another engine.
    #[test]
    fn every_name_cuts_as_llama_cpp_does() {
        let (words, texts) = (fixture("pre_tokenizers.json"), fixture("smollm2_tokens.json"));
        let texts: Vec<&str> =
            texts["cases"].as_array().unwrap().iter().map(|case| case["text"].as_str().unwrap()).collect();
        let mut names = 0;
        for case in words["cases"].as_array().unwrap() {
            let expected = case["words"].as_array().unwrap();
            assert_eq!(expected.len(), texts.len());
            for name in case["pre"].as_array().unwrap() {
                let name = name.as_str().unwrap();
                let pipeline = pipeline(name).unwrap().unwrap_or_else(|| panic!("{name} is not known"));
                for (text, expected) in texts.iter().zip(expected) {
                    let expected: Vec<&str> =
                        expected.as_array().unwrap().iter().map(|word| word.as_str().unwrap()).collect();
                    assert_eq!(cut(&pipeline.pre_tokenizer, text), expected, "{name}: {text:?}");
                }
                names += 1;
            }
        }
        assert_eq!(names, 12);
        assert!(pipeline("gpt2").unwrap().is_none() && pipeline("").unwrap().is_none());
    }

    #[test]
    fn only_llama_3_adds_a_beginning_of_text() {
        for name in ["refact", "dbrx", "smollm", "gpt-2", "qwen2", "default"] {
            let pipeline = pipeline(name).unwrap().unwrap();
            assert!(!pipeline.add_bos && !pipeline.ignore_merges, "{name}");
        }
        let llama3 = pipeline("llama-bpe").unwrap().unwrap();
        assert!(llama3.add_bos && llama3.ignore_merges);
    }
}
