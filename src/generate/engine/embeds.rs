//! Requests whose text is embeddings: virtual tokens and text go through the model at once, as a block of the request's own,
//! and the hidden state of the last row predicts the answer's first token.

use super::{Engine, Sequence, SequenceId, Waiting, own_rows};
use crate::generate::sampling::Chooser;
use crate::generate::{Event, Request};
use crate::{Error, Result};
use std::sync::Arc;

impl Engine<'_> {
    /// Refuses embeddings of another width, and such as are not the whole text.
    pub(super) fn check_embeds(&self, request: &Request) -> Result<()> {
        let Some(embeds) = &request.embeds else { return Ok(()) };
        let width = self.model.config().hidden_size;
        if embeds.dims().len() != 2 || embeds.dims()[1] != width {
            let problem = format!("request: expected embeddings [T, {width}], found {:?}", embeds.dims());
            return Err(Error::Invalid(problem));
        }
        if !request.tokens.is_empty() || request.scored > 0 || !request.score.is_empty() {
            let problem = "request: expected embeddings without tokens, and none to score, found both";
            return Err(Error::Invalid(problem.into()));
        }
        Ok(())
    }

    /// Takes in the first request in line, whose text is embeddings. Gives the rows of its block, or `None` when the cache
    /// has no room for them and the answer.
    pub(super) fn admit_embeds(&mut self, events: &mut Vec<(SequenceId, Event)>) -> Option<usize> {
        let Waiting { prefix, request, .. } = self.waiting.front()?;
        let rows = self.prefixes.get(prefix)?.virtual_tokens() + request.text_positions();
        let answer = own_rows(0, request.max_new_tokens);
        self.make_room(rows + answer)?;
        let Waiting { id, prefix, request } = self.waiting.pop_front()?;
        match self.begin_embeds(&prefix, id, request) {
            Ok(sequence) => self.running.push(sequence),
            Err(error) if self.shortage.caused(&error) => events.push((id, Event::no_memory(&error))),
            Err(error) => events.push((id, Event::Failed(error.to_string()))),
        }
        Some(rows)
    }

    fn begin_embeds(
        &mut self,
        prefix: &super::PrefixId,
        id: SequenceId,
        request: Request,
    ) -> Result<Sequence> {
        let full = || Error::Invalid("cache: expected free rows for a request, found none".into());
        let own = self.cache.take(own_rows(0, request.max_new_tokens)).ok_or_else(full)?;
        let first_position = self.long(*prefix, &request)?.unwrap_or(0);
        let found = self.prefixes.get(prefix).ok_or_else(super::gone)?;
        let embeds = request.embeds.as_ref().ok_or_else(full)?;
        let block = match found.extended(self.model, &mut self.cache, embeds, first_position) {
            Ok(Some(block)) => Arc::new(block),
            other => {
                self.cache.give_back(own);
                return Err(other.err().unwrap_or_else(full));
            }
        };
        // Given back when the sequence drops it.
        self.leaving.push(block.clone());
        let chooser = Chooser::new(&request);
        let (generated, scored, events) = (Vec::new(), Vec::new(), Vec::new());
        let mut sequence =
            Sequence { id, request, chooser, block, own, filled: 0, generated, scored, events };
        if let Err(error) = sequence.begin(self.model) {
            self.cache.give_back(sequence.own);
            return Err(error);
        }
        Ok(sequence)
    }
}
