//! CompletionParameters that completions and chat completions share.

use crate::checkpoint::TextTokenizer;
use crate::generate::{Choices, Request, Sampling};
use crate::serve::api_error::ApiError;
use crate::serve::choices::{AnswerConstraint, check_room};
use crate::serve::generation::Stopping;
use crate::serve::params::{Fields, OVER_0};
use crate::serve::state::AppState;
use serde_json::Value;
use std::sync::Arc;

/// Most choices of a prompt.
const MAX_CHOICES: usize = 128;
/// Most stop sequences. OpenAI's own models allow 4, and clients of others send more.
const MAX_STOPS: usize = 16;
/// Most banned words.
const MAX_BAD_WORDS: usize = 1024;

/// How to continue each prompt.
#[derive(Debug, Clone)]
pub(super) struct CompletionParameters {
    /// Number of choices of each prompt.
    pub n: usize,
    pub min_new_tokens: usize,
    pub stopping: Stopping,
    stop_token_ids: Arc<[u32]>,
    sampling: Sampling,
    /// The possible answers if they are constrained, and the field that constrains them.
    choices: Option<(String, Arc<Choices>)>,
    pub stream: bool,
    /// Whether the last event of a stream has the usage.
    pub include_usage: bool,
}

impl CompletionParameters {
    /// # Errors
    /// Returns 400 if a value is invalid.
    pub fn read(state: &AppState, fields: &Fields) -> Result<Self, ApiError> {
        let n = fields.count("n", 1..=MAX_CHOICES)?.unwrap_or(1);
        if let Some(best_of) = fields.count("best_of", 1..=MAX_CHOICES)?
            && best_of != n
        {
            let problem = format!("expected {n}, as `n` is: choices are not ranked here; found {best_of}");
            return Err(ApiError::invalid("best_of", problem));
        }
        let stream = fields.boolean("stream")?.unwrap_or(false);
        let stream_options = fields.object("stream_options", "stream_options.")?;
        if stream_options.is_some() && !stream {
            return Err(ApiError::invalid(
                "stream_options",
                "expected it with `stream` true alone, found it without",
            ));
        }
        let include_usage = stream_options.map(|o| o.boolean("include_usage")).transpose()?.flatten();
        fields.string("user")?;
        let min_new_tokens = fields.count("min_tokens", 0..=usize::MAX)?.unwrap_or(0);
        let sequences = stops(fields)?;
        let stop_token_ids = stop_token_ids(state, fields, &sequences)?;
        Ok(Self {
            n,
            min_new_tokens,
            choices: choices(state, fields, min_new_tokens, &stop_token_ids)?,
            stopping: Stopping {
                sequences,
                include: fields.boolean("include_stop_str_in_output")?.unwrap_or(false),
                show_special: !fields.boolean("skip_special_tokens")?.unwrap_or(true),
            },
            stop_token_ids,
            sampling: sampling(state, fields)?,
            stream,
            include_usage: include_usage.unwrap_or(false),
        })
    }

    /// Most tokens to generate: the request's value, else `default` or as many as the longest choice needs.
    ///
    /// # Errors
    /// Returns 400 about `key` if the number is too small for a choice.
    pub fn max_tokens(&self, key: &str, requested: Option<usize>, default: usize) -> Result<usize, ApiError> {
        let longest = self.choices.as_ref().map_or(0, |(_, choices)| choices.longest());
        let most = requested.unwrap_or(default.max(longest));
        if let Some((field, choices)) = &self.choices {
            check_room(key, most, field, choices)?;
        }
        Ok(most)
    }

    /// The request for choice `choice` of a prompt.
    pub fn request(
        &self,
        state: &AppState,
        tokens: Vec<u32>,
        max_new_tokens: usize,
        choice: usize,
    ) -> Request {
        let mut sampling = self.sampling.clone();
        sampling.seed = sampling.seed.wrapping_add(choice as u64);
        Request {
            tokens,
            max_new_tokens,
            min_new_tokens: self.min_new_tokens.min(max_new_tokens),
            stop_token_ids: self.stop_token_ids.clone(),
            sampling,
            choices: self.choices.as_ref().map(|(_, choices)| choices.clone()),
            deadline: state.deadline(f64::MAX),
            ..Request::default()
        }
    }
}

/// `truncate_prompt_tokens`: the number of last tokens of a longer prompt that are kept; `room` is the number of tokens
/// for text and answer together.
pub(super) fn truncation(fields: &Fields, room: usize, max_tokens: usize) -> Result<Option<usize>, ApiError> {
    match fields.integer("truncate_prompt_tokens", -1..=i64::MAX)? {
        // In vLLM, -1 means as many as there is room for.
        Some(-1) => Ok(Some(room.saturating_sub(max_tokens).max(1))),
        Some(0) => Err(ApiError::invalid("truncate_prompt_tokens", "expected -1, or 1 or more, found 0")),
        other => Ok(other.and_then(|most| usize::try_from(most).ok())),
    }
}

/// `stop`: a string, or a list of them.
fn stops(fields: &Fields) -> Result<Vec<String>, ApiError> {
    match fields.get("stop") {
        Some(Value::String(stop)) if !stop.is_empty() => Ok(vec![stop.clone()]),
        Some(value @ Value::String(_)) => Err(fields.wrong("stop", "a string that is not empty", value)),
        _ => Ok(fields.strings("stop", MAX_STOPS)?.unwrap_or_default()),
    }
}

/// The checkpoint's tokens that end a text, unless `ignore_eos` is true, and those of the request. A special token
/// among the stop sequences is included, because an answer does not show its text.
fn stop_token_ids(state: &AppState, fields: &Fields, sequences: &[String]) -> Result<Arc<[u32]>, ApiError> {
    let ignore = fields.boolean("ignore_eos")?.unwrap_or(false);
    let mut ids = if ignore { Vec::new() } else { state.tokenizer.stop_token_ids.clone() };
    ids.extend(fields.token_ids("stop_token_ids", state.vocabulary)?.unwrap_or_default());
    let added = state.tokenizer.tokenizer.get_added_tokens_decoder();
    let special = |(id, token): (&u32, &tokenizers::AddedToken)| {
        (token.special && sequences.contains(&token.content)).then_some(*id)
    };
    ids.extend(added.iter().filter_map(special));
    Ok(ids.into())
}

/// The possible answers, and the field that lists them.
fn choices(
    state: &AppState,
    fields: &Fields,
    min_tokens: usize,
    stop_token_ids: &[u32],
) -> Result<Option<(String, Arc<Choices>)>, ApiError> {
    let Some(wanted) = AnswerConstraint::read(fields)? else { return Ok(None) };
    for key in ["allowed_token_ids", "bad_words"] {
        if fields.get(key).and_then(Value::as_array).is_some_and(|items| !items.is_empty()) {
            let problem =
                format!("expected it without `{}`, which says what may come; found both", wanted.field);
            return Err(ApiError::invalid(key, problem));
        }
    }
    let choices = wanted.tokenized(state, min_tokens, stop_token_ids)?;
    Ok(Some((wanted.field, choices)))
}

fn sampling(state: &AppState, fields: &Fields) -> Result<Sampling, ApiError> {
    let number = |key, range, default| fields.number(key, range).map(|value| value.unwrap_or(default));
    let top_k = fields.integer("top_k", -1..=i64::from(u32::MAX))?.unwrap_or(0);
    let seed = fields.integer("seed", i64::MIN..=i64::MAX)?;
    Ok(Sampling {
        temperature: number("temperature", 0.0..=2.0, 1.0)?,
        top_p: number("top_p", OVER_0..=1.0, 1.0)?,
        // In vLLM, -1 means all.
        top_k: usize::try_from(top_k).unwrap_or(0),
        min_p: number("min_p", 0.0..=1.0, 0.0)?,
        repetition_penalty: number("repetition_penalty", OVER_0..=100.0, 1.0)?,
        presence_penalty: number("presence_penalty", -2.0..=2.0, 0.0)?,
        frequency_penalty: number("frequency_penalty", -2.0..=2.0, 0.0)?,
        logit_bias: logit_bias(state, fields)?,
        allowed: allowed(state, fields)?,
        banned: bad_words(state, fields)?,
        seed: seed.map_or_else(rand::random, |seed| seed as u64),
    })
}

/// `logit_bias`: token ids, as strings, and the numbers that are added to their logits.
fn logit_bias(state: &AppState, fields: &Fields) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(object) = fields.object("logit_bias", "logit_bias.")? else { return Ok(Vec::new()) };
    let bias = |(key, _): (&String, &Value)| {
        let id = key.parse::<u32>().ok().filter(|id| *id < state.vocabulary);
        let Some(id) = id else {
            let expected =
                format!("token ids from 0 to {} as keys, found {key:?}", state.vocabulary.saturating_sub(1));
            return Err(ApiError::invalid("logit_bias", format!("expected {expected}")));
        };
        Ok((id, object.number(key, -100.0..=100.0)?.unwrap_or(0.0) as f32))
    };
    object.entries().map(bias).collect()
}

/// `allowed_token_ids`: the only tokens that may be generated.
fn allowed(state: &AppState, fields: &Fields) -> Result<Option<Arc<[u32]>>, ApiError> {
    let ids = fields.token_ids("allowed_token_ids", state.vocabulary)?;
    Ok(ids.filter(|ids| !ids.is_empty()).map(Arc::from))
}

/// `bad_words`: texts that must not be generated.
fn bad_words(state: &AppState, fields: &Fields) -> Result<Arc<[Vec<u32>]>, ApiError> {
    let words = fields.strings("bad_words", MAX_BAD_WORDS)?.unwrap_or_default();
    if words.iter().any(|word| word.trim_start().is_empty()) {
        return Err(ApiError::invalid("bad_words", "expected words of a token or more, found spaces alone"));
    }
    Ok(spellings(&state.tokenizer, &words)?.into())
}

/// The tokens of each word by itself, after a space, and after a line break (which differs if a tokenizer adds a space
/// before a text). vLLM has the first two, and the second only if it has as many tokens as the first
/// (`vllm/sampling_params.py`), so it may generate " the" although "the" is banned.
fn spellings(tokenizer: &TextTokenizer, words: &[String]) -> crate::Result<Vec<Vec<u32>>> {
    let mut sequences: Vec<Vec<u32>> = Vec::new();
    let line_break = tokenizer.encode("\n", false)?;
    for word in words {
        let word = word.trim_start();
        let after_line_break = tokenizer.encode(&format!("\n{word}"), false)?;
        let inside = after_line_break.strip_prefix(&line_break[..]).unwrap_or_default().to_vec();
        for sequence in
            [tokenizer.encode(word, false)?, tokenizer.encode(&format!(" {word}"), false)?, inside]
        {
            // A sequence that ends with a banned one is banned already.
            if !sequence.is_empty() && !sequences.iter().any(|banned| sequence.ends_with(banned)) {
                sequences.push(sequence);
            }
        }
    }
    Ok(sequences)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::testing::{byte_fallback, byte_level};

    #[test]
    fn bad_words_are_banned_in_all_spellings() {
        let (level, fallback) = (byte_level(), byte_fallback());
        let words = ["ab".to_owned(), " b".to_owned()];
        // A space is a token of its own; the second word ends the first, which may come inside another all the same.
        assert_eq!(spellings(&level, &words).unwrap(), [vec![97, 98], vec![98]]);
        let id = |piece: &str| fallback.tokenizer.token_to_id(piece).unwrap();
        let found = spellings(&fallback, &words[1..]).unwrap();
        for expected in [vec![id("\u{2581}"), id("b")], vec![id("b")]] {
            let banned = |sequence: &Vec<u32>| expected.ends_with(sequence);
            assert!(found.iter().any(banned), "{expected:?} is not banned by {found:?}");
        }
    }
}
