//! The examples of a run as the teacher of a distillation reads them.

use crate::config::Config;
use crate::data::{Dataset, Encoded, Encoder};
use crate::session::Session;
use crate::tune::TeacherExamples;
use crate::{Error, Result};

/// The files of a run, encoded with `data.teacher_text` in front of each input.
pub struct TeacherData {
    train: Encoded,
    validation: Encoded,
    /// Tokens of the text alone.
    pub text_tokens: usize,
}

impl TeacherData {
    /// Encodes the rows of a run whose examples `encoder` encodes; `None` without a teacher's text.
    ///
    /// # Errors
    /// Returns an error if the text gives no token or one without an embedding row, and the errors of [`Encoder::encode`].
    pub fn encode(
        config: &Config,
        session: &Session,
        encoder: &Encoder,
        (train, validation): (&Dataset, Option<&Dataset>),
    ) -> Result<Option<Self>> {
        let text = config.data.teacher_text.as_str();
        if text.is_empty() {
            return Ok(None);
        }
        let key = "data.teacher_text";
        let ids = session.tokenizer.encode(text, false).map_err(|error| error.in_text(key))?;
        if ids.is_empty() {
            return Err(Error::Invalid(format!("{key}: expected at least one token, found none")));
        }
        let encoder = Encoder { instruction: Some(text), ..*encoder };
        Ok(Some(Self {
            train: encoder.encode_dataset(train)?,
            validation: validation
                .map(|dataset| encoder.encode_dataset(dataset))
                .transpose()?
                .unwrap_or_default(),
            text_tokens: ids.len(),
        }))
    }

    /// The examples of both files.
    pub fn examples(&self) -> TeacherExamples<'_> {
        TeacherExamples { train: &self.train.examples, validation: &self.validation.examples }
    }
}
