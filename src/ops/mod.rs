//! The operations of a tuning step, one file each: formula with its source, `forward`, `backward`,
//! `reference` made of plain candle ops, tests.
//!
//! Shape letters, used everywhere:
//!
//! | letter | what |
//! |---|---|
//! | T | rows of a packed batch (no padding), all its prefixes first |
//! | P | prefix rows |
//! | C | hidden size, width of the residual stream |
//! | H | query heads |
//! | K | key and value heads |
//! | D | head size |
//! | F | feed-forward size |
//! | V | vocabulary size |
//!
//! Every weight is frozen, so a `backward` makes the gradient of its input and of nothing else.
//! On the CPU an op runs the code in its file, in f32 (or f64, which the tests use). On a GPU it runs the kernel
//! of its name in `kernels/`, in f32, bf16 or f16 with sums in f32; in other dtypes its `reference`, and
//! `backward` is candle's autograd of that.

pub mod adamw;
pub mod attention;
pub(crate) mod backend;
pub mod cross_entropy;
pub mod embed;
pub mod indices;
pub mod linear;
pub mod profile;
pub mod rms_norm;
pub mod rope;
pub mod rows;
pub mod swiglu;
#[cfg(test)]
pub(crate) mod testing;

pub(crate) use backend::{bf16, cpu, gpu};

pub use attention::{AttentionShape, Segment, Segments};
pub use indices::{IndexView, Indices};
pub use linear::Linear;
pub use rope::RopeTable;

use crate::Result;
use candle_core::{DType, Device, Tensor, Var};

/// Gradients of `(f(inputs) * dy).sum()` in each input, by candle's autograd of a reference.
pub(crate) fn autograd(
    inputs: &[&Tensor],
    dy: &Tensor,
    f: impl FnOnce(&[Var]) -> Result<Tensor>,
) -> Result<Vec<Tensor>> {
    let leaves = inputs.iter().map(|t| Var::from_tensor(t)).collect::<candle_core::Result<Vec<_>>>()?;
    let loss = (f(&leaves)? * dy)?.sum_all()?;
    let store = loss.backward()?;
    leaves
        .iter()
        .map(|leaf| match store.get(leaf) {
            Some(gradient) => Ok(gradient.clone()),
            None => Ok(leaf.zeros_like()?),
        })
        .collect()
}

/// A matrix of no rows. Drivers refuse allocations of no bytes: it is a part of one row.
pub(crate) fn no_rows(width: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    Ok(Tensor::zeros((1, width), dtype, device)?.narrow(0, 0, 0)?)
}
