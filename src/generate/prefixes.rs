//! What precedes requests and is computed once for all of them: a soft prompt's virtual tokens, and the first tokens
//! that many requests share.
//!
//! ```text
//!   ┌ virtual tokens ┐┌ head: an instruction, a verbalizer ┐┌ a request's own tokens
//!   └──────────── a cached prefix, [rows, 2K D] ───────────┘└ its rows in the cache
//! ```
//!
//! A prompt may stand after tokens with which every request begins; they are the first tokens of every head:
//!
//! ```text
//!   ┌ before: a system turn ┐┌ virtual tokens ┐┌ more of the head ┐┌ a request's own tokens
//! ```
//!
//! Each soft prompt has one cached prefix without a head of its own, and more for heads that were given or that recent requests
//! share. A request uses the cached prefix with the longest head that it begins with.

use crate::Result;
use crate::model::{Continuation, Decoder, KvCache, PrefixState};
use crate::ops::embed::virtual_id;
use crate::ops::gpu;
use crate::prompt::Prefix;
use candle_core::Tensor;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

/// Number of recent requests with which a new one is compared.
const RECENT: usize = 8;

/// Number of recent requests that must share the beginning of the new one before it becomes a head.
const MIN_ALIKE: usize = 3;

/// Least number of tokens that a new head is longer than the best one there is, because a cached prefix costs a pass
/// over virtual tokens and head.
const MIN_GAIN: usize = 4;

/// Most heads of a prompt. The least recently used one is replaced.
const MAX_HEADS: usize = 4;

/// Number of tokens of a request that are compared.
const COMPARED: usize = 2048;

/// Identifies a soft prompt, or no prompt, of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PrefixId(pub(super) u64);

/// Keys and values of virtual tokens and a head, in the cache.
pub(super) struct CachedPrefix {
    /// Rows of the cache.
    pub(super) rows: Range<usize>,
    /// The first row of the rotary table for its positions.
    pub(super) first_position: usize,
    /// Its tokens of the vocabulary: those before the virtual tokens, then those after.
    pub(super) head: Vec<u32>,
    /// Hidden states [n, C] of the rows that predict the tokens before the virtual tokens, the first of which has no such row,
    /// and the first token after them; `None` if there are no virtual tokens or there is more of a head.
    pub(super) predicting: Option<Tensor>,
}

/// The cached prefixes of one soft prompt, or of no prompt.
pub(super) struct PromptCache {
    /// Tokens before the virtual tokens, with which every request begins.
    before: Vec<u32>,
    /// The virtual tokens' embeddings [P, C] in the model's dtype; no rows if they are keys and values.
    prompts: Tensor,
    /// The virtual tokens' keys and values, and how many they are.
    given: GivenKeysValues,
    /// The first row of the rotary table for the positions of its sequences.
    first_position: usize,
    /// The first has no head but `before`. The others are in the order of their last use, the latest last.
    cached: Vec<Arc<CachedPrefix>>,
    recent: VecDeque<Vec<u32>>,
}

/// Keys and values of virtual tokens, and how many these are.
type GivenKeysValues = Option<(Arc<[PrefixState]>, usize)>;

impl PromptCache {
    /// Computes the cached prefix without a head; `None` if the cache has no room for it.
    pub(super) fn new(model: &Decoder, cache: &mut KvCache, prompt: Option<&Prefix>) -> Result<Option<Self>> {
        let before = prompt.map_or(&[][..], Prefix::before).to_vec();
        let (prompts, given) = match super::prompts(model, prompt)? {
            Prefix::Embeddings(prompts) | Prefix::EmbeddingsAfter { values: prompts, .. } => (prompts, None),
            Prefix::KeysValues(values) => {
                let states = model.given_states(&values)?;
                (model.no_prompts()?, Some((states.into(), values.dims()[0])))
            }
        };
        let (cached, recent) = (Vec::new(), VecDeque::new());
        Self { before, prompts, given, first_position: 0, cached, recent }.with_first(model, cache)
    }

    /// The same prompt for sequences whose positions begin at `first_position` of the rotary table.
    pub(super) fn at_position(
        &self,
        model: &Decoder,
        cache: &mut KvCache,
        first_position: usize,
    ) -> Result<Option<Self>> {
        let prompt_cache = Self {
            before: self.before.clone(),
            prompts: self.prompts.clone(),
            given: self.given.clone(),
            first_position,
            cached: Vec::new(),
            recent: VecDeque::new(),
        };
        prompt_cache.with_first(model, cache)
    }

    /// With the cached prefix that every request can use; `None` if the cache has no room for it.
    fn with_first(mut self, model: &Decoder, cache: &mut KvCache) -> Result<Option<Self>> {
        let Some(block) = self.compute(model, cache, &self.before)? else { return Ok(None) };
        self.cached.push(Arc::new(block));
        Ok(Some(self))
    }

    /// Tokens with which every request begins; the virtual tokens stand after them.
    pub(super) fn before(&self) -> &[u32] {
        &self.before
    }

    /// Rows of the cached prefix that every request can use.
    pub(super) fn rows(&self) -> usize {
        self.before.len() + self.virtual_tokens()
    }

    pub(super) fn virtual_tokens(&self) -> usize {
        self.given_rows() + self.prompts.dims()[0]
    }

    fn given_rows(&self) -> usize {
        self.given.as_ref().map_or(0, |(_, rows)| *rows)
    }

    /// A cached prefix for one request alone, whose text is `embeds` [T, C] and whose rows of the rotary table begin at
    /// `first_position`; `None` if the cache has no room for it.
    pub(super) fn with_embeds(
        &self,
        model: &Decoder,
        cache: &mut KvCache,
        embeds: &Tensor,
        first_position: usize,
    ) -> Result<Option<CachedPrefix>> {
        let embeds = gpu::to_device(embeds, model.device())?.to_dtype(model.prompt_dtype())?;
        let prompts = match self.prompts.dims()[0] {
            0 => embeds,
            _ => Tensor::cat(&[&self.prompts, &embeds], 0)?,
        };
        let extended = Self {
            before: self.before.clone(),
            prompts,
            given: self.given.clone(),
            cached: Vec::new(),
            recent: VecDeque::new(),
            first_position,
        };
        extended.compute(model, cache, &self.before)
    }

    /// The cached prefix for requests that begin with `head`, which begins with the tokens before the virtual tokens.
    fn compute(&self, model: &Decoder, cache: &mut KvCache, head: &[u32]) -> Result<Option<CachedPrefix>> {
        let first_position = self.first_position;
        let (before, after) = head.split_at(self.before.len());
        let virtual_ids = (0..self.prompts.dims()[0] as u32).map(virtual_id);
        let tokens: Vec<u32> =
            before.iter().copied().chain(virtual_ids).chain(after.iter().copied()).collect();
        let filled = self.given_rows();
        let Some(rows) = cache.allocate(filled + tokens.len()) else { return Ok(None) };
        if let Some((states, _)) = &self.given
            && let Err(error) = cache.write_given(&rows, states)
        {
            cache.free(rows);
            return Err(error);
        }
        if tokens.is_empty() {
            return Ok(Some(CachedPrefix { rows, first_position, head: Vec::new(), predicting: None }));
        }
        // Without tokens before the virtual tokens the last row alone predicts a token.
        let targets = match (before.len(), after.len()) {
            (0, 0) => 1,
            (_, 0) => tokens.len(),
            _ => 0,
        };
        let own = rows.clone();
        let next = Continuation { tokens: &tokens, prefix: 0..0, first_position, own, filled, targets };
        let computed = cache.pack(&[next]).and_then(|batch| model.infer(&batch, &self.prompts, cache));
        match computed {
            Ok(hidden) => {
                let predicting = match targets {
                    0 => None,
                    1 => Some(hidden),
                    _ => Some(predicting_rows(&hidden, before.len())?),
                };
                Ok(Some(CachedPrefix { rows, first_position, head: head.to_vec(), predicting }))
            }
            Err(error) => {
                cache.free(rows);
                Err(error)
            }
        }
    }

    /// The cached prefix with the longest head that `tokens` begin with, if at least `remaining` tokens follow the
    /// head.
    pub(super) fn longest_match(&mut self, tokens: &[u32], remaining: usize) -> Arc<CachedPrefix> {
        let most = tokens.len().saturating_sub(remaining);
        let fits = |block: &CachedPrefix| block.head.len() <= most && tokens.starts_with(&block.head);
        let best = (0..self.cached.len()).filter(|i| fits(&self.cached[*i]));
        let best = best.max_by_key(|i| self.cached[*i].head.len()).unwrap_or(0);
        if best > 0 {
            let block = self.cached.remove(best);
            self.cached.push(block);
        }
        let index = if best > 0 { self.cached.len() - 1 } else { 0 };
        self.cached[index].clone()
    }

    /// Computes a cached prefix for requests that begin with `head`, if the cache has room for it.
    pub(super) fn add_head(&mut self, model: &Decoder, cache: &mut KvCache, head: &[u32]) -> Result<()> {
        let is_known = self.cached.iter().any(|block| block.head == head);
        if is_known || head.len() <= self.before.len() || !head.starts_with(&self.before) {
            return Ok(());
        }
        if self.cached.len() > MAX_HEADS && !self.free_unused_head(cache) {
            return Ok(());
        }
        let block = self.compute(model, cache, head)?;
        self.cached.extend(block.map(Arc::new));
        Ok(())
    }

    /// Compares a request with recent ones, and adds the head that they share.
    pub(super) fn observe(&mut self, model: &Decoder, cache: &mut KvCache, tokens: &[u32]) -> Result<()> {
        let tokens = &tokens[..tokens.len().min(COMPARED)];
        let common_tokens = |other: &Vec<u32>| tokens.iter().zip(other).take_while(|(a, b)| a == b).count();
        let mut lengths: Vec<usize> = self.recent.iter().map(common_tokens).collect();
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        if let Some(length) = lengths.get(MIN_ALIKE - 1) {
            // The last token's row predicts the answer's first token, so it belongs to the request itself.
            let length = (*length).min(tokens.len().saturating_sub(1));
            let known = self.longest_match(tokens, 1).head.len();
            if length >= known + MIN_GAIN {
                self.add_head(model, cache, &tokens[..length])?;
            }
        }
        if self.recent.len() == RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(tokens.to_vec());
        Ok(())
    }

    /// Frees the rows of the least recently used head that no request uses now. Returns false if there is none.
    pub(super) fn free_unused_head(&mut self, cache: &mut KvCache) -> bool {
        let unused = (1..self.cached.len()).find(|i| Arc::strong_count(&self.cached[*i]) == 1);
        if let Some(index) = unused {
            cache.free(self.cached.remove(index).rows.clone());
        }
        unused.is_some()
    }

    /// All cached prefixes, to be freed when no request uses them.
    pub(super) fn into_cached(self) -> Vec<Arc<CachedPrefix>> {
        self.cached
    }
}

/// The rows of `hidden` that predict tokens of the vocabulary, for a prefix of `before` tokens and then virtual tokens: all of
/// the first but their last, and the last of all.
fn predicting_rows(hidden: &Tensor, before: usize) -> Result<Tensor> {
    let rows = hidden.dims()[0];
    let (first, last) = (hidden.narrow(0, 0, before - 1)?, hidden.narrow(0, rows - 1, 1)?);
    Ok(Tensor::cat(&[&first, &last], 0)?)
}
