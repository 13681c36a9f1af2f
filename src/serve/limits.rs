//! How many requests a server holds, and how many rows it keeps for them.

use crate::device::free_memory;
use crate::model::Decoder;
use crate::model::GPU_FULL_ROWS;
use crate::{Error, Result};

/// What a server keeps for requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServerLimits {
    /// Requests that may wait for their first step; one more is [`super::client::SubmitError::Busy`].
    pub queue: usize,
    /// Most tokens of a sequence: virtual tokens, text and answer together. No more than the model has positions.
    pub sequence_tokens: usize,
    /// Rows of the key and value cache, prefixes included.
    pub cache_rows: usize,
    /// Rows that go through the model at a time.
    pub step_rows: usize,
}

/// Rows of a server's step on the CPU: 32 classification requests of 34 rows. On machine A of LOG.md 819 rows of
/// SmolLM2-135M went through a second in steps of up to 2,048, 709 in steps of up to 512.
const CPU_SERVING_ROWS: usize = 1024;

/// Rows of keys and values that a server keeps at most where nobody says how many: 128 requests of 128 tokens on the
/// CPU.
const CPU_CACHE_ROWS: usize = 16_384;

/// The same on a GPU.
const GPU_CACHE_ROWS: usize = 131_072;

/// Memory of a GPU that a server leaves to the activations of a step, bytes.
const GPU_STEP_RESERVE: usize = 2 << 30;

/// What a server keeps for requests, where `configured` names none (0): rows of the cache by the memory that is free, a
/// quarter of it on the CPU, three quarters of what a step leaves on a GPU; rows of a step that fill the device.
///
/// # Errors
/// The device's; too little memory for a single row.
pub fn serving_limits(model: &Decoder, configured: ServerLimits) -> Result<ServerLimits> {
    let (config, device) = (model.config(), model.device());
    let width = 2 * config.num_key_value_heads * config.head_dim;
    let row_bytes = config.num_hidden_layers * width * model.product_dtype().size_in_bytes();
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
        limits.cache_rows = free.map_or(most, |free| (share(free) / row_bytes).min(most));
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
