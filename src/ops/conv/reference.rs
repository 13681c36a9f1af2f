//! The convolution in candle's ops.

use super::source::RowSource;
use super::{ConvInputs, ConvWeights};
use crate::Result;
use candle_core::Tensor;

/// [`super::forward`] and [`super::ends`] in candle's ops, tap by tap, in the dtype of the weights; for tests and `gneiss check`.
///
/// # Errors
/// Returns an error if shapes do not match or a device operation fails.
pub fn reference(inputs: ConvInputs, conv: &ConvWeights) -> Result<(Tensor, Option<Tensor>)> {
    let taps = inputs.check("conv", conv)?;
    let (rows, channels) = inputs.x.dims2()?;
    let (dtype, device) = (conv.weight.dtype(), inputs.x.device());
    // All rows that can be read: a row of zeros, those of the batch, and the tails.
    let mut sources = vec![Tensor::zeros((1, channels), dtype, device)?, inputs.x.to_dtype(dtype)?];
    if let Some(tails) = inputs.tails {
        sources.push(tails.to_dtype(dtype)?.flatten_to(1)?);
    }
    let sources = Tensor::cat(&sources, 0)?;
    let taken = |wanted: Vec<RowSource>| -> Result<Tensor> {
        let places = wanted.into_iter().map(|source| match source {
            RowSource::Zero => 0,
            RowSource::Row(row) => 1 + row as u32,
            RowSource::Tail(state, row) => (1 + rows + state * (taps - 1) + row) as u32,
        });
        let places: Vec<u32> = places.collect();
        Ok(sources.index_select(&Tensor::new(places, device)?, 0)?)
    };
    let segments = || inputs.plan.iter().enumerate();
    let mut v = conv.bias.broadcast_as((rows, channels))?;
    for d in 0..taps {
        let before = segments().flat_map(|(s, segment)| {
            let positions = 0..segment.rows.len() as isize;
            positions.map(move |i| RowSource::new(inputs.plan, s, i - d as isize, taps))
        });
        let weight = conv.weight.narrow(1, taps - 1 - d, 1)?.t()?;
        v = (v + taken(before.collect())?.broadcast_mul(&weight)?)?;
    }
    if inputs.plan.ends() == 0 {
        return Ok((v.silu()?, None));
    }
    let mut ended: Vec<_> = segments().filter_map(|(s, segment)| Some((segment.end?, s))).collect();
    ended.sort_unstable();
    let tails = ended.iter().flat_map(|(_, s)| RowSource::tail(inputs.plan, *s, taps));
    let ends = match taps {
        1 => Tensor::zeros((ended.len(), 0, channels), dtype, device)?,
        _ => taken(tails.collect())?.reshape((ended.len(), taps - 1, channels))?,
    };
    Ok((v.silu()?, Some(ends)))
}
