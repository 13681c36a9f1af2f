//! The operations of a tuning step. Each is a folder: `mod.rs` has the formula with its source, the shapes, and `forward` and
//! `backward`, which choose the code that runs; `cpu.rs` and `gpu.rs` have that code; `reference.rs` has the same formula in
//! candle's ops, for tests and `gneiss check`; `tests.rs` compares them.
//!
//! # Shape letters
//!
//! | letter | meaning |
//! |---|---|
//! | T | rows of a packed batch (no padding), all its prefixes first |
//! | P | prefix rows |
//! | C | hidden size, width of the residual stream |
//! | H | query heads |
//! | K | key and value heads |
//! | D | head size |
//! | F | feed-forward size |
//! | V | vocabulary size |
//! | E | experts |
//! | k | experts that a row goes to |
//! | S | pairs of a row and an expert that it goes to, T k |
//! | I | inner width of a Mamba2 layer, M R |
//! | M, R | heads of a Mamba2 layer and their size |
//! | N | state size of a Mamba2 layer |
//! | G | groups of heads that share B and C, and of columns of the gated norm |
//! | W, X | taps of the convolution, and its channels: I + 2 G N |
//!
//! A matrix that is multiplied is [m, k] or [k, n] where none of these letters applies.
//!
//! # Glossary
//!
//! | term | meaning |
//! |---|---|
//! | virtual tokens | the rows of a soft prompt, trained vectors in the place of token embeddings |
//! | prefix | the rows with which all sequences of a group begin: the virtual tokens, then the tokens that all examples share |
//! | segment | query rows that share their keys: a prefix, or one sequence that follows a prefix |
//! | packed batch | the rows of all prefixes, then of all sequences, as one matrix without padding |
//! | target row | a row that predicts a token of an example's target; only these have logits and a loss |
//! | residual stream | the matrix [T, C] to which attention and MLP of every layer add their outputs |
//! | rstd | reciprocal root mean square of a row, saved by the norm for its backward pass |
//! | lse | log-sum-exp of a row of scores or logits, saved for the backward pass |
//! | teacher, student | of a distillation: the base model after a text, whose distribution is the target, and the model after the prompt, which is trained towards it |
//! | saved | the values of a forward pass that its backward pass needs |
//! | chunk | up to 64 rows of one segment, which the scan computes as products |
//! | state | of a Mamba2 layer after a row: the scan's, [I, N], and the last W - 1 rows of the convolution's input, its tail |
//! | panel | 16 rows of a bf16 weight, packed for the CPU's products (`backend/bf16`) |
//! | epilogue | how the sums of a product become its output: their factor, and whether they are added to it |
//! | tile | rows and columns of a product that are computed together |
//! | block | the threads of a GPU that run together, or a part of a product's output |
//!
//! # Which code runs an op
//!
//! `backend::route` chooses by the device of the activations; tests on the emulator use the GPU's route. Every weight is
//! frozen, so a `backward` computes the gradient of its input and no other.
//!
//! | op | CPU, f32 and f64 | CPU, bf16 | CUDA, Metal and emulator, in f32, bf16 and f16 |
//! |---|---|---|---|
//! | [`linear`] | `gemm`; weights in f16 or bf16 are widened | packed panels: AMX, AVX512-BF16 or f32 FMA, the fastest of this CPU; without AVX-512 widened | cuBLASLt, or cuBLAS if it has no algorithm; candle on Metal |
//! | [`attention`] | own code with `gemm` | own code with packed panels | portable kernel of head size 64, 128 or 256; on tensor cores one of 64 or 128; candle's ops for larger heads |
//! | [`rms_norm`], [`rope`], [`swiglu`] | own code | own code: computed in f32, stored in bf16 | kernel |
//! | [`experts`] | own code; products as `linear` | as `linear`, expert by expert; the activation computed in f32, stored in bf16 | kernels, of up to 128 experts |
//! | [`conv`], [`gated_norm`] | own code | own code: computed in f32, stored in bf16 | kernel |
//! | [`ssd`] | own code with `gemm`, in chunks | the same in f32: xBC and y may be bf16 | kernel, row by row, of states up to 256 |
//! | [`embed`] | own code | embedding in bf16, output in f32 | kernel |
//! | [`cross_entropy`] | own code | (logits are f32) | kernel |
//! | [`distillation`] | own code | (logits are f32) | kernel |
//! | [`rows`] | candle | candle | kernel |
//! | [`adamw`] | own code | (parameters are f32) | kernel, f32 only |
//!
//! Sums are f32, or f64 for activations in f64, which tests use on the CPU. On a GPU activations in f64 are an error.

pub mod adamw;
pub mod attention;
pub(crate) mod backend;
pub mod conv;
pub mod cross_entropy;
pub mod distillation;
pub mod embed;
pub mod experts;
pub mod gated_norm;
pub mod indices;
pub mod linear;
pub mod profile;
pub mod rms_norm;
pub mod rope;
pub mod rows;
pub mod ssd;
pub mod swiglu;
#[cfg(test)]
pub(crate) mod testing;

pub(crate) use backend::{bf16, cpu, gpu};

pub use attention::{AttentionShape, Segment, Segments};
pub use experts::{ExpertLinear, Routing};
pub use indices::{IndexView, Indices};
pub use linear::Linear;
pub use rope::RopeTable;
pub use ssd::{ScanPlan, ScanSegment, ScanStart, ScanStates};

use crate::Result;
use candle_core::{DType, Device, Tensor, Var};

/// Gradients of `(f(inputs) * dy).sum()` with respect to each input, by candle's autograd; for tests and `gneiss check`.
///
/// # Errors
/// Returns an error if shapes do not match or a device operation fails.
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

/// A matrix of no rows. Drivers refuse allocations of no bytes, so it is a part of a matrix of one row.
///
/// # Errors
/// Returns an error if a device operation fails.
pub(crate) fn no_rows(width: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    Ok(Tensor::zeros((1, width), dtype, device)?.narrow(0, 0, 0)?)
}
