//! The norm of a Mamba2 layer: the gate first, then RMS norm over each group of columns (Dao and Gu, 2024, arXiv:2405.21060, section 7;
//! transformers `modeling_granitemoehybrid.py`, `GraniteMoeHybridRMSNormGated`).
//!
//! ```text
//! g    = y * silu(z)                          silu(z) = z * sigmoid(z)
//! rstd = 1 / sqrt(mean(g²) + eps)             over the I/G columns of a group
//! n    = w * g * rstd
//! dg   = rstd * (w * dn - g * rstd² * mean(w * dn * g))
//! dy   = dg * silu(z)      dz = dg * y * sigmoid(z) * (1 + z * (1 - sigmoid(z)))
//! ```

mod cpu;
mod gpu;
mod reference;
#[cfg(test)]
mod tests;

use super::backend::{Route, route};
use super::profile;
use crate::{Error, Result};
use candle_core::{DType, Tensor};

/// Gain, groups and epsilon of the norm.
#[derive(Debug, Clone)]
pub struct GatedNorm {
    /// Gain `[I]`, in f32, or f64 for activations in f64; on a GPU in the dtype of the activations.
    pub weight: Tensor,
    /// Groups of columns that are normed on their own, G.
    pub groups: usize,
    /// Added to the mean square.
    pub eps: f64,
}

/// Result of [`GatedNorm::forward`].
#[derive(Debug, Clone)]
pub struct GatedNormed {
    /// n [T, I].
    pub normed: Tensor,
    /// Reciprocal root mean square of each row and group, [T, G]; f32, or f64 of activations in f64.
    pub rstd: Tensor,
}

/// Result of [`GatedNorm::backward`].
#[derive(Debug, Clone)]
pub struct GatedNormGradients {
    /// Gradient of y, [T, I].
    pub y: Tensor,
    /// Gradient of the gate z, [T, I].
    pub z: Tensor,
}

impl GatedNorm {
    /// Norms `y` [T, I] after multiplying it with `silu(z)`, `z` [T, I]. [`GatedNormed::normed`] has dtype `out`: on the CPU that of the
    /// gain, or bf16 if that is f32; on a GPU that of `y`. On the CPU `y` and `z` may be bf16 as well.
    ///
    /// # Errors
    /// Returns an error if shapes or dtypes do not match, or a device operation fails.
    pub fn forward(&self, y: &Tensor, z: &Tensor, out: DType) -> Result<GatedNormed> {
        let _timed = profile::scope("gated norm", y.device());
        self.check("gated norm", &[y, z])?;
        match route(y) {
            Route::Cpu => cpu::forward(self, (y, z), out),
            Route::Kernel => gpu::forward(self, (y, z), out),
        }
    }

    /// Gradients from `dnormed` [T, I], in its dtype: on the CPU that of the gain.
    ///
    /// # Errors
    /// Returns an error if shapes or dtypes do not match, or a device operation fails.
    pub fn backward(
        &self,
        dnormed: &Tensor,
        y: &Tensor,
        z: &Tensor,
        rstd: &Tensor,
    ) -> Result<GatedNormGradients> {
        const OP: &str = "gated norm backward";
        let _timed = profile::scope(OP, y.device());
        let rows = self.check(OP, &[y, z, dnormed])?;
        if rstd.dims() != [rows, self.groups] {
            return Err(Error::Shape {
                op: OP,
                expected: format!("rstd of [{rows}, {}]", self.groups),
                found: format!("{:?}", rstd.dims()),
            });
        }
        match route(dnormed) {
            Route::Cpu => cpu::backward(self, dnormed, (y, z), rstd),
            Route::Kernel => gpu::backward(self, dnormed, (y, z), rstd),
        }
    }

    /// Returns the number of rows of the matrices.
    fn check(&self, op: &'static str, matrices: &[&Tensor]) -> Result<usize> {
        let (rows, width) = matrices[0].dims2()?;
        let fits = matrices.iter().all(|matrix| matrix.dims() == [rows, width]);
        if self.weight.dims() == [width] && self.groups > 0 && width.is_multiple_of(self.groups) && fits {
            return Ok(rows);
        }
        let found: Vec<_> = matrices.iter().map(|matrix| matrix.dims()).collect();
        Err(Error::Shape {
            op,
            expected: format!("a gain of [I] in {} groups and matrices of [T, I]", self.groups),
            found: format!("{:?} and {found:?}", self.weight.dims()),
        })
    }
}
