//! Embedding lookup over the vocabulary and the soft prompts.
//!
//! ```text
//! x[t] = embedding_multiplier * E[ids[t]]               ids[t] < V: a token
//! x[t] = embedding_multiplier * prompts[j]              ids[t] = VIRTUAL | j: a virtual token
//! ```
//!
//! The two kinds of ids never overlap, so an id for which the embedding has no row is an error and not a virtual token.
//!
//! Granite multiplies embeddings after the lookup (transformers `modeling_granite.py`, `GraniteModel.forward`), so a soft
//! prompt is stored before the multiplier.

mod cpu;
mod gpu;
mod reference;
#[cfg(test)]
mod tests;

pub use reference::reference;

use super::backend::{Route, route};
use super::{IndexView, profile};
use crate::{Error, Result};
use candle_core::Tensor;

/// The bit that the id of a virtual token has and no id of a token has: a vocabulary of 2^31 tokens does not exist.
/// `kernels/embed.cu` has the same constant.
pub const VIRTUAL: u32 = 1 << 31;

/// The id of the virtual token whose vector is row `row` of the matrix of prompts.
pub const fn virtual_id(row: u32) -> u32 {
    VIRTUAL | row
}

/// The row of the matrix of prompts that `id` names; `None` if `id` is a token of the vocabulary.
pub const fn virtual_row(id: u32) -> Option<usize> {
    if id & VIRTUAL == 0 { None } else { Some((id & !VIRTUAL) as usize) }
}

/// Which rows to look up, and their multiplier.
pub struct EmbedLookup<'a> {
    /// The id of each row of the batch; see the module.
    pub ids: IndexView<'a>,
    /// Granite's `embedding_multiplier`.
    pub multiplier: f64,
}

/// Looks up rows of `embedding` [V, C] (f32, f64, f16 or bf16) and `prompts` [n, C] (f32, or f64 on the CPU).
/// Returns [T, C]: on the CPU in the dtype of `prompts`, on a GPU in that of `embedding`.
///
/// # Errors
/// Returns an error if an id is beyond the matrix that it names, the two widths differ, or a device operation fails.
pub fn forward(embedding: &Tensor, prompts: &Tensor, lookup: &EmbedLookup) -> Result<Tensor> {
    let _timed = profile::scope("embed", embedding.device());
    let (vocab, width) = embedding.dims2()?;
    let (virtual_tokens, prompt_width) = prompts.dims2()?;
    if prompt_width != width {
        return Err(Error::shape("embed", format!("prompts of width {width}"), format!("{prompt_width}")));
    }
    check_ids(lookup.ids.host(), vocab, virtual_tokens)?;
    match route(embedding) {
        Route::Cpu => cpu::forward(embedding, prompts, lookup),
        Route::Kernel => gpu::forward(embedding, prompts, lookup),
    }
}

/// Gradient of `prompts` [n, C] from that of the rows, `dx` [T, C]: the rows of one virtual token are added up. Rows of
/// tokens of the vocabulary, which is frozen, are left out. On a GPU the gradient is f32.
///
/// # Errors
/// Returns an error if `dx` has another number of rows than there are ids, or a device operation fails.
pub fn backward(dx: &Tensor, virtual_tokens: usize, lookup: &EmbedLookup) -> Result<Tensor> {
    let _timed = profile::scope("embed backward", dx.device());
    let (rows, _) = dx.dims2()?;
    let ids = lookup.ids.host();
    if rows != ids.len() {
        return Err(Error::shape("embed backward", format!("{} rows", ids.len()), format!("{rows}")));
    }
    match route(dx) {
        Route::Cpu => cpu::backward(dx, virtual_tokens, lookup),
        Route::Kernel => gpu::backward(dx, virtual_tokens, lookup),
    }
}

/// Returns an error for an id beyond the embedding's `vocab` rows or the prompts' `virtual_tokens`.
fn check_ids(ids: &[u32], vocab: usize, virtual_tokens: usize) -> Result<()> {
    let is_beyond = |id: u32| virtual_row(id).map_or(id as usize >= vocab, |row| row >= virtual_tokens);
    let Some(id) = ids.iter().copied().find(|id| is_beyond(*id)) else { return Ok(()) };
    let (expected, found) = match virtual_row(id) {
        None => (format!("token ids under {vocab}"), id.to_string()),
        Some(row) => (format!("virtual tokens under {virtual_tokens}"), row.to_string()),
    };
    Err(Error::shape("embed", expected, found))
}
