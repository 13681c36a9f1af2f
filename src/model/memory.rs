//! What tuning a soft prompt will need of a device's memory, from the shapes of the model alone.
//!
//! ```text
//! tape of a block, values a row      residual stream at two norms 2C, their rstd 2, q/k/v (H + 2K) D,
//!                                    attention output H D with lse H, gate/up 2F
//! tape of the last block, a row      residual stream C, rstd 1, keys and values 2K D
//!   and a target row                 q and attention output 2H D with lse H, residual stream C, rstd 1,
//!                                    gate/up 2F, and the last norm: residual stream and output 2C, rstd 1
//! workspace, a row                   the larger of what is alive at once behind the tape in
//!                                    the MLP's backward: two gradients C, that of the activation F, of gate/up 2F
//!                                    the attention's:    four of C, of the output H D, of q/k/v (H + 2K) D
//! head                               64 target rows' logits 64V, whose gradient takes their place
//! ```
//!
//! It is an estimate from below: the process itself, the tokenizer, the products' packed blocks (a few
//! megabytes a thread) and the tables of the rotary embedding come on top. A GPU without kernels of gneiss's
//! own runs some operations through candle's autograd, which holds more.

use super::pass::head_rows;
use super::{Dtypes, ModelConfig};

/// Bytes of one value of the prompt and its moments, which are f32 on every device.
const F32: usize = size_of::<f32>();

/// Memory that tuning needs, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TuningMemory {
    /// Of the frozen weights; a tied head counts once.
    pub weights: usize,
    /// Of the tape, per row that goes through the model at once.
    pub tape_per_row: usize,
    /// Of the tape, per target row beyond what every row takes.
    pub tape_per_target: usize,
    /// Of the logits that exist at a time.
    pub head: usize,
    /// Of the backward pass of a block, per row.
    pub workspace_per_row: usize,
    /// Of the prompt and AdamW's two moments, per virtual token.
    pub prompt_per_token: usize,
}

impl TuningMemory {
    /// For a model of this shape in these dtypes.
    pub fn of(config: &ModelConfig, dtypes: Dtypes) -> Self {
        let value = dtypes.activations.size_in_bytes();
        let (c, f, h) = (config.hidden_size, config.intermediate_size, config.num_attention_heads);
        let q = h * config.head_dim;
        let kv = 2 * config.num_key_value_heads * config.head_dim;
        let block = 2 * c + 2 + (q + kv) + (q + h) + 2 * f;
        let last_block = c + 1 + kv;
        let target = (2 * q + h) + (c + 1) + 2 * f + (2 * c + 1);
        let Parameters { matrices, vectors } = Parameters::of(config);
        Self {
            weights: matrices * dtypes.weights.size_in_bytes() + vectors * value,
            tape_per_row: ((config.num_hidden_layers - 1) * block + last_block) * value,
            tape_per_target: target * value,
            head: head_rows(&candle_core::Device::Cpu) * config.vocab_size * value,
            workspace_per_row: (2 * c + 3 * f).max(4 * c + q + (q + kv)) * value,
            prompt_per_token: 3 * c * F32,
        }
    }

    /// Bytes of the tape of `rows` rows, `targets` of which predict a target token.
    pub fn tape(&self, rows: usize, targets: usize) -> usize {
        rows * self.tape_per_row + targets * self.tape_per_target
    }

    /// Bytes beside weights, tape and prompt: the head has given its logits back when the blocks' backward
    /// pass begins.
    pub fn workspace(&self, rows: usize) -> usize {
        self.head.max(rows * self.workspace_per_row)
    }

    /// Bytes in all for a prompt of `virtual_tokens`; the rows are those of [`TuningMemory::tape`].
    pub fn total(&self, rows: usize, targets: usize, virtual_tokens: usize) -> usize {
        self.weights
            + self.tape(rows, targets)
            + self.workspace(rows)
            + virtual_tokens * self.prompt_per_token
    }
}

/// Values of a model's weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parameters {
    /// Of the embedding and of all linear layers, which are held in the dtype of the weights; a tied head
    /// counts once.
    pub matrices: usize,
    /// Of norms and biases, which are held in the dtype of the activations.
    pub vectors: usize,
}

impl Parameters {
    /// Of a model of this shape.
    pub fn of(config: &ModelConfig) -> Self {
        let (c, f) = (config.hidden_size, config.intermediate_size);
        let q = config.num_attention_heads * config.head_dim;
        let kv = 2 * config.num_key_value_heads * config.head_dim;
        let block = (q + kv) * c + c * q + 2 * f * c + c * f;
        let attention_bias = if config.attention_bias { q + kv + c } else { 0 };
        let mlp_bias = if config.mlp_bias { 2 * f + c } else { 0 };
        let embeddings = if config.tie_word_embeddings { 1 } else { 2 };
        Self {
            matrices: embeddings * config.vocab_size * c + config.num_hidden_layers * block,
            vectors: config.num_hidden_layers * (2 * c + attention_bias + mlp_bias) + c,
        }
    }

    /// All of them.
    pub fn total(&self) -> usize {
        self.matrices + self.vectors
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Checkpoint, Granite};
    use candle_core::{DType, Device};
    use std::path::Path;

    const F32: Dtypes = Dtypes { weights: DType::F32, activations: DType::F32 };
    const BF16: Dtypes = Dtypes { weights: DType::BF16, activations: DType::F32 };

    /// A model of tests/golden, and its tensors' values.
    fn golden(name: &str, dtypes: Dtypes) -> (ModelConfig, Granite) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
        let bare = Checkpoint::open_without_tokenizer(&path).unwrap();
        let model = Granite::load(&bare.config, &bare.weights, dtypes, &Device::Cpu, &mut |_| {}).unwrap();
        (bare.config, model)
    }

    #[test]
    fn weights_are_those_of_a_loaded_model() {
        for name in ["granite", "llama_bias", "hybrid_dense"] {
            for dtypes in [F32, BF16] {
                let (config, model) = golden(name, dtypes);
                let parameters = Parameters::of(&config);
                let loaded = model.weight_bytes();
                let memory = TuningMemory::of(&config, dtypes);
                assert_eq!(
                    memory.weights,
                    parameters.matrices * dtypes.weights.size_in_bytes() + 4 * parameters.vectors
                );
                // A loaded model counts its biases as weights, and leaves its norms out.
                let norms = 4 * config.hidden_size * (2 * config.num_hidden_layers + 1);
                assert_eq!(memory.weights - norms, loaded, "{name} in {dtypes:?}");
            }
        }
    }

    #[test]
    fn parameters_are_the_checkpoints() {
        for name in ["granite", "llama_bias", "hybrid_dense"] {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
            let config = ModelConfig::from_json(&path.join("config.json")).unwrap();
            let bytes = std::fs::read(path.join("model.safetensors")).unwrap();
            let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let stored =
                file.tensors().iter().map(|(_, t)| t.shape().iter().product::<usize>()).sum::<usize>();
            assert_eq!(Parameters::of(&config).total(), stored, "{name}");
        }
    }

    #[test]
    fn the_prompt_has_two_moments() {
        let (config, _) = golden("granite", F32);
        let memory = TuningMemory::of(&config, F32);
        assert_eq!(memory.total(0, 0, 10) - memory.total(0, 0, 0), 10 * 3 * 40 * 4);
    }
}
