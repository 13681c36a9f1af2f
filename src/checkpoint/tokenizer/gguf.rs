//! A tokenizer from GGUF metadata, read as in llama.cpp
//! (<https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp>).
//!
//! candle-core has `TokenizerFromGguf`, which works for a few models only. It treats every pre-tokenizer that it
//! doesn't know as GPT-2's, with a space before the text, reads keys like `unk_token_id` that llama.cpp does not write,
//! and makes user-defined tokens special. So gneiss builds the tokenizer itself.

mod ends;
mod sentencepiece;
mod vocabulary;

use std::collections::HashSet;

use tokenizers::decoders::byte_level::ByteLevel as ByteLevelDecoder;
use tokenizers::models::bpe::{BPE, Merges};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Tokenizer};

pub(crate) use self::ends::ends_by_text;

use self::ends::EndTokens;
use self::vocabulary::GgufVocabulary;
use super::{TextTokenizer, pre};
use crate::checkpoint::gguf::metadata::GgufMetadata;
use crate::checkpoint::typed::TypedKeys;
use crate::{Error, Result};

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const MERGES: &str = "tokenizer.ggml.merges";
const BOS_ID: &str = "tokenizer.ggml.bos_token_id";
const EOS_ID: &str = "tokenizer.ggml.eos_token_id";
const SUPPRESSED: &str = "tokenizer.ggml.suppress_tokens";
const ADD_SPACE_PREFIX: &str = "tokenizer.ggml.add_space_prefix";

/// A tokenizer without its added tokens, and the properties that its kind decides.
struct TokenizerKind {
    tokenizer: Tokenizer,
    /// Whether a beginning-of-text token is added if the file does not say.
    add_bos: bool,
    /// Ids of the beginning and the end of a text in a file that names none.
    default_ids: [Option<u32>; 2],
    /// Warnings about keys that are ignored, or whose absence changes the tokens.
    warnings: Vec<String>,
}

/// Builds the tokenizer; `vocab_size` is the number of rows of the embedding.
pub(super) fn build(metadata: GgufMetadata<'_>, vocab_size: usize) -> Result<TextTokenizer> {
    let read: fn(GgufMetadata<'_>, &GgufVocabulary) -> Result<TokenizerKind> = match metadata.string(MODEL)? {
        Some("gpt2") => byte_level,
        Some("llama") => sentencepiece::kind,
        Some(other) => return Err(unsupported(metadata, format!("tokenizer model `{other}` in GGUF"))),
        None => return Err(metadata.missing(MODEL, "`gpt2` or `llama`")),
    };
    let vocabulary = GgufVocabulary::read(metadata, vocab_size)?;
    let TokenizerKind { mut tokenizer, add_bos, default_ids, mut warnings } = read(metadata, &vocabulary)?;
    let Some(eos_token_id) = id(metadata, &vocabulary, EOS_ID, default_ids[1])? else {
        return Err(metadata.missing(EOS_ID, "the id of the end-of-text token"));
    };
    let ends = EndTokens::find(metadata, &vocabulary, eos_token_id)?;
    warnings.extend(ends.warning(&vocabulary));
    if let Some(count @ 1..) = metadata.counts(SUPPRESSED)?.map(|ids| ids.len()) {
        warnings.push(format!(
            "`{SUPPRESSED}` is not obeyed: {count} tokens that llama.cpp never generates may be generated"
        ));
    }

    let failed = |error| Error::Tokenizer(format!("{}: {error}", metadata.path().display()));
    tokenizer.add_tokens(added_tokens(&vocabulary, &ends)).map_err(failed)?;
    let around = Around {
        bos: id(metadata, &vocabulary, BOS_ID, default_ids[0])?,
        add_bos: metadata.boolean("tokenizer.ggml.add_bos_token")?.unwrap_or(add_bos),
        eos: eos_token_id,
        add_eos: metadata.boolean("tokenizer.ggml.add_eos_token")?.unwrap_or(false),
    };
    if around.add_bos && around.bos.is_none() {
        return Err(metadata.missing(BOS_ID, "the id of the token before every text"));
    }
    if let Some(template) = around.template(&vocabulary).map_err(failed)? {
        tokenizer.with_post_processor(Some(template));
    }
    Ok(TextTokenizer { tokenizer, eos_token_id, stop_token_ids: ends.ids, vocab_size, warnings })
}

/// A token id of the metadata; `default` if the file has no such key and the default is a control token.
fn id(
    metadata: GgufMetadata<'_>,
    vocabulary: &GgufVocabulary,
    key: &str,
    default: Option<u32>,
) -> Result<Option<u32>> {
    match metadata.count(key)? {
        Some(id) if id < vocabulary.len() => Ok(Some(id as u32)),
        Some(id) => Err(metadata.error(key, "an id of the vocabulary", &id.to_string())),
        None => Ok(default.filter(|id| (*id as usize) < vocabulary.len() && vocabulary.is_control(*id))),
    }
}

fn unsupported(metadata: GgufMetadata<'_>, what: String) -> Error {
    let path = metadata.path().to_path_buf();
    let hint = "a wrong tokenizer would spoil everything without a word; use the checkpoint's folder with \
                its `tokenizer.json`"
        .to_string();
    Error::Unsupported { path, what, hint }
}

/// GPT-2's kind: words by a named pre-tokenizer, merged in the order of a list.
fn byte_level(metadata: GgufMetadata<'_>, vocabulary: &GgufVocabulary) -> Result<TokenizerKind> {
    let mut warnings = Vec::new();
    let name = match metadata.string(PRE)? {
        Some(name) if !name.is_empty() => name,
        _ => {
            warnings.push(format!(
                "`{PRE}` is missing: texts are split as llama.cpp's `{}` does, which may not be how the model was \
                 trained; convert the model again with a newer llama.cpp, or use the checkpoint's folder",
                pre::DEFAULT
            ));
            pre::DEFAULT
        }
    };
    let Some(pipeline) = pre::pipeline(name)? else {
        return Err(unsupported(metadata, format!("pre-tokenizer `{name}` (`{PRE}`)")));
    };
    if metadata.boolean(ADD_SPACE_PREFIX)? == Some(true) {
        warnings.push(format!(
            "`{ADD_SPACE_PREFIX}` is true and has no effect on a `gpt2` vocabulary, as in llama.cpp: no space is put \
             before a text"
        ));
    }
    let failed = |error| Error::Tokenizer(format!("{}: {error}", metadata.path().display()));
    let merges = merges(metadata, vocabulary, &mut warnings)?;
    let bpe = BPE::builder()
        .vocab_and_merges(vocabulary.to_vocab(), merges)
        .ignore_merges(pipeline.ignore_merges)
        .build()
        .map_err(failed)?;
    let mut tokenizer = Tokenizer::new(bpe);
    tokenizer.with_normalizer(pipeline.normalizer).map_err(failed)?;
    tokenizer.with_pre_tokenizer(Some(pipeline.pre_tokenizer));
    tokenizer.with_decoder(Some(ByteLevelDecoder::new(false, false, false)));
    Ok(TokenizerKind { tokenizer, add_bos: pipeline.add_bos, default_ids: [None; 2], warnings })
}

/// The list of merges. A merge that makes no token is skipped with a warning, and so are the merges that use its
/// result.
fn merges(
    metadata: GgufMetadata<'_>,
    vocabulary: &GgufVocabulary,
    warnings: &mut Vec<String>,
) -> Result<Merges> {
    let Some(list) = metadata.strings(MERGES)? else {
        return Err(metadata.missing(MERGES, "a list of strings"));
    };
    let (mut merges, mut lost) = (Merges::with_capacity(list.len()), HashSet::new());
    let mut passed_over = Vec::new();
    for merge in list {
        let Some((left, right)) = merge.split_once(' ') else {
            return Err(metadata.error(MERGES, "two pieces with a space between", &format!("`{merge}`")));
        };
        let (joined, parts) = (format!("{left}{right}"), [left, right]);
        let is_token = vocabulary.id(&joined).is_some();
        let of_lost = parts.iter().any(|part| lost.contains(*part));
        if of_lost || (!is_token && parts.iter().all(|part| vocabulary.id(part).is_some())) {
            passed_over.push(merge);
            if !is_token {
                lost.insert(joined);
            }
        } else {
            // A merge with a part that is no token would be an error in the model.
            merges.push((left.to_string(), right.to_string()));
        }
    }
    if let Some(first) = passed_over.first() {
        warnings.push(format!(
            "`{MERGES}`: {} make no token of `tokenizer.ggml.tokens`, `{first}` for one, and are passed over; texts with \
             them get other tokens than the model was trained on",
            passed_over.len()
        ));
    }
    Ok(merges)
}

/// The tokens that are found in a text before it is split: control tokens, which are special, and user-defined tokens.
fn added_tokens(vocabulary: &GgufVocabulary, ends: &EndTokens) -> Vec<AddedToken> {
    let added = vocabulary.iter().filter_map(|(id, text)| {
        let special = if ends.by_text.contains(&id) { Some(true) } else { vocabulary.found_first(id) };
        Some(AddedToken::from(text, special?).normalized(false))
    });
    added.collect()
}

/// The tokens before and after every text.
struct Around {
    bos: Option<u32>,
    add_bos: bool,
    eos: u32,
    add_eos: bool,
}

impl Around {
    fn template(&self, vocabulary: &GgufVocabulary) -> tokenizers::Result<Option<TemplateProcessing>> {
        let bos = self.bos.filter(|_| self.add_bos);
        let eos = Some(self.eos).filter(|_| self.add_eos);
        let special: Vec<(&str, u32)> =
            bos.into_iter().chain(eos).map(|id| (vocabulary.text(id), id)).collect();
        if special.is_empty() {
            return Ok(None);
        }
        let [bos, eos] = [bos, eos].map(|id| id.map(|id| vocabulary.text(id)));
        let single: Vec<&str> = bos.into_iter().chain(["$A"]).chain(eos).collect();
        let mut processing = TemplateProcessing::builder();
        processing.try_single(single)?.special_tokens(special);
        Ok(Some(processing.build()?))
    }
}
