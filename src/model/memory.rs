//! What tuning a soft prompt will need of a device's memory, from the shapes of the model alone.
//!
//! ```text
//! tape of a layer, values a row      residual stream at two norms 2C, their rstd 2, q/k/v (H + 2K) D,
//!                                    attention output H D with lse H, gate/up 2F
//!   Mamba2 in place of attention     z and y 2I, x, B and C X, dt M, rstd G
//!   experts beside or in place of    gate/up 2F of k pairs, their weights and indices 5k
//!   of a recomputed layer            residual stream C, experts' weights and indices, and of a prefix pass's prefixes keys
//!                                    and values 2K D
//! tape of the last layer, a row      residual stream C, rstd 1, keys and values 2K D
//!   and a target row                 q and attention output 2H D with lse H, residual stream C, rstd 1,
//!                                    gate/up 2F, and the last norm: residual stream and output 2C, rstd 1
//! workspace, a row                   the largest of what is in memory at once beside the tape in
//!   last layer's backward            five gradients C, that of keys and values 2K D
//!   MLP's backward                   two gradients C, that of the activation F, of gate/up 2F
//!   attention's backward             four of C, of the output H D, of q/k/v (H + 2K) D
//!   Mamba2's backward                four of C, three of I and of X, z and x, B, C again
//!   experts' backward                two of C; of k pairs a row C, F and 2F
//!                                    for these the last layer's tape is freed already; and with
//!                                    the gradient of the hidden states, C a target row
//!   of a recomputed layer            its tape on top, when all other tapes are freed
//! head                               logits 64V on the CPU, 512V on a GPU, whose gradient takes their place; V is padded
//!                                    to a multiple of 64 on a GPU, in the weights too
//! split batch                        the tape of the prefix pass, beside that of an example pass; and of the
//!                                    prefixes' keys and values in all layers the gradient so far, and that of the
//!                                    next pass; the same and the values themselves of a prefix's Mamba2 states I N + (W-1) X
//! ```
//!
//! Values have the size of the activations; rstd and lse are at least f32, and so is the gradient of a
//! split batch's prefixes. This is a lower bound; [`TuningMemory::reserve`] adds a margin.

use super::Dtypes;
use super::decoder::padded_vocab;
use super::forward::prefix_pass_rows;
use super::head::head_rows;
use super::keys_values::keys_values_width;
use super::layer::{Attention, Dense, Experts, Mamba2};
use crate::checkpoint::tensors::{LayerTensors, LayerVector, Stack};
use crate::checkpoint::{MixerKind, ModelConfig};
use crate::ops::bf16::PackedWeight;
use crate::ops::gpu::allocated_rows;
use candle_core::DeviceLocation;
use half::bf16;

/// Bytes of one value of the prompt and its moments, which are f32 on every device.
const F32: usize = size_of::<f32>();

/// Bytes of a value in bf16.
const BF16: usize = size_of::<bf16>();

/// Kept free on the CPU: the process itself, the tokenizer, the products' packed blocks (a few megabytes a thread)
/// and the rotary table. Two steps on SmolLM2-135M peaked at 60 MB above the estimate (tests/cli/inspect.rs).
const CPU_RESERVE: usize = 128 << 20;

/// Kept free on a GPU: the driver's context and loaded kernels (0.3 to 0.5 GB as NVIDIA's tools report them), the
/// workspace of cuBLAS (32 MiB on Hopper), indices, and what a screen takes meanwhile. An allowance, not a
/// measurement.
const GPU_RESERVE: usize = 1 << 30;

/// Part of tape and workspace that a GPU's allocator may lose to rounding and to gaps between buffers, in per cent.
/// An allowance, not a measurement.
const GPU_SLACK: usize = 10;

/// Bytes of values in a pass.
#[derive(Debug, Clone, Copy)]
pub(super) struct ValueSizes {
    /// Of an activation.
    pub(super) activation: usize,
    /// Of what projections read, and of their output if it is read by another product.
    pub(super) operand: usize,
    /// Of the copy of a gradient in the dtype that projections read; 0 if that is the activations' dtype.
    pub(super) operand_copy: usize,
    /// Of a sum over a row, such as rstd: at least f32.
    pub(super) row_sum: usize,
    /// Whether the backward pass reads attention's output, as on a GPU.
    pub(super) keeps_attention_output: bool,
}

/// What a mixer needs in a layer, in bytes a row.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct MixerMemory {
    /// Saved of every row, in the last layer too.
    pub(super) saved: usize,
    /// Saved of a row whose output is wanted.
    pub(super) saved_per_output: usize,
    /// What sequences read of a prefix row.
    pub(super) prefix_state: usize,
    /// The gradient of that.
    pub(super) prefix_gradient: usize,
    /// Bytes of what sequences read of a prefix whatever its rows, in each layer, recomputed or not.
    pub(super) state_per_prefix: usize,
    /// Bytes of its gradients.
    pub(super) state_gradient_per_prefix: usize,
    /// The largest that is in memory at once in the backward pass.
    pub(super) workspace: usize,
    /// The same in the last layer.
    pub(super) last_workspace: usize,
}

/// What a feed-forward network needs in a layer, in bytes a row.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct FeedForwardMemory {
    /// Saved of a row whose output is wanted.
    pub(super) saved: usize,
    /// The part of it that is saved if the layer is recomputed too.
    pub(super) saved_if_recomputed: usize,
    /// The largest that is in memory at once in the backward pass.
    pub(super) workspace: usize,
}

/// Bytes a row of a layer but the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerMemory {
    /// Of its tape.
    pub tape: usize,
    /// Of its tape if it is recomputed.
    pub recomputed: usize,
    /// Of what other passes read of a prefix row.
    pub prefix_state: usize,
}

/// Memory that tuning needs, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TuningMemory {
    /// Of the frozen weights; a tied head counts once.
    pub weights: usize,
    /// Of the transposes of the layers' weights, a second copy that the backward pass reads if there is memory for it; 0 if
    /// products gain nothing by one, as anywhere but on a CPU with AMX.
    pub transposes: usize,
    /// Whether those are in memory already.
    pub has_transposes: bool,
    /// Of the layers but the last, in order.
    pub inner_layers: Vec<LayerMemory>,
    /// Of the residual stream, per row.
    pub input_per_row: usize,
    /// Of the tape of the last layer, per row.
    pub last_per_row: usize,
    /// Of the tape, per target row, beside what every row needs.
    pub tape_per_target: usize,
    /// Of the gradient of what all layers hand on of a prefix, per prefix row of a split batch.
    pub split_per_row: usize,
    /// Of what Mamba2 layers hand on of a prefix, per prefix of a split batch.
    pub states_per_prefix: usize,
    /// Of its gradient.
    pub split_per_prefix: usize,
    /// Of the logits that exist at a time.
    pub head: usize,
    /// Of the backward pass of a layer but the last, per row.
    pub workspace_per_row: usize,
    /// Of the backward pass of the last layer, per row.
    pub last_workspace_per_row: usize,
    /// Of a prompt of embeddings and AdamW's two moments, per virtual token.
    pub prompt_per_token: usize,
    /// Of a prompt of keys and values and AdamW's two moments, per virtual token.
    pub keys_values_per_token: usize,
    /// Of what all attention layers read of a prompt of keys and values, per virtual token, or of a teacher's prefix, per row.
    pub given_per_token: usize,
    /// Kept free, whatever the pass.
    pub reserve_at_least: usize,
    /// Kept free besides, in per cent of tape and workspace.
    pub slack: usize,
    /// Whether it is a GPU's, whose matrices' rows are rounded up, and whose prefix passes may hold sequences.
    pub on_gpu: bool,
}

impl TuningMemory {
    /// For a model of this shape in these dtypes, on a device of this kind.
    pub fn new(config: &ModelConfig, dtypes: Dtypes, device: DeviceLocation) -> Self {
        let isa = dtypes.packed_for(device);
        let (on_cpu, packed) = (device == DeviceLocation::Cpu, isa.is_some());
        let activation = dtypes.activations.size_in_bytes();
        let sizes = ValueSizes {
            activation,
            operand: if packed { BF16 } else { activation },
            operand_copy: if packed { BF16 } else { 0 },
            row_sum: activation.max(F32),
            keeps_attention_output: !on_cpu,
        };
        let c = config.hidden_size;
        let mixer = |layer| match config.mixer(layer) {
            MixerKind::Attention => Attention::memory(config, sizes),
            MixerKind::Mamba2 => Mamba2::memory(config, sizes),
        };
        let mixers: Vec<MixerMemory> = (0..config.num_hidden_layers).map(mixer).collect();
        let feed_forward = feed_forward(config, sizes);
        let norm = c * activation + sizes.row_sum;
        let inner = |mixer: &MixerMemory| LayerMemory {
            tape: 2 * norm + mixer.saved + mixer.saved_per_output + feed_forward.saved,
            recomputed: c * activation + feed_forward.saved_if_recomputed,
            prefix_state: mixer.prefix_state,
        };
        let last = mixers.last().copied().unwrap_or_default();
        let inner_mixers = &mixers[..mixers.len().saturating_sub(1)];
        let vocab = padded_vocab(config.vocab_size, device);
        let transposes =
            isa.filter(|isa| isa.reads_packed_transposes()).map_or(0, |_| transposed_bytes(config));
        Self {
            weights: weight_bytes(config, dtypes, packed)
                + (vocab - config.vocab_size) * c * dtypes.weights.size_in_bytes(),
            transposes,
            has_transposes: false,
            inner_layers: inner_mixers.iter().map(inner).collect(),
            input_per_row: c * activation,
            last_per_row: norm + last.saved,
            // The feed-forward network's norm, and the last norm with its output.
            tape_per_target: 2 * norm + c * activation + last.saved_per_output + feed_forward.saved,
            // What was summed so far, and what the next pass adds.
            split_per_row: 2 * mixers.iter().map(|mixer| mixer.prefix_gradient).sum::<usize>(),
            states_per_prefix: mixers.iter().map(|mixer| mixer.state_per_prefix).sum(),
            split_per_prefix: mixers.iter().map(|mixer| mixer.state_gradient_per_prefix).sum(),
            head: head_rows(device) * vocab * activation,
            workspace_per_row: inner_mixers
                .iter()
                .map(|mixer| feed_forward.workspace.max(mixer.workspace))
                .max()
                .unwrap_or(0),
            last_workspace_per_row: last.last_workspace,
            prompt_per_token: 3 * c * F32,
            keys_values_per_token: 3 * keys_values_width(config) * F32,
            given_per_token: keys_values_width(config) * sizes.operand,
            reserve_at_least: if on_cpu { CPU_RESERVE } else { GPU_RESERVE },
            slack: if on_cpu { 0 } else { GPU_SLACK },
            on_gpu: !on_cpu,
        }
    }

    /// Layers of the model.
    pub fn layers(&self) -> usize {
        self.inner_layers.len() + 1
    }

    /// Layers that can be recomputed: all but the last.
    pub fn most_recomputed(&self) -> usize {
        self.inner_layers.len()
    }

    /// Bytes of the tape a row that is no target row, if `recompute` layers are recomputed.
    pub fn tape_per_row(&self, recompute: usize) -> usize {
        let (again, whole) = self.inner_layers.split_at(recompute.min(self.most_recomputed()));
        let again: usize = again.iter().map(|layer| layer.recomputed).sum();
        again + whole.iter().map(|layer| layer.tape).sum::<usize>() + self.last_per_row
    }

    /// Rows that the matrices of a pass of so many rows have memory for.
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

    /// Bytes of the keys and values of `rows` rows of prefixes that other passes read, in the recomputed layers: in the others
    /// the tape holds them.
    pub fn prefix_keys_values(&self, rows: usize, recompute: usize) -> usize {
        let again = &self.inner_layers[..recompute.min(self.most_recomputed())];
        rows * again.iter().map(|layer| layer.prefix_state).sum::<usize>()
    }

    /// Rows that a prefix pass should have at least, in passes of at most `max_rows` ([`crate::batch::Packing`]).
    pub fn prefix_pass_rows(&self, max_rows: usize) -> usize {
        prefix_pass_rows(!self.on_gpu, max_rows)
    }

    /// Bytes at the peak of a pass beyond weights, tape and prompt. The head has freed its logits when the layers'
    /// backward pass begins, which frees the tape from the last layer on.
    pub fn workspace(&self, rows: usize, targets: usize, recompute: usize) -> usize {
        let recompute = recompute.min(self.most_recomputed());
        let tape = self.tape(rows, targets, recompute);
        let (rows, targets) = (self.allocated(rows), self.allocated(targets));
        let backward = rows * self.workspace_per_row + targets * self.input_per_row;
        let last = rows * self.last_per_row + targets * self.tape_per_target;
        let inner = if self.inner_layers.is_empty() { 0 } else { backward.saturating_sub(last) };
        // When layer i is run again, the inputs of the layers before it are in memory.
        let mut inputs = 0;
        let again = self.inner_layers[..recompute].iter().map(|layer| {
            let now = rows * (inputs + layer.tape) + backward;
            inputs += layer.recomputed;
            now.saturating_sub(tape)
        });
        let again = again.max().unwrap_or(0);
        self.head.max(rows * self.last_workspace_per_row).max(inner).max(again)
    }

    /// Bytes to keep free beside what is counted, for a pass of so much tape and workspace.
    pub fn reserve(&self, pass: usize) -> usize {
        self.reserve_at_least + pass / 100 * self.slack
    }
}

/// What a layer's feed-forward network needs: a dense one, experts, or both, whose backward passes follow one another.
fn feed_forward(config: &ModelConfig, sizes: ValueSizes) -> FeedForwardMemory {
    let dense = match config.intermediate_size {
        0 => FeedForwardMemory::default(),
        _ => Dense::memory(config, sizes),
    };
    let experts = Experts::memory(config, sizes);
    FeedForwardMemory {
        saved: dense.saved + experts.saved,
        saved_if_recomputed: dense.saved_if_recomputed + experts.saved_if_recomputed,
        // While the experts' runs, the gradient that the dense network gave is in memory.
        workspace: dense.workspace.max(match experts.workspace {
            0 => 0,
            workspace if dense.workspace > 0 => workspace + config.hidden_size * sizes.activation,
            workspace => workspace,
        }),
    }
}

/// Bytes of the transposes of the layers' projections as the CPU's bf16 products read them.
fn transposed_bytes(config: &ModelConfig) -> usize {
    let bytes = |stack: &Stack| PackedWeight::transpose_bytes_of(stack.rows(), stack.inputs);
    all_layers(config).iter().flat_map(LayerTensors::stacks).map(bytes).sum()
}

/// Bytes of all weights, the head not padded; `packed` as the CPU's bf16 products read them.
fn weight_bytes(config: &ModelConfig, dtypes: Dtypes, packed: bool) -> usize {
    let Parameters { matrices, vectors } = Parameters::new(config);
    let vectors = vectors * dtypes.activations.size_in_bytes();
    if !packed {
        return matrices * dtypes.weights.size_in_bytes() + vectors;
    }
    let (c, v) = (config.hidden_size, config.vocab_size);
    let bytes = |stack: &Stack| PackedWeight::bytes_of(stack.rows(), stack.inputs);
    let layers: usize = all_layers(config).iter().flat_map(LayerTensors::stacks).map(bytes).sum();
    let head = if config.tie_word_embeddings { 0 } else { PackedWeight::bytes_of(v, c) };
    v * c * BF16 + head + layers + vectors
}

/// The tensors of each layer.
fn all_layers(config: &ModelConfig) -> Vec<LayerTensors> {
    (0..config.num_hidden_layers).map(|layer| LayerTensors::new(config, layer, false)).collect()
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
    pub fn new(config: &ModelConfig) -> Self {
        let c = config.hidden_size;
        let layers = all_layers(config);
        let weights: usize = layers.iter().flat_map(LayerTensors::stacks).map(Stack::weights).sum();
        let biases: usize = layers.iter().flat_map(LayerTensors::stacks).map(Stack::biases).sum();
        let vectors: usize = layers.iter().flat_map(LayerTensors::vectors).map(LayerVector::values).sum();
        let norms = LayerTensors::NORMS.len() * c;
        let embeddings = if config.tie_word_embeddings { 1 } else { 2 };
        Self {
            matrices: embeddings * config.vocab_size * c + weights,
            vectors: layers.len() * norms + biases + vectors + c,
        }
    }

    /// Those that a row's way through the model multiplies: of the experts, the ones that it goes to.
    pub fn active(config: &ModelConfig) -> usize {
        let all = Self::new(config).total();
        let idle = |stack: &Stack| {
            stack
                .experts
                .map_or(0, |experts| stack.weights() / experts.count * (experts.count - experts.per_token))
        };
        all - all_layers(config).iter().flat_map(LayerTensors::stacks).map(idle).sum::<usize>()
    }

    /// All of them.
    pub fn total(&self) -> usize {
        self.matrices + self.vectors
    }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) use tests::granite_8b;
