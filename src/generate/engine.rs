//! Continuous batching: every step runs the next tokens of all requests under way through the model together, whatever
//! prefix they stand behind; requests join and leave between steps.
//!
//! ```text
//!   rows of a step, grouped by block (src/generate/prefixes.rs):
//!   ┌ behind prompt A ───────────────────────────────┐┌ behind prompt B ┐┌ base ──────────┐
//!   │ a's last token │ b's last token │ text of c    ││ text of d       ││ e's last token │   [rows, C]
//!   └─ logits ───────┴─ logits ───────┴──── of its ──┘└────── last ─────┘└─ logits ───────┘
//! ```
//!
//! A request is taken in when the cache has rows for all that it may come to, in the order of arrival, so none is ever
//! thrown out again. Long texts go through in parts, so that they do not hold up the others. If a device runs out of memory,
//! steps have fewer rows for a time; a request whose single row does not fit ends by itself.

mod check;
mod embeds;
mod room;

use super::prefixes::{Block, Prefix, PrefixId};
use super::sampling::Chooser;
use super::sequence::{Sequence, SequenceId};
use super::{Event, Request, StopReason};
use crate::device::Shortage;
use crate::model::{Decoder, KvCache, Next};
use crate::{Error, Result};
use candle_core::Tensor;
use room::StepRows;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

/// Runs requests through a model.
pub struct Engine<'m> {
    pub(super) model: &'m Decoder,
    pub(super) cache: KvCache,
    no_prompts: Tensor,
    step_rows: StepRows,
    pub(super) shortage: Shortage,
    pub(super) prefixes: BTreeMap<PrefixId, Prefix>,
    /// The same prompts for requests longer than [`crate::ops::rope::Rope::long_above`], made when one comes.
    pub(super) long_prefixes: BTreeMap<PrefixId, Prefix>,
    /// Blocks of prefixes that are gone, whose requests are not.
    leaving: Vec<Arc<Block>>,
    waiting: VecDeque<Waiting>,
    running: Vec<Sequence>,
    /// Events of a step that failed.
    undelivered: Vec<(SequenceId, Event)>,
    ids: u64,
}

/// What a step came to.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Stepped {
    /// What became of requests, each one's in order.
    pub events: Vec<(SequenceId, Event)>,
    /// Requests that had rows in the pass.
    pub sequences: usize,
    /// Token rows in the pass.
    pub rows: usize,
    /// Rows that a step may have from now on, where the device ran out of memory in this one.
    pub less_rows: Option<usize>,
}

struct Waiting {
    id: SequenceId,
    prefix: PrefixId,
    request: Request,
}

/// The part of a sequence that goes through in a step.
struct Part {
    /// Which of `running`.
    sequence: usize,
    tokens: Vec<u32>,
    targets: usize,
}

impl Part {
    fn next<'a>(&'a self, running: &[Sequence]) -> Next<'a> {
        let Sequence { block, own, filled, .. } = &running[self.sequence];
        Next {
            tokens: &self.tokens,
            prefix: block.rows.clone(),
            first_position: block.first_position,
            own: own.clone(),
            filled: *filled,
            targets: self.targets,
        }
    }
}

impl<'m> Engine<'m> {
    /// An engine with room for `cache_rows` rows of keys and values, and steps of at most `step_rows` rows.
    ///
    /// # Errors
    /// The device's.
    pub fn new(model: &'m Decoder, cache_rows: usize, step_rows: usize) -> Result<Self> {
        Ok(Self {
            model,
            cache: KvCache::new(model, cache_rows)?,
            no_prompts: super::prompts(model, None)?,
            step_rows: StepRows::new(step_rows),
            shortage: Shortage::new(model.device()),
            prefixes: BTreeMap::new(),
            long_prefixes: BTreeMap::new(),
            leaving: Vec::new(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            undelivered: Vec::new(),
            ids: 0,
        })
    }

    /// Computes keys and values of a soft prompt f32 [P, C], or of none for the base model.
    ///
    /// # Errors
    /// A prompt of another width; no room in the cache; the device's.
    pub fn add_prefix(&mut self, prompt: Option<&Tensor>) -> Result<PrefixId> {
        let rows = prompt.map_or(0, |prompt| prompt.dims()[0]);
        self.make_room(rows);
        let Some(prefix) = Prefix::new(self.model, &mut self.cache, prompt)? else {
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

    /// Computes the tokens that requests behind `prefix` begin with, once for all of them. Requests still hold them; what
    /// they get is the same.
    ///
    /// # Errors
    /// A prefix that is gone; the device's.
    pub fn share_head(&mut self, prefix: PrefixId, head: &[u32]) -> Result<()> {
        if head.is_empty() {
            return Ok(());
        }
        let found = self.prefixes.get_mut(&prefix).ok_or_else(gone)?;
        let shared = found.share(self.model, &mut self.cache, head);
        self.unless_short(shared)
    }

    /// A head saves work; without the memory for it, requests have its tokens as their own.
    fn unless_short(&mut self, shared: Result<()>) -> Result<()> {
        match shared {
            Err(error) if self.shortage.caused(&error) => Ok(()),
            other => other,
        }
    }

    /// Virtual tokens of a prefix.
    pub fn virtual_tokens(&self, prefix: PrefixId) -> Option<usize> {
        self.prefixes.get(&prefix).map(Prefix::virtual_tokens)
    }

    /// Takes a prefix away. Requests behind it that are under way go on; those that wait for it end at the next step.
    pub fn remove_prefix(&mut self, prefix: PrefixId) {
        for prefix in
            [self.prefixes.remove(&prefix), self.long_prefixes.remove(&prefix)].into_iter().flatten()
        {
            self.leaving.extend(prefix.into_blocks());
        }
    }

    /// Puts a request in line.
    ///
    /// # Errors
    /// A prefix that is gone; a request without text, that asks for nothing, with tokens that the model does not have, or
    /// that is longer than the cache; the device's.
    pub fn submit(&mut self, prefix: PrefixId, request: Request) -> Result<SequenceId> {
        self.check(prefix, &request)?;
        let found = match self.long(prefix, &request)? {
            None => self.prefixes.get_mut(&prefix),
            Some(_) => self.long_prefixes.get_mut(&prefix),
        };
        if request.embeds.is_none()
            && let Some(found) = found
        {
            let learned = found.learn(self.model, &mut self.cache, &request.tokens);
            self.unless_short(learned)?;
        }
        let id = SequenceId(self.next_id());
        self.waiting.push_back(Waiting { id, prefix, request });
        Ok(id)
    }

    /// Ends a request; nothing more comes of it.
    pub fn cancel(&mut self, id: SequenceId) {
        self.waiting.retain(|waiting| waiting.id != id);
        if let Some(at) = self.running.iter().position(|sequence| sequence.id == id) {
            self.end(at);
        }
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty() && self.undelivered.is_empty()
    }

    /// Requests that have not begun.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Runs the next rows of the requests through the model: fewer of them where the device runs out of memory.
    ///
    /// # Errors
    /// The device's, but for too little memory. The requests under way ([`Engine::running`]) have to be ended then.
    pub fn step(&mut self) -> Result<Stepped> {
        let events = std::mem::take(&mut self.undelivered);
        let mut stepped = Stepped { events, ..Stepped::default() };
        match self.advance(&mut stepped) {
            Ok(()) => Ok(stepped),
            Err(error) => {
                // Requests that ended before are told so by the next step.
                self.undelivered = stepped.events;
                Err(error)
            }
        }
    }

    fn advance(&mut self, stepped: &mut Stepped) -> Result<()> {
        self.end_overdue(&mut stepped.events);
        stepped.rows = self.admit(&mut stepped.events)?;
        if stepped.rows > 0 {
            self.deliver(&mut stepped.events);
        }
        loop {
            let parts = self.parts();
            let rows = parts.iter().map(|part| part.tokens.len()).sum::<usize>();
            if rows == 0 {
                return Ok(());
            }
            match self.run(&parts) {
                Ok(()) => {
                    self.step_rows.went_well();
                    stepped.sequences = parts.len();
                    stepped.rows += rows;
                    self.deliver(&mut stepped.events);
                    return Ok(());
                }
                Err(error) if self.shortage.caused(&error) => {
                    if self.step_rows.less(rows) {
                        stepped.less_rows = Some(self.step_rows.now());
                    } else {
                        let at = parts[0].sequence;
                        stepped.events.push((self.running[at].id, Event::no_memory(&error)));
                        self.end(at);
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Runs `parts` through the model. Nothing is changed where that fails before tokens are chosen.
    fn run(&mut self, parts: &[Part]) -> Result<()> {
        let next: Vec<Next> = parts.iter().map(|part| part.next(&self.running)).collect();
        let batch = self.cache.pack(&next)?;
        let hidden = self.model.infer(&batch, &self.no_prompts, &mut self.cache)?;
        self.choose(parts, &hidden)?;
        for part in parts {
            self.running[part.sequence].filled += part.tokens.len();
        }
        Ok(())
    }

    /// Takes the sequences' events, and ends those that are over.
    fn deliver(&mut self, events: &mut Vec<(SequenceId, Event)>) {
        for sequence in &mut self.running {
            let id = sequence.id;
            events.extend(sequence.events.drain(..).map(|event| (id, event)));
        }
        for at in (0..self.running.len()).rev() {
            let ended = events.iter().any(|(id, event)| *id == self.running[at].id && event.is_last());
            if ended {
                self.end(at);
            }
        }
    }

    /// Requests under way.
    pub fn running(&self) -> Vec<SequenceId> {
        self.running.iter().map(|sequence| sequence.id).collect()
    }

    fn next_id(&mut self) -> u64 {
        self.ids += 1;
        self.ids
    }

    fn end(&mut self, at: usize) {
        let sequence = self.running.remove(at);
        self.cache.give_back(sequence.own);
        drop(sequence.block);
        self.leave();
    }

    /// Gives back blocks of prefixes that are gone, where nobody uses them any more.
    fn leave(&mut self) {
        let (cache, leaving) = (&mut self.cache, &mut self.leaving);
        leaving.retain(|block| {
            let used = Arc::strong_count(block) > 1;
            if !used {
                cache.give_back(block.rows.clone());
            }
            used
        });
    }

    fn end_overdue(&mut self, events: &mut Vec<(SequenceId, Event)>) {
        let now = Instant::now();
        let overdue = |request: &Request| request.deadline.is_some_and(|deadline| deadline <= now);
        self.waiting.retain(|waiting| {
            let over = overdue(&waiting.request);
            if over {
                events.push((waiting.id, Event::Finished(StopReason::TimeLimit)));
            }
            !over
        });
        for at in (0..self.running.len()).rev() {
            if overdue(&self.running[at].request) {
                events.push((self.running[at].id, Event::Finished(StopReason::TimeLimit)));
                self.end(at);
            }
        }
    }

    /// Frees heads that nobody uses until `rows` rows stand together, or none is left.
    pub(super) fn make_room(&mut self, rows: usize) -> Option<Range<usize>> {
        self.leave();
        loop {
            if let Some(range) = self.cache.take(rows) {
                self.cache.give_back(range.clone());
                return Some(range);
            }
            let cache = &mut self.cache;
            let mut prefixes = self.prefixes.values_mut().chain(self.long_prefixes.values_mut());
            if !prefixes.any(|prefix| prefix.give_back_one(cache)) {
                return None;
            }
        }
    }

    /// Takes requests in, in the order of their arrival, while there is room for them. Gives the rows that went through
    /// the model for it.
    fn admit(&mut self, events: &mut Vec<(SequenceId, Event)>) -> Result<usize> {
        self.leave();
        let mut rows: usize = self.running.iter().map(Sequence::rows_to_come).sum();
        let mut begun = 0;
        while rows < self.step_rows.now() {
            let Some(Waiting { id, prefix, request }) = self.waiting.front() else { break };
            if !self.prefixes.contains_key(prefix) {
                events.push((*id, Event::Failed("the prompt was unloaded".into())));
                self.waiting.pop_front();
                continue;
            }
            if request.embeds.is_some() {
                let Some(n) = self.admit_embeds(events) else { break };
                rows += n;
                begun += n;
                continue;
            }
            let (prefix, long) = (*prefix, self.long(*prefix, request)?);
            if let Some(first_position) = long {
                match self.make_long_prefix(prefix, first_position) {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(error) if self.shortage.caused(&error) => {
                        let Some(Waiting { id, .. }) = self.waiting.pop_front() else { break };
                        events.push((id, Event::no_memory(&error)));
                        continue;
                    }
                    Err(error) => return Err(error),
                }
            }
            let Some(Waiting { request, .. }) = self.waiting.front() else { break };
            let prefixes = if long.is_some() { &mut self.long_prefixes } else { &mut self.prefixes };
            let Some(found) = prefixes.get_mut(&prefix) else { break };
            // The row before the first token to score is the request's own, as is the last.
            let block = found.block(&request.tokens, request.scored + 1);
            let n = own_rows(request.tokens.len() - block.head.len(), request.max_new_tokens);
            if self.make_room(n).is_none() {
                break;
            }
            let Some(own) = self.cache.take(n) else { break };
            let Some(Waiting { id, request, .. }) = self.waiting.pop_front() else { break };
            let chooser = Chooser::new(&request);
            rows += request.tokens.len() - block.head.len();
            let (generated, scored, events) = (Vec::new(), Vec::new(), Vec::new());
            let sequence =
                Sequence { id, request, chooser, block, own, filled: 0, generated, scored, events };
            self.running.push(sequence);
        }
        Ok(begun)
    }

    /// What of each sequence goes through now: a token of those that generate, then as much text as there is room for.
    /// In the order of their blocks, so that those behind one prefix stand together.
    fn parts(&self) -> Vec<Part> {
        let mut room = self.step_rows.now();
        let (mut texts, mut parts) = (Vec::new(), Vec::new());
        for (i, sequence) in self.running.iter().enumerate() {
            match sequence.generated.last() {
                Some(token) if room > 0 => {
                    parts.push(Part { sequence: i, tokens: vec![*token], targets: 1 });
                    room -= 1;
                }
                Some(_) => {}
                None => texts.push(i),
            }
        }
        for i in texts {
            let sequence = &self.running[i];
            let text = sequence.text();
            let end = text.len().min(sequence.filled + room);
            if end > sequence.filled {
                let targets = end.saturating_sub(sequence.first_target().max(sequence.filled));
                let tokens = text[sequence.filled..end].to_vec();
                room -= tokens.len();
                parts.push(Part { sequence: i, tokens, targets });
            }
        }
        parts.sort_by_key(|part| {
            let sequence = &self.running[part.sequence];
            (sequence.block.rows.start, sequence.own.start)
        });
        parts
    }

    /// Looks at the logits of the target rows, whose hidden states are `hidden` [targets, C].
    fn choose(&mut self, parts: &[Part], hidden: &Tensor) -> Result<()> {
        let mut rows = Vec::new();
        for part in parts {
            let sequence = &self.running[part.sequence];
            let first = sequence.filled + part.tokens.len() - part.targets;
            rows.extend((first..first + part.targets).map(|row| (part.sequence, row)));
        }
        super::choose::choose(self.model, hidden, &rows, &mut self.running, &mut self.shortage)
    }
}

/// Rows of keys and values that a request may need; the last token is chosen and not read.
fn own_rows(text: usize, max_new_tokens: usize) -> usize {
    text + max_new_tokens.saturating_sub(1)
}

fn gone() -> Error {
    Error::Invalid("request: expected a prompt that is loaded, found one that was unloaded".into())
}
