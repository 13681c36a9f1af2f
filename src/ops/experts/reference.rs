//! The experts in candle's ops: every expert for every row, times a weight that is zero for experts that were not chosen.

use super::ExpertLinear;
use crate::Result;
use candle_core::{D, DType, Device, Tensor};

/// The experts' output [T, C] for rows `u` [T, C] with the router's `logits` [T, E]: by `gate_up`, matrices [2F, C], and `down`,
/// matrices [C, F]; for tests and `gneiss check`.
///
/// # Errors
/// Returns an error if shapes do not match or a device operation fails.
pub fn reference(
    u: &Tensor,
    logits: &Tensor,
    [gate_up, down]: [&ExpertLinear; 2],
    per_token: usize,
) -> Result<Tensor> {
    let weights = weights(logits, per_token)?;
    let mut out = u.zeros_like()?;
    for expert in 0..logits.dims()[1] {
        let weight = |layer: &ExpertLinear| -> Result<Tensor> {
            let (n, _) = layer.dims()?;
            let all = layer.projection().weight()?.to_dtype(u.dtype())?;
            Ok(all.narrow(0, expert * n, n)?.t()?)
        };
        let h = u.matmul(&weight(gate_up)?)?;
        let f = h.dims()[1] / 2;
        let a = (h.narrow(1, 0, f)?.contiguous()?.silu()? * h.narrow(1, f, f)?)?;
        let a = a.broadcast_mul(&weights.narrow(1, expert, 1)?)?;
        out = (out + a.matmul(&weight(down)?)?)?;
    }
    Ok(out)
}

/// Softmax over the `per_token` largest logits of each row, [T, E]: zero for the others.
fn weights(logits: &Tensor, per_token: usize) -> Result<Tensor> {
    let values = logits.to_dtype(DType::F64)?.to_device(&Device::Cpu)?.to_vec2::<f64>()?;
    let mask: Vec<f64> = values.iter().flat_map(|row| chosen(row, per_token)).collect();
    let mask = Tensor::from_vec(mask, logits.shape(), &Device::Cpu)?;
    let mask = mask.to_device(logits.device())?.to_dtype(logits.dtype())?;
    let exponentials = logits.broadcast_sub(&logits.detach().max_keepdim(D::Minus1)?)?.exp()?;
    let chosen = (exponentials * mask)?;
    Ok(chosen.broadcast_div(&chosen.sum_keepdim(D::Minus1)?)?)
}

/// 1 for the `per_token` largest, of equal ones the first; 0 for the others.
fn chosen(logits: &[f64], per_token: usize) -> Vec<f64> {
    let mut experts: Vec<usize> = (0..logits.len()).collect();
    experts.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    let mut mask = vec![0.0; logits.len()];
    experts[..per_token].iter().for_each(|&expert| mask[expert] = 1.0);
    mask
}
