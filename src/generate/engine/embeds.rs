//! Requests whose text is given as embeddings. Virtual tokens and text go through the model at once, as a prefix of
//! this request alone, and the hidden state of the last row predicts the answer's first token.

use super::{Engine, RunningSequence, SequenceId, Waiting, own_rows};
use crate::generate::{Event, Request};
use crate::{Error, Result};
use std::sync::Arc;

impl Engine<'_> {
    /// Refuses embeddings of another width, and embeddings in addition to tokens.
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

    /// Admits the first waiting request, whose text is embeddings. Returns the rows of its prefix, or `None` if the
    /// cache has no room for them and the answer.
    pub(super) fn admit_embeds(&mut self, events: &mut Vec<(SequenceId, Event)>) -> Option<usize> {
        let Waiting { prefix, request, .. } = self.waiting.front()?;
        let rows = self.prefixes.get(prefix)?.rows() + request.text_positions();
        let answer = own_rows(0, request.max_new_tokens);
        self.make_room(rows + answer)?;
        let Waiting { id, prefix, request } = self.waiting.pop_front()?;
        match self.start_embeds(&prefix, id, request) {
            Ok(sequence) => self.running.push(sequence),
            Err(error) if self.shortage.caused(&error) => events.push((id, Event::no_memory(&error))),
            Err(error) => events.push((id, Event::Failed(error.to_string()))),
        }
        Some(rows)
    }

    fn start_embeds(
        &mut self,
        prefix: &super::PrefixId,
        id: SequenceId,
        request: Request,
    ) -> Result<RunningSequence> {
        let full = || Error::Invalid("cache: expected free rows for a request, found none".into());
        let own = self.cache.allocate(own_rows(0, request.max_new_tokens)).ok_or_else(full)?;
        let first_position = self.long_first_position(*prefix, &request)?.unwrap_or(0);
        let prompt_cache = self.prefixes.get(prefix).ok_or_else(super::removed_prefix)?;
        let embeds = request.embeds.as_ref().ok_or_else(full)?;
        let cached = match prompt_cache.with_embeds(self.model, &mut self.cache, embeds, first_position) {
            Ok(Some(cached)) => Arc::new(cached),
            other => {
                self.cache.free(own);
                return Err(other.err().unwrap_or_else(full));
            }
        };
        // It is freed when the sequence drops it.
        self.removed.push(cached.clone());
        let mut sequence = RunningSequence::new(id, request, cached, own);
        if let Err(error) = sequence.choose_first(self.model) {
            self.cache.free(sequence.own);
            return Err(error);
        }
        Ok(sequence)
    }
}
