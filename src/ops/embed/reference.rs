//! The lookup in plain candle ops.

use super::{EmbedLookup, virtual_row};
use crate::Result;
use candle_core::Tensor;

/// [`super::forward`] in plain candle ops, in the dtype of `prompts`; for tests and `gneiss check`.
///
/// # Errors
/// Returns an error if shapes do not match or a device operation fails.
pub fn reference(embedding: &Tensor, prompts: &Tensor, lookup: &EmbedLookup) -> Result<Tensor> {
    let table = Tensor::cat(&[&embedding.to_dtype(prompts.dtype())?, prompts], 0)?;
    let vocab = embedding.dims2()?.0;
    let row = |id: &u32| virtual_row(*id).map_or(*id, |row| (vocab + row) as u32);
    let ids: Vec<u32> = lookup.ids.host().iter().map(row).collect();
    let n = ids.len();
    let ids = Tensor::from_vec(ids, n, embedding.device())?;
    Ok((table.index_select(&ids, 0)? * lookup.multiplier)?)
}
