//! Rotary position embedding on the leading heads of each row (Su et al., 2021, arXiv:2104.09864), in the
//! half-split layout of transformers (`modeling_granite.py`, `apply_rotary_pos_emb`):
//!
//! ```text
//! y[i]       = x[i] cos - x[i + D/2] sin        i < D/2, angle = position * theta^(-2i/D)
//! y[i + D/2] = x[i + D/2] cos + x[i] sin
//! ```
//!
//! The backward pass is the same rotation by the negative angle. How a checkpoint scales the angles, and by what it
//! multiplies cos and sin, is part of the table ([`crate::ops::rope::scaling`]). A row's position is its row of the table:
//!
//! ```text
//! row     0 ........ n-1   n ...............
//!         ┌─────────────┐┌──────────────────    n = Rope::long_above: positions of sequences of at most n positions,
//! angles  0 ........ n-1   0 ...............    then those of longer sequences, which have other frequencies;
//!                                               other models have the first part only, without an end
//! ```

mod cpu;
mod gpu;
mod reference;
pub mod scaling;
#[cfg(test)]
mod tests;

pub(crate) use gpu::forward_to_cache;
pub use scaling::{Llama3Scaling, LongRopeScaling, Rope, RopeScaling, YarnScaling};

use super::backend::{Route, route};
use super::{IndexView, profile};
use crate::ops::gpu::to_device;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};

/// Rows of a cache of keys and values.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CacheRows<'a> {
    /// [capacity, 2K D].
    pub(crate) cache: &'a Tensor,
    /// One for each row of a batch, none twice.
    pub(crate) rows: IndexView<'a>,
}

/// Cosines and sines [rows, D/2] of every position of a pass; the module has a drawing.
#[derive(Debug, Clone)]
pub struct RopeTable {
    cos: Tensor,
    sin: Tensor,
    head_dim: usize,
}

impl RopeTable {
    /// The table of `positions` rows for heads of size `head_dim`; angles are computed in f64. Kernels read the table in f32,
    /// whatever the dtype of the activations is.
    pub fn new(
        rope: &Rope,
        head_dim: usize,
        positions: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let half = head_dim / 2;
        let end = rope.long_above().unwrap_or(positions).min(positions);
        let (short, long) = (rope.frequencies(head_dim, false), rope.frequencies(head_dim, true));
        let rows = (0..end).map(|p| (p, &short)).chain((0..positions - end).map(|p| (p, &long)));
        let angles: Vec<f64> = rows.flat_map(|(p, all)| all.iter().map(move |f| p as f64 * f)).collect();
        let factor = rope.attention_factor();
        let table = |f: fn(f64) -> f64| -> Result<Tensor> {
            let values: Vec<f64> = angles.iter().map(|angle| f(*angle) * factor).collect();
            to_device(&Tensor::from_vec(values, (positions, half), &Device::Cpu)?.to_dtype(dtype)?, device)
        };
        Ok(Self { cos: table(f64::cos)?, sin: table(f64::sin)?, head_dim })
    }

    /// Size of the heads.
    pub(crate) fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Cosines and sines.
    pub(crate) fn tables(&self) -> (&Tensor, &Tensor) {
        (&self.cos, &self.sin)
    }

    /// Rows of the table.
    pub fn positions(&self) -> usize {
        self.cos.dims()[0]
    }

    /// Rotates the first `heads` heads of each row of `x` [T, at least heads * D] by the row's position, in dtype `out`: that of
    /// `x`, or on the CPU bf16 if `x` is f32. The CPU computes in f32 if `x` is bf16; a GPU's kernel changes `x` in place.
    ///
    /// # Errors
    /// Returns an error if a position is beyond the table, there are fewer columns than heads, `out` is another dtype, or a
    /// device operation fails.
    pub fn forward(&self, x: Tensor, heads: usize, position_ids: IndexView, out: DType) -> Result<Tensor> {
        self.rotate(x, heads, position_ids, (1.0, out))
    }

    /// Gradient of [`RopeTable::forward`]'s input from that of its output; dtypes as there.
    ///
    /// # Errors
    /// As [`RopeTable::forward`].
    pub fn backward(&self, dy: Tensor, heads: usize, position_ids: IndexView, out: DType) -> Result<Tensor> {
        self.rotate(dy, heads, position_ids, (-1.0, out))
    }

    fn rotate(
        &self,
        x: Tensor,
        heads: usize,
        positions: IndexView,
        (sign, out): (f64, DType),
    ) -> Result<Tensor> {
        let _timed = profile::scope("rope", x.device());
        let (t, width) = x.dims2()?;
        let position_ids = positions.host();
        let last = position_ids.iter().max().map_or(0, |p| *p as usize + 1);
        if t != position_ids.len() || width < heads * self.head_dim || last > self.positions() {
            return Err(Error::shape(
                "rope",
                format!(
                    "{} rows of at least {} columns, positions under {}",
                    position_ids.len(),
                    heads * self.head_dim,
                    self.positions()
                ),
                format!("[{t}, {width}], positions under {last}"),
            ));
        }
        match route(&x) {
            Route::Cpu => cpu::rotate(self, &x, heads, position_ids, (sign, out)),
            Route::Kernel => gpu::rotate(self, x, heads, positions, (sign, out)),
        }
    }
}
