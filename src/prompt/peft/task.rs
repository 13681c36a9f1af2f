//! What a prompt was tuned for, in a file beside PEFT's two: PEFT's format has no place for it, and whoever serves the
//! prompt needs it.

use crate::config::Task;
use crate::data::Template;
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
        Template::parse(&task.verbalizer).map_err(|error| malformed(error.to_string()))?;
        Ok(Some(task))
    }

    pub(super) fn write(&self, dir: &Path) -> Result<()> {
        write_json(&dir.join(TASK), self)
    }
}
