//! Where the virtual tokens of a run stand.

use crate::config::{Config, PromptPosition};
use crate::data::{Dataset, Encoded, Encoder, InputHead};
use crate::prompt::Prompt;
use crate::tune::State;
use crate::{Error, Result};

/// A file that a run reads: its name after `data.`, its rows and their token ids; `None` if the configuration names none.
pub(super) type SplitFile<'a> = (&'a str, Option<&'a (Dataset, Encoded)>);

/// What stands before the virtual tokens by the configuration: the head of the training inputs, with which the other inputs begin
/// too; `None` if the virtual tokens stand at the start.
///
/// # Errors
/// Returns [`Error::Invalid`] if there is no such head, or with the first input that begins otherwise.
pub(super) fn before<const N: usize>(
    config: &Config,
    encoder: &Encoder,
    files: [SplitFile; N],
) -> Result<Option<InputHead>> {
    if config.prompt.position == PromptPosition::Start {
        return Ok(None);
    }
    let train = files.iter().find_map(|(_, file)| *file).map_or(&[][..], |(_, encoded)| &encoded.examples);
    let head = InputHead::find(encoder, train)?;
    for (split, (_, encoded)) in files.into_iter().filter_map(|(split, file)| Some((split, file?))) {
        head.check_all(split, &encoded.examples)?;
    }
    Ok(Some(head))
}

/// `initial` after `before`.
///
/// # Errors
/// Returns [`Error::Invalid`] if the run that `state` continues began with another place, or if the prompt is keys and values.
pub(super) fn placed(initial: Prompt, before: Option<&InputHead>, state: Option<&State>) -> Result<Prompt> {
    let tokens = before.map_or(&[][..], |before| &before.token_ids);
    if let Some(began) = state.map(|state| state.prompt.before()).filter(|began| *began != tokens) {
        return Err(Error::Invalid(format!(
            "prompt.position: expected the tokens {began:?} before the prompt, with which the run began, found {tokens:?}: \
             data.verbalizer, data.train or the tokenizer has changed; start a new run"
        )));
    }
    initial.after(tokens)
}
