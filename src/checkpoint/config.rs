//! `config.json` of the checkpoints that gneiss tunes, reduced to the values that the model code needs.

use std::path::Path;

use serde_json::Value;

use super::json::{JsonObject, describe};
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
    /// `granitemoehybrid` if it is dense: all layers attention, no experts.
    GraniteMoeHybrid,
}

/// Shape and multipliers of a dense decoder, for Granite, Llama and dense granitemoehybrid.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The family.
    pub model_type: ModelType,
    /// Rows of the embedding matrix, V.
    pub vocab_size: usize,
    /// Width of the residual stream, C.
    pub hidden_size: usize,
    /// Feed-forward size, F (`shared_intermediate_size` of granitemoehybrid).
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
}

impl ModelConfig {
    /// Reads a `config.json` of `granite`, `llama` or dense `granitemoehybrid`.
    ///
    /// Absent keys have the defaults of the configuration classes of transformers 5. Both forms of the rotary settings
    /// are read: `rope_parameters`, and the older `rope_theta` with `rope_scaling`.
    ///
    /// # Errors
    /// Returns [`Error::Unsupported`] with the part that gneiss does not tune (another model type, experts, Mamba
    /// layers, another rotary scaling or activation, quantised weights), and [`Error::Checkpoint`] with a key whose
    /// value does not fit.
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
        let hybrid = model_type == ModelType::GraniteMoeHybrid;
        let num_hidden_layers = json.size("num_hidden_layers")?.unwrap_or(32);
        if hybrid {
            refuse_experts_and_mamba(&json, num_hidden_layers)?;
        }

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
        let intermediate_size = if hybrid {
            json.size("shared_intermediate_size")?.unwrap_or(1024)
        } else {
            json.size("intermediate_size")?.unwrap_or(11008)
        };
        let max_position_embeddings = json.size("max_position_embeddings")?.unwrap_or(2048);
        let multiplier = |key, llama| match model_type {
            ModelType::Llama => Ok(llama),
            _ => json.number(key).map(|found| found.unwrap_or(1.0)),
        };
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
            rope: read_rope(&json, hybrid, &rope::Context { head_dim, max_position_embeddings })?,
            tie_word_embeddings: json.boolean("tie_word_embeddings")?.unwrap_or(false),
            attention_bias: json.boolean("attention_bias")?.unwrap_or(false),
            // granitemoehybrid's shared MLP has no biases, whatever its configuration says.
            mlp_bias: !hybrid && json.boolean("mlp_bias")?.unwrap_or(false),
            embedding_multiplier: multiplier("embedding_multiplier", 1.0)?,
            residual_multiplier: multiplier("residual_multiplier", 1.0)?,
            attention_multiplier: multiplier("attention_multiplier", (head_dim as f64).powf(-0.5))?,
            logits_scaling: multiplier("logits_scaling", 1.0)?,
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
        let frequencies = self.rope.as_ref().map(|rope| rope.frequencies(self.head_dim, false));
        if frequencies.is_some_and(|all| all.iter().any(|frequency| !frequency.is_finite())) {
            let found = format!("{:?}", self.rope);
            return bad("rope_scaling", "finite rotary frequencies".to_string(), found);
        }
        Ok(())
    }
}

/// The family of a configuration whose weights and activation gneiss supports.
fn supported_family(json: &JsonObject) -> Result<ModelType> {
    let model_type = match json.string("model_type")? {
        Some("granite") => ModelType::Granite,
        Some("llama") => ModelType::Llama,
        Some("granitemoehybrid") => ModelType::GraniteMoeHybrid,
        Some(other) => return Err(unsupported(json.path(), format!("model type `{other}`"))),
        None => return Err(json.missing("model_type", "`granite`, `llama` or `granitemoehybrid`")),
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
    let hint = "gneiss tunes dense Granite 3.x and 4.x, Granite Code and other Llama checkpoints in \
                floating point, or as GGUF"
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

fn refuse_experts_and_mamba(json: &JsonObject, num_hidden_layers: usize) -> Result<()> {
    let key = if json.get("layer_types").is_some() { "layer_types" } else { "layers_block_type" };
    // transformers treats every layer as a Mamba layer if the configuration has no list of layer types.
    let Some(layers) = json.list(key)? else {
        return Err(unsupported(json.path(), format!("Mamba in all {num_hidden_layers} layers")));
    };
    let mut mamba = 0;
    for layer in layers {
        match layer.as_str() {
            // transformers 5 writes the second name of each pair.
            Some("attention" | "full_attention") => {}
            Some("mamba" | "linear_attention") => mamba += 1,
            _ => return Err(json.error(key, "`attention` or `mamba` entries", &describe(layer))),
        }
    }
    if mamba > 0 {
        let what = format!("Mamba ({mamba} of {} layers)", layers.len());
        return Err(unsupported(json.path(), what));
    }
    if layers.len() != num_hidden_layers {
        let expected = format!("`num_hidden_layers` ({num_hidden_layers}) entries");
        return Err(json.error(key, &expected, &layers.len().to_string()));
    }
    match json.count("num_local_experts")?.unwrap_or(8) {
        0 => Ok(()),
        experts => Err(unsupported(json.path(), format!("a mixture of {experts} experts"))),
    }
}

/// Rotary settings; `None` if positions are not embedded.
fn read_rope(json: &JsonObject, hybrid: bool, context: &rope::Context) -> Result<Option<Rope>> {
    if hybrid {
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
