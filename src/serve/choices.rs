//! Answers that must be one of some texts. Requests ask for them by the fields of vLLM, SGLang, llama.cpp and OpenAI.
//!
//! A choice is tokenized by itself, as a target is during tuning, and continues the prompt directly: no space is
//! inserted. Between tokens, the model chooses as it would without the constraint, but only among the tokens that lead
//! to a choice: greedily, or by their relative probabilities.

use super::body::describe;
use super::params::Fields;
use super::schema;
use crate::generate::Choices;
use crate::serve::api_error::ApiError;
use crate::serve::state::AppState;
use serde_json::Value;
use std::sync::Arc;

/// Most choices of a request.
pub(super) const MAX_CHOICES: usize = schema::MAX_TEXTS;
/// Most bytes of all choices together. They are tokenized at once.
const MAX_BYTES: usize = 32 << 10;

/// The texts that a request allows as the answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AnswerConstraint {
    /// The field that lists them.
    pub field: String,
    pub texts: Vec<String>,
}

impl AnswerConstraint {
    /// Reads the fields that constrain the answer: `guided_choice`, `guided_json`, `json_schema`, `structured_outputs`
    /// and `response_format`.
    ///
    /// # Errors
    /// Returns 400 if the constraint is not a list of texts, or if two fields constrain the answer.
    pub fn read(fields: &Fields) -> Result<Option<Self>, ApiError> {
        let mut all = Vec::new();
        all.extend(Self::choice(fields, "guided_choice")?);
        all.extend(Self::json(fields, "guided_json")?);
        all.extend(Self::json(fields, "json_schema")?);
        if let Some(outputs) = fields.object("structured_outputs", "structured_outputs.")? {
            all.extend(Self::choice(&outputs, "choice")?);
            all.extend(Self::json(&outputs, "json")?);
        }
        all.extend(Self::format(fields)?);
        if let [one, other, ..] = &all[..] {
            let problem = format!("expected one constraint of the answer, found `{}` too", one.field);
            return Err(ApiError::invalid(other.field.clone(), problem));
        }
        Ok(all.pop())
    }

    fn choice(fields: &Fields, key: &str) -> Result<Option<Self>, ApiError> {
        if is_off(fields.get(key)) {
            return Ok(None);
        }
        let texts = fields.strings(key, MAX_CHOICES)?.unwrap_or_default();
        Ok(Some(Self { field: fields.name(key), texts }))
    }

    /// A schema, given as an object or as JSON text.
    fn json(fields: &Fields, key: &str) -> Result<Option<Self>, ApiError> {
        let value = fields.get(key);
        if is_off(value) {
            return Ok(None);
        }
        match value {
            Some(Value::String(text)) => match serde_json::from_str(text) {
                Ok(schema) => Self::from_schema(fields.name(key), &schema).map(Some),
                Err(error) => Err(ApiError::invalid(fields.name(key), format!("expected JSON: {error}"))),
            },
            Some(schema) => Self::from_schema(fields.name(key), schema).map(Some),
            None => Ok(None),
        }
    }

    /// The JSON texts of all values that match a schema.
    ///
    /// # Errors
    /// Returns 400 if the schema does not list its values.
    pub fn from_schema(field: String, schema: &Value) -> Result<Self, ApiError> {
        match schema::texts(schema) {
            Ok(texts) => Ok(Self { field, texts }),
            Err(problem) => Err(ApiError::unsupported(field, &problem)),
        }
    }

    /// `response_format`, with its schema where OpenAI has it or where others have it.
    fn format(fields: &Fields) -> Result<Option<Self>, ApiError> {
        const KEY: &str = "response_format";
        if is_off(fields.get(KEY)) {
            return Ok(None);
        }
        let Some(format) = fields.object(KEY, "response_format.")? else { return Ok(None) };
        let kind = format.string("type")?;
        let inner = format.object("json_schema", "response_format.json_schema.")?;
        let schema = inner.and_then(|inner| inner.get("schema")).or_else(|| format.get("schema"));
        match (kind, schema) {
            (Some("text"), _) => Ok(None),
            (Some("json_schema" | "json_object"), Some(schema)) => {
                Self::from_schema(KEY.into(), schema).map(Some)
            }
            (Some("json_schema"), None) => {
                Err(ApiError::missing("response_format.json_schema", "an object with `schema`"))
            }
            _ => {
                let found = describe(format.get("type").unwrap_or(&Value::Null));
                let problem = format!(
                    "expected the type \"text\", or \"json_schema\" with a schema that lists its values; found {found}"
                );
                Err(ApiError::unsupported(KEY, &problem))
            }
        }
    }

    /// The choices as tokens. Choices of fewer than `min_tokens` tokens are left out; `stop_token_ids` are the tokens
    /// that end the request's answers.
    ///
    /// # Errors
    /// Returns 400 if the tokenizer does not reproduce a choice, if a choice contains a stop token, or if there are too
    /// many bytes.
    pub fn tokenized(
        &self,
        state: &AppState,
        min_tokens: usize,
        stop_token_ids: &[u32],
    ) -> Result<Arc<Choices>, ApiError> {
        let invalid = |problem: String| ApiError::invalid(self.field.clone(), problem);
        let bytes: usize = self.texts.iter().map(String::len).sum();
        if bytes > MAX_BYTES {
            return Err(invalid(format!(
                "expected choices of at most {MAX_BYTES} bytes together, found {bytes}"
            )));
        }
        let end: Arc<[u32]> = state.tokenizer.stop_token_ids.clone().into();
        let mut sequences = Vec::with_capacity(self.texts.len());
        for text in &self.texts {
            let ids = state.tokenizer.encode(text, false)?;
            let decoded = state.tokenizer.decode(&ids, true)?;
            if decoded != *text || ids.is_empty() {
                return Err(invalid(format!(
                    "expected choices that the tokenizer gives back as they are, found {text:?}, which becomes {decoded:?}"
                )));
            }
            if ids.iter().any(|id| end.contains(id) || stop_token_ids.contains(id)) {
                return Err(invalid(format!("expected choices without a stop token, found one in {text:?}")));
            }
            sequences.push(ids);
        }
        sequences.retain(|ids| ids.len() >= min_tokens);
        if sequences.is_empty() {
            return Err(invalid(format!(
                "expected a choice of {min_tokens} tokens or more, as many as the answer has to have, found none"
            )));
        }
        Ok(Arc::new(Choices::new(&sequences, end)))
    }
}

/// Whether the value of a constraint means that there is none.
fn is_off(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null | Value::Bool(false)) => true,
        Some(Value::String(text)) => text.is_empty(),
        Some(Value::Array(items)) => items.is_empty(),
        Some(Value::Object(map)) => map.is_empty(),
        Some(_) => false,
    }
}

/// Refuses a limit of tokens that is too low for the longest choice.
///
/// # Errors
/// Returns 400 about `key`.
pub(super) fn check_room(
    key: &str,
    max_tokens: usize,
    field: &str,
    choices: &Choices,
) -> Result<(), ApiError> {
    let longest = choices.longest();
    if max_tokens < longest {
        let problem = format!(
            "expected {longest} or more, as the longest choice of `{field}` has tokens, found {max_tokens}"
        );
        return Err(ApiError::invalid(key, problem));
    }
    Ok(())
}
