//! The choice of the next token, as transformers' logits processors and warpers make it.
//!
//! candle-transformers' `LogitsProcessor` applies `top_p` to the whole distribution, while transformers applies it to
//! the `top_k` that remain. It also has no penalties, and it sorts the whole vocabulary for every token.

use super::choices::{ChoiceState, mask_all_but};
use super::{Request, Sampling};
use crate::Result;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::cmp::Ordering;
use std::collections::HashMap;

/// Number of likeliest tokens that are examined first for `top_p`; four times as many each time that their probability
/// is too small.
const NUCLEUS: usize = 64;

/// Chooses the tokens of one sequence.
pub(super) struct TokenSampler {
    sampling: Sampling,
    rng: ChaCha8Rng,
    /// How often each token of the text or the answer was generated; filled only if there are penalties.
    counts: HashMap<u32, u32>,
    /// Tokens generated; filled only if there are banned sequences.
    generated: Vec<u32>,
    /// The position among the possible answers, if the request lists them.
    choice_state: Option<ChoiceState>,
}

impl TokenSampler {
    pub(super) fn new(request: &Request) -> Self {
        let sampling = request.sampling.clone();
        let rng = ChaCha8Rng::seed_from_u64(sampling.seed);
        let mut counts = HashMap::new();
        if sampling.repetition_penalty != 1.0 {
            counts.extend(request.tokens.iter().map(|token| (*token, 0)));
        }
        Self {
            sampling,
            rng,
            counts,
            generated: Vec::new(),
            choice_state: request.choices.clone().map(ChoiceState::new),
        }
    }

    /// Whether the choice is always the largest logit.
    pub(super) fn is_greedy(&self) -> bool {
        let Sampling { temperature, logit_bias, allowed, banned, .. } = &self.sampling;
        *temperature == 0.0
            && !self.penalises()
            && logit_bias.is_empty()
            && allowed.is_none()
            && banned.is_empty()
            && self.choice_state.is_none()
    }

    /// Whether the last token ended an answer that is one of the choices. It is not part of the answer.
    pub(super) fn has_ended(&self) -> bool {
        self.choice_state.as_ref().is_some_and(ChoiceState::has_ended)
    }

    /// Whether the answer is one of the choices and no token can follow.
    pub(super) fn is_complete(&self) -> bool {
        self.choice_state.as_ref().is_some_and(ChoiceState::is_complete)
    }

    fn penalises(&self) -> bool {
        let Sampling { repetition_penalty, presence_penalty, frequency_penalty, .. } = self.sampling;
        repetition_penalty != 1.0 || presence_penalty != 0.0 || frequency_penalty != 0.0
    }

    /// Chooses the next token by its logits [V], which are changed; never one of `forbidden`.
    pub(super) fn choose(&mut self, logits: &mut [f32], forbidden: &[u32]) -> Result<u32> {
        self.adjust(logits, forbidden);
        let token = match self.sampling.temperature {
            0.0 => argmax(logits)?,
            _ => {
                argmax(logits)?;
                let candidates = candidates(logits, &self.sampling);
                draw(&candidates, self.rng.random::<f64>())
            }
        };
        if self.penalises() {
            *self.counts.entry(token).or_default() += 1;
        }
        if !self.sampling.banned.is_empty() {
            self.generated.push(token);
        }
        if let Some(choice_state) = &mut self.choice_state {
            choice_state.step(token);
        }
        Ok(token)
    }

    fn adjust(&self, logits: &mut [f32], forbidden: &[u32]) {
        for (token, bias) in &self.sampling.logit_bias {
            if let Some(logit) = logits.get_mut(*token as usize) {
                *logit += bias;
            }
        }
        let Sampling { repetition_penalty, presence_penalty, frequency_penalty, .. } = self.sampling;
        for (token, times) in &self.counts {
            let Some(logit) = logits.get_mut(*token as usize) else { continue };
            let penalty = repetition_penalty as f32;
            *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
            if *times > 0 {
                *logit -= (presence_penalty + frequency_penalty * f64::from(*times)) as f32;
            }
        }
        let banned = self.sampling.banned.iter().filter_map(|sequence| {
            let (last, before) = sequence.split_last()?;
            self.generated.ends_with(before).then_some(last)
        });
        for token in forbidden.iter().chain(banned) {
            if let Some(logit) = logits.get_mut(*token as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
        if let Some(allowed) = &self.sampling.allowed {
            mask_all_but(logits, allowed.iter().copied());
        }
        if let Some(choice_state) = &self.choice_state {
            choice_state.mask(logits);
        }
    }
}

/// The index of the largest logit, of several the first.
///
/// # Errors
/// Returns an error if a logit is NaN or the largest one is infinite.
pub(super) fn argmax(logits: &[f32]) -> Result<u32> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let nan = logits.iter().fold(false, |nan, logit| nan | logit.is_nan());
    match logits.iter().position(|logit| *logit == largest) {
        Some(index) if !nan && largest.is_finite() => Ok(index as u32),
        _ => {
            let value = if nan { f32::NAN } else { largest };
            let hint =
                "the prompt's tuning diverged, or the weights overflow in f16; --dtype f32 shows which";
            Err(candle_core::Error::Msg(format!("logits: expected numbers, found {value}; hint: {hint}"))
                .into())
        }
    }
}

/// Tokens that may be drawn, and their probabilities, whose sum is 1.
fn candidates(logits: &[f32], sampling: &Sampling) -> Vec<(u32, f64)> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut candidates: Vec<(u32, f64)> =
        (0u32..).zip(logits.iter().map(|logit| f64::from(*logit))).collect();
    if sampling.top_k > 0 && sampling.top_k < candidates.len() {
        let (_, (_, least), _) = candidates.select_nth_unstable_by(sampling.top_k - 1, by_descending_weight);
        let least = *least;
        candidates.retain(|(_, logit)| *logit >= least);
    }
    for (_, logit) in &mut candidates {
        *logit = ((*logit - f64::from(largest)) / sampling.temperature).exp();
    }
    if sampling.top_p < 1.0 {
        nucleus(&mut candidates, sampling.top_p);
    }
    if sampling.min_p > 0.0 {
        // Weights are relative to the likeliest token, whose weight is 1.
        candidates.retain(|(_, weight)| *weight >= sampling.min_p);
    }
    candidates.sort_unstable_by(by_descending_weight);
    let sum: f64 = candidates.iter().map(|(_, weight)| weight).sum();
    candidates.iter_mut().for_each(|(_, weight)| *weight /= sum);
    candidates
}

/// Keeps the smallest set of the largest weights that makes up `top_p` of their sum, and at least one.
fn nucleus(candidates: &mut Vec<(u32, f64)>, top_p: f64) {
    let wanted = top_p * candidates.iter().map(|(_, weight)| weight).sum::<f64>();
    let mut n = NUCLEUS;
    while n < candidates.len() {
        candidates.select_nth_unstable_by(n - 1, by_descending_weight);
        if candidates[..n].iter().map(|(_, weight)| weight).sum::<f64>() >= wanted {
            candidates.truncate(n);
            break;
        }
        n *= 4;
    }
    candidates.sort_unstable_by(by_descending_weight);
    let mut sum = 0.0;
    let count = candidates.iter().take_while(|(_, weight)| {
        let before = sum;
        sum += weight;
        before < wanted
    });
    let count = count.count().max(1);
    candidates.truncate(count);
}

/// The largest first; of equal ones the lower token first.
fn by_descending_weight(a: &(u32, f64), b: &(u32, f64)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// The token at which the cumulative probability exceeds `quantile`, from 0 to 1.
fn draw(candidates: &[(u32, f64)], quantile: f64) -> u32 {
    let mut sum = 0.0;
    let drawn = candidates.iter().find(|(_, probability)| {
        sum += probability;
        sum > quantile
    });
    // Because of rounding, the sum can be slightly less than 1.
    drawn.or(candidates.iter().rfind(|(_, p)| *p > 0.0)).map_or(0, |(token, _)| *token)
}

/// Logarithm of the sum of the exponentials.
pub(super) fn log_sum_exp(logits: &[f32]) -> f64 {
    let largest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|logit| (f64::from(*logit) - largest).exp()).sum();
    largest + sum.ln()
}

/// The `n` largest of `logits` and their log-probabilities, the largest first.
pub(super) fn top_n(logits: &[f32], n: usize, log_sum_exp: f64) -> Vec<(u32, f64)> {
    let n = n.min(logits.len());
    if n == 0 {
        return Vec::new();
    }
    let mut all: Vec<(u32, f64)> = (0u32..).zip(logits.iter().map(|logit| f64::from(*logit))).collect();
    all.select_nth_unstable_by(n - 1, by_descending_weight);
    all.truncate(n);
    all.sort_unstable_by(by_descending_weight);
    all.iter_mut().for_each(|(_, logit)| *logit -= log_sum_exp);
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;
    use std::sync::Arc;

    fn floats(value: &Value) -> Vec<f64> {
        value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap_or(f64::NEG_INFINITY)).collect()
    }

    fn tokens(value: &Value) -> Vec<u32> {
        value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
    }

    fn sampler(sampling: &Sampling, tokens: Vec<u32>) -> TokenSampler {
        TokenSampler::new(&Request { tokens, sampling: sampling.clone(), ..Request::default() })
    }

    /// transformers' own processors and warpers on the same logits (tests/golden/sampling.py).
    #[test]
    fn distribution_is_that_of_transformers() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/sampling.json");
        let golden: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let cases = golden["cases"].as_array().unwrap();
        assert!(cases.len() >= 20);
        for case in cases {
            let sampling = Sampling {
                temperature: case["temperature"].as_f64().unwrap(),
                top_p: case["top_p"].as_f64().unwrap(),
                top_k: case["top_k"].as_u64().unwrap() as usize,
                min_p: case["min_p"].as_f64().unwrap(),
                repetition_penalty: case["repetition_penalty"].as_f64().unwrap(),
                ..Sampling::default()
            };
            let mut logits: Vec<f32> = floats(&case["logits"]).iter().map(|v| *v as f32).collect();
            let sampler = sampler(&sampling, tokens(&case["text"]));
            sampler.adjust(&mut logits, &tokens(&case["forbidden"]));
            let mut ours = vec![0.0; logits.len()];
            candidates(&logits, &sampling).iter().for_each(|(token, p)| ours[*token as usize] = *p);
            for (token, (ours, wanted)) in ours.iter().zip(floats(&case["probabilities"])).enumerate() {
                assert!((ours - wanted).abs() < 2e-6, "{}, token {token}: {ours} and {wanted}", case["name"]);
            }
        }
    }

    #[test]
    fn samples_follow_the_probabilities_and_the_seed() {
        let logits = [0.0f32, 1.0, 2.0, -1.0];
        let sampling = Sampling { temperature: 1.0, seed: 7, ..Sampling::default() };
        let draws = |n: usize| {
            let mut sampler = sampler(&sampling, Vec::new());
            (0..n).map(|_| sampler.choose(&mut logits.clone(), &[3]).unwrap()).collect::<Vec<_>>()
        };
        let many = draws(20_000);
        assert_eq!(many[..100], draws(100));
        let sum: f64 = logits[..3].iter().map(|l| f64::from(*l).exp()).sum();
        for (token, logit) in (0u32..).zip(&logits[..3]) {
            let (expected, n) = (f64::from(*logit).exp() / sum, many.len() as f64);
            let found = many.iter().filter(|t| **t == token).count() as f64 / n;
            // Four standard deviations of a share of so many draws.
            assert!(
                (found - expected).abs() < 4.0 * (expected * (1.0 - expected) / n).sqrt(),
                "{token}: {found}"
            );
        }
        assert!(!many.contains(&3));
    }

    #[test]
    fn penalties_of_what_was_generated_count_its_times() {
        let sampling = Sampling { presence_penalty: 0.5, frequency_penalty: 0.25, ..Sampling::default() };
        let mut sampler = sampler(&sampling, vec![1]);
        let mut chosen = Vec::new();
        for _ in 0..4 {
            chosen.push(sampler.choose(&mut [0.0, 1.3, 1.0], &[]).unwrap());
        }
        // 1.3 | 1.3 - 0.75, 1.0 | 0.55, 0.25 | 1.3 - 1.0, 0.25
        assert_eq!(chosen, [1, 2, 1, 1]);
    }

    #[test]
    fn a_bias_changes_the_likeliest_token() {
        for (bias, expected) in [(vec![(0, 100.0)], 0), (vec![(1, -100.0)], 2), (vec![(9, 100.0)], 1)] {
            let sampling = Sampling { logit_bias: bias, ..Sampling::default() };
            let mut sampler = sampler(&sampling, Vec::new());
            assert!(!sampler.is_greedy());
            assert_eq!(sampler.choose(&mut [0.0, 5.0, 4.5, -3.0], &[]).unwrap(), expected);
        }
    }

    #[test]
    fn only_allowed_tokens_are_chosen_and_banned_sequences_are_not() {
        let logits = [0.0f32, 3.0, 2.0, 1.0];
        let allowed = Sampling { allowed: Some(Arc::from([0, 3])), ..Sampling::default() };
        assert!(!sampler(&allowed, Vec::new()).is_greedy());
        assert_eq!(sampler(&allowed, Vec::new()).choose(&mut logits.clone(), &[]).unwrap(), 3);
        assert_eq!(sampler(&allowed, Vec::new()).choose(&mut logits.clone(), &[3]).unwrap(), 0);
        // The text before the answer does not count.
        let banned = Sampling { banned: Arc::from([vec![1, 2, 1], vec![1, 1]]), ..Sampling::default() };
        let mut sampler = sampler(&banned, vec![1, 2]);
        assert!(!sampler.is_greedy());
        let chosen: Vec<u32> = (0..4).map(|_| sampler.choose(&mut logits.clone(), &[]).unwrap()).collect();
        assert_eq!(chosen, [1, 2, 2, 1]);
    }

    #[test]
    fn sampled_choices_follow_the_probabilities_of_their_tokens() {
        let choices =
            Arc::new(crate::generate::Choices::new(&[vec![1], vec![1, 2], vec![3, 0]], Arc::from([4])));
        let logits = [0.5f32, 1.0, 0.25, 0.0, -0.5, 9.0];
        let mut counts = HashMap::<Vec<u32>, f64>::new();
        let n = 4000;
        for seed in 0..n {
            let sampling = Sampling { temperature: 1.0, seed, ..Sampling::default() };
            let request = Request { sampling, choices: Some(choices.clone()), ..Request::default() };
            let (mut sampler, mut answer) = (TokenSampler::new(&request), Vec::new());
            while !sampler.is_complete() {
                let token = sampler.choose(&mut logits.clone(), &[]).unwrap();
                if sampler.has_ended() {
                    break;
                }
                answer.push(token);
            }
            *counts.entry(answer).or_default() += 1.0 / n as f64;
        }
        // 1 against 3 at the root; then 2 against the end.
        let share = |a: f64, b: f64| a.exp() / (a.exp() + b.exp());
        let (one, two) = (share(1.0, 0.0), share(0.25, -0.5));
        for (answer, expected) in
            [(vec![1], one * (1.0 - two)), (vec![1, 2], one * two), (vec![3, 0], 1.0 - one)]
        {
            let found = counts.remove(&answer).unwrap_or_default();
            let tolerance = 4.0 * (expected * (1.0 - expected) / n as f64).sqrt();
            assert!((found - expected).abs() < tolerance, "{answer:?}: {found} and {expected}");
        }
        assert!(counts.is_empty(), "{counts:?}");
    }

    #[test]
    fn logits_that_are_no_numbers_are_an_error() {
        for logits in [[0.0, f32::NAN], [f32::NEG_INFINITY; 2], [f32::INFINITY, 0.0]] {
            let error = argmax(&logits).unwrap_err().to_string();
            assert!(error.starts_with("logits: expected numbers"), "{error}");
        }
        assert_eq!(argmax(&[1.0, 2.0, 2.0]).unwrap(), 1);
    }

    #[test]
    fn the_likeliest_come_with_their_log_probabilities() {
        let logits = [1.0f32, 3.0, 2.0, 3.0];
        let lse = log_sum_exp(&logits);
        let expected = logits.iter().map(|l| f64::from(*l).exp()).sum::<f64>().ln();
        assert!((lse - expected).abs() < 1e-12);
        let top = top_n(&logits, 3, lse);
        assert_eq!(top.iter().map(|(token, _)| *token).collect::<Vec<_>>(), [1, 3, 2]);
        assert!((top[2].1 - (2.0 - expected)).abs() < 1e-12);
    }
}
