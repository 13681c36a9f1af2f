//! What is asked of a model, and what comes back, a token at a time.

use super::Choices;
use crate::Error;
use candle_core::Tensor;
use std::sync::Arc;
use std::time::Instant;

/// How the next token is chosen, in the order of transformers: biases and penalties, temperature, `top_k`, `top_p`, `min_p`.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the likeliest token, and the rest but penalties and biases is without effect.
    pub temperature: f64,
    /// Share of the probability that the likeliest tokens, among which one is drawn, make up; 1 is all.
    pub top_p: f64,
    /// Number of the likeliest tokens among which one is drawn; 0 is all.
    pub top_k: usize,
    /// Tokens less likely than this share of the likeliest one's probability are not drawn (Nguyen et al., 2024,
    /// arXiv:2407.01082); 0 is all.
    pub min_p: f64,
    /// Divides the logits of tokens that were in the text or generated where they are positive, and multiplies them
    /// where they are negative (Keskar et al., 2019, arXiv:1909.05858); 1 is none.
    pub repetition_penalty: f64,
    /// Taken off the logits of tokens that were generated; 0 is none.
    pub presence_penalty: f64,
    /// Taken off the logits of tokens for each time that they were generated; 0 is none.
    pub frequency_penalty: f64,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// The only tokens that may be chosen; `None` is all.
    pub allowed: Option<Arc<[u32]>>,
    /// Token sequences that are not generated: the last token of one is not chosen after those before it.
    pub banned: Arc<[Vec<u32>]>,
    /// Of the draws: the same request with the same seed gets the same tokens.
    pub seed: u64,
}

impl Default for Sampling {
    /// The likeliest token.
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

/// One text to go on from.
#[derive(Debug, Clone)]
pub struct Request {
    /// Token ids behind the prefix; at least one, or none with `embeds`.
    pub tokens: Vec<u32>,
    /// The text as embeddings f32 [T, C] instead, before the model's embedding multiplier.
    pub embeds: Option<Tensor>,
    /// Trailing tokens of `tokens` whose log-probabilities are wanted, each given all before it. The first token has
    /// none where nothing stands before it.
    pub scored: usize,
    /// Tokens to generate at most; 0 scores only.
    pub max_new_tokens: usize,
    /// Generated tokens before which no stop token is chosen.
    pub min_new_tokens: usize,
    /// Tokens that end the text; they are not part of what is generated.
    pub stop_token_ids: Arc<[u32]>,
    /// How the next token is chosen.
    pub sampling: Sampling,
    /// What the answer may be; it ends when it is one of them. `None` is any text. `max_new_tokens` and stop tokens
    /// still cut it; `min_new_tokens` does not lengthen it.
    pub choices: Option<Arc<Choices>>,
    /// With each token its log-probability, and those of so many likeliest tokens, before biases, penalties and
    /// temperature, and among all tokens whatever the choices.
    pub logprobs: Option<usize>,
    /// Tokens whose log-probabilities as the first generated token are wanted.
    pub score: Vec<u32>,
    /// When generation ends at the latest.
    pub deadline: Option<Instant>,
}

impl Request {
    /// Positions of the text.
    pub fn text_positions(&self) -> usize {
        self.embeds.as_ref().map_or(self.tokens.len(), |embeds| embeds.dims().first().copied().unwrap_or(0))
    }
}

impl Default for Request {
    /// No text: one has to be given.
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

/// A token with the log-probabilities that were asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// Its log-probability, nats; `None` where none was asked for or nothing stands before it.
    pub logprob: Option<f64>,
    /// The likeliest tokens in its place with theirs, the likeliest first.
    pub top: Vec<(u32, f64)>,
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    /// A stop token came.
    StopToken,
    /// `max_new_tokens` were generated.
    MaxTokens,
    /// The deadline passed.
    TimeLimit,
}

/// What a sequence came to, in the order in which it does.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The trailing tokens of the text, as many as [`Request::scored`] says; not sent where that is 0.
    Scored(Vec<Token>),
    /// Log-probabilities of [`Request::score`]; not sent where that is empty.
    FirstScores(Vec<f64>),
    /// One more token.
    Token(Token),
    /// Nothing comes behind this.
    Finished(StopReason),
    /// The device failed; nothing comes behind this.
    Failed(String),
    /// The device has too little memory for this request alone; nothing comes behind this.
    NoMemory(String),
}

impl Event {
    /// Whether nothing comes behind it.
    pub fn is_last(&self) -> bool {
        matches!(self, Self::Finished(_) | Self::Failed(_) | Self::NoMemory(_))
    }

    /// [`Event::NoMemory`] by what the device said.
    pub(super) fn no_memory(error: &Error) -> Self {
        Self::NoMemory(format!(
            "the device has too little memory for this request: {error}; hint: fewer tokens of text and answer, or \
             another try later"
        ))
    }
}
