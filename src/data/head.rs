//! The beginning of every input, for a soft prompt that stands after it.
//!
//! ```text
//!  BOS  the verbalizer's text before {{input}} │ virtual tokens │ the rest of the input
//!  └─────────────── input head ───────────────┘
//! ```

use crate::batch::{Example, common_head};
use crate::data::encode::Encoder;
use crate::{Error, Result};

/// What every input begins with.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InputHead {
    /// The text, without what the tokenizer adds before every text.
    pub text: String,
    /// Its token ids, with those that the tokenizer adds; at least one.
    pub token_ids: Vec<u32>,
}

impl InputHead {
    /// The longest beginning of the text before the input whose tokens begin every input of `examples`, which `encoder` made. It
    /// leaves a token of each input, and its text alone has the same tokens.
    ///
    /// # Errors
    /// Returns [`Error::Invalid`] if there is none, and the errors of [`Encoder::encode`].
    pub fn find(encoder: &Encoder, examples: &[Example]) -> Result<Self> {
        let (text, tokens) = encoder.encode_head()?;
        let common = common_head(examples.iter().map(|e| e.input.as_slice()));
        let shared = tokens.iter().zip(common).take_while(|((id, _), other)| id == *other).count();
        for n in (1..=shared).rev() {
            let token_ids = common[..n].to_vec();
            let end = tokens[..n].iter().map(|(_, end)| *end).max().unwrap_or(0);
            let Some(head) = text.get(..end) else { continue };
            if encoder.encode_alone(head)?.iter().map(|(id, _)| id).eq(&token_ids) {
                return Ok(Self { text: head.to_owned(), token_ids });
            }
        }
        Err(Error::Invalid(format!(
            "prompt.position \"after_head\": expected text before {{{{input}}}} in data.verbalizer whose first token begins every \
             input, found {:?}; hint: begin data.verbalizer with a system turn or an instruction, or set prompt.position = \
             \"start\"",
            format!("{}{{{{input}}}}{}", encoder.template.head(), encoder.template.tail())
        )))
    }

    /// What is wrong with a text of `tokens` for a prompt that stands after this head.
    ///
    /// # Errors
    /// Returns a message if the tokens do not begin with those of the head, or if there is none after them.
    pub fn check(&self, tokens: &[u32]) -> std::result::Result<(), String> {
        let Self { text, token_ids } = self;
        let expected = format!(
            "expected a text that begins with {text:?} (tokens {token_ids:?}), after which this soft prompt stands"
        );
        if !tokens.starts_with(token_ids) {
            return Err(format!(
                "{expected}, found another beginning; hint: the verbalizer on which the prompt was tuned, or in a chat the same \
                 system turn"
            ));
        }
        if tokens.len() == token_ids.len() {
            return Err(format!("{expected}, and has more, found this text alone"));
        }
        Ok(())
    }

    /// Checks the inputs of all examples of the file that `data.` and `split` name.
    ///
    /// # Errors
    /// Returns [`Error::Invalid`] with the line of the first input that begins otherwise or has no token after the head.
    pub fn check_all(&self, split: &str, examples: &[Example]) -> Result<()> {
        for example in examples {
            self.check(&example.input).map_err(|problem| {
                Error::Invalid(format!("data.{split}, line {}: {problem}", example.line))
            })?;
        }
        Ok(())
    }
}
