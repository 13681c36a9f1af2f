//! Whether a prompt is one for a model.

use super::{Adapter, AdapterConfig, malformed};
use crate::Result;
use crate::checkpoint::config::{MixerKind, ModelConfig};
use crate::prompt::Prefix;
use std::path::Path;

impl Adapter {
    /// Refuses a prompt, read from `path`, that does not fit `model`, whose shape is `config`: embeddings of another width
    /// than the hidden size; keys and values of other layers, or of other key-value heads.
    ///
    /// # Errors
    /// [`Error::Checkpoint`](crate::Error::Checkpoint) with what differs, as it is in the adapter and in the model.
    pub fn check_fits(&self, path: &Path, model: &str, config: &ModelConfig) -> Result<()> {
        let width = self.prompt.values().dims()[1];
        let problem = match &self.prompt {
            Prefix::Embeddings(_) | Prefix::EmbeddingsAfter { .. } if width == config.hidden_size => None,
            Prefix::Embeddings(_) | Prefix::EmbeddingsAfter { .. } => Some(format!(
                "expected a prompt of width {}, the hidden size of {model}, found {width}",
                config.hidden_size
            )),
            Prefix::KeysValues(_) => keys_values_problem(&self.config, width, model, config),
        };
        let Some(problem) = problem else { return Ok(()) };
        let base = self.config.base_model_name_or_path.as_deref().unwrap_or("another model");
        Err(malformed(path, format!("{problem}; it was tuned on {base}")))
    }
}

/// Layers of a model that have keys and values.
pub(super) fn attention_layers(config: &ModelConfig) -> Vec<usize> {
    (0..config.num_hidden_layers).filter(|layer| config.mixer(*layer) == MixerKind::Attention).collect()
}

/// What differs between keys and values of `width` columns and those of `model`.
fn keys_values_problem(
    adapter: &AdapterConfig,
    width: usize,
    model: &str,
    config: &ModelConfig,
) -> Option<String> {
    let expected_layers = attention_layers(config);
    if let Some(layers) = adapter.attention_layers.as_ref().filter(|layers| **layers != expected_layers) {
        return Some(format!(
            "gneiss_attention_layers: expected {expected_layers:?}, the attention layers of {model}, found {layers:?}"
        ));
    }
    let expected = expected_layers.len();
    if let Some(layers) = adapter.num_layers.filter(|layers| *layers != expected) {
        let mamba = if layers == config.num_hidden_layers {
            "; Mamba2 layers have no keys and values, and PEFT can't use such a prefix either"
        } else {
            ""
        };
        return Some(format!(
            "num_layers: expected {expected}, the attention layers of {model}, found {layers}{mamba}"
        ));
    }
    let (heads, size) = (config.num_key_value_heads, config.head_dim);
    if let Some(found) = adapter.num_attention_heads.filter(|found| *found != heads) {
        let query = if found == config.num_attention_heads {
            "; these are the query heads: PEFT made such prefixes until July 2024 (its pull request 1901), and they \
             were wrong for this model; tune it again"
        } else {
            ""
        };
        return Some(format!(
            "num_attention_heads: expected {heads}, the key-value heads of {model}, found {found}{query}"
        ));
    }
    if adapter.token_dim != 0 && adapter.token_dim != heads * size {
        let found = adapter.token_dim;
        return Some(format!(
            "token_dim: expected {}, {heads} key-value heads of size {size} as {model} has, found {found}",
            heads * size
        ));
    }
    let expected = expected * 2 * heads * size;
    (width != expected).then(|| {
        format!(
            "expected keys and values of width {expected}, 2 for each of the {} attention layers of {model} with {heads} \
             key-value heads of size {size}, found {width}",
            expected_layers.len()
        )
    })
}
