//! Answers that have to be one of some texts, as requests ask for them in the words of vLLM, SGLang, llama.cpp and OpenAI.
//!
//! A choice is tokenized on its own, as a target is in tuning, and goes on from the prompt as it stands: no space is put
//! between them. A choice between tokens is made as it would be without the constraint, but among the tokens that go on
//! towards a choice: greedily, or drawn with their probabilities among themselves.

use super::body::describe;
use super::params::Fields;
use super::schema;
use crate::generate::Choices;
use crate::serve::api_error::ApiError;
use crate::serve::state::AppState;
use serde_json::Value;
use std::sync::Arc;

/// Most choices of a request.
pub(super) const CHOICES: usize = 1024;
/// Most bytes of all choices together, which are tokenized at once.
const BYTES: usize = 32 << 10;

/// The texts that a request leaves to choose from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AnswerConstraint {
    /// The field that lists them.
    pub field: String,
    pub texts: Vec<String>,
}

impl AnswerConstraint {
    /// Of the fields of an object that bind an answer: `guided_choice`, `guided_json`, `json_schema`,
    /// `structured_outputs` and `response_format`.
    ///
    /// # Errors
    /// 400 of another form than one of some texts, and of two fields at a time.
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
        let texts = fields.strings(key, CHOICES)?.unwrap_or_default();
        Ok(Some(Self { field: fields.name(key), texts }))
    }

    /// A schema, as an object or as its text.
    fn json(fields: &Fields, key: &str) -> Result<Option<Self>, ApiError> {
        let value = fields.get(key);
        if is_off(value) {
            return Ok(None);
        }
        match value {
            Some(Value::String(text)) => match serde_json::from_str(text) {
                Ok(schema) => Self::of_schema(fields.name(key), &schema).map(Some),
                Err(error) => Err(ApiError::invalid(fields.name(key), format!("expected JSON: {error}"))),
            },
            Some(schema) => Self::of_schema(fields.name(key), schema).map(Some),
            None => Ok(None),
        }
    }

    /// The JSON texts of all values that fit a schema.
    ///
    /// # Errors
    /// 400 of a schema that does not list its values.
    pub fn of_schema(field: String, schema: &Value) -> Result<Self, ApiError> {
        match schema::texts(schema) {
            Ok(texts) => Ok(Self { field, texts }),
            Err(problem) => Err(ApiError::unsupported(field, &problem)),
        }
    }

    /// `response_format`, with its schema in OpenAI's place or in that of others.
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
                Self::of_schema(KEY.into(), schema).map(Some)
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

    /// The choices as tokens. Those of fewer than `min_tokens` tokens are left out; `stop_token_ids` are those at which
    /// the request's texts end.
    ///
    /// # Errors
    /// 400 of choices that the tokenizer has no tokens for, or gives back as another text; of those that hold a token
    /// that ends texts; of too many.
    pub fn tokenized(
        &self,
        app: &AppState,
        min_tokens: usize,
        stop_token_ids: &[u32],
    ) -> Result<Arc<Choices>, ApiError> {
        let invalid = |problem: String| ApiError::invalid(self.field.clone(), problem);
        let bytes: usize = self.texts.iter().map(String::len).sum();
        if bytes > BYTES {
            return Err(invalid(format!(
                "expected choices of at most {BYTES} bytes together, found {bytes}"
            )));
        }
        let end: Arc<[u32]> = app.tokenizer.stop_token_ids.clone().into();
        let mut sequences = Vec::with_capacity(self.texts.len());
        for text in &self.texts {
            let ids = app.tokenizer.encode(text, false)?;
            let back = app.tokenizer.decode(&ids, true)?;
            if back != *text || ids.is_empty() {
                return Err(invalid(format!(
                    "expected choices that the tokenizer gives back as they are, found {text:?}, which becomes {back:?}"
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

/// Whether the value of a field that binds an answer means that it does not.
fn is_off(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null | Value::Bool(false)) => true,
        Some(Value::String(text)) => text.is_empty(),
        Some(Value::Array(items)) => items.is_empty(),
        Some(Value::Object(map)) => map.is_empty(),
        Some(_) => false,
    }
}

/// Refuses room for fewer tokens than the longest choice has.
///
/// # Errors
/// 400 about `key`.
pub(super) fn have_room(
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
