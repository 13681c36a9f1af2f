//! Checks of a request: tokens within the vocabulary, and no more positions and rows than there are.

use super::{Engine, own_rows, removed_prefix};
use crate::generate::{PrefixId, Request};
use crate::{Error, Result};

impl Engine<'_> {
    /// Refuses a request that asks for nothing or for too much.
    ///
    /// # Errors
    /// Returns an error as [`Engine::submit`] does.
    pub(super) fn check(&self, prefix: PrefixId, request: &Request) -> Result<()> {
        let prompt_cache = self.prefixes.get(&prefix).ok_or_else(removed_prefix)?;
        let invalid = |problem: String| Err(Error::Invalid(format!("request: {problem}")));
        let (tokens, vocabulary) = (&request.tokens, self.model.config().vocab_size);
        self.check_embeds(request)?;
        if request.text_positions() == 0 {
            return invalid("expected at least one token, found none".into());
        }
        if let Some(id) = tokens.iter().find(|id| **id as usize >= vocabulary) {
            return invalid(format!("expected token ids under {vocabulary}, found {id}"));
        }
        check_beginning(prompt_cache.before(), request)?;
        if let Some(id) = request.score.iter().find(|id| **id as usize >= vocabulary) {
            return invalid(format!("score: expected token ids under {vocabulary}, found {id}"));
        }
        let choices = request.choices.iter().flat_map(|choices| choices.tokens());
        if let Some(id) = choices.into_iter().find(|id| *id as usize >= vocabulary) {
            return invalid(format!("choices: expected token ids under {vocabulary}, found {id}"));
        }
        if request.scored > tokens.len() || (request.max_new_tokens == 0 && request.scored == 0) {
            return invalid(format!(
                "expected something to generate, or up to {} tokens to score, found max_new_tokens {} and scored {}",
                tokens.len(),
                request.max_new_tokens,
                request.scored
            ));
        }
        let text = request.text_positions();
        let positions = prompt_cache.virtual_tokens() + text + request.max_new_tokens;
        let most = self.model.config().max_position_embeddings;
        if positions > most {
            return invalid(format!(
                "expected at most {most} virtual tokens, tokens of text and tokens to generate together, as the model \
                 has positions, found {positions}"
            ));
        }
        // A long request needs a second prefix, with other frequencies.
        let prefixes =
            prompt_cache.rows() * if self.long_first_position(prefix, request)?.is_some() { 2 } else { 1 };
        let own = text - prompt_cache.before().len();
        let rows = own_rows(own, request.max_new_tokens) + prefixes;
        if rows > self.cache.capacity() {
            return invalid(format!(
                "expected at most {} rows of keys and values, the size of the cache, found {rows}",
                self.cache.capacity()
            ));
        }
        Ok(())
    }
}

/// Refuses a request that does not begin with the tokens `before`, after which the prompt stands, and go on after them.
fn check_beginning(before: &[u32], request: &Request) -> Result<()> {
    let tokens = &request.tokens;
    if before.is_empty() || (tokens.len() > before.len() && tokens.starts_with(before)) {
        return Ok(());
    }
    let found = match request.embeds {
        Some(_) => "embeddings".to_owned(),
        None => format!("{:?}", &tokens[..tokens.len().min(before.len() + 1)]),
    };
    Err(Error::Invalid(format!(
        "request: expected the tokens {before:?}, after which the soft prompt stands (prompt.position = \"after_head\"), and at \
         least one more, found {found}"
    )))
}
