//! What tuning a soft prompt will need of a device's memory, from the shapes of the model alone.
//!
//! ```text
//! tape of a block, values a row      residual stream at two norms 2C, their rstd 2, q/k/v (H + 2K) D,
//!                                    attention output H D with lse H, gate/up 2F
//!   of a recomputed block            residual stream C, and of a prefix pass's prefixes keys and values 2K D
//! tape of the last block, a row      residual stream C, rstd 1, keys and values 2K D
//!   and a target row                 q and attention output 2H D with lse H, residual stream C, rstd 1,
//!                                    gate/up 2F, and the last norm: residual stream and output 2C, rstd 1
//! workspace, a row                   the largest of what is alive at once behind the tape in
//!   last block's backward            five gradients C, that of keys and values 2K D
//!   MLP's backward                   two gradients C, that of the activation F, of gate/up 2F
//!   attention's backward             four of C, of the output H D, of q/k/v (H + 2K) D
//!                                    these two where the last block's tape is gone, which makes room, and with
//!                                    the gradient of the hidden states, C a target row
//!   of a recomputed block            its tape on top, where all whole tapes are gone
//! head                               logits 64V on the CPU, 512V on a GPU, whose gradient takes their place; V is padded
//!                                    to a multiple of 64 on a GPU, in the weights too
//! split batch                        the tape of the prefix pass, beside that of an example pass; and of the
//!                                    prefixes' keys and values in all blocks the gradient so far, and what the
//!                                    next pass adds
//! ```
//!
//! Values have the size of the activations; rstd and lse are f32 where that is smaller, and so is the gradient of a
//! split batch's prefixes. It is an estimate from below: [`TuningMemory::reserve`] covers what comes on top.

use super::Dtypes;
use super::granite::padded_vocab;
use super::pass::{head_rows, prefix_pass_rows};
use crate::checkpoint::ModelConfig;
use crate::ops::gpu::allocated_rows;
use crate::ops::packed::Panels;
use candle_core::DeviceLocation;
use half::bf16;

/// Bytes of one value of the prompt and its moments, which are f32 on every device.
const F32: usize = size_of::<f32>();

/// Bytes of a value in bf16.
const BF16: usize = size_of::<bf16>();

/// Kept free on the CPU: the process itself, the tokenizer, the products' packed blocks (a few megabytes a thread)
/// and the rotary table. Two steps on SmolLM2-135M peaked at 60 MB above the estimate (tests/inspect.rs).
const CPU_RESERVE: usize = 128 << 20;

/// Kept free on a GPU: the driver's context and loaded kernels (0.3 to 0.5 GB as NVIDIA's tools report them), the
/// workspace of cuBLAS (32 MiB on Hopper), indices, and what a screen takes meanwhile. An allowance, not a
/// measurement.
const GPU_RESERVE: usize = 1 << 30;

/// Part of tape and workspace that a GPU's allocator may lose to rounding and to gaps between buffers, in per cent.
/// An allowance, not a measurement.
const GPU_SLACK: usize = 10;

/// Memory that tuning needs, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TuningMemory {
    /// Of the frozen weights; a tied head counts once.
    pub weights: usize,
    /// Of the transposes of the blocks' weights, a second copy that the backward pass reads if there is room for it; 0 if
    /// products gain nothing by one, as anywhere but on a CPU with AMX.
    pub transposes: usize,
    /// Whether those are in memory already.
    pub has_transposes: bool,
    /// Blocks of the model.
    pub blocks: usize,
    /// Of the tape of a block but the last, per row that goes through the model at once.
    pub block_per_row: usize,
    /// Of the tape of such a block where it is recomputed.
    pub input_per_row: usize,
    /// Of the tape of the last block, per row.
    pub last_per_row: usize,
    /// Of the tape, per target row beyond what every row takes.
    pub tape_per_target: usize,
    /// Of a block's keys and values, per row.
    pub keys_values_per_row: usize,
    /// Of the gradient of all blocks' keys and values, per prefix row of a split batch.
    pub split_per_row: usize,
    /// Of the logits that exist at a time.
    pub head: usize,
    /// Of the backward pass of a block but the last, per row.
    pub workspace_per_row: usize,
    /// Of the backward pass of the last block, per row.
    pub last_workspace_per_row: usize,
    /// Of the prompt and AdamW's two moments, per virtual token.
    pub prompt_per_token: usize,
    /// Kept free, whatever the pass.
    pub reserve_at_least: usize,
    /// Kept free besides, in per cent of tape and workspace.
    pub slack: usize,
    /// Whether it is a GPU's, whose matrices' rows are rounded up, and whose prefix passes may hold sequences.
    pub on_gpu: bool,
}

impl TuningMemory {
    /// For a model of this shape in these dtypes, on a device of this kind.
    pub fn of(config: &ModelConfig, dtypes: Dtypes, device: DeviceLocation) -> Self {
        let value = dtypes.activations.size_in_bytes();
        let (layers, wide) = (config.num_hidden_layers, value.max(F32));
        let (c, f, h) = (config.hidden_size, config.intermediate_size, config.num_attention_heads);
        let q = h * config.head_dim;
        let kv = 2 * config.num_key_value_heads * config.head_dim;
        let Parameters { matrices, vectors } = Parameters::of(config);
        let vocab = padded_vocab(config.vocab_size, dtypes.weights, device);
        let matrices = matrices + (vocab - config.vocab_size) * c;
        let isa = dtypes.packed_for(device);
        let (cpu, packed) = (device == DeviceLocation::Cpu, isa.is_some());
        let transposes =
            isa.filter(|isa| isa.reads_packed_transposes()).map_or(0, |_| transposed_bytes(config));
        // What products read, and what they read of a gradient that is kept wider.
        let (operand, rounded) = if packed { (BF16, BF16) } else { (value, 0) };
        let attended = if cpu { 0 } else { q * value };
        let block = 2 * c * value + (q + kv + 2 * f) * operand + attended + (2 + h) * wide;
        let last_block = c * value + kv * operand + wide;
        let target = 3 * c * value + (q + 2 * f) * operand + attended + (h + 2) * wide;
        let mlp = (2 * c + f) * value + 2 * f * operand + c * rounded;
        let attention = (4 * c + q + (q + kv)) * value + (q + (q + kv)) * rounded;
        Self {
            weights: match packed {
                true => packed_bytes(config),
                false => matrices * dtypes.weights.size_in_bytes(),
            } + vectors * value,
            transposes,
            has_transposes: false,
            blocks: layers,
            block_per_row: block,
            input_per_row: c * value,
            last_per_row: last_block,
            tape_per_target: target,
            keys_values_per_row: kv * operand,
            split_per_row: 2 * layers * kv * wide,
            head: head_rows(device) * vocab * value,
            workspace_per_row: mlp.max(attention),
            last_workspace_per_row: (5 * c + kv) * value + kv * rounded,
            prompt_per_token: 3 * c * F32,
            reserve_at_least: if cpu { CPU_RESERVE } else { GPU_RESERVE },
            slack: if cpu { 0 } else { GPU_SLACK },
            on_gpu: !cpu,
        }
    }

    /// Blocks that can be recomputed: all but the last.
    pub fn most_recomputed(&self) -> usize {
        self.blocks.saturating_sub(1)
    }

    /// Bytes of the tape a row that is no target row, where `recompute` blocks are recomputed.
    pub fn tape_per_row(&self, recompute: usize) -> usize {
        let recompute = recompute.min(self.most_recomputed());
        (self.most_recomputed() - recompute) * self.block_per_row
            + recompute * self.input_per_row
            + self.last_per_row
    }

    /// Rows that there is memory for in the matrices of a pass of so many.
    fn allocated(&self, rows: usize) -> usize {
        if self.on_gpu { allocated_rows(rows) } else { rows }
    }

    /// Bytes of the tape of `rows` rows, `targets` of which predict a target token.
    pub fn tape(&self, rows: usize, targets: usize, recompute: usize) -> usize {
        let (rows, targets) = (self.allocated(rows), self.allocated(targets));
        rows * self.tape_per_row(recompute) + targets * self.tape_per_target
    }

    /// Bytes of the tapes of two passes together, whose matrices are allocated one by one; `targets` are those of both.
    pub fn tapes(&self, rows: [usize; 2], targets: usize, recompute: usize) -> usize {
        let rows: usize = rows.into_iter().map(|rows| self.allocated(rows)).sum();
        rows * self.tape_per_row(recompute) + self.allocated(targets) * self.tape_per_target
    }

    /// Bytes of the keys and values of `rows` rows of prefixes that other passes read, in the recomputed blocks: in the others
    /// the tape holds them.
    pub fn prefix_keys_values(&self, rows: usize, recompute: usize) -> usize {
        rows * recompute.min(self.most_recomputed()) * self.keys_values_per_row
    }

    /// Rows that a prefix pass should have at least, in passes of at most `max_rows` ([`crate::batch::Packing`]).
    pub fn prefix_pass_rows(&self, max_rows: usize) -> usize {
        prefix_pass_rows(!self.on_gpu, max_rows)
    }

    /// Bytes at the peak of a pass beyond weights, tape and prompt. The head has given its logits back when the blocks'
    /// backward pass begins; that frees the tape from the last block on.
    pub fn workspace(&self, rows: usize, targets: usize, recompute: usize) -> usize {
        let recompute = recompute.min(self.most_recomputed());
        let tape = self.tape(rows, targets, recompute);
        let (rows, targets) = (self.allocated(rows), self.allocated(targets));
        let backward = rows * self.workspace_per_row + targets * self.input_per_row;
        let last = rows * self.last_per_row + targets * self.tape_per_target;
        let inner = if self.blocks > 1 { backward.saturating_sub(last) } else { 0 };
        let again = match recompute {
            0 => 0,
            _ => {
                let inputs = rows * recompute * self.input_per_row;
                let block = rows * (self.block_per_row - self.input_per_row);
                (inputs + block + backward).saturating_sub(tape)
            }
        };
        self.head.max(rows * self.last_workspace_per_row).max(inner).max(again)
    }

    /// Bytes to keep free beside what is counted, for a pass of so much tape and workspace.
    pub fn reserve(&self, pass: usize) -> usize {
        self.reserve_at_least + pass / 100 * self.slack
    }
}

/// Shapes [out, in] of a block's linear layers.
fn layer_shapes(config: &ModelConfig) -> [(usize, usize); 4] {
    let (c, f) = (config.hidden_size, config.intermediate_size);
    let q = config.num_attention_heads * config.head_dim;
    let kv = 2 * config.num_key_value_heads * config.head_dim;
    [(q + kv, c), (c, q), (2 * f, c), (c, f)]
}

/// Bytes of the transposes of the blocks' linear layers as the CPU's bf16 products read them.
fn transposed_bytes(config: &ModelConfig) -> usize {
    let block: usize = layer_shapes(config).map(|(n, k)| Panels::transpose_bytes_of(n, k)).iter().sum();
    config.num_hidden_layers * block
}

/// Bytes of the embedding, and of all linear layers as the CPU's bf16 products read them.
fn packed_bytes(config: &ModelConfig) -> usize {
    let (c, v) = (config.hidden_size, config.vocab_size);
    let block: usize = layer_shapes(config).map(|(n, k)| Panels::bytes_of(n, k)).iter().sum();
    let head = if config.tie_word_embeddings { 0 } else { Panels::bytes_of(v, c) };
    v * c * size_of::<bf16>() + head + config.num_hidden_layers * block
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

/// The shape of Granite 4.1 8b.
#[cfg(test)]
pub(crate) fn granite_8b() -> ModelConfig {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/granite/config.json");
    let small = ModelConfig::from_json(&path).expect("the fixture is valid");
    ModelConfig {
        num_hidden_layers: 40,
        hidden_size: 4096,
        num_attention_heads: 32,
        num_key_value_heads: 8,
        head_dim: 128,
        intermediate_size: 12800,
        vocab_size: 100_352,
        tie_word_embeddings: true,
        attention_bias: false,
        mlp_bias: false,
        ..small
    }
}

#[cfg(test)]
mod tests;
