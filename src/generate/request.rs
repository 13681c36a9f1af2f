//! Requests for generated text, and the events that answer them.

use super::Choices;
use crate::Error;
use candle_core::Tensor;
use std::sync::Arc;
use std::time::Instant;

/// How the next token is chosen. The order is that of transformers: biases and penalties, temperature, `top_k`,
/// `top_p`, `min_p`.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Divides the logits. With 0 the likeliest token is chosen, and only penalties and biases have an effect.
    pub temperature: f64,
    /// A token is drawn from the likeliest tokens that together have this probability; 1 is all.
    pub top_p: f64,
    /// A token is drawn from this number of likeliest tokens; 0 is all.
    pub top_k: usize,
    /// Tokens less likely than this fraction of the likeliest token's probability are not drawn (Nguyen et al., 2024,
    /// arXiv:2407.01082); 0 is all.
    pub min_p: f64,
    /// Divides the positive logits of tokens that occur in the text or the answer, and multiplies the negative ones
    /// (Keskar et al., 2019, arXiv:1909.05858); 1 is none.
    pub repetition_penalty: f64,
    /// Subtracted from the logits of tokens that were generated; 0 is none.
    pub presence_penalty: f64,
    /// Subtracted from the logits of tokens once for each time that they were generated; 0 is none.
    pub frequency_penalty: f64,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// The only tokens that may be chosen; `None` is all.
    pub allowed: Option<Arc<[u32]>>,
    /// Token sequences that are not generated: the last token of a sequence is not chosen after the tokens before it.
    pub banned: Arc<[Vec<u32>]>,
    /// Seed of the random draws. The same request with the same seed gets the same tokens.
    pub seed: u64,
}

impl Default for Sampling {
    /// The likeliest token is chosen.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            allowed: None,
            banned: Arc::from([]),
            seed: 0,
        }
    }
}

/// One text to continue.
#[derive(Debug, Clone)]
pub struct Request {
    /// Token ids after the prefix: at least one, or none with `embeds`.
    pub tokens: Vec<u32>,
    /// The text as embeddings f32 [T, C] instead, before the model's embedding multiplier.
    pub embeds: Option<Tensor>,
    /// Number of trailing tokens of `tokens` whose log-probabilities are returned, each given all tokens before it. The
    /// very first token has none if there are no virtual tokens.
    pub scored: usize,
    /// Most tokens to generate. With 0, `tokens` are scored only.
    pub max_new_tokens: usize,
    /// Number of generated tokens before a stop token may be chosen.
    pub min_new_tokens: usize,
    /// Tokens that end the answer. They are not part of it.
    pub stop_token_ids: Arc<[u32]>,
    /// How the next token is chosen.
    pub sampling: Sampling,
    /// The possible answers. The answer ends when it is one of them; `None` allows any text. `max_new_tokens` and stop
    /// tokens may still end it earlier, and `min_new_tokens` does not make it longer.
    pub choices: Option<Arc<Choices>>,
    /// If set, each token has its log-probability, and this number of likeliest tokens with theirs. They are taken
    /// before biases, penalties and temperature, and among all tokens, whatever the choices are.
    pub logprobs: Option<usize>,
    /// Tokens whose log-probabilities as the first generated token are returned.
    pub score: Vec<u32>,
    /// The latest end of the generation.
    pub deadline: Option<Instant>,
}

impl Request {
    /// Number of positions of the text.
    pub fn text_positions(&self) -> usize {
        self.embeds.as_ref().map_or(self.tokens.len(), |embeds| embeds.dims().first().copied().unwrap_or(0))
    }
}

impl Default for Request {
    /// A request without text. The caller must set one.
    fn default() -> Self {
        Self {
            tokens: Vec::new(),
            embeds: None,
            scored: 0,
            max_new_tokens: 1,
            min_new_tokens: 0,
            stop_token_ids: Arc::from([]),
            sampling: Sampling::default(),
            choices: None,
            logprobs: None,
            score: Vec::new(),
            deadline: None,
        }
    }
}

/// A token, with log-probabilities if the request asks for them.
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// Its log-probability in nats; `None` if the request does not ask for it or no token precedes this one.
    pub logprob: Option<f64>,
    /// The likeliest tokens at its position and their log-probabilities, the likeliest first.
    pub top: Vec<(u32, f64)>,
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    /// A stop token was chosen.
    StopToken,
    /// `max_new_tokens` were generated.
    MaxTokens,
    /// The deadline passed.
    TimeLimit,
}

/// The events of a sequence, in the order in which they are sent.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The trailing tokens of the text, as many as [`Request::scored`] says; not sent if that is 0.
    Scored(Vec<Token>),
    /// Log-probabilities of [`Request::score`]; not sent if that is empty.
    FirstScores(Vec<f64>),
    /// One more token.
    Token(Token),
    /// The last event of a request that ended normally.
    Finished(StopReason),
    /// The device failed. This is the last event.
    Failed(String),
    /// The device has too little memory for this request alone. This is the last event.
    NoMemory(String),
}

impl Event {
    /// Whether this is the last event of a request.
    pub fn is_last(&self) -> bool {
        matches!(self, Self::Finished(_) | Self::Failed(_) | Self::NoMemory(_))
    }

    /// [`Event::NoMemory`] with the device's message.
    pub(super) fn no_memory(error: &Error) -> Self {
        Self::NoMemory(format!(
            "the device has too little memory for this request: {error}; hint: fewer tokens of text and answer, or \
             another try later"
        ))
    }
}
