//! `config.json` of the checkpoints that gneiss tunes, reduced to what the model code needs.

/// The family that a checkpoint says it is of (`model_type` of `config.json`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelType {
    /// `granite`: Llama with Granite's four multipliers.
    Granite,
    /// `llama`: Granite with embedding, residual and logits multipliers of 1.
    Llama,
    /// `granitemoehybrid` where it is dense: all layers attention, no experts.
    GraniteMoeHybrid,
}

/// Rotary position embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the frequencies, `rope_theta`.
    pub theta: f64,
    /// `rope_scaling` of the Llama 3 kind.
    pub llama3: Option<Llama3Scaling>,
}

/// `rope_scaling` with `rope_type = "llama3"`: low frequencies are divided by `factor`, high ones kept,
/// those between interpolated (transformers `modeling_rope_utils.py`, `_compute_llama3_parameters`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Llama3Scaling {
    /// Divides the frequencies whose wavelength is long.
    pub factor: f64,
    /// Wavelengths over `original_max_position_embeddings / low_freq_factor` are long.
    pub low_freq_factor: f64,
    /// Wavelengths under `original_max_position_embeddings / high_freq_factor` are short.
    pub high_freq_factor: f64,
    /// Context length of the pretraining.
    pub original_max_position_embeddings: usize,
}

/// Shape and multipliers of a dense decoder, one for Granite, Llama and dense granitemoehybrid.
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
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Query heads, H.
    pub num_attention_heads: usize,
    /// Key and value heads, K; H is a multiple of it.
    pub num_key_value_heads: usize,
    /// Size of a head, D.
    pub head_dim: usize,
    /// Longest position the model was made for.
    pub max_position_embeddings: usize,
    /// Epsilon of the RMS norms.
    pub rms_norm_eps: f64,
    /// Rotary embedding; `None` where positions are not embedded.
    pub rope: Option<Rope>,
    /// Whether the head is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// Whether q/k/v/o have biases.
    pub attention_bias: bool,
    /// Whether gate/up/down have biases.
    pub mlp_bias: bool,
    /// Multiplies the embeddings, the soft prompt's included.
    pub embedding_multiplier: f64,
    /// Multiplies what attention and MLP add to the residual stream.
    pub residual_multiplier: f64,
    /// Multiplies the attention scores.
    pub attention_multiplier: f64,
    /// Divides the logits.
    pub logits_scaling: f64,
}
