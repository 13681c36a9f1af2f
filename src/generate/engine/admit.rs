//! Which waiting requests begin: in the order of arrival, when the cache has room for the longest possible answer.

use super::{Engine, RunningSequence, SequenceId, Waiting, own_rows};
use crate::Result;
use crate::generate::Event;
use std::ops::Range;

impl Engine<'_> {
    /// Admits waiting requests in the order of their arrival, while the cache has room for them. Returns the number of rows
    /// that went through the model for it.
    pub(super) fn admit(&mut self, events: &mut Vec<(SequenceId, Event)>) -> Result<usize> {
        self.free_removed();
        let mut rows: usize = self.running.iter().map(RunningSequence::rows_to_come).sum();
        let mut prefix_rows = 0;
        while rows < self.step_rows.current() {
            let Some(Waiting { id, prefix, request }) = self.waiting.front() else { break };
            let (id, prefix) = (*id, *prefix);
            if !self.prefixes.contains_key(&prefix) {
                events.push((id, Event::Failed("the prompt was unloaded".into())));
                self.waiting.pop_front();
                continue;
            }
            if request.embeds.is_some() {
                let Some(n) = self.admit_embeds(events) else { break };
                rows += n;
                prefix_rows += n;
                continue;
            }
            let first_position = self.long_first_position(prefix, request)?;
            if let Some(first_position) = first_position {
                match self.make_long_prefix(prefix, first_position) {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(error) if self.shortage.caused(&error) => {
                        self.waiting.pop_front();
                        events.push((id, Event::no_memory(&error)));
                        continue;
                    }
                    Err(error) => return Err(error),
                }
            }
            let Some(n) = self.admit_tokens(first_position.is_some()) else { break };
            rows += n;
        }
        Ok(prefix_rows)
    }

    /// Admits the first waiting request, whose text is tokens. Returns the number of its text's rows, or `None` if the
    /// cache has no room for the text and the answer.
    fn admit_tokens(&mut self, is_long: bool) -> Option<usize> {
        let Waiting { prefix, request, .. } = self.waiting.front()?;
        let prefixes = if is_long { &mut self.long_prefixes } else { &mut self.prefixes };
        // The row before the first token to score belongs to the request itself, as the last row does.
        let cached = prefixes.get_mut(prefix)?.longest_match(&request.tokens, request.scored + 1);
        let text_rows = request.tokens.len() - cached.head.len();
        let rows = own_rows(text_rows, request.max_new_tokens);
        self.make_room(rows)?;
        let own = self.cache.allocate(rows)?;
        let Waiting { id, request, .. } = self.waiting.pop_front()?;
        self.running.push(RunningSequence::new(id, request, cached, own));
        Some(text_rows)
    }

    /// Frees unused heads until `rows` adjacent rows are free. Returns `None` if no unused head is left.
    pub(in crate::generate) fn make_room(&mut self, rows: usize) -> Option<Range<usize>> {
        self.free_removed();
        loop {
            if let Some(range) = self.cache.allocate(rows) {
                self.cache.free(range.clone());
                return Some(range);
            }
            let cache = &mut self.cache;
            let mut prefixes = self.prefixes.values_mut().chain(self.long_prefixes.values_mut());
            if !prefixes.any(|prefix| prefix.free_unused_head(cache)) {
                return None;
            }
        }
    }
}
