//! `config.json` of the checkpoints that gneiss tunes, reduced to the values that the model code needs.

use std::path::Path;

use serde_json::Value;

use super::json::JsonObject;
use super::layers::{ExpertsConfig, MambaConfig};
use super::rope;
use crate::checkpoint::typed::TypedKeys;
use crate::ops::rope::Rope;
use crate::{Error, Result};

/// The model family (`model_type` of `config.json`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelType {
    /// `granite`: Llama with Granite's four multipliers.
    Granite,
    /// `llama`: Granite with embedding, residual and logits multipliers of 1.
    Llama,
    /// `granitemoe`: attention, and experts in place of the dense feed-forward network.
    GraniteMoe,
    /// `granitemoeshared`: the same with a dense feed-forward network beside the experts.
    GraniteMoeShared,
    /// `granitemoehybrid`: layers of Mamba2 or attention, with a dense feed-forward network and perhaps experts.
    GraniteMoeHybrid,
}

impl ModelType {
    /// `model_type` of `config.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Granite => "granite",
            Self::Llama => "llama",
            Self::GraniteMoe => "granitemoe",
            Self::GraniteMoeShared => "granitemoeshared",
            Self::GraniteMoeHybrid => "granitemoehybrid",
        }
    }
}

/// What makes the rows of a layer see each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MixerKind {
    /// Grouped-query attention.
    Attention,
    /// Mamba2 (Dao and Gu, 2024, arXiv:2405.21060).
    Mamba2,
}

/// Shape and multipliers of a decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The family.
    pub model_type: ModelType,
    /// Rows of the embedding matrix, V.
    pub vocab_size: usize,
    /// Width of the residual stream, C.
    pub hidden_size: usize,
    /// Size of the dense feed-forward network, F (`shared_intermediate_size` of granitemoeshared and granitemoehybrid); 0 if
    /// a layer has experts alone.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Query heads, H.
    pub num_attention_heads: usize,
    /// Key and value heads, K; H is a multiple of K.
    pub num_key_value_heads: usize,
    /// Size of a head, D.
    pub head_dim: usize,
    /// Largest number of positions for which the model was made.
    pub max_position_embeddings: usize,
    /// Epsilon of the RMS norms.
    pub rms_norm_eps: f64,
    /// Rotary embedding; `None` if positions are not embedded.
    pub rope: Option<Rope>,
    /// Whether the head is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// Whether q/k/v/o have biases.
    pub attention_bias: bool,
    /// Whether gate/up/down have biases.
    pub mlp_bias: bool,
    /// Multiplies the embeddings, the soft prompt's included.
    pub embedding_multiplier: f64,
    /// Multiplies the outputs of attention and MLP before they are added to the residual stream.
    pub residual_multiplier: f64,
    /// Multiplies the attention scores.
    pub attention_multiplier: f64,
    /// Divides the logits.
    pub logits_scaling: f64,
    /// The Mamba2 layers; `None` if every layer has attention.
    pub mamba: Option<MambaConfig>,
    /// The experts of each layer; `None` if it has none.
    pub experts: Option<ExpertsConfig>,
}

impl ModelConfig {
    /// The mixer of layer `layer`.
    pub fn mixer(&self, layer: usize) -> MixerKind {
        match &self.mamba {
            Some(mamba) if !mamba.attention_layers.contains(&layer) => MixerKind::Mamba2,
            _ => MixerKind::Attention,
        }
    }

    /// Number of layers with this mixer.
    pub fn layers_with(&self, mixer: MixerKind) -> usize {
        (0..self.num_hidden_layers).filter(|layer| self.mixer(*layer) == mixer).count()
    }

    /// Whether gate and up are one tensor of `shared_mlp` in transformers' files.
    pub fn has_shared_mlp(&self) -> bool {
        matches!(self.model_type, ModelType::GraniteMoeShared | ModelType::GraniteMoeHybrid)
    }

    /// Reads a `config.json`.
    ///
    /// Absent keys have the defaults of the configuration classes of transformers 5. Both forms of the rotary settings
    /// are read: `rope_parameters`, and the older `rope_theta` with `rope_scaling`.
    ///
    /// # Errors
    /// Returns [`Error::Unsupported`] with the part that gneiss does not tune (another model type, rotary scaling or
    /// activation, quantised weights), and [`Error::Checkpoint`] with a key whose value does not fit.
    pub fn from_json(path: &Path) -> Result<Self> {
        Self::read(path).map(|(config, _)| config)
    }

    /// As [`ModelConfig::from_json`], with a warning for each key that would change the arithmetic and that neither
    /// transformers nor gneiss reads for this model type.
    ///
    /// # Errors
    /// Returns the errors of [`ModelConfig::from_json`].
    pub fn read(path: &Path) -> Result<(Self, Vec<String>)> {
        let json = JsonObject::read(path)?;
        let model_type = supported_family(&json)?;
        let num_hidden_layers = json.size("num_hidden_layers")?.unwrap_or(32);
        let hidden_size = json.size("hidden_size")?.unwrap_or(4096);
        let num_attention_heads = json.size("num_attention_heads")?.unwrap_or(32);
        let head_dim = match json.size("head_dim")? {
            Some(head_dim) => head_dim,
            None if hidden_size.is_multiple_of(num_attention_heads) => hidden_size / num_attention_heads,
            None => {
                let expected = format!("a multiple of `num_attention_heads` ({num_attention_heads})");
                return Err(json.error("hidden_size", &expected, &hidden_size.to_string()));
            }
        };
        let intermediate_size = match model_type {
            ModelType::Granite | ModelType::Llama => json.size("intermediate_size")?.unwrap_or(11008),
            ModelType::GraniteMoe => 0,
            ModelType::GraniteMoeShared => json.count("shared_intermediate_size")?.unwrap_or(0),
            ModelType::GraniteMoeHybrid => json.size("shared_intermediate_size")?.unwrap_or(1024),
        };
        let max_position_embeddings = json.size("max_position_embeddings")?.unwrap_or(2048);
        let multiplier = |key, llama| match model_type {
            ModelType::Llama => Ok(llama),
            _ => json.number(key).map(|found| found.unwrap_or(1.0)),
        };
        let is_dense = matches!(model_type, ModelType::Granite | ModelType::Llama);
        let config = Self {
            model_type,
            vocab_size: json.size("vocab_size")?.unwrap_or(32000),
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads: json.size("num_key_value_heads")?.unwrap_or(num_attention_heads),
            head_dim,
            max_position_embeddings,
            rms_norm_eps: json.number("rms_norm_eps")?.unwrap_or(1e-6),
            rope: read_rope(&json, model_type, &rope::Context { head_dim, max_position_embeddings })?,
            tie_word_embeddings: json.boolean("tie_word_embeddings")?.unwrap_or(false),
            attention_bias: json.boolean("attention_bias")?.unwrap_or(false),
            // The shared MLP has no biases, whatever its configuration says.
            mlp_bias: is_dense && json.boolean("mlp_bias")?.unwrap_or(false),
            embedding_multiplier: multiplier("embedding_multiplier", 1.0)?,
            residual_multiplier: multiplier("residual_multiplier", 1.0)?,
            attention_multiplier: multiplier("attention_multiplier", (head_dim as f64).powf(-0.5))?,
            logits_scaling: multiplier("logits_scaling", 1.0)?,
            mamba: match model_type {
                ModelType::GraniteMoeHybrid => MambaConfig::read(&json, num_hidden_layers, hidden_size)?,
                _ => None,
            },
            experts: match model_type {
                ModelType::Granite | ModelType::Llama => None,
                ModelType::GraniteMoe | ModelType::GraniteMoeShared => Some(ExpertsConfig::read(&json)?),
                ModelType::GraniteMoeHybrid => ExpertsConfig::read_if_any(&json)?,
            },
        };
        config.validate(path)?;
        let warnings = super::unread::warnings(&json, &config);
        Ok((config, warnings))
    }

    /// Checks the conditions between the values, both for `config.json` and for GGUF metadata.
    pub(super) fn validate(&self, path: &Path) -> Result<()> {
        let bad = |key: &str, expected: String, found: String| {
            let problem = format!("`{key}`: expected {expected}, found {found}");
            Err(Error::Checkpoint { path: path.to_path_buf(), problem })
        };
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        if !heads.is_multiple_of(kv_heads) {
            let expected = format!("a multiple of `num_key_value_heads` ({kv_heads})");
            return bad("num_attention_heads", expected, heads.to_string());
        }
        if !self.head_dim.is_multiple_of(2) {
            return bad("head_dim", "an even head size".to_string(), self.head_dim.to_string());
        }
        let rope_theta = self.rope.as_ref().map_or(1.0, |rope| rope.theta);
        for (key, value) in [
            ("rms_norm_eps", self.rms_norm_eps),
            ("rope_theta", rope_theta),
            ("embedding_multiplier", self.embedding_multiplier),
            ("residual_multiplier", self.residual_multiplier),
            ("attention_multiplier", self.attention_multiplier),
            ("logits_scaling", self.logits_scaling),
        ] {
            if !(value.is_finite() && value > 0.0) {
                return bad(key, "a finite number over 0".to_string(), value.to_string());
            }
        }
        self.validate_layers().map_or(Ok(()), |(key, expected, found)| bad(key, expected, found))?;
        let frequencies = self.rope.as_ref().map(|rope| rope.frequencies(self.head_dim, false));
        if frequencies.is_some_and(|all| all.iter().any(|frequency| !frequency.is_finite())) {
            let found = format!("{:?}", self.rope);
            return bad("rope_scaling", "finite rotary frequencies".to_string(), found);
        }
        Ok(())
    }
}

impl ModelConfig {
    /// The first condition on Mamba2 layers and experts that does not hold: key, what was expected, what was found.
    fn validate_layers(&self) -> Option<(&'static str, String, String)> {
        if let Some(mamba) = &self.mamba {
            if !mamba.heads.is_multiple_of(mamba.groups) {
                let expected = format!("a multiple of `mamba_n_groups` ({})", mamba.groups);
                return Some(("mamba_n_heads", expected, mamba.heads.to_string()));
            }
            let (low, high) = mamba.dt_limit;
            if low.is_nan() || high.is_nan() || low < 0.0 || high <= low {
                let expected = "a lower bound of 0 or more and an upper bound over it".to_string();
                return Some(("time_step_limit", expected, format!("{low} and {high}")));
            }
        }
        let experts = self.experts?;
        if experts.per_token > experts.count {
            let expected = format!("at most `num_local_experts` ({})", experts.count);
            return Some(("num_experts_per_tok", expected, experts.per_token.to_string()));
        }
        None
    }
}

/// The family of a configuration whose weights and activation gneiss supports.
fn supported_family(json: &JsonObject) -> Result<ModelType> {
    let model_type = match json.string("model_type")? {
        Some("granite") => ModelType::Granite,
        Some("llama") => ModelType::Llama,
        Some("granitemoe") => ModelType::GraniteMoe,
        Some("granitemoeshared") => ModelType::GraniteMoeShared,
        Some("granitemoehybrid") => ModelType::GraniteMoeHybrid,
        Some(other) => return Err(unsupported(json.path(), format!("model type `{other}`"))),
        None => {
            return Err(json.missing(
                "model_type",
                "`granite`, `llama`, `granitemoe`, `granitemoeshared` or `granitemoehybrid`",
            ));
        }
    };
    if let Some(quantised) = json.object("quantization_config")? {
        return Err(quantised_by(json.path(), &quantised));
    }
    match json.string("hidden_act")? {
        // transformers' two names of one function.
        None | Some("silu" | "swish") => {}
        Some(other) => return Err(unsupported(json.path(), format!("activation `{other}` (`hidden_act`)"))),
    }
    Ok(model_type)
}

/// The error for a part that gneiss does not tune, with the kinds that it does tune.
pub(super) fn unsupported(path: &Path, what: String) -> Error {
    let hint = "gneiss tunes Granite 3.x and 4.x (dense, with experts, and hybrids with Mamba2), Granite Code and other \
                Llama checkpoints in floating point, or as GGUF"
        .to_string();
    Error::Unsupported { path: path.to_path_buf(), what, hint }
}

/// An error about quantised weights, with the name of the method.
fn quantised_by(path: &Path, quantised: &JsonObject) -> Error {
    let method = quantised.get("quant_method").and_then(Value::as_str);
    let bits = |key: &str| quantised.get(key).and_then(Value::as_bool) == Some(true);
    let what = match method {
        Some(method) => format!("`quantization_config` (safetensors quantised by `{method}`)"),
        None if bits("load_in_4bit") || bits("load_in_8bit") => {
            "`quantization_config` (safetensors quantised by `bitsandbytes`)".to_string()
        }
        None => "`quantization_config` (quantised safetensors)".to_string(),
    };
    unsupported(path, what)
}

/// Rotary settings; `None` if positions are not embedded.
fn read_rope(json: &JsonObject, model_type: ModelType, context: &rope::Context) -> Result<Option<Rope>> {
    if model_type == ModelType::GraniteMoeHybrid {
        match json.string("position_embedding_type")? {
            Some("rope") => {}
            None | Some("nope") => return Ok(None),
            Some(other) => {
                let found = format!("`{other}`");
                return Err(json.error("position_embedding_type", "`rope` or `nope`", &found));
            }
        }
    }
    rope::from_json(json, context).map(Some)
}
