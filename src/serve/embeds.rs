//! `prompt_embeds`: prompts as embeddings, in vLLM's form: a tensor [T, C] as `torch.save` writes it, in base64.

use super::params::Fields;
use crate::prompt::torch_reader;
use crate::serve::api_error::ApiError;
use crate::serve::state::AppState;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use candle_core::Tensor;
use serde_json::Value;

const KEY: &str = "prompt_embeds";

/// The prompts of a request, f32 [T, C] each.
///
/// # Errors
/// Returns 400 if the server does not accept embeddings, or a value is not such a tensor or is not finite.
pub(super) fn read(state: &AppState, fields: &Fields) -> Result<Vec<Tensor>, ApiError> {
    let Some(value) = fields.get(KEY) else { return Ok(Vec::new()) };
    let list = match value {
        Value::Array(items) => items.as_slice(),
        one => std::slice::from_ref(one),
    };
    if list.is_empty() || *value == "" {
        return Ok(Vec::new());
    }
    if !state.options.prompt_embeds {
        let problem =
            "embeddings are not taken by this server; gneiss serve --enable-prompt-embeds takes them";
        return Err(ApiError::unsupported(KEY, problem));
    }
    let each = list.iter().map(|item| match item {
        Value::String(text) => decode(text).map_err(|problem| ApiError::invalid(KEY, problem)),
        other => Err(fields.wrong(KEY, "a tensor in base64, or a list of such", other)),
    });
    each.collect()
}

fn decode(text: &str) -> Result<Tensor, String> {
    let file = BASE64_STANDARD.decode(text).map_err(|error| format!("expected base64: {error}"))?;
    let tensor = torch_reader::read(&file).map_err(|error| error.to_string())?;
    let tensor = match tensor.dims() {
        // A batch of one.
        [1, _, _] => tensor.squeeze(0).map_err(|error| error.to_string())?,
        [_, _] => tensor,
        other => return Err(format!("expected a tensor [T, C], found {other:?}")),
    };
    if tensor.elem_count() == 0 {
        return Err(format!("expected a row or more, found {:?}", tensor.dims()));
    }
    let values =
        tensor.flatten_all().and_then(|flat| flat.to_vec1::<f32>()).map_err(|error| error.to_string())?;
    match values.iter().find(|value| !value.is_finite()) {
        Some(value) => Err(format!("expected finite values, found {value}")),
        None => Ok(tensor),
    }
}
