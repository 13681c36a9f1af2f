//! The number of requests that a server accepts, and the number of rows that it keeps for them.

use crate::checkpoint::MixerKind;
use crate::device::free_memory;
use crate::model::{Decoder, GPU_FULL_ROWS};
use crate::{Error, Result};

/// Limits of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServerLimits {
    /// Most requests that may wait for their first step. The next one is [`super::client::SubmitError::Busy`].
    pub queue: usize,
    /// Most tokens of a sequence: virtual tokens, text and answer together. Never more than the model has positions.
    pub sequence_tokens: usize,
    /// Rows of the key-value cache, including prefixes.
    pub cache_rows: usize,
    /// Most rows of a step.
    pub step_rows: usize,
}

/// Rows of a server's step on the CPU: 32 classification requests of 34 rows. On machine A of LOG.md 819 rows of
/// SmolLM2-135M went through a second in steps of up to 2,048, 709 in steps of up to 512.
const CPU_SERVING_ROWS: usize = 1024;

/// Most rows of keys and values on the CPU if the limit is not set: 128 requests of 128 tokens.
const CPU_CACHE_ROWS: usize = 16_384;

/// The same on a GPU.
const GPU_CACHE_ROWS: usize = 131_072;

/// Bytes of a GPU's memory that stay free for the activations of a step.
const GPU_STEP_RESERVE: usize = 2 << 30;

/// Replaces the limits that are 0 in `configured`. The cache has as many rows as fit into a quarter of the free memory
/// on the CPU, or into three quarters of the memory that a step leaves on a GPU. A step has as many rows as the device
/// needs to be fully used.
///
/// # Errors
/// Returns an error if the free memory cannot be determined or a single row does not fit.
pub fn serving_limits(model: &Decoder, configured: ServerLimits) -> Result<ServerLimits> {
    let (config, device) = (model.config(), model.device());
    let width = 2 * config.num_key_value_heads * config.head_dim;
    // Mamba2 layers keep a state per sequence instead, for which the cache takes memory of its own.
    let attention_layers = config.layers_with(MixerKind::Attention);
    let row_bytes = attention_layers * width * model.product_dtype().size_in_bytes();
    let (most, full) = match device.is_cpu() {
        true => (CPU_CACHE_ROWS, CPU_SERVING_ROWS),
        false => (GPU_CACHE_ROWS, GPU_FULL_ROWS),
    };
    let mut limits = configured;
    if limits.step_rows == 0 {
        limits.step_rows = full;
    }
    if limits.cache_rows == 0 {
        let free = free_memory(device)?;
        let share = |free: usize| match device.is_cpu() {
            true => free / 4,
            false => free.saturating_sub(GPU_STEP_RESERVE) / 4 * 3,
        };
        limits.cache_rows = free.map_or(most, |free| (share(free) / row_bytes.max(1)).min(most));
    }
    if limits.sequence_tokens == 0 {
        limits.sequence_tokens = config.max_position_embeddings;
    }
    if limits.cache_rows == 0 {
        return Err(Error::Invalid(format!(
            "cache: expected memory for keys and values, {row_bytes} bytes a row, found {free:?} bytes free; hint: \
             --cache-tokens",
            free = free_memory(device)?
        )));
    }
    Ok(limits)
}
