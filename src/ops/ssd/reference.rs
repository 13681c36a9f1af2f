//! The scan row by row in candle's ops.

use super::{ScanStart, SsdInputs, SsdOutput, SsdShape, SsdWeights};
use crate::Result;
use candle_core::Tensor;

/// [`super::forward`] as the recurrence, row by row, in candle's ops, in the dtype of the weights; for tests and `gneiss check`.
///
/// # Errors
/// Returns an error if shapes do not match or a device operation fails.
pub fn reference(inputs: SsdInputs, shape: &SsdShape, weights: &SsdWeights) -> Result<SsdOutput> {
    let SsdInputs { xbc, dt, plan, states } = inputs;
    let SsdShape { heads, head_dim, state, groups } = *shape;
    let rows = inputs.check("scan", shape, weights)?;
    let xbc = xbc.to_dtype(dt.dtype())?;
    let inner = shape.inner();
    let x = xbc.narrow(1, 0, inner)?.reshape((rows, heads, head_dim, 1))?;
    let per_head = |first: usize| -> Result<Tensor> {
        let columns = xbc.narrow(1, first, groups * state)?.reshape((rows, groups, 1, state))?;
        let repeated = columns.broadcast_as((rows, groups, heads / groups, state))?.contiguous()?;
        Ok(repeated.reshape((rows, heads, 1, state))?)
    };
    let (b, c) = (per_head(inner)?, per_head(inner + groups * state)?);
    let dt = softplus(&dt.broadcast_add(&weights.dt_bias)?)?;
    let dt = dt.clamp(weights.dt_limit.0, weights.dt_limit.1)?;
    let decay = dt.broadcast_mul(&weights.a)?.exp()?.reshape((rows, heads, 1, 1))?;
    let scaled = x.broadcast_mul(&dt.reshape((rows, heads, 1, 1))?)?;
    let skip = x.broadcast_mul(&weights.d.reshape((1, heads, 1, 1))?)?;
    let zero = Tensor::zeros((heads, head_dim, state), dt.dtype(), dt.device())?;
    let (mut ys, mut segment_ends) = (Vec::new(), Vec::new());
    let mut ends = vec![None; plan.ends()];
    for segment in plan.iter() {
        let mut s = match (segment.start, states) {
            (ScanStart::State(i), Some(states)) => states.get(i)?.reshape((heads, head_dim, state))?,
            (ScanStart::Segment(i), _) => Tensor::clone(&segment_ends[i]),
            _ => zero.clone(),
        };
        for t in segment.rows.clone() {
            s = (s.broadcast_mul(&decay.get(t)?)? + scaled.get(t)?.broadcast_mul(&b.get(t)?)?)?;
            let y = s.broadcast_mul(&c.get(t)?)?.sum_keepdim(2)?;
            ys.push((y + skip.get(t)?)?.reshape((1, inner))?);
        }
        if let Some(end) = segment.end {
            ends[end] = Some(s.reshape((1, inner, state))?);
        }
        segment_ends.push(s);
    }
    let y = if ys.is_empty() {
        Tensor::zeros((0, inner), dt.dtype(), dt.device())?
    } else {
        Tensor::cat(&ys, 0)?
    };
    let ends: Vec<Tensor> = ends.into_iter().flatten().collect();
    Ok(SsdOutput { y, ends: if ends.is_empty() { None } else { Some(Tensor::cat(&ends, 0)?) } })
}

/// `ln(1 + e^x)` as `max(x, 0) + ln(1 + e^-|x|)`, which neither overflows nor loses its gradient; x itself above 20.
fn softplus(x: &Tensor) -> Result<Tensor> {
    let below = (x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?)?;
    Ok(x.gt(20.0)?.where_cond(x, &below)?)
}
