//! watsonx's parameters of a text generation.

use crate::generate::{Request, Sampling};
use crate::serve::api_error::ApiError;
use crate::serve::generation::Stopping;
use crate::serve::params::Fields;
use crate::serve::state::AppState;
use serde_json::{Map, Value};

const PREFIX: &str = "parameters.";
/// Tokens to generate if the request does not say.
const DEFAULT_MAX_NEW_TOKENS: usize = 20;
/// Most stop sequences.
const MAX_STOPS: usize = 6;
/// Most likeliest tokens with their log-probabilities.
const MAX_TOP_TOKENS: usize = 5;

/// How to continue a text, and what to return with the answer.
#[derive(Debug, Clone)]
pub(super) struct GenerationParameters {
    pub max_new_tokens: usize,
    min_new_tokens: usize,
    sampling: Sampling,
    /// The seed if tokens are sampled.
    pub seed: Option<u64>,
    pub stopping: Stopping,
    /// Seconds.
    time_limit: f64,
    /// Most tokens of the text.
    pub truncate: Option<usize>,
    pub returned: Returned,
}

/// What an answer has in addition to its text.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Returned {
    pub input_text: bool,
    pub input_tokens: bool,
    pub generated_tokens: bool,
    pub token_logprobs: bool,
    pub top_n_tokens: usize,
}

impl GenerationParameters {
    /// Reads the parameters of a request's body. Decoding is greedy if it does not say.
    ///
    /// # Errors
    /// Returns 400 if a value is invalid.
    pub fn read(state: &AppState, body: &Fields) -> Result<Self, ApiError> {
        let empty = Map::new();
        let fields = body.object("parameters", PREFIX)?.unwrap_or(Fields::new(&empty));
        let max_new_tokens =
            fields.count("max_new_tokens", 0..=usize::MAX)?.unwrap_or(DEFAULT_MAX_NEW_TOKENS);
        let min_new_tokens = fields.count("min_new_tokens", 0..=usize::MAX)?.unwrap_or(0);
        if min_new_tokens > max_new_tokens {
            let problem =
                format!("expected at most {max_new_tokens}, as `max_new_tokens` is, found {min_new_tokens}");
            return Err(ApiError::invalid(fields.name("min_new_tokens"), problem));
        }
        let most = state.client.limits().sequence_tokens;
        if max_new_tokens > most {
            let problem =
                format!("expected at most {most}, as many as a sequence may have, found {max_new_tokens}");
            return Err(ApiError::invalid(fields.name("max_new_tokens"), problem));
        }
        let (sampling, is_sampled) = sampling(&fields)?;
        let time_limit = fields.count("time_limit", 1..=usize::MAX)?;
        let truncate = fields.count("truncate_input_tokens", 0..=usize::MAX)?;
        Ok(Self {
            max_new_tokens,
            min_new_tokens,
            seed: is_sampled.then_some(sampling.seed),
            sampling,
            stopping: Stopping {
                sequences: fields.strings("stop_sequences", MAX_STOPS)?.unwrap_or_default(),
                include: fields.boolean("include_stop_sequence")?.unwrap_or(true),
                show_special: false,
            },
            time_limit: time_limit.map_or(f64::MAX, |milliseconds| milliseconds as f64 / 1000.0),
            // In watsonx, 0 means that the text is not cut.
            truncate: truncate.filter(|tokens| *tokens > 0),
            returned: returned(&fields)?,
        })
    }

    /// The request for a text.
    pub fn request(&self, state: &AppState, tokens: Vec<u32>) -> Request {
        let returned = self.returned;
        let with_logprobs = returned.token_logprobs || returned.top_n_tokens > 0;
        Request {
            scored: if with_logprobs && returned.input_tokens { tokens.len() } else { 0 },
            tokens,
            max_new_tokens: self.max_new_tokens,
            min_new_tokens: self.min_new_tokens,
            stop_token_ids: state.tokenizer.stop_token_ids.clone().into(),
            sampling: self.sampling.clone(),
            logprobs: with_logprobs.then_some(returned.top_n_tokens),
            deadline: state.deadline(self.time_limit),
            ..Request::default()
        }
    }
}

/// How tokens are chosen, and whether they are sampled.
fn sampling(fields: &Fields) -> Result<(Sampling, bool), ApiError> {
    let is_sampled = match fields.string("decoding_method")? {
        None | Some("greedy") => false,
        Some("sample") => true,
        Some(other) => {
            let problem = format!("expected \"greedy\" or \"sample\", found {other:?}");
            return Err(ApiError::invalid(fields.name("decoding_method"), problem));
        }
    };
    let temperature = fields.number("temperature", 0.0..=2.0)?.unwrap_or(1.0);
    let top_p = fields.number("top_p", 0.0..=1.0)?.unwrap_or(1.0);
    let top_k = fields.count("top_k", 0..=usize::MAX)?.unwrap_or(0);
    let seed = fields.integer("random_seed", 0..=i64::MAX)?;
    let repetition_penalty = fields.number("repetition_penalty", 1.0..=2.0)?.unwrap_or(1.0);
    let mut sampling = Sampling { repetition_penalty, ..Sampling::default() };
    if is_sampled {
        sampling.temperature = temperature;
        // In the protocol, 0 means all.
        sampling.top_p = if top_p == 0.0 { 1.0 } else { top_p };
        sampling.top_k = top_k;
        // A client can repeat the answer by the seed in it, because JSON represents whole numbers up to 2^53 exactly.
        sampling.seed = seed.map_or_else(|| u64::from(rand::random::<u32>()), |seed| seed.unsigned_abs());
    }
    Ok((sampling, is_sampled && temperature > 0.0))
}

fn returned(fields: &Fields) -> Result<Returned, ApiError> {
    let Some(options) = fields.object("return_options", "parameters.return_options.")? else {
        return Ok(Returned::default());
    };
    let flag = |key| options.boolean(key).map(|value| value.unwrap_or(false));
    let top_n_tokens = match options.get("top_n_tokens") {
        // The SDK sends a boolean.
        Some(Value::Bool(one)) => usize::from(*one),
        _ => options.count("top_n_tokens", 0..=MAX_TOP_TOKENS)?.unwrap_or(0),
    };
    Ok(Returned {
        input_text: flag("input_text")?,
        input_tokens: flag("input_tokens")?,
        generated_tokens: flag("generated_tokens")?,
        token_logprobs: flag("token_logprobs")?,
        top_n_tokens,
    })
}
