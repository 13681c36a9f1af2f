//! The head's row for the new tokens, chosen so that no engine generates them.
//!
//! A row of zeros would not work: its logit is 0, which is the largest if all others are below 0. The row is the mean
//! of the rows of a few real tokens:
//!
//! ```text
//! u = (W[a] + W[b] + ...) / K        u . h = the mean of their logits
//! ```
//!
//! * For every hidden state `h` the logit is at most the largest of those tokens' logits, so greedy decoding chooses
//!   that token.
//! * A mean of logits is the logarithm of a geometric mean. So the new token's probability is at most the geometric
//!   mean of those tokens' probabilities: it is likely only if all K are.
//!
//! The K tokens are the least likely ones of the base itself, on average over a text in prose, code, markup and several
//! languages, without a prompt and after each prompt. Over 11,963 states of SmolLM2-135M-Instruct that were not used
//! for the choice, a new token's probability was 4.4e-11 on average and at most 5.1e-9 (LOG.md, 2026-11-25). The mean
//! over *all* tokens has the same guarantee and needs no text, but is far likelier: over other states of that model
//! 1.3e-7 on average and at most 4e-6; a row of zeros had 4.7e-6 and 1.8e-2.

use super::ProgressCallback;
use super::base::Base;
use super::place::Placed;
use crate::batch::{Passes, PrefixGroup, Sequence};
use crate::model::{Decoder, Dtypes};
use crate::ops::gpu;
use crate::ops::rope::Rope;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::collections::HashSet;

/// Number of tokens whose rows are averaged, K.
const TOKENS: usize = 16;

/// Hidden states whose logits are computed at once: 64 rows of 100,352 are 26 MB.
const STATES: usize = 64;

/// The texts for the base: different kinds, each on its own.
pub(super) const TEXTS: [&str; 8] = [
    "The harbour was quiet that morning, and only two of the boats had gone out. \"They'll be back before noon,\" said \
     the old man, who hadn't slept; it was 7:45 and the wind had turned.",
    "Comment: Friendly staff, but we waited 50 minutes and my dog came home wet.\nSatisfaction:\n0",
    "def mean(values: list[float]) -> float:\n    if not values:\n        raise ValueError(\"no values\")\n    return \
     sum(values) / len(values)\n",
    "# Results\n\n| model | accuracy |\n|---|---:|\n| base | 93.1 % |\n\n* see <https://example.org/a?b=1#c>\n\n$x^2 + \
     y_1 = 3$",
    "{\"name\": \"Ada\", \"year\": 1843, \"tags\": [\"notes\", null, true]}\n<p class=\"x\">A &amp; B</p>",
    "Le café ouvre à neuf heures. Die Straße ist naß, und es regnet weiter. ¿Cuánto cuesta el billete?",
    "Сегодня хорошая погода. 今日はいい天気ですね。今天天气很好。 오늘은 날씨가 좋네요. مرحبا بالعالم 😀",
    "Question: What is 17 times 24?\nAnswer: 17 * 24 = 408\n\nUSER: thanks!\nASSISTANT: You're welcome.",
];

/// The head's row for the new tokens, and the probability of such a token.
#[derive(Debug, Clone)]
pub struct Unlikely {
    /// The real tokens whose rows are averaged.
    pub tokens: Vec<u32>,
    /// The row, `[C]`.
    pub row: Vec<f32>,
    /// Number of hidden states.
    pub states: usize,
    /// Mean probability of a new token over the states.
    pub mean: f64,
    /// Its largest probability over the states.
    pub worst: f64,
}

/// Runs the base over [`TEXTS`], without a prompt and after each prompt.
pub(super) fn find(base: &Base, placed: &Placed, progress: ProgressCallback<'_>) -> Result<Unlikely> {
    let device = Device::Cpu;
    let blocks = base.config.num_hidden_layers;
    // The choice needs no precision, and bf16 needs half the memory of f32.
    let dtypes = Dtypes::for_weights(DType::BF16, &device)?;
    let loaded = &mut |done| progress("reading the base", done, blocks);
    let model = Decoder::load(&base.config, &base.weights, dtypes, &device, loaded)?;
    let mut seen =
        HiddenStates { sums: vec![0.0; base.config.vocab_size], hidden: Vec::new(), normalisers: Vec::new() };
    let groups = groups(base, placed)?;
    let prompts = gpu::to_device(&placed.rows, &device)?.to_dtype(model.prompt_dtype())?;
    for (i, group) in groups.iter().enumerate() {
        let long_above = base.config.rope.as_ref().and_then(Rope::long_above);
        let group = std::slice::from_ref(group);
        let batch = Passes::with_long_rope(group, usize::MAX, long_above).prefix_pass;
        seen.add(&model, model.hidden(&batch, &prompts, None)?)?;
        progress("looking for unlikely tokens", i + 1, groups.len());
    }
    drop(model);
    let tokens = least(&eligible(base, placed.first), &seen.sums);
    let head = base.config_matrix(base.head())?;
    let chosen = head.index_select(&Tensor::new(tokens.as_slice(), &device)?, 0)?;
    let row = chosen.mean(0)?;
    let (mean, worst) = seen.probability(&row, base.config.logits_scaling)?;
    Ok(Unlikely { tokens, row: row.to_vec1()?, states: seen.normalisers.len(), mean, worst })
}

/// The texts for the base alone and for each prompt.
fn groups(base: &Base, placed: &Placed) -> Result<Vec<PrefixGroup>> {
    let mut sequences = Vec::new();
    for text in TEXTS {
        let mut ids = base.tokenizer.encode(text, true)?;
        ids.retain(|id| *id < placed.first);
        if ids.len() >= 2 {
            let target = ids.split_off(1);
            sequences.push(Sequence { input: ids, target });
        }
    }
    if sequences.is_empty() {
        let problem = "expected a tokenizer that knows some of a text in many languages, found none".into();
        return Err(Error::Checkpoint { path: base.path.clone(), problem });
    }
    let prompts = placed.tokens.iter().map(|t| {
        let before = t.before().map_or(Vec::new(), |before| before.token_ids.clone());
        (before, t.ids.start - placed.first..t.ids.end - placed.first)
    });
    let groups = std::iter::once((Vec::new(), 0..0)).chain(prompts);
    let group =
        |(before, prompt)| PrefixGroup { before, prompt, head: Vec::new(), sequences: sequences.clone() };
    Ok(groups.map(group).collect())
}

/// Tokens that may be chosen: real ones that do not occur in a program's text as special tokens or ends of text.
fn eligible(base: &Base, first: u32) -> Vec<u32> {
    let tokenizer = &base.tokenizer.tokenizer;
    let added = tokenizer.get_added_tokens_decoder();
    let stops: HashSet<u32> = base.tokenizer.stop_token_ids.iter().copied().collect();
    let eligible =
        |id: &u32| tokenizer.id_to_token(*id).is_some() && !added.contains_key(id) && !stops.contains(id);
    let eligible: Vec<u32> = (0..first).filter(eligible).collect();
    if eligible.len() < 2 { (0..first).collect() } else { eligible }
}

/// The tokens with the least sums; several even of a small vocabulary, because the mean of one row would be that token
/// again.
fn least(tokens: &[u32], sums: &[f64]) -> Vec<u32> {
    let mut tokens = tokens.to_vec();
    tokens.sort_by(|a, b| sums[*a as usize].total_cmp(&sums[*b as usize]));
    tokens.truncate(TOKENS.min(tokens.len() / 8).max(2));
    tokens
}

/// Hidden states with the normalisers of their logits, and the sum of each token's logits.
struct HiddenStates {
    sums: Vec<f64>,
    hidden: Vec<Tensor>,
    normalisers: Vec<f64>,
}

impl HiddenStates {
    fn add(&mut self, model: &Decoder, hidden: Tensor) -> Result<()> {
        let rows = hidden.dims()[0];
        for start in (0..rows).step_by(STATES) {
            let states = hidden.narrow(0, start, STATES.min(rows - start))?;
            for logits in model.logits(&states)?.to_dtype(DType::F32)?.to_vec2::<f32>()? {
                let greatest = f64::from(logits.iter().copied().fold(f32::MIN, f32::max));
                let total: f64 = logits.iter().map(|logit| (f64::from(*logit) - greatest).exp()).sum();
                self.normalisers.push(greatest + total.ln());
                self.sums.iter_mut().zip(&logits).for_each(|(sum, logit)| *sum += f64::from(*logit));
            }
        }
        self.hidden.push(hidden.to_dtype(DType::F32)?);
        Ok(())
    }

    /// Mean and largest probability of a token with the head row `row`.
    fn probability(&self, row: &Tensor, logits_scaling: f64) -> Result<(f64, f64)> {
        let mut logits = Vec::with_capacity(self.normalisers.len());
        for hidden in &self.hidden {
            logits.extend(hidden.matmul(&row.unsqueeze(1)?)?.flatten_all()?.to_vec1::<f32>()?);
        }
        let of = |(logit, normaliser): (&f32, &f64)| (f64::from(*logit) / logits_scaling - normaliser).exp();
        let all: Vec<f64> = logits.iter().zip(&self.normalisers).map(of).collect();
        let worst = all.iter().copied().fold(0.0, f64::max);
        Ok((all.iter().sum::<f64>() / all.len() as f64, worst))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_likely_are_chosen_and_never_one_alone() {
        let sums: Vec<f64> = (0..1000).map(|i| ((i * 7) % 1000) as f64).collect();
        let all: Vec<u32> = (0..1000).collect();
        let chosen = least(&all, &sums);
        assert_eq!(chosen.len(), TOKENS);
        assert!(chosen.iter().all(|id| sums[*id as usize] < TOKENS as f64), "{chosen:?}");
        assert_eq!(least(&[5, 6, 7], &sums), [5, 6]);
    }
}
