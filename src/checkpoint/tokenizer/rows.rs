//! Tokens and the rows of the model's embedding: a text with a token that has no row is refused.

use super::TextTokenizer;
use crate::ops::embed::VIRTUAL;
use tokenizers::{Encoding, Tokenizer};

/// Most tokens that a message lists.
const LISTED: usize = 8;

/// A token of a text for which the embedding has no row.
pub(crate) struct TokenWithoutRow {
    /// Its place among the text's tokens.
    pub index: usize,
    /// The expected and the found value, and a hint.
    pub problem: String,
}

/// The first token of a text for which an embedding of `vocab_size` rows has no row.
pub(crate) fn first_without_row(
    tokenizer: &Tokenizer,
    encoding: &Encoding,
    vocab_size: usize,
) -> Option<TokenWithoutRow> {
    let rows = vocab_size.min(VIRTUAL as usize);
    let index = encoding.get_ids().iter().position(|id| *id as usize >= rows)?;
    let id = encoding.get_ids()[index];
    let problem = format!(
        "expected token ids under {rows}, the rows of the model's embedding, found {}, which is {id}; hint: leave that \
         token out, or give it a row (transformers: `model.resize_token_embeddings(len(tokenizer))`)",
        quoted(tokenizer, id)
    );
    Some(TokenWithoutRow { index, problem })
}

fn quoted(tokenizer: &Tokenizer, id: u32) -> String {
    format!("`{}`", tokenizer.id_to_token(id).unwrap_or_default())
}

impl TextTokenizer {
    /// Warnings about settings that the tokenizer does not follow, values that were filled in, and tokens without a
    /// row.
    pub fn all_warnings(&self) -> impl Iterator<Item = String> {
        self.warnings.iter().cloned().chain(self.rows_warning())
    }

    /// A warning about tokens for which the embedding has no row. An embedding with more rows than tokens is usual and
    /// gives no warning.
    pub fn rows_warning(&self) -> Option<String> {
        let vocabulary = self.tokenizer.get_vocab(true);
        let mut beyond: Vec<u32> =
            vocabulary.values().copied().filter(|id| *id as usize >= self.vocab_size).collect();
        beyond.sort_unstable();
        if beyond.is_empty() {
            return None;
        }
        let listed = beyond.iter().take(LISTED).map(|id| format!("{} ({id})", quoted(&self.tokenizer, *id)));
        let mut list = listed.collect::<Vec<_>>().join(", ");
        if beyond.len() > LISTED {
            list.push_str(&format!(" and {} more", beyond.len() - LISTED));
        }
        Some(format!(
            "the tokenizer has {} tokens and the model's embedding {} rows: a text with one of the tokens without a row \
             is refused: {list}",
            vocabulary.len(),
            self.vocab_size
        ))
    }
}
