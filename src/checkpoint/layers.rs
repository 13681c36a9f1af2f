//! Experts and Mamba2 layers in `config.json` (transformers `configuration_granitemoehybrid.py`, `configuration_granitemoe.py`).

use super::config::unsupported;
use super::json::{JsonObject, describe};
use super::typed::TypedKeys;
use crate::Result;
use serde_json::Value;

/// The Mamba2 layers of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct MambaConfig {
    /// The layers that have attention, ascending; all others have Mamba2.
    pub attention_layers: Vec<usize>,
    /// Heads, M.
    pub heads: usize,
    /// Size of a head, R.
    pub head_dim: usize,
    /// Size of the state, N.
    pub state: usize,
    /// Groups of heads that share B and C, G; M is a multiple of G.
    pub groups: usize,
    /// Taps of the causal convolution, W.
    pub taps: usize,
    /// Whether the convolution has a bias.
    pub conv_bias: bool,
    /// Bounds of the time step.
    pub dt_limit: (f64, f64),
}

impl MambaConfig {
    /// Width inside the layer, I = M R.
    pub fn inner(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Channels of the convolution, X = I + 2 G N.
    pub fn channels(&self) -> usize {
        self.inner() + 2 * self.groups * self.state
    }

    /// Reads a granitemoehybrid's Mamba2 layers; `None` if every layer has attention.
    pub(super) fn read(json: &JsonObject, layers: usize, hidden_size: usize) -> Result<Option<Self>> {
        let attention_layers = attention_layers(json, layers)?;
        if attention_layers.len() == layers {
            return Ok(None);
        }
        if json.boolean("mamba_proj_bias")? == Some(true) {
            return Err(unsupported(
                json.path(),
                "Mamba layers whose projections have biases (`mamba_proj_bias`)".into(),
            ));
        }
        let inner = json.size("mamba_expand")?.unwrap_or(2) * hidden_size;
        let heads = json.size("mamba_n_heads")?.unwrap_or(128);
        if !inner.is_multiple_of(heads) {
            let expected = format!("a number that divides `mamba_expand` times `hidden_size` ({inner})");
            return Err(json.error("mamba_n_heads", &expected, &heads.to_string()));
        }
        let head_dim = match json.get("mamba_d_head").and_then(Value::as_str) {
            Some("auto") => None,
            _ => json.size("mamba_d_head")?,
        };
        match head_dim {
            Some(head_dim) if head_dim * heads != inner => {
                let expected =
                    format!("`mamba_expand` times `hidden_size` ({inner}) over `mamba_n_heads` ({heads})");
                return Err(json.error("mamba_d_head", &expected, &head_dim.to_string()));
            }
            _ => {}
        }
        Ok(Some(Self {
            attention_layers,
            heads,
            head_dim: inner / heads,
            state: json.size("mamba_d_state")?.unwrap_or(256),
            groups: json.size("mamba_n_groups")?.unwrap_or(1),
            taps: json.size("mamba_d_conv")?.unwrap_or(4),
            conv_bias: json.boolean("mamba_conv_bias")?.unwrap_or(true),
            dt_limit: dt_limit(json)?,
        }))
    }
}

/// The layers of a granitemoehybrid that have attention.
fn attention_layers(json: &JsonObject, layers: usize) -> Result<Vec<usize>> {
    let key = if json.get("layer_types").is_some() { "layer_types" } else { "layers_block_type" };
    // transformers treats every layer as a Mamba layer if the configuration has no list of layer types.
    let Some(kinds) = json.list(key)? else { return Ok(Vec::new()) };
    if kinds.len() != layers {
        let expected = format!("`num_hidden_layers` ({layers}) entries");
        return Err(json.error(key, &expected, &kinds.len().to_string()));
    }
    let mut attention = Vec::new();
    for (layer, kind) in kinds.iter().enumerate() {
        match kind.as_str() {
            // transformers 5 writes the second name of each pair.
            Some("attention" | "full_attention") => attention.push(layer),
            Some("mamba" | "linear_attention") => {}
            _ => return Err(json.error(key, "`attention` or `mamba` entries", &describe(kind))),
        }
    }
    Ok(attention)
}

/// `time_step_limit`: two numbers, the second of which may be infinite.
fn dt_limit(json: &JsonObject) -> Result<(f64, f64)> {
    match json.numbers("time_step_limit")?.as_deref() {
        None => Ok((0.0, f64::INFINITY)),
        Some(&[low, high]) => Ok((low, high)),
        Some(other) => {
            Err(json.error("time_step_limit", "two numbers", &format!("a list of {}", other.len())))
        }
    }
}

/// The experts of each layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertsConfig {
    /// Experts of a layer, E.
    pub count: usize,
    /// Experts that a row goes to, k.
    pub per_token: usize,
    /// Size of an expert's feed-forward network, F.
    pub size: usize,
}

impl ExpertsConfig {
    /// Reads the experts of a model that may have none.
    pub(super) fn read_if_any(json: &JsonObject) -> Result<Option<Self>> {
        match json.count("num_local_experts")? {
            Some(0) => Ok(None),
            _ => Self::read(json).map(Some),
        }
    }

    /// Reads the experts of a model that has some.
    pub(super) fn read(json: &JsonObject) -> Result<Self> {
        Ok(Self {
            count: json.size("num_local_experts")?.unwrap_or(8),
            per_token: json.size("num_experts_per_tok")?.unwrap_or(2),
            size: json.size("intermediate_size")?.unwrap_or(11008),
        })
    }
}
