//! Parameters that completions and chat completions share.

use crate::generate::{Request, Sampling};
use crate::serve::app::Shared;
use crate::serve::failure::Failure;
use crate::serve::generation::Stopping;
use crate::serve::params::{Fields, OVER_0};
use serde_json::Value;
use std::sync::Arc;

/// Most choices of a prompt.
const CHOICES: usize = 128;
/// Most stop sequences.
const STOPS: usize = 4;

/// How to go on from each prompt.
#[derive(Debug, Clone)]
pub(super) struct Parameters {
    /// Choices of each prompt.
    pub n: usize,
    pub min_new_tokens: usize,
    pub stopping: Stopping,
    stop_token_ids: Arc<[u32]>,
    sampling: Sampling,
    pub stream: bool,
    /// Whether a stream ends with its usage.
    pub include_usage: bool,
}

impl Parameters {
    /// # Errors
    /// 400 of a value that can't be taken.
    pub fn read(app: &Shared, fields: &Fields) -> Result<Self, Failure> {
        let n = fields.count("n", 1..=CHOICES)?.unwrap_or(1);
        if let Some(best_of) = fields.count("best_of", 1..=CHOICES)?
            && best_of != n
        {
            let problem = format!("expected {n}, as `n` is: choices are not ranked here; found {best_of}");
            return Err(Failure::invalid("best_of", problem));
        }
        let stream = fields.boolean("stream")?.unwrap_or(false);
        let stream_options = fields.object("stream_options", "stream_options.")?;
        if stream_options.is_some() && !stream {
            return Err(Failure::invalid(
                "stream_options",
                "expected it with `stream` true alone, found it without",
            ));
        }
        let include_usage = stream_options.map(|o| o.boolean("include_usage")).transpose()?.flatten();
        fields.string("user")?;
        Ok(Self {
            n,
            min_new_tokens: fields.count("min_tokens", 0..=usize::MAX)?.unwrap_or(0),
            stopping: Stopping {
                sequences: stops(fields)?,
                include: fields.boolean("include_stop_str_in_output")?.unwrap_or(false),
            },
            stop_token_ids: stop_token_ids(app, fields)?,
            sampling: sampling(app, fields)?,
            stream,
            include_usage: include_usage.unwrap_or(false),
        })
    }

    /// The request for choice `choice` of a prompt.
    pub fn request(&self, app: &Shared, tokens: Vec<u32>, max_new_tokens: usize, choice: usize) -> Request {
        let mut sampling = self.sampling.clone();
        sampling.seed = sampling.seed.wrapping_add(choice as u64);
        Request {
            tokens,
            max_new_tokens,
            min_new_tokens: self.min_new_tokens.min(max_new_tokens),
            stop_token_ids: self.stop_token_ids.clone(),
            sampling,
            deadline: app.deadline(f64::MAX),
            ..Request::default()
        }
    }
}

/// `stop`: a string, or a list of them.
fn stops(fields: &Fields) -> Result<Vec<String>, Failure> {
    match fields.get("stop") {
        Some(Value::String(stop)) if !stop.is_empty() => Ok(vec![stop.clone()]),
        Some(found @ Value::String(_)) => Err(fields.wrong("stop", "a string that is not empty", found)),
        _ => Ok(fields.strings("stop", STOPS)?.unwrap_or_default()),
    }
}

/// The checkpoint's tokens that end a text, unless `ignore_eos` is true, and those of the request.
fn stop_token_ids(app: &Shared, fields: &Fields) -> Result<Arc<[u32]>, Failure> {
    let ignore = fields.boolean("ignore_eos")?.unwrap_or(false);
    let mut ids = if ignore { Vec::new() } else { app.tokenizer.stop_token_ids.clone() };
    ids.extend(fields.token_ids("stop_token_ids", app.vocabulary)?.unwrap_or_default());
    Ok(ids.into())
}

fn sampling(app: &Shared, fields: &Fields) -> Result<Sampling, Failure> {
    let number = |key, range, default| fields.number(key, range).map(|value| value.unwrap_or(default));
    let top_k = fields.integer("top_k", -1..=i64::from(u32::MAX))?.unwrap_or(0);
    let seed = fields.integer("seed", i64::MIN..=i64::MAX)?;
    Ok(Sampling {
        temperature: number("temperature", 0.0..=2.0, 1.0)?,
        top_p: number("top_p", OVER_0..=1.0, 1.0)?,
        // vLLM's word for all is -1.
        top_k: usize::try_from(top_k).unwrap_or(0),
        repetition_penalty: number("repetition_penalty", OVER_0..=100.0, 1.0)?,
        presence_penalty: number("presence_penalty", -2.0..=2.0, 0.0)?,
        frequency_penalty: number("frequency_penalty", -2.0..=2.0, 0.0)?,
        logit_bias: logit_bias(app, fields)?,
        seed: seed.map_or_else(rand::random, |seed| seed as u64),
    })
}

/// `logit_bias`: token ids, as strings, with what is added to their logits.
fn logit_bias(app: &Shared, fields: &Fields) -> Result<Vec<(u32, f32)>, Failure> {
    let Some(object) = fields.object("logit_bias", "logit_bias.")? else { return Ok(Vec::new()) };
    let bias = |(key, _): (&String, &Value)| {
        let id = key.parse::<u32>().ok().filter(|id| *id < app.vocabulary);
        let Some(id) = id else {
            let expected =
                format!("token ids from 0 to {} as keys, found {key:?}", app.vocabulary.saturating_sub(1));
            return Err(Failure::invalid("logit_bias", format!("expected {expected}")));
        };
        Ok((id, object.number(key, -100.0..=100.0)?.unwrap_or(0.0) as f32))
    };
    object.entries().map(bias).collect()
}
