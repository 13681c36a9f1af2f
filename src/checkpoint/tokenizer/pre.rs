//! The pre-tokenizers that llama.cpp names (`tokenizer.ggml.pre`), as the pipelines of the tokenizer.json files for
//! which the names stand.
//!
//! The names come from `get_vocab_base_pre` of llama.cpp's conversion, their meaning from
//! <https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp>. Granite Code and Granite 3 are `refact`,
//! Granite 4 is `dbrx`.

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

/// The name of the pipeline for a file that names none.
pub(super) const DEFAULT: &str = "default";

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
/// The same with line breaks separated from the text before them.
const SEED_CODER: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// cl100k after digits were cut in groups of up to three.
const MINICPM5: [&str; 2] = [
    r"\p{N}{1,3}",
    concat!(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+",
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
];
/// GPT-4o's words (o200k), as in the tokenizer.json; llama.cpp's own engine lacks the classes and approximates them.
const GPT_4O: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// Mistral's words, as in the tokenizer.json: GPT-4o's without contractions, and single digits.
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// GPT-2's words. [`ByteLevel`] has them too, for pipelines that map bytes in the same step.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// llama.cpp's `default`, one after the other.
const DEFAULT_WORDS: [&str; 4] = [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"];
const DEEPSEEK_LLM: [&str; 6] =
    [r"[\r\n]", DEEPSEEK_LLM_LETTERS, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", DEEPSEEK_ASIAN, r"\p{N}+"];
/// Letters with small and capital forms, by their code points: some change when a text is normalised.
const DEEPSEEK_LLM_LETTERS: &str = concat!(
    r"\s?[",
    r"A-Za-z\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}\x{1C4}-\x{293}\x{295}-\x{2AF}",
    r"\x{370}-\x{373}\x{376}\x{377}\x{37B}-\x{37D}\x{37F}\x{386}\x{388}-\x{38A}\x{38C}\x{38E}-\x{3A1}",
    r"\x{3A3}-\x{3F5}\x{3F7}-\x{481}\x{48A}-\x{52F}\x{531}-\x{556}\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}",
    r"\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA}\x{1CBD}-\x{1CBF}\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}",
    r"\x{1D79}-\x{1D9A}\x{1E00}-\x{1F15}\x{1F18}-\x{1F1D}\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}",
    r"\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}\x{1F5D}\x{1F5F}-\x{1F7D}\x{1F80}-\x{1FB4}\x{1FB6}-\x{1FBC}\x{1FBE}",
    r"\x{1FC2}-\x{1FC4}\x{1FC6}-\x{1FCC}\x{1FD0}-\x{1FD3}\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}",
    r"\x{1FF2}-\x{1FF4}\x{1FF6}-\x{1FFC}\x{2102}\x{2107}\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D}\x{2124}",
    r"\x{2126}\x{2128}\x{212A}-\x{212D}\x{212F}-\x{2134}\x{2139}\x{213C}-\x{213F}\x{2145}-\x{2149}\x{214E}",
    r"\x{2183}\x{2184}\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}\x{A640}-\x{A66D}",
    r"\x{A680}-\x{A69B}\x{A722}-\x{A76F}\x{A771}-\x{A787}\x{A78B}-\x{A78E}\x{AB70}-\x{ABBF}",
    r"\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}\x{10400}-\x{1044F}",
    r"\x{104B0}-\x{104D3}\x{104D8}-\x{104FB}\x{10C80}-\x{10CB2}\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF}",
    r"\x{1E900}-\x{1E943}",
    r"]+"
);
const DEEPSEEK_ASIAN: &str = r"[一-龥ࠀ-一가-퟿]+";
const DEEPSEEK_CODER: [&str; 5] = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_ASIAN, r"\p{N}"];
const DEEPSEEK_V3: [&str; 3] = [
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    concat!(
        r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"##,
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
];
const VIKING: [&str; 2] = [r" ?[^(\s|.,!?…。，、।۔،)]+", r"\p{N}"];

/// The parts of a tokenizer that its pre-tokenizer's name decides.
pub(super) struct Pipeline {
    /// The normalizer.
    pub normalizer: Option<NormalizerWrapper>,
    /// Splits the text into words and maps bytes to characters, without a space before the text.
    pub pre_tokenizer: PreTokenizerWrapper,
    /// Whether a word that is a token is not split further.
    pub ignore_merges: bool,
    /// Whether a beginning-of-text token is added if the file does not say.
    pub add_bos: bool,
}

/// The pipeline of a name; `None` for a name that isn't known.
pub(super) fn pipeline(name: &str) -> Result<Option<Pipeline>> {
    let gpt2_words = || PreTokenizerWrapper::from(ByteLevel::new(false, true, true));
    let pipeline =
        |pre_tokenizer| Pipeline { normalizer: None, pre_tokenizer, ignore_merges: false, add_bos: false };
    Ok(Some(match name {
        "refact" | "starcoder" | "smollm" | "codeshell" | "minerva-7b" => {
            pipeline(Sequence::new(vec![Digits::new(true).into(), gpt2_words()]).into())
        }
        "gpt-2" | "granite-docling" | "mellum" | "trillion" => pipeline(gpt2_words()),
        "dbrx" | "smaug-bpe" => pipeline(words(&[CL100K])?),
        "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "pixtral" | "midm-2.0" => {
            Pipeline { ignore_merges: true, add_bos: true, ..pipeline(words(&[CL100K])?) }
        }
        "qwen2" | "deepseek-r1-qwen" => {
            Pipeline { normalizer: Some(NFC.into()), ..pipeline(words(&[QWEN2])?) }
        }
        "gpt-4o" | "llama4" => pipeline(words(&[GPT_4O])?),
        "tekken" => Pipeline { ignore_merges: true, add_bos: true, ..pipeline(words(&[TEKKEN])?) },
        "deepseek-llm" => pipeline(words(&DEEPSEEK_LLM)?),
        "deepseek-coder" => pipeline(words(&DEEPSEEK_CODER)?),
        "deepseek-v3" => pipeline(words(&DEEPSEEK_V3)?),
        "seed-coder" => pipeline(words(&[SEED_CODER])?),
        "minicpm5" => Pipeline { ignore_merges: true, ..pipeline(words(&MINICPM5)?) },
        "viking" => pipeline(words(&VIKING)?),
        DEFAULT => pipeline(words(&DEFAULT_WORDS)?),
        _ => return Ok(None),
    }))
}

/// One name for each pipeline.
const NAMES: [&str; 14] = [
    "refact", "gpt-2", "dbrx", "llama-bpe", "qwen2", "gpt-4o", "tekken", "deepseek-llm", "deepseek-coder",
    "deepseek-v3", "seed-coder", "minicpm5", "viking", DEFAULT,
];

/// Texts for which any two pipelines give different words.
const PROBES: [&str; 6] = [
    "It's LATE, isn't It'S? 'Tis McDonald's O'NEILL 12345678 ½Ⅷ²³ v1.2.3 ٣٤٥",
    "a/b://\n\n !?\r\n\n/ #x =y _z a\u{301}b \u{301}\u{302}c 语\u{301} ǅabc ʰAb",
    "tail  \n \t\n  x   \n\n 12   3",
    "日本語テキスト，한국어。中文123汉字 Ελλάδα ไทย हिन्दी",
    "price: $1,234.56 <=> ^~|`+ (x) [y] {z}…",
    "e\u{301} \u{212b} \u{f900}",
];

/// The name of the pipeline that splits and normalises `texts` as `tokenizer` does; `None` if no known one does.
pub(crate) fn find_name(tokenizer: &Tokenizer, texts: &[&str]) -> Result<Option<&'static str>> {
    let ignores = match tokenizer.get_model() {
        ModelWrapper::BPE(bpe) => bpe.ignore_merges,
        _ => return Ok(None),
    };
    let texts: Vec<&str> = texts.iter().copied().chain(PROBES).collect();
    let theirs = split_words(tokenizer.get_normalizer(), tokenizer.get_pre_tokenizer(), &texts)?;
    for name in NAMES {
        let Some(pipeline) = pipeline(name)? else { continue };
        let ours = split_words(pipeline.normalizer.as_ref(), Some(&pipeline.pre_tokenizer), &texts)?;
        if pipeline.ignore_merges == ignores && ours == theirs {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// The words of each text, in the characters that represent bytes.
fn split_words(
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

/// Splits a text at the matches of regular expressions, one after the other, and maps its bytes to characters. Each
/// match is a word, and so is the text between two matches.
fn words(patterns: &[&str]) -> Result<PreTokenizerWrapper> {
    let mut parts = Vec::with_capacity(patterns.len() + 1);
    for pattern in patterns {
        let pattern = SplitPattern::Regex((*pattern).to_string());
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
        parts.push(split.map_err(|error| Error::Tokenizer(error.to_string()))?.into());
    }
    parts.push(ByteLevel::new(false, true, false).into());
    Ok(Sequence::new(parts).into())
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

    fn pipeline_of(name: &str) -> Pipeline {
        pipeline(name).unwrap().unwrap_or_else(|| panic!("{name} is not known"))
    }

    /// A name of each pipeline stands for no other one.
    #[test]
    fn find_name_finds_every_pipeline() {
        use tokenizers::models::bpe::BPE;
        for name in NAMES {
            let Pipeline { normalizer, pre_tokenizer, ignore_merges, .. } = pipeline_of(name);
            let model = BPE::builder().ignore_merges(ignore_merges).build().unwrap();
            let mut tokenizer = Tokenizer::new(model);
            tokenizer.with_normalizer(normalizer).unwrap();
            tokenizer.with_pre_tokenizer(Some(pre_tokenizer));
            assert_eq!(find_name(&tokenizer, &[]).unwrap(), Some(name));
        }
    }

    #[test]
    fn names_of_one_pipeline_are_alike() {
        let alike: [(&str, &[&str]); 5] = [
            ("refact", &["starcoder", "smollm", "codeshell", "minerva-7b"]),
            ("gpt-2", &["granite-docling", "mellum", "trillion"]),
            ("llama-bpe", &["llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0"]),
            ("qwen2", &["deepseek-r1-qwen"]),
            ("gpt-4o", &["llama4"]),
        ];
        for (name, others) in alike {
            let first = pipeline_of(name);
            for other in others.iter().map(|other| pipeline_of(other)) {
                assert_eq!((first.ignore_merges, first.add_bos), (other.ignore_merges, other.add_bos));
                let [first, other] = [&first, &other].map(|pipeline| {
                    split_words(pipeline.normalizer.as_ref(), Some(&pipeline.pre_tokenizer), &PROBES).unwrap()
                });
                assert_eq!(first, other, "{name}");
            }
        }
    }

    #[test]
    fn llama_3_and_tekken_add_a_beginning_of_text() {
        for name in ["refact", "dbrx", "smollm", "gpt-2", "qwen2", "default"] {
            let pipeline = pipeline(name).unwrap().unwrap();
            assert!(!pipeline.add_bos && !pipeline.ignore_merges, "{name}");
        }
        for name in ["llama-bpe", "tekken"] {
            let pipeline = pipeline_of(name);
            assert!(pipeline.add_bos && pipeline.ignore_merges, "{name}");
        }
    }
}
