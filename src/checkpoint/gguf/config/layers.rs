//! Experts and Mamba2 layers of a GGUF file.

use candle_core::quantized::gguf_file::{Content, Value};

use super::Keys;
use crate::Result;
use crate::checkpoint::config::{ModelType, unsupported};
use crate::checkpoint::layers::{ExpertsConfig, MambaConfig};
use crate::checkpoint::typed::TypedKeys;

/// The architecture with Mamba2 layers.
const HYBRID: &str = "granitehybrid";

/// Numbers of heads of the layers' mixers.
pub(super) struct HeadCounts {
    /// HeadCounts of attention; `None` if the key is absent or no layer has any.
    pub count: Option<usize>,
    /// The layers with heads, if the file has a number for each layer.
    pub layers: Option<Vec<usize>>,
}

impl HeadCounts {
    /// Reads a number of heads: one for all layers, or a list of equal ones. In a list of `granitehybrid`, 0 stands for a
    /// Mamba2 layer.
    pub fn read(keys: &Keys<'_>, name: &str) -> Result<Self> {
        let key = keys.key(name);
        if !matches!(keys.metadata.get(&key), Some(Value::Array(_))) {
            return Ok(Self { count: keys.count(name)?, layers: None });
        }
        let counts = keys.metadata.counts(&key)?.unwrap_or_default();
        let has_heads = |layer: &usize| keys.arch != HYBRID || counts[*layer] > 0;
        let layers: Vec<usize> = (0..counts.len()).filter(has_heads).collect();
        let count = layers.first().map(|first| counts[*first]);
        if counts.is_empty() || layers.iter().any(|layer| Some(counts[*layer]) != count) {
            return Err(unsupported(keys.metadata.path(), format!("`{key}` that differs between layers")));
        }
        let expected = keys.size("block_count")?;
        if keys.arch == HYBRID && counts.len() != expected {
            let expected = format!("a list of {expected}");
            return Err(keys.metadata.error(&key, &expected, &format!("a list of {}", counts.len())));
        }
        Ok(Self { count, layers: Some(layers) })
    }
}

/// The Mamba2 layers: those without heads of keys and values.
pub(super) fn mamba(keys: &Keys<'_>, content: &Content, kv_heads: HeadCounts) -> Result<Option<MambaConfig>> {
    let Some(attention_layers) = kv_heads.layers.filter(|_| keys.arch == HYBRID) else { return Ok(None) };
    let mut layers = 0..keys.size("block_count")?;
    let Some(first) = layers.find(|layer| !attention_layers.contains(layer)) else { return Ok(None) };
    let inner = keys.size("ssm.inner_size")?;
    // llama.cpp keeps the number of heads in this key.
    let heads = keys.size("ssm.time_step_rank")?;
    if !inner.is_multiple_of(heads) {
        let expected = format!("a number that divides `{}` ({inner})", keys.key("ssm.inner_size"));
        return Err(keys.metadata.error(&keys.key("ssm.time_step_rank"), &expected, &heads.to_string()));
    }
    Ok(Some(MambaConfig {
        attention_layers,
        heads,
        head_dim: inner / heads,
        state: keys.size("ssm.state_size")?,
        groups: keys.size("ssm.group_count")?,
        taps: keys.size("ssm.conv_kernel")?,
        conv_bias: content.tensor_infos.contains_key(&format!("blk.{first}.ssm_conv1d.bias")),
        // llama.cpp has no limits.
        dt_limit: (0.0, f64::INFINITY),
    }))
}

/// The experts, and the size of the dense feed-forward network beside them; 0 if there is none.
///
/// # Errors
/// Returns [`crate::Error::Unsupported`] if an architecture without experts has some.
pub(super) fn feed_forward(keys: &Keys<'_>, model_type: ModelType) -> Result<(Option<ExpertsConfig>, usize)> {
    let size = keys.size("feed_forward_length")?;
    let shared = keys.count("expert_shared_feed_forward_length")?.unwrap_or(0);
    match keys.count("expert_count")? {
        // The conversion of a hybrid without experts writes the size in both keys.
        None | Some(0) if keys.arch == HYBRID && shared > 0 => Ok((None, shared)),
        None | Some(0) => Ok((None, size)),
        Some(count) if matches!(model_type, ModelType::Granite | ModelType::Llama) => {
            let what = format!("a mixture of {count} experts in `{}`", keys.arch);
            Err(unsupported(keys.metadata.path(), what))
        }
        Some(count) => {
            let per_token = keys.size("expert_used_count")?;
            Ok((Some(ExpertsConfig { count, per_token, size }), shared))
        }
    }
}
