//! The convolution in candle's ops.

use super::source::RowSource;
use super::{ConvInputs, ConvWeights};
use crate::Result;
use candle_core::Tensor;

/// [`super::forward`] and [`super::ends`] in candle's ops, row by row, in the dtype of the weights; for tests and `gneiss check`.
///
/// # Errors
/// Returns an error if shapes do not match or a device operation fails.
pub fn reference(inputs: ConvInputs, conv: &ConvWeights) -> Result<(Tensor, Option<Tensor>)> {
    let taps = inputs.check("conv", conv)?;
    let (rows, channels) = inputs.x.dims2()?;
    let dtype = conv.weight.dtype();
    let x = inputs.x.to_dtype(dtype)?;
    let tails = inputs.tails.map(|tails| tails.to_dtype(dtype)).transpose()?;
    let zero = Tensor::zeros(channels, dtype, x.device())?;
    let row = |source: RowSource| -> Result<Tensor> {
        Ok(match (source, &tails) {
            (RowSource::Row(row), _) => x.get(row)?,
            (RowSource::Tail(state, row), Some(tails)) => tails.get(state)?.get(row)?,
            _ => zero.clone(),
        })
    };
    let (mut outputs, mut ends) = (vec![zero.clone(); rows], vec![None; inputs.plan.ends()]);
    for (s, segment) in inputs.plan.iter().enumerate() {
        for (i, t) in segment.rows.clone().enumerate() {
            let mut v = conv.bias.clone();
            for d in 0..taps {
                let source = RowSource::new(inputs.plan, s, i as isize - d as isize, taps);
                v = (v + (conv.weight.narrow(1, taps - 1 - d, 1)?.squeeze(1)? * row(source)?)?)?;
            }
            outputs[t] = v.silu()?;
        }
        if let Some(end) = segment.end {
            let rows = RowSource::tail(inputs.plan, s, taps).map(row).collect::<Result<Vec<_>>>()?;
            let none = || Tensor::zeros((0, channels), dtype, x.device());
            ends[end] = Some(if rows.is_empty() { none()? } else { Tensor::stack(&rows, 0)? });
        }
    }
    let y = if rows == 0 { x.clone() } else { Tensor::stack(&outputs, 0)? };
    let ends: Vec<Tensor> = ends.into_iter().flatten().collect();
    Ok((y, if ends.is_empty() { None } else { Some(Tensor::stack(&ends, 0)?) }))
}
