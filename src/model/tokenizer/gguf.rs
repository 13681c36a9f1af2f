//! A tokenizer from GGUF metadata.
//!
//! candle-core has `TokenizerFromGguf`, which does this for a few models. It takes every pre-tokenizer
//! that it doesn't know for GPT-2's, with a space before the text, reads `unk_token_id`-like keys that
//! llama.cpp does not write, and makes user-defined tokens special; so the parts are put together here.

use tokenizers::decoders::byte_level::ByteLevel as ByteLevelDecoder;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Tokenizer};

use super::TextTokenizer;
use super::pre;
use crate::model::gguf::metadata::Metadata;
use crate::{Error, Result};

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TOKEN_TYPE: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const BOS_ID: &str = "tokenizer.ggml.bos_token_id";
const EOS_ID: &str = "tokenizer.ggml.eos_token_id";
/// Ends of a turn and of a message, which stop generation too.
const OTHER_END_IDS: [&str; 2] = ["tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];

// `tokenizer.ggml.token_type`
const UNKNOWN: usize = 2;
const CONTROL: usize = 3;
const USER_DEFINED: usize = 4;

/// Builds the tokenizer; `vocab_size` is the number of rows of the embedding.
pub(super) fn build(metadata: Metadata<'_>, vocab_size: usize) -> Result<TextTokenizer> {
    match metadata.string(MODEL)? {
        Some("gpt2") => {}
        Some(other) => return Err(unsupported(metadata, format!("tokenizer model `{other}` in GGUF"))),
        None => return Err(metadata.missing(MODEL, "`gpt2`")),
    }
    let Some(pre_name) = metadata.string(PRE)? else {
        let expected = "the name of a pre-tokenizer (convert the model again, with a newer llama.cpp)";
        return Err(metadata.missing(PRE, expected));
    };
    let Some(pipeline) = pre::pipeline(pre_name)? else {
        let what = format!("pre-tokenizer `{pre_name}` (`{PRE}`)");
        return Err(unsupported(metadata, what));
    };
    let Some(tokens) = metadata.strings(TOKENS)? else {
        return Err(metadata.missing(TOKENS, "a list of strings"));
    };
    if tokens.len() > vocab_size {
        let expected = format!("at most {vocab_size} tokens, the rows of `token_embd.weight`");
        return Err(metadata.error(TOKENS, &expected, &tokens.len().to_string()));
    }

    let failed = |error| Error::Tokenizer(format!("{}: {error}", metadata.path().display()));
    let bpe = BPE::builder()
        .vocab_and_merges(vocabulary(metadata, &tokens)?, merges(metadata)?)
        .ignore_merges(pipeline.ignore_merges)
        .build()
        .map_err(failed)?;
    let mut tokenizer = Tokenizer::new(bpe);
    tokenizer.with_normalizer(pipeline.normalizer).map_err(failed)?;
    tokenizer.with_pre_tokenizer(Some(pipeline.pre_tokenizer));
    tokenizer.with_decoder(Some(ByteLevelDecoder::new(false, false, false)));
    tokenizer.add_tokens(added_tokens(metadata, &tokens)?).map_err(failed)?;

    let id = |key: &str| match metadata.count(key)? {
        Some(id) if id < tokens.len() => Ok(Some((tokens[id], id as u32))),
        Some(id) => Err(metadata.error(key, "an id of the vocabulary", &id.to_string())),
        None => Ok(None),
    };
    let Some((eos, eos_token_id)) = id(EOS_ID)? else {
        return Err(metadata.missing(EOS_ID, "the id of the end-of-text token"));
    };
    let add_bos = metadata.boolean("tokenizer.ggml.add_bos_token")?.unwrap_or(pipeline.add_bos);
    let add_eos = metadata.boolean("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
    let bos = match id(BOS_ID)? {
        None if add_bos => return Err(metadata.missing(BOS_ID, "the id of the token before every text")),
        bos => bos,
    };
    let (bos, eos) = (bos.filter(|_| add_bos), add_eos.then_some((eos, eos_token_id)));
    if let Some(template) = template(bos, eos).map_err(failed)? {
        tokenizer.with_post_processor(Some(template));
    }

    let mut stop_token_ids = vec![eos_token_id];
    for key in OTHER_END_IDS {
        if let Some((_, id)) = id(key)?
            && !stop_token_ids.contains(&id)
        {
            stop_token_ids.push(id);
        }
    }
    Ok(TextTokenizer { tokenizer, eos_token_id, stop_token_ids, vocab_size, warnings: Vec::new() })
}

fn unsupported(metadata: Metadata<'_>, what: String) -> Error {
    let path = metadata.path().to_path_buf();
    let hint = "a wrong tokenizer would spoil everything without a word; use the checkpoint's folder with \
                its `tokenizer.json`"
        .to_string();
    Error::Unsupported { path, what, hint }
}

fn vocabulary(metadata: Metadata<'_>, tokens: &[&str]) -> Result<Vocab> {
    let mut vocabulary = Vocab::with_capacity(tokens.len());
    for (id, token) in tokens.iter().enumerate() {
        if let Some(first) = vocabulary.insert((*token).to_string(), id as u32) {
            let found = format!("`{token}` as {first} and {id}");
            return Err(metadata.error(TOKENS, "each token once", &found));
        }
    }
    Ok(vocabulary)
}

fn merges(metadata: Metadata<'_>) -> Result<Merges> {
    let Some(merges) = metadata.strings(MERGES)? else {
        return Err(metadata.missing(MERGES, "a list of strings"));
    };
    let split = |merge: &&str| match merge.split_once(' ') {
        Some((left, right)) => Ok((left.to_string(), right.to_string())),
        None => Err(metadata.error(MERGES, "two pieces with a space between", &format!("`{merge}`"))),
    };
    merges.iter().map(split).collect()
}

/// The tokens that are found in a text before it is split: control tokens, which are special, and
/// user-defined ones.
fn added_tokens(metadata: Metadata<'_>, tokens: &[&str]) -> Result<Vec<AddedToken>> {
    let Some(types) = metadata.counts(TOKEN_TYPE)? else {
        return Err(metadata.missing(TOKEN_TYPE, "a list of types, one a token"));
    };
    if types.len() != tokens.len() {
        let expected = format!("{} types, one a token", tokens.len());
        return Err(metadata.error(TOKEN_TYPE, &expected, &types.len().to_string()));
    }
    let added = tokens.iter().zip(types).filter_map(|(token, kind)| {
        let special = match kind {
            UNKNOWN | CONTROL => true,
            USER_DEFINED => false,
            _ => return None,
        };
        Some(AddedToken::from(*token, special).normalized(false))
    });
    Ok(added.collect())
}

/// What goes before and after every text.
fn template(
    bos: Option<(&str, u32)>,
    eos: Option<(&str, u32)>,
) -> tokenizers::Result<Option<TemplateProcessing>> {
    let special: Vec<(&str, u32)> = bos.into_iter().chain(eos).collect();
    if special.is_empty() {
        return Ok(None);
    }
    let (bos, eos) = (bos.map(|(token, _)| token), eos.map(|(token, _)| token));
    let single: Vec<&str> = bos.into_iter().chain(["$A"]).chain(eos).collect();
    let mut processing = TemplateProcessing::builder();
    processing.try_single(single)?.special_tokens(special);
    Ok(Some(processing.build()?))
}
