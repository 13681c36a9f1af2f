//! The new tokens of the prompts, and their ids.

use super::base::Base;
use super::prompts::NamedPrompt;
use crate::data::InputHead;
use crate::prompt::peft::PromptTask;
use crate::{Error, Result};
use candle_core::Tensor;
use std::ops::Range;
use std::path::Path;
use tokenizers::{AddedToken, Tokenizer};

/// The new tokens of one prompt.
#[derive(Debug, Clone)]
pub(super) struct NewTokens {
    pub name: String,
    pub ids: Range<u32>,
    pub task: Option<PromptTask>,
}

impl NewTokens {
    pub fn strings(&self) -> impl Iterator<Item = String> + '_ {
        (0..self.ids.len()).map(|i| token(&self.name, i))
    }

    /// What stands before the tokens; `None` if they stand at the start.
    pub fn before(&self) -> Option<&InputHead> {
        self.task.as_ref()?.before.as_ref()
    }

    /// The tokens in order, as the text before an input.
    pub fn text(&self) -> String {
        self.strings().collect()
    }
}

fn token(name: &str, i: usize) -> String {
    format!("<|{name}:{i}|>")
}

/// All prompts with their new tokens.
pub(super) struct Placed {
    pub tokens: Vec<NewTokens>,
    /// Id of the first new token; the others follow it.
    pub first: u32,
    /// The vectors of all new tokens, f32 [N, C].
    pub rows: Tensor,
    /// The base's tokenizer with the new tokens.
    pub tokenizer: Tokenizer,
}

impl Placed {
    /// Adds tokens to the base's tokenizer, which decides their ids.
    pub fn new(base: &Base, prompts: Vec<NamedPrompt>) -> Result<Self> {
        for NamedPrompt { name, adapter } in &prompts {
            adapter.check_fits(Path::new(name), &base.path.display().to_string(), &base.config)?;
        }
        let mut next = 0;
        let mut tokens = Vec::with_capacity(prompts.len());
        for NamedPrompt { name, adapter } in &prompts {
            let ids = next..next + adapter.config.num_virtual_tokens as u32;
            next = ids.end;
            tokens.push(NewTokens { name: name.clone(), ids, task: adapter.task.clone() });
        }
        let all: Vec<String> = tokens.iter().flat_map(NewTokens::strings).collect();
        let (tokenizer, first) = add(base, &all)?;
        for tokens in &mut tokens {
            tokens.ids = tokens.ids.start + first..tokens.ids.end + first;
        }
        if first as usize > base.config.vocab_size {
            let problem = format!(
                "expected an embedding of {first} rows, one for each token of the tokenizer, found {}",
                base.config.vocab_size
            );
            return Err(Error::Checkpoint { path: base.path.clone(), problem });
        }
        let rows = prompts.iter().map(|prompt| prompt.adapter.prompt.embeddings(&prompt.name));
        let rows: Vec<&Tensor> = rows.collect::<Result<_>>()?;
        Ok(Self { tokens, first, rows: Tensor::cat(&rows, 0)?, tokenizer })
    }

    pub fn ids(&self) -> Range<u32> {
        self.first..self.first + self.rows.dims()[0] as u32
    }

    /// Every new token with its id.
    pub fn numbered(&self) -> impl Iterator<Item = (u32, String)> + '_ {
        self.ids().zip(self.tokens.iter().flat_map(NewTokens::strings))
    }
}

/// The tokenizer with these special tokens, and the id of the first one.
fn add(base: &Base, tokens: &[String]) -> Result<(Tokenizer, u32)> {
    let old = &base.tokenizer.tokenizer;
    if let Some(token) = tokens.iter().find(|token| old.token_to_id(token).is_some()) {
        let problem = format!(
            "expected a vocabulary without {token}, found it there: a prompt of that name was baked into this checkpoint; \
             hint: bake all prompts into the base at once, or under another name"
        );
        return Err(Error::Checkpoint { path: base.path.clone(), problem });
    }
    if old.get_encode_special_tokens() {
        let problem = "`split_special_tokens` of tokenizer_config.json: expected false, found true, which splits all special \
                       tokens in texts, those of a baked prompt too"
            .to_string();
        return Err(Error::Checkpoint { path: base.path.clone(), problem });
    }
    let failed = |what: String| Error::Tokenizer(format!("{}: {what}", base.path.display()));
    let mut tokenizer = old.clone();
    let special = tokens.iter().map(|token| AddedToken::from(token.as_str(), true).normalized(false));
    tokenizer.add_special_tokens(special).map_err(|error| failed(error.to_string()))?;
    let first = tokens.first().and_then(|token| tokenizer.token_to_id(token));
    let first = first.ok_or_else(|| failed("it took no new token".into()))?;
    for (id, token) in (first..).zip(tokens) {
        if old.id_to_token(id).is_some() || tokenizer.token_to_id(token) != Some(id) {
            return Err(failed(format!("expected {id} as the free id of {token}, found it taken")));
        }
    }
    let text = tokens.concat();
    let encoding = tokenizer.encode(text, false).map_err(|error| failed(error.to_string()))?;
    if !encoding.get_ids().iter().copied().eq(first..first + tokens.len() as u32) {
        return Err(failed("expected one id for each new token, found others".into()));
    }
    Ok((tokenizer, first))
}
