//! Llama 2's kind of vocabulary: sentencepiece's pieces with scores, `▁` for spaces, bytes as `<0x41>`.
//!
//! llama.cpp starts with single characters and joins the two neighbours whose piece has the largest score, the left
//! ones first, until no two neighbours form a piece (`llm_tokenizer_spm_session`). That is a BPE with a list of merges:
//!
//! * In every text a piece is joined from the same two parts. Let `l` and `r` be neighbours that form the piece `lr`.
//!   So far nothing was joined across the ends of `lr` or between `l` and `r`. So inside of it the same happened as in
//!   the text `lr` alone: the same pairs in the same order. There the last pair is the only one; it is (l, r).
//! * So a piece gives one merge: the last pair when its own text is split. A piece that its own text does not become
//!   gives none.
//! * Merges are ordered by score, the largest first. If two scores are equal, llama.cpp joins the left pair, but a list
//!   must have an order; the order has no effect unless the pairs may overlap or one makes a part of another.

use std::collections::HashMap;

use tokenizers::decoders::DecoderWrapper;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as DecoderSequence;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Merges};
use tokenizers::normalizers::{Prepend, Replace, Sequence};
use tokenizers::{NormalizerWrapper, Tokenizer};

use super::vocabulary::GgufVocabulary;
use super::{ADD_SPACE_PREFIX, TokenizerKind, id, unsupported};
use crate::checkpoint::gguf::metadata::GgufMetadata;
use crate::checkpoint::typed::TypedKeys;
use crate::{Error, Result};

const SCORES: &str = "tokenizer.ggml.scores";
const TOKENS: &str = "tokenizer.ggml.tokens";
const UNKNOWN_ID: &str = "tokenizer.ggml.unknown_token_id";
const REMOVE_SPACES: &str = "tokenizer.ggml.remove_extra_whitespaces";

/// The character for a space.
const SPACE: &str = "\u{2581}";

/// Reads the tokenizer.
pub(super) fn kind(metadata: GgufMetadata<'_>, vocabulary: &GgufVocabulary) -> Result<TokenizerKind> {
    let missing: Vec<String> = (0..=255u8)
        .map(|byte| format!("<0x{byte:02X}>"))
        .filter(|text| vocabulary.id(text).is_none())
        .collect();
    if let Some(first) = missing.first() {
        let found = format!("no `{first}` and {} others", missing.len() - 1);
        return Err(metadata.error(TOKENS, "the 256 tokens of bytes, `<0x00>` to `<0xFF>`", &found));
    }
    let failed = |error| Error::Tokenizer(format!("{}: {error}", metadata.path().display()));
    let pieces = scores(metadata, vocabulary)?;
    let (merges, fraction) = (merges(metadata, vocabulary, &pieces)?, unigram_warning(&pieces));
    let mut bpe =
        BPE::builder().vocab_and_merges(vocabulary.to_vocab(), merges).byte_fallback(true).fuse_unk(true);
    if let Some(unknown) = id(metadata, vocabulary, UNKNOWN_ID, None)? {
        bpe = bpe.unk_token(vocabulary.text(unknown).to_string());
    }
    let mut tokenizer = Tokenizer::new(bpe.build().map_err(failed)?);

    let prefix = metadata.boolean(ADD_SPACE_PREFIX)?.unwrap_or(true);
    let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
    let mut decoders: Vec<DecoderWrapper> = vec![
        Replace::new(SPACE, " ").map_err(failed)?.into(),
        ByteFallback::new().into(),
        Fuse::new().into(),
    ];
    if prefix {
        normalizers.push(Prepend::new(SPACE.to_string()).into());
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    normalizers.push(Replace::new(" ", SPACE).map_err(failed)?.into());
    tokenizer.with_normalizer(Some(Sequence::new(normalizers))).map_err(failed)?;
    tokenizer.with_decoder(Some(DecoderSequence::new(decoders)));

    let mut warnings: Vec<String> = fraction.into_iter().collect();
    if metadata.boolean(REMOVE_SPACES)? == Some(true) {
        warnings.push(format!(
            "`{REMOVE_SPACES}` is true and has no effect on a `llama` vocabulary, as in llama.cpp: spaces stay as they are"
        ));
    }
    Ok(TokenizerKind { tokenizer, add_bos: true, default_ids: [Some(1), Some(2)], warnings })
}

/// Two parts that become a piece.
struct Merge<'a> {
    left: &'a str,
    right: &'a str,
    score: f64,
}

impl Merge<'_> {
    fn piece(&self) -> String {
        format!("{}{}", self.left, self.right)
    }
}

/// The list of merges that joins the same pairs as the scores.
fn merges(
    metadata: GgufMetadata<'_>,
    vocabulary: &GgufVocabulary,
    pieces: &HashMap<&str, f64>,
) -> Result<Merges> {
    let merges = ordered(pieces);
    for merge in &merges {
        if let Some(part) = [merge.left, merge.right].into_iter().find(|part| vocabulary.id(part).is_none()) {
            let what = format!("the piece `{}` of `{part}`, which is no piece (`{TOKENS}`),", merge.piece());
            return Err(unsupported(metadata, what));
        }
    }
    if let Some((a, b)) = undecided(&merges) {
        let expected = "scores that say which of two pieces is joined first";
        let found = format!("{} for both `{}` and `{}`", a.score, a.piece(), b.piece());
        let hint = "use the checkpoint's folder with its `tokenizer.json`";
        return Err(metadata.error(SCORES, expected, &format!("{found}; hint: {hint}")));
    }
    Ok(merges.into_iter().map(|merge| (merge.left.to_string(), merge.right.to_string())).collect())
}

/// A warning if the scores are logarithms of probabilities: sentencepiece's other kind does not join pieces.
fn unigram_warning(pieces: &HashMap<&str, f64>) -> Option<String> {
    let fractions = pieces.iter().filter(|(_, score)| score.fract() != 0.0 && score.is_finite());
    // Hash maps have no order.
    let (text, score) = fractions.min_by_key(|(text, _)| **text)?;
    Some(format!(
        "`{SCORES}` are no ranks ({score} for `{text}`), so this may be a vocabulary of sentencepiece's unigram kind; pieces \
         are joined as in llama.cpp, which gives other tokens than the model was trained on"
    ))
}

/// The merge of each piece that has one, the largest score first.
fn ordered<'a>(pieces: &HashMap<&'a str, f64>) -> Vec<Merge<'a>> {
    let merge = |(text, score): (&&'a str, &f64)| {
        let (left, right) = last_pair(text, pieces)?;
        Some(Merge { left, right, score: *score })
    };
    let mut merges: Vec<Merge<'a>> = pieces.iter().filter_map(merge).collect();
    merges
        .sort_by(|a, b| b.score.total_cmp(&a.score).then_with(|| (a.left, a.right).cmp(&(b.left, b.right))));
    merges
}

/// Scores of the tokens to which texts are joined. A token that is found before a text is split is never joined, unless
/// its `▁` comes from spaces.
fn scores<'a>(metadata: GgufMetadata<'_>, vocabulary: &'a GgufVocabulary) -> Result<HashMap<&'a str, f64>> {
    let Some(scores) = metadata.numbers(SCORES)? else {
        return Err(metadata.missing(SCORES, "a list of numbers, one a token"));
    };
    if scores.len() != vocabulary.len() || scores.iter().any(|score| score.is_nan()) {
        let expected = format!("{} numbers, one a token", vocabulary.len());
        let found = match scores.len() == vocabulary.len() {
            true => "NaN".to_string(),
            false => scores.len().to_string(),
        };
        return Err(metadata.error(SCORES, &expected, &found));
    }
    let joined = |id: u32, text: &str| vocabulary.found_first(id).is_none() || text.contains(SPACE);
    let pieces = vocabulary.iter().filter(|(id, text)| joined(*id, text));
    Ok(pieces.map(|(id, text)| (text, scores[id as usize])).collect())
}

/// The last pair that is joined when the characters of the piece `text` are joined; `None` if they become something
/// else.
fn last_pair<'a>(text: &'a str, pieces: &HashMap<&str, f64>) -> Option<(&'a str, &'a str)> {
    let mut ends: Vec<usize> = text.char_indices().map(|(start, _)| start).chain([text.len()]).collect();
    while ends.len() > 3 {
        let mut best: Option<(f64, usize)> = None;
        for (i, span) in ends.windows(3).enumerate() {
            let Some(score) = pieces.get(&text[span[0]..span[2]]) else { continue };
            if best.is_none_or(|(greatest, _)| *score > greatest) {
                best = Some((*score, i));
            }
        }
        ends.remove(best?.1 + 1);
    }
    let [_, middle, _] = ends[..] else { return None };
    Some(text.split_at(middle))
}

/// Two merges of equal score whose order changes the result; `merges` are sorted by score.
fn undecided<'m, 'a>(merges: &'m [Merge<'a>]) -> Option<(&'m Merge<'a>, &'m Merge<'a>)> {
    let mut part_of = HashMap::<&str, &Merge<'a>>::new();
    // The one with the largest score is inserted last and stays.
    for merge in merges.iter().rev() {
        part_of.extend([(merge.left, merge), (merge.right, merge)]);
    }
    for equal in merges.chunk_by(|a, b| a.score == b.score).filter(|equal| equal.len() > 1) {
        let mut by_right = HashMap::<&str, Vec<&Merge<'a>>>::new();
        for merge in equal {
            by_right.entry(merge.right).or_default().push(merge);
        }
        for merge in equal {
            let overlapping = by_right.get(merge.left).into_iter().flatten();
            let overlapping = overlapping.copied().find(|other| !std::ptr::eq(*other, merge));
            let whole = part_of.get(merge.piece().as_str()).copied();
            let whole = whole.filter(|whole| whole.score >= merge.score);
            if let Some(other) = overlapping.or(whole) {
                return Some((other, merge));
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;
    use tokenizers::models::bpe::Vocab;

    use super::*;

    /// What llama.cpp joins, pair by pair: the greatest score first, then the leftmost.
    fn joined(text: &str, pieces: &HashMap<&str, f64>) -> Vec<String> {
        let mut parts: Vec<String> = text.chars().map(String::from).collect();
        loop {
            let pairs = parts.windows(2).enumerate().rev();
            let scored = pairs.filter_map(|(i, pair)| Some((*pieces.get(pair.concat().as_str())?, i)));
            // Of equal ones the last, which is the leftmost.
            let Some((_, i)) = scored.max_by(|a, b| a.0.total_cmp(&b.0)) else { return parts };
            let right = parts.remove(i + 1);
            parts[i].push_str(&right);
        }
    }

    fn random_text(draw: &mut ChaCha8Rng, most: usize) -> String {
        let length = draw.random_range(1..=most);
        (0..length).map(|_| ['a', 'b', 'c'][draw.random_range(0..3)]).collect()
    }

    /// The proof at the head of this file, tried: vocabularies of random pieces, in which parts may score less than what
    /// they make, and scores may be equal.
    #[test]
    fn a_list_of_merges_joins_what_scores_join() {
        let mut draw = ChaCha8Rng::seed_from_u64(29);
        let (mut equal, mut refused) = (0, 0);
        for round in 0..600 {
            let mut texts: Vec<String> = ["a", "b", "c"].map(String::from).into();
            texts.extend((0..draw.random_range(3..40)).map(|_| random_text(&mut draw, 6)));
            texts.sort_unstable();
            texts.dedup();
            let few = round % 2 == 0;
            let mut score = || if few { f64::from(draw.random_range(0..30)) } else { draw.random() };
            let pieces: HashMap<&str, f64> = texts.iter().map(|text| (text.as_str(), score())).collect();
            let merges = ordered(&pieces);
            if undecided(&merges).is_some() {
                refused += 1;
                continue;
            }
            equal += usize::from(merges.chunk_by(|a, b| a.score == b.score).any(|equal| equal.len() > 1));
            let ids: Vocab = texts.iter().cloned().zip(0..).collect();
            let list: Merges = merges.iter().map(|m| (m.left.to_string(), m.right.to_string())).collect();
            let tokenizer = Tokenizer::new(BPE::builder().vocab_and_merges(ids, list).build().unwrap());
            for _ in 0..40 {
                let text = random_text(&mut draw, 24);
                let found = tokenizer.encode(text.as_str(), false).unwrap();
                assert_eq!(found.get_tokens(), joined(&text, &pieces), "{text} by {pieces:?}");
            }
        }
        // Both kinds were met.
        assert!(equal > 20 && refused > 20, "{equal} {refused}");
    }
}
