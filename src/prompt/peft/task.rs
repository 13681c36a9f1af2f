//! What a prompt was tuned for, in a file beside PEFT's two: PEFT's format has no place for it, and whoever serves the
//! prompt needs it.

use super::{Adapter, PeftType};
use crate::config::Task;
use crate::data::{InputHead, Template};
use crate::files::write_json;
use crate::layout::adapter_folder::TASK;
use crate::{Error, Result};
use std::path::Path;

/// What a prompt was tuned for.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PromptTask {
    /// What the outputs are.
    pub task: Task,
    /// Template of the model's input, with `{{input}}` in it.
    pub verbalizer: String,
    /// The distinct outputs of a classification, sorted; none of other tasks.
    #[serde(default)]
    pub labels: Vec<String>,
    /// Instruction in plain words that the base model gets in the prompt's place, before the verbalizer and one space;
    /// empty where there is none.
    #[serde(default)]
    pub hard_prompt: String,
    /// What stands before the virtual tokens, with which every input begins; `None` if they stand at the start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<InputHead>,
    /// Most tokens of an answer.
    pub max_output_tokens: usize,
    /// Inputs to try the prompt on.
    #[serde(default)]
    pub examples: Vec<String>,
}

impl PromptTask {
    /// Reads the file of an adapter's folder; `None` if there is none.
    pub(super) fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(TASK);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io(&path)(error)),
        };
        let malformed = |problem: String| Error::Checkpoint { path: path.clone(), problem };
        let task: Self = serde_json::from_str(&text)
            .map_err(|error| malformed(format!("expected what a prompt was tuned for, found {error}")))?;
        let template = Template::parse(&task.verbalizer).map_err(|error| malformed(error.to_string()))?;
        if let Some(InputHead { text, token_ids }) = &task.before {
            if token_ids.is_empty() {
                return Err(malformed("before.token_ids: expected at least one token, found none".into()));
            }
            if !template.head().starts_with(text) {
                return Err(malformed(format!(
                    "before.text: expected the beginning of the text before {{{{input}}}} in the verbalizer, {:?}, found {text:?}",
                    template.head()
                )));
            }
        }
        Ok(Some(task))
    }

    pub(super) fn write(&self, dir: &Path) -> Result<()> {
        write_json(&dir.join(TASK), self)
    }
}

impl Adapter {
    /// What is wrong with the place of the virtual tokens: it differs between the prompt, `task.json` and the method, which keeps
    /// PEFT from putting them at the start.
    pub(super) fn check_position(&self) -> std::result::Result<(), String> {
        let before = self.task.as_ref().and_then(|task| task.before.as_ref());
        let (expected, found) = (before.map_or(&[][..], |before| &before.token_ids), self.prompt.before());
        if found != expected {
            return Err(format!(
                "expected a prompt after the tokens {expected:?}, as `before` of {TASK} says, found one after {found:?}"
            ));
        }
        let (own, method) = (PeftType::GneissPromptTuning, self.config.peft_type);
        match (found.is_empty(), method == own) {
            (true, true) => Err(format!("peft_type {own}: expected `before` in {TASK}, found none")),
            (false, false) => Err(format!(
                "peft_type: expected {own}, as {TASK} has `before`, which PEFT does not know, found {method}"
            )),
            _ => Ok(()),
        }
    }
}
