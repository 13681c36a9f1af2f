//! Requests so long that the model rotates all their positions by other frequencies (rotary scaling `longrope`). They
//! have prefixes of their own, so that no request changes the answer to another.

use super::engine::Engine;
use super::prefixes::{PrefixId, PromptCache};
use super::request::Request;
use crate::ops::rope::Rope;
use crate::{Error, Result};

impl Engine<'_> {
    /// The first row of the rotary table for the positions of a long request; `None` if the request is short.
    ///
    /// # Errors
    /// Returns an error if the request would become long while it is generated: its first rows would have been computed
    /// with the frequencies of a short one.
    pub(super) fn long_first_position(&self, prefix: PrefixId, request: &Request) -> Result<Option<usize>> {
        let rope = self.model.config().rope.as_ref();
        let Some(most) = rope.and_then(Rope::long_above) else { return Ok(None) };
        let virtual_tokens = self.virtual_tokens(prefix).unwrap_or(0);
        let first = virtual_tokens + request.text_positions();
        // The last token does not go through the model.
        let last = first + request.max_new_tokens.saturating_sub(1);
        match (first > most, last > most) {
            (true, _) => Ok(Some(most)),
            (false, false) => Ok(None),
            (false, true) => Err(Error::Invalid(format!(
                "request: expected at most {} new tokens, found {}: beyond {most} positions the model's rotary scaling \
                 `longrope` turns all of them by other frequencies, and there are {virtual_tokens} virtual tokens and {} \
                 of text",
                most - first + 1,
                request.max_new_tokens,
                request.text_positions(),
            ))),
        }
    }

    /// Computes the prefix of long requests. Returns false if the cache has no room for it.
    pub(super) fn make_long_prefix(&mut self, id: PrefixId, first_position: usize) -> Result<bool> {
        if self.long_prefixes.contains_key(&id) {
            return Ok(true);
        }
        let Some(rows) = self.prefixes.get(&id).map(PromptCache::rows) else { return Ok(false) };
        self.make_room(rows);
        let Some(prompt_cache) = self.prefixes.get(&id) else { return Ok(false) };
        let long = prompt_cache.at_position(self.model, &mut self.cache, first_position)?;
        let has_room = long.is_some();
        self.long_prefixes.extend(long.map(|prefix| (id, prefix)));
        Ok(has_room)
    }
}
