//! From a request's text to token ids. A large text is tokenized on a thread of its own; a text that is certainly too
//! long is refused first.

use crate::data::Template;
use crate::data::encode::Encoder;
use crate::serve::api_error::ApiError;
use crate::serve::state::AppState;
use std::sync::Arc;

/// Texts of more bytes are tokenized on a thread of their own, so that they do not delay other requests. A shorter one
/// takes less than a millisecond.
const LARGE: usize = 4096;
/// A normalizer may make a text shorter before it is tokenized, but hardly by more than this factor.
const NORMALIZED: usize = 4;

/// How a text becomes tokens.
#[derive(Debug, Clone)]
pub(crate) enum PromptEncoding {
    /// As it is, with or without the special tokens that the tokenizer adds before every text.
    Text { special: bool },
    /// In the verbalizer, as during tuning, and after an instruction if there is one.
    Verbalized { template: Template, instruction: Option<String> },
}

impl AppState {
    /// Token ids of a text. If there are more than `most`, only its last ones, and the special tokens that precede
    /// every text.
    ///
    /// # Errors
    /// Returns 400 if the text is certainly too long, or cannot be encoded.
    pub async fn encode(
        self: &Arc<Self>,
        text: String,
        how: PromptEncoding,
        most: Option<usize>,
    ) -> Result<Vec<u32>, ApiError> {
        if most.is_none() {
            self.check_length(text.len())?;
        }
        if text.len() <= LARGE {
            return self.encode_now(&text, &how, most);
        }
        // The permit is held until the thread ends, even if the client disconnects before.
        let permit = self.tokenizing.clone().acquire_owned().await;
        let state = self.clone();
        let encoded = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            state.encode_now(&text, &how, most)
        })
        .await;
        encoded.unwrap_or_else(|error| Err(ApiError::internal(format!("the tokenizer: {error}"))))
    }

    /// Refuses a text that would be too long even if each of its tokens were the longest token.
    fn check_length(&self, bytes: usize) -> Result<(), ApiError> {
        let most = self.client.limits().sequence_tokens;
        let shrinks = if self.tokenizer.tokenizer.get_normalizer().is_some() { NORMALIZED } else { 1 };
        let least = bytes / (self.longest_token * shrinks).max(1);
        if least > most {
            let message = format!(
                "expected a text of at most {most} tokens, found {bytes} bytes, at least {least} tokens"
            );
            return Err(ApiError::too_long(message));
        }
        Ok(())
    }

    fn encode_now(
        &self,
        text: &str,
        how: &PromptEncoding,
        most: Option<usize>,
    ) -> Result<Vec<u32>, ApiError> {
        match how {
            PromptEncoding::Text { special } => {
                let ids = self.token_ids(text, *special)?;
                Ok(most.map_or_else(|| ids.clone(), |most| self.last_tokens(&ids, *special, most)))
            }
            PromptEncoding::Verbalized { template, instruction } => {
                let encoder = Encoder {
                    tokenizer: &self.tokenizer.tokenizer,
                    template,
                    vocab_size: self.tokenizer.vocab_size,
                    eos_token_id: self.tokenizer.eos_token_id,
                    max_input_tokens: most.unwrap_or(usize::MAX),
                    max_output_tokens: 1,
                    instruction: instruction.as_deref(),
                };
                Ok(encoder.encode_input(text)?.0)
            }
        }
    }

    /// The tokens without the end-of-text token that some tokenizers append, because the model continues the text.
    fn token_ids(&self, text: &str, special: bool) -> crate::Result<Vec<u32>> {
        let encoding = self.tokenizer.encoding(text, special)?;
        let mut ids = encoding.get_ids().to_vec();
        let mut masks = encoding.get_special_tokens_mask().iter().rev();
        while special && ids.last() == Some(&self.tokenizer.eos_token_id) && masks.next() == Some(&1) {
            ids.pop();
        }
        Ok(ids)
    }

    /// The last `most` of `ids`. The special tokens that precede every text are kept.
    fn last_tokens(&self, ids: &[u32], special: bool, most: usize) -> Vec<u32> {
        let cut = ids.len().saturating_sub(most);
        if cut == 0 {
            return ids.to_vec();
        }
        let first = if special { self.token_ids("", true).unwrap_or_default() } else { Vec::new() };
        if most > first.len() && !first.is_empty() && ids.starts_with(&first) {
            [&first[..], &ids[cut + first.len()..]].concat()
        } else {
            ids[cut..].to_vec()
        }
    }
}

/// Refuses a text without tokens, which the model cannot continue.
pub(super) fn not_empty(key: &str, tokens: &[u32]) -> Result<(), ApiError> {
    if tokens.is_empty() {
        return Err(ApiError::invalid(key, "expected a text of at least one token, found none"));
    }
    Ok(())
}
