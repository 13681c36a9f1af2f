//! The list of tokens with their types.

use std::collections::HashMap;

use tokenizers::models::bpe::Vocab;

use crate::Result;
use crate::checkpoint::gguf::metadata::GgufMetadata;
use crate::checkpoint::typed::TypedKeys;

const TOKENS: &str = "tokenizer.ggml.tokens";
const TOKEN_TYPE: &str = "tokenizer.ggml.token_type";

// `tokenizer.ggml.token_type`
const UNKNOWN: usize = 2;
const CONTROL: usize = 3;
const USER_DEFINED: usize = 4;
const UNUSED: usize = 5;

/// The tokens of a file, each text once, and their types.
pub(super) struct GgufVocabulary {
    tokens: Vec<String>,
    types: Vec<usize>,
    ids: HashMap<String, u32>,
}

impl GgufVocabulary {
    /// Reads the lists; `vocab_size` is the number of rows of the embedding.
    ///
    /// # Errors
    /// Returns an error if a list is missing or does not fit, or if a token occurs twice and both are used.
    pub fn read(metadata: GgufMetadata<'_>, vocab_size: usize) -> Result<Self> {
        let Some(tokens) = metadata.strings(TOKENS)? else {
            return Err(metadata.missing(TOKENS, "a list of strings"));
        };
        if tokens.len() > vocab_size {
            let expected = format!("at most {vocab_size} tokens, the rows of `token_embd.weight`");
            return Err(metadata.error(TOKENS, &expected, &tokens.len().to_string()));
        }
        let Some(types) = metadata.counts(TOKEN_TYPE)? else {
            return Err(metadata.missing(TOKEN_TYPE, "a list of types, one a token"));
        };
        let mut vocabulary = Self {
            tokens: vec![String::new(); tokens.len()],
            types,
            ids: HashMap::with_capacity(tokens.len()),
        };
        let (unused, used): (Vec<usize>, Vec<usize>) =
            (0..tokens.len()).partition(|id| vocabulary.types.get(*id) == Some(&UNUSED));
        for id in used {
            // llama.cpp's name of an empty token.
            let text = if tokens[id].is_empty() { format!("[EMPTY_{id}]") } else { tokens[id].to_string() };
            if let Some(first) = vocabulary.insert(id, text) {
                let found = format!("`{}` as {first} and {id}", tokens[id]);
                return Err(metadata.error(TOKENS, "each token once", &found));
            }
        }
        if vocabulary.types.len() != tokens.len() {
            let expected = format!("{} types, one a token", tokens.len());
            return Err(metadata.error(TOKEN_TYPE, &expected, &vocabulary.types.len().to_string()));
        }
        // Conversions give one text to several tokens that occur in no text; here each token needs its own text.
        for id in unused {
            let stand_ins =
                std::iter::successors(Some(format!("[PAD{id}]")), |text| Some(format!("{text}_")));
            let texts =
                std::iter::once(tokens[id].to_string()).filter(|text| !text.is_empty()).chain(stand_ins);
            for text in texts {
                if vocabulary.insert(id, text).is_none() {
                    break;
                }
            }
        }
        Ok(vocabulary)
    }

    /// Adds a token; if its text exists, returns the id with that text and adds nothing.
    fn insert(&mut self, id: usize, text: String) -> Option<u32> {
        if let Some(first) = self.ids.get(&text) {
            return Some(*first);
        }
        self.ids.insert(text.clone(), id as u32);
        self.tokens[id] = text;
        None
    }

    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// The text of a token of this vocabulary.
    pub fn text(&self, id: u32) -> &str {
        &self.tokens[id as usize]
    }

    pub fn id(&self, text: &str) -> Option<u32> {
        self.ids.get(text).copied()
    }

    pub fn is_control(&self, id: u32) -> bool {
        self.types[id as usize] == CONTROL
    }

    /// Whether the token is found in a text before the text is split; if so, whether it is special.
    pub fn found_first(&self, id: u32) -> Option<bool> {
        match self.types[id as usize] {
            UNKNOWN | CONTROL => Some(true),
            USER_DEFINED => Some(false),
            _ => None,
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = (u32, &str)> {
        (0..).zip(self.tokens.iter().map(String::as_str))
    }

    /// Ids by text, in the form that the model needs.
    pub fn to_vocab(&self) -> Vocab {
        self.ids.iter().map(|(text, id)| (text.clone(), *id)).collect()
    }
}
