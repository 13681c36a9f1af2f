//! Requests so long that the model turns all their positions by other frequencies (rotary scaling `longrope`): they
//! have a prefix of their own, so that no request changes what another one gives.

use super::engine::Engine;
use super::prefixes::PrefixId;
use super::request::Request;
use crate::ops::rope::Rope;
use crate::{Error, Result};

impl Engine<'_> {
    /// The first row of the rotary table for the positions of a request that the model turns by other frequencies
    /// because it is long; `None` of any other.
    ///
    /// # Errors
    /// A request that would become long while it is generated: what was computed before would be of a short one.
    pub(super) fn long(&self, prefix: PrefixId, request: &Request) -> Result<Option<usize>> {
        let rope = self.model.config().rope.as_ref();
        let Some(most) = rope.and_then(Rope::long_above) else { return Ok(None) };
        let virtual_tokens = self.virtual_tokens(prefix).unwrap_or(0);
        let first = virtual_tokens + request.text_positions();
        // The last token is chosen and not read.
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

    /// Makes the prefix of long requests; whether it is there.
    pub(super) fn make_long_prefix(&mut self, id: PrefixId, first_position: usize) -> Result<bool> {
        if self.long_prefixes.contains_key(&id) {
            return Ok(true);
        }
        let Some(rows) = self.virtual_tokens(id) else { return Ok(false) };
        self.make_room(rows);
        let Some(found) = self.prefixes.get(&id) else { return Ok(false) };
        let made = found.turned(self.model, &mut self.cache, first_position)?;
        let there = made.is_some();
        self.long_prefixes.extend(made.map(|prefix| (id, prefix)));
        Ok(there)
    }
}
