//! Continuous batching: every step runs the next tokens of all running requests through the model together, whatever
//! prefix they have. Requests join and leave between steps.
//!
//! ```text
//!   rows of a step, grouped by cached prefix (src/generate/prefixes.rs):
//!   ┌ after prompt A ────────────────────────────────┐┌ after prompt B ─┐┌ base ──────────┐
//!   │ a's last token │ b's last token │ text of c    ││ text of d       ││ e's last token │   [rows, C]
//!   └─ logits ───────┴─ logits ───────┴ last: logits ┘└ last: logits ───┘└─ logits ───────┘
//! ```
//!
//! Requests are admitted in arrival order, and only when the cache can hold the longest possible result. A running
//! request is therefore never preempted. Long texts are processed in parts, so that they do not delay the other
//! requests. If a device runs out of memory, steps have fewer rows for a time; a request whose single row does not fit
//! ends by itself.

mod admit;
mod check;
mod embeds;
mod room;
mod step;

use super::prefixes::{CachedPrefix, PrefixId, PromptCache};
use super::sequence::{RunningSequence, SequenceId};
use super::{Event, Request, StopReason};
use crate::device::Shortage;
use crate::model::{Decoder, Decoding, KvCache};
use crate::prompt::Prefix;
use crate::{Error, Result};
use candle_core::Tensor;
use room::RowLimit;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

/// Runs requests through a model.
pub struct Engine<'m> {
    pub(super) model: &'m Decoder,
    pub(super) cache: KvCache,
    no_prompts: Tensor,
    /// Runs steps of one token a sequence as graphs, if that was asked for.
    decoding: Option<Decoding>,
    step_rows: RowLimit,
    pub(super) shortage: Shortage,
    pub(super) prefixes: BTreeMap<PrefixId, PromptCache>,
    /// The same prompts for requests longer than [`crate::ops::rope::Rope::long_above`], computed when the first such
    /// request begins.
    pub(super) long_prefixes: BTreeMap<PrefixId, PromptCache>,
    /// Cached prefixes that were removed while requests use them.
    removed: Vec<Arc<CachedPrefix>>,
    waiting: VecDeque<Waiting>,
    running: Vec<RunningSequence>,
    /// Events of a step that failed, to be returned by the next step.
    undelivered: Vec<(SequenceId, Event)>,
    last_id: u64,
}

/// The result of a step.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepOutput {
    /// Events of requests, those of each request in order.
    pub events: Vec<(SequenceId, Event)>,
    /// Number of requests that had rows in the pass.
    pub sequences: usize,
    /// Number of token rows in the pass.
    pub rows: usize,
    /// The new limit of rows per step, if the device ran out of memory in this step.
    pub less_rows: Option<usize>,
}

struct Waiting {
    id: SequenceId,
    prefix: PrefixId,
    request: Request,
}

impl<'m> Engine<'m> {
    /// An engine with room for `cache_rows` rows of keys and values, and steps of at most `step_rows` rows.
    ///
    /// # Errors
    /// Returns an error if a device operation fails, or `GNEISS_CUDA_GRAPHS` has another value than 0 or 1.
    pub fn new(model: &'m Decoder, cache_rows: usize, step_rows: usize) -> Result<Self> {
        Self::with_decoding(model, (cache_rows, step_rows), Decoding::new(model)?)
    }

    pub(super) fn with_decoding(
        model: &'m Decoder,
        (cache_rows, step_rows): (usize, usize),
        decoding: Option<Decoding>,
    ) -> Result<Self> {
        let padding_rows = if decoding.is_some() { Decoding::PADDING_ROWS } else { 0 };
        Ok(Self {
            model,
            cache: KvCache::with_padding(model, cache_rows, padding_rows)?,
            no_prompts: model.no_prompts()?,
            decoding,
            step_rows: RowLimit::new(step_rows),
            shortage: Shortage::new(model.device()),
            prefixes: BTreeMap::new(),
            long_prefixes: BTreeMap::new(),
            removed: Vec::new(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            undelivered: Vec::new(),
            last_id: 0,
        })
    }

    /// Puts the keys and values of a soft prompt into the cache, or of no prompt for the base model.
    ///
    /// # Errors
    /// Returns an error if the prompt has another width than the model, the cache has no room for it, or a device
    /// operation fails.
    pub fn add_prefix(&mut self, prompt: Option<&Prefix>) -> Result<PrefixId> {
        let rows = prompt.map_or(0, |prompt| prompt.before().len() + prompt.num_virtual_tokens());
        self.make_room(rows);
        let Some(prefix) = PromptCache::new(self.model, &mut self.cache, prompt)? else {
            return Err(Error::Invalid(format!(
                "cache: expected {rows} free rows for a prompt, found none of {}; hint: a larger cache, fewer prompts, \
                 or fewer requests at a time",
                self.cache.capacity()
            )));
        };
        let id = PrefixId(self.next_id());
        self.prefixes.insert(id, prefix);
        Ok(id)
    }

    /// Computes the tokens `head` with which requests after `prefix` begin, once for all of them. The requests still
    /// contain them, and their answers are the same.
    ///
    /// # Errors
    /// Returns an error if the prefix was removed or a device operation fails.
    pub fn share_head(&mut self, prefix: PrefixId, head: &[u32]) -> Result<()> {
        if head.is_empty() {
            return Ok(());
        }
        let prompt_cache = self.prefixes.get_mut(&prefix).ok_or_else(removed_prefix)?;
        let added = prompt_cache.add_head(self.model, &mut self.cache, head);
        self.ignore_shortage(added)
    }

    /// A head only saves work. If the device has no memory for it, every request computes its tokens itself.
    fn ignore_shortage(&mut self, outcome: Result<()>) -> Result<()> {
        match outcome {
            Err(error) if self.shortage.caused(&error) => Ok(()),
            other => other,
        }
    }

    /// Number of virtual tokens of a prefix; `None` if it was removed.
    pub fn virtual_tokens(&self, prefix: PrefixId) -> Option<usize> {
        self.prefixes.get(&prefix).map(PromptCache::virtual_tokens)
    }

    /// Removes a prefix. Running requests continue to use it; requests that wait for it end at the next step.
    pub fn remove_prefix(&mut self, prefix: PrefixId) {
        for prefix in
            [self.prefixes.remove(&prefix), self.long_prefixes.remove(&prefix)].into_iter().flatten()
        {
            self.removed.extend(prefix.into_cached());
        }
    }

    /// Adds a request to the queue.
    ///
    /// # Errors
    /// Returns an error if the prefix was removed; if the request has no text, asks for nothing, has tokens outside the
    /// vocabulary, does not begin with the tokens before the prompt or is longer than the cache; or if a device operation fails.
    pub fn submit(&mut self, prefix: PrefixId, request: Request) -> Result<SequenceId> {
        self.check(prefix, &request)?;
        let prompt_cache = match self.long_first_position(prefix, &request)? {
            None => self.prefixes.get_mut(&prefix),
            Some(_) => self.long_prefixes.get_mut(&prefix),
        };
        if request.embeds.is_none()
            && let Some(prompt_cache) = prompt_cache
        {
            let observed = prompt_cache.observe(self.model, &mut self.cache, &request.tokens);
            self.ignore_shortage(observed)?;
        }
        let id = SequenceId(self.next_id());
        self.waiting.push_back(Waiting { id, prefix, request });
        Ok(id)
    }

    /// Ends a request. It has no more events.
    pub fn cancel(&mut self, id: SequenceId) {
        self.waiting.retain(|waiting| waiting.id != id);
        if let Some(index) = self.running.iter().position(|sequence| sequence.id == id) {
            self.end(index);
        }
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty() && self.undelivered.is_empty()
    }

    /// Number of requests that have not begun.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Runs the next rows of the requests through the model: fewer of them if the device runs out of memory.
    ///
    /// # Errors
    /// Returns an error if a device operation fails for another reason than too little memory. The caller must then
    /// cancel the running requests ([`Engine::running`]).
    pub fn step(&mut self) -> Result<StepOutput> {
        let events = std::mem::take(&mut self.undelivered);
        let mut output = StepOutput { events, ..StepOutput::default() };
        match self.advance(&mut output) {
            Ok(()) => Ok(output),
            Err(error) => {
                // The next step returns the events of this one.
                self.undelivered = output.events;
                Err(error)
            }
        }
    }

    /// The running requests.
    pub fn running(&self) -> Vec<SequenceId> {
        self.running.iter().map(|sequence| sequence.id).collect()
    }

    fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    fn end(&mut self, index: usize) {
        let sequence = self.running.remove(index);
        self.cache.free(sequence.own);
        drop(sequence.prefix);
        self.free_removed();
    }

    /// Frees the removed prefixes that no request uses any more.
    fn free_removed(&mut self) {
        let (cache, removed) = (&mut self.cache, &mut self.removed);
        removed.retain(|cached| {
            let used = Arc::strong_count(cached) > 1;
            if !used {
                cache.free(cached.rows.clone());
            }
            used
        });
    }

    fn end_overdue(&mut self, events: &mut Vec<(SequenceId, Event)>) {
        let now = Instant::now();
        let overdue = |request: &Request| request.deadline.is_some_and(|deadline| deadline <= now);
        self.waiting.retain(|waiting| {
            let is_overdue = overdue(&waiting.request);
            if is_overdue {
                events.push((waiting.id, Event::Finished(StopReason::TimeLimit)));
            }
            !is_overdue
        });
        for index in (0..self.running.len()).rev() {
            if overdue(&self.running[index].request) {
                events.push((self.running[index].id, Event::Finished(StopReason::TimeLimit)));
                self.end(index);
            }
        }
    }
}

/// Rows of keys and values that a request may need. The last token does not go through the model.
fn own_rows(text: usize, max_new_tokens: usize) -> usize {
    text + max_new_tokens.saturating_sub(1)
}

fn removed_prefix() -> Error {
    Error::Invalid("request: expected a prompt that is loaded, found one that was unloaded".into())
}
