//! What stands before requests, computed once for all of them: a soft prompt's virtual tokens, and token rows that
//! many requests begin with.
//!
//! ```text
//!   ┌ virtual tokens ┐┌ head: an instruction, a verbalizer ┐┌ a request's own tokens
//!   └──────────────── a block, [rows, 2K D] ───────────────┘└ its rows in the cache
//! ```
//!
//! Each prefix has a block without a head, and more for heads that were named or that recent requests share. A request
//! hangs on the block with the longest head that it begins with.

use crate::Result;
use crate::model::{Decoder, KvCache, Next};
use crate::ops::embed::virtual_id;
use candle_core::Tensor;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

/// Recent requests of a prefix that a new one is compared with.
const RECENT: usize = 8;

/// Of these so many have to begin like the new one, for the beginning to become a head.
const ALIKE: usize = 3;

/// Tokens that a head is longer than the one there is: a block costs a pass over virtual tokens and head.
const LONGER: usize = 4;

/// Heads of a prefix at most; the one that was not used for the longest makes room.
const HEADS: usize = 4;

/// Tokens of a request that are compared.
const COMPARED: usize = 2048;

/// A handle on a prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PrefixId(pub(super) u64);

/// Keys and values of virtual tokens and a head, in the cache.
pub(super) struct Block {
    /// Rows of the cache.
    pub(super) rows: Range<usize>,
    /// The first row of the rotary table for its positions.
    pub(super) first_position: usize,
    /// Tokens behind the virtual ones.
    pub(super) head: Vec<u32>,
    /// Hidden state of the last virtual token [1, C], where there is one and no head.
    pub(super) last: Option<Tensor>,
}

/// One soft prompt, or none, with its blocks.
pub(super) struct Prefix {
    /// The virtual tokens' embeddings as the model computes, [P, C].
    prompts: Tensor,
    /// The first row of the rotary table for the positions of its sequences.
    first_position: usize,
    /// The first has no head. In the order of their last use otherwise, the latest last.
    blocks: Vec<Arc<Block>>,
    recent: VecDeque<Vec<u32>>,
}

impl Prefix {
    /// A prefix and its block without a head; `None` where the cache has no room for it.
    pub(super) fn new(model: &Decoder, cache: &mut KvCache, prompt: Option<&Tensor>) -> Result<Option<Self>> {
        Self::at(model, cache, super::prompts(model, prompt)?, 0)
    }

    /// The same prompt for sequences whose positions begin at `first_position` of the rotary table.
    pub(super) fn turned(
        &self,
        model: &Decoder,
        cache: &mut KvCache,
        first_position: usize,
    ) -> Result<Option<Self>> {
        Self::at(model, cache, self.prompts.clone(), first_position)
    }

    fn at(
        model: &Decoder,
        cache: &mut KvCache,
        prompts: Tensor,
        first_position: usize,
    ) -> Result<Option<Self>> {
        let mut prefix = Self { prompts, first_position, blocks: Vec::new(), recent: VecDeque::new() };
        let Some(block) = prefix.compute(model, cache, &[])? else { return Ok(None) };
        prefix.blocks.push(Arc::new(block));
        Ok(Some(prefix))
    }

    pub(super) fn virtual_tokens(&self) -> usize {
        self.prompts.dims()[0]
    }

    /// A block of its own for one request, whose text is `embeds` [T, C] and whose rows of the rotary table begin at
    /// `first_position`; `None` when the cache has no room for it.
    pub(super) fn extended(
        &self,
        model: &Decoder,
        cache: &mut KvCache,
        embeds: &Tensor,
        first_position: usize,
    ) -> Result<Option<Block>> {
        let embeds = super::prompts(model, Some(embeds))?;
        let prompts = match self.virtual_tokens() {
            0 => embeds,
            _ => Tensor::cat(&[&self.prompts, &embeds], 0)?,
        };
        let whole = Self { prompts, blocks: Vec::new(), recent: VecDeque::new(), first_position };
        whole.compute(model, cache, &[])
    }

    fn compute(&self, model: &Decoder, cache: &mut KvCache, head: &[u32]) -> Result<Option<Block>> {
        let first_position = self.first_position;
        let virtual_ids = (0..self.virtual_tokens() as u32).map(virtual_id);
        let tokens: Vec<u32> = virtual_ids.chain(head.iter().copied()).collect();
        let Some(rows) = cache.take(tokens.len()) else { return Ok(None) };
        if tokens.is_empty() {
            return Ok(Some(Block { rows, first_position, head: Vec::new(), last: None }));
        }
        let targets = usize::from(head.is_empty());
        let own = rows.clone();
        let next = Next { tokens: &tokens, prefix: 0..0, first_position, own, filled: 0, targets };
        let computed = cache.pack(&[next]).and_then(|batch| model.infer(&batch, &self.prompts, cache));
        match computed {
            Ok(hidden) => {
                let last = head.is_empty().then_some(hidden);
                Ok(Some(Block { rows, first_position, head: head.to_vec(), last }))
            }
            Err(error) => {
                cache.give_back(rows);
                Err(error)
            }
        }
    }

    /// The block with the longest head that `tokens` begin with, which leaves `rest` of them at least.
    pub(super) fn block(&mut self, tokens: &[u32], rest: usize) -> Arc<Block> {
        let most = tokens.len().saturating_sub(rest);
        let fits = |block: &Block| block.head.len() <= most && tokens.starts_with(&block.head);
        let best = (0..self.blocks.len()).filter(|i| fits(&self.blocks[*i]));
        let best = best.max_by_key(|i| self.blocks[*i].head.len()).unwrap_or(0);
        if best > 0 {
            let block = self.blocks.remove(best);
            self.blocks.push(block);
        }
        let at = if best > 0 { self.blocks.len() - 1 } else { 0 };
        self.blocks[at].clone()
    }

    /// Computes a block for requests that begin with `head`; nothing where the cache has no room.
    pub(super) fn share(&mut self, model: &Decoder, cache: &mut KvCache, head: &[u32]) -> Result<()> {
        if self.blocks.iter().any(|block| block.head == head) {
            return Ok(());
        }
        if self.blocks.len() > HEADS && !self.give_back_one(cache) {
            return Ok(());
        }
        let block = self.compute(model, cache, head)?;
        self.blocks.extend(block.map(Arc::new));
        Ok(())
    }

    /// Looks at how a request begins, and shares the head that recent ones have with it.
    pub(super) fn learn(&mut self, model: &Decoder, cache: &mut KvCache, tokens: &[u32]) -> Result<()> {
        let tokens = &tokens[..tokens.len().min(COMPARED)];
        let alike = |other: &Vec<u32>| tokens.iter().zip(other).take_while(|(a, b)| a == b).count();
        let mut lengths: Vec<usize> = self.recent.iter().map(alike).collect();
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        if let Some(length) = lengths.get(ALIKE - 1) {
            // The last token's row predicts the answer's first, and is the request's own.
            let length = (*length).min(tokens.len().saturating_sub(1));
            let known = self.block(tokens, 1).head.len();
            if length >= known + LONGER {
                self.share(model, cache, &tokens[..length])?;
            }
        }
        if self.recent.len() == RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(tokens.to_vec());
        Ok(())
    }

    /// Gives back the rows of the head that was not used for the longest, of those that nobody uses now.
    pub(super) fn give_back_one(&mut self, cache: &mut KvCache) -> bool {
        let unused = (1..self.blocks.len()).find(|i| Arc::strong_count(&self.blocks[*i]) == 1);
        if let Some(at) = unused {
            cache.give_back(self.blocks.remove(at).rows.clone());
        }
        unused.is_some()
    }

    /// All blocks, to be given back when nobody uses them any more.
    pub(super) fn into_blocks(self) -> Vec<Arc<Block>> {
        self.blocks
    }
}
