//! Log-likelihoods of labels after a text.

use super::api_error::ApiError;
use super::generation::{Generation, Piece, Stopping};
use super::served::Served;
use super::state::AppState;
use crate::generate::Request;
use std::sync::Arc;
use std::time::Instant;

/// A text, and the labels whose likelihoods after it are asked for.
#[derive(Debug, Clone)]
pub(super) struct LabelQuery {
    pub tokens: Vec<u32>,
    /// The labels' token sequences ([`crate::data::labels::targets`]).
    pub targets: Vec<Vec<u32>>,
    /// The latest end.
    pub deadline: Option<Instant>,
    /// When the request arrived.
    pub started: Instant,
}

/// The likelihoods of labels after a model's prompt, which are being computed. They are cancelled when this is dropped.
pub(super) struct LabelScores {
    /// One, whose first token has the likelihoods of all labels; or one for each label.
    generations: Vec<Generation>,
    /// Tokens of each label.
    lengths: Vec<usize>,
}

impl LabelScores {
    /// Submits the query to the worker. Several queries run in the same steps.
    ///
    /// # Errors
    /// Returns the errors of [`Generation::start`].
    pub fn start(state: &Arc<AppState>, model: &Served, query: &LabelQuery) -> Result<Self, ApiError> {
        let LabelQuery { tokens, targets, deadline, started } = query;
        let start = |request: Request| {
            let request = Request { deadline: *deadline, ..request };
            Generation::start(state, model, request, &Stopping::default(), *started)
        };
        let lengths: Vec<usize> = targets.iter().map(Vec::len).collect();
        // If each label is one token, the probabilities of the first token are sufficient.
        let generations = match lengths.iter().all(|length| *length == 1) {
            true => vec![start(Request {
                tokens: tokens.clone(),
                score: targets.concat(),
                ..Request::default()
            })?],
            false => {
                let target = |ids: &Vec<u32>| {
                    let tokens = [&tokens[..], ids].concat();
                    start(Request { tokens, scored: ids.len(), max_new_tokens: 0, ..Request::default() })
                };
                targets.iter().map(target).collect::<Result<_, _>>()?
            }
        };
        Ok(Self { generations, lengths })
    }

    /// Log-likelihood of each label, nats.
    ///
    /// # Errors
    /// Returns an error if the device fails, the worker ends, the time is over, or a value is not finite.
    pub async fn collect(self) -> Result<Vec<f64>, ApiError> {
        let missing = || ApiError::internal("the model's thread gave no label's likelihood");
        let one_token = self.lengths.iter().all(|length| *length == 1);
        let mut sums = Vec::with_capacity(self.lengths.len());
        for (mut generation, length) in self.generations.into_iter().zip(self.lengths) {
            if one_token {
                while let Some(piece) = generation.next().await {
                    if let Piece::First(scores) = piece? {
                        return finite(scores);
                    }
                }
                return Err(missing());
            }
            let scored: Vec<f64> =
                generation.collect().await?.scored.iter().filter_map(|token| token.logprob).collect();
            if scored.len() != length {
                return Err(missing());
            }
            sums.push(scored.iter().sum());
        }
        finite(sums)
    }
}

/// Refuses log-likelihoods that are not finite.
fn finite(values: Vec<f64>) -> Result<Vec<f64>, ApiError> {
    match values.iter().find(|value| !value.is_finite()) {
        None => Ok(values),
        Some(value) => Err(ApiError::internal(format!("the log-likelihood of a label is {value}"))),
    }
}
