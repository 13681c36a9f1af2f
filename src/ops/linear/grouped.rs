//! Products of several layers, each with rows of its own of one matrix.

use super::{Linear, Weight, cpu};
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use rayon::prelude::*;
use std::mem::MaybeUninit;

/// Layers of one shape over one matrix on the CPU: layer i multiplies rows `offsets[i]..offsets[i + 1]` (a grouped GEMM). One
/// layer over all rows is the simplest case.
#[derive(Clone, Copy)]
pub(crate) struct GroupedLinear<'a> {
    layers: &'a [Linear],
    offsets: &'a [usize],
}

impl<'a> GroupedLinear<'a> {
    /// # Errors
    /// Returns an error if there is no layer, or not one more offset than layers.
    pub(crate) fn new(layers: &'a [Linear], offsets: &'a [usize]) -> Result<Self> {
        if layers.is_empty() || offsets.len() != layers.len() + 1 {
            return Err(Error::Shape {
                op: "linear",
                expected: format!("{} offsets of the rows of at least one layer", layers.len() + 1),
                found: offsets.len().to_string(),
            });
        }
        Ok(Self { layers, offsets })
    }

    /// As [`Linear::forward_to`], by each layer for its rows of `x` [T, in]: [T, out].
    ///
    /// # Errors
    /// As [`Linear::forward_to`]; also if the offsets do not ascend from 0 to T.
    pub(crate) fn forward_to(self, x: &Tensor, out: DType) -> Result<Tensor> {
        cpu::forward(self, x, out)
    }

    /// As [`Linear::backward`], by each layer for its rows of `dy` [T, out]: [T, in].
    ///
    /// # Errors
    /// As [`Linear::backward`]; also if the offsets do not ascend from 0 to T.
    pub(crate) fn backward(self, dy: &Tensor, scale: f64) -> Result<Tensor> {
        cpu::backward(self, dy, scale)
    }

    /// The first layer: all have its shape and dtype.
    pub(super) fn first(self) -> &'a Linear {
        &self.layers[0]
    }

    /// Calls `f` with each layer that has rows, its rows of `x`, rows of `k` elements, and those of `out`, rows of `n` elements.
    /// Layers run in parallel.
    pub(super) fn for_each_layer<X: Sync, O: Send>(
        self,
        (x, k): (&[X], usize),
        (out, n): (&mut [MaybeUninit<O>], usize),
        f: impl Fn(&Linear, &[X], &mut [MaybeUninit<O>]) -> Result<()> + Sync,
    ) -> Result<()> {
        let mut parts = Vec::with_capacity(self.layers.len());
        let (mut next, mut x, mut out) = (0, x, out);
        for (layer, &end) in self.layers.iter().zip(&self.offsets[1..]) {
            let rows = end.saturating_sub(next);
            let (Some((x_part, x_after)), Some((out_part, out_after))) =
                (x.split_at_checked(rows * k), std::mem::take(&mut out).split_at_mut_checked(rows * n))
            else {
                return Err(self.offsets_error());
            };
            if rows > 0 {
                parts.push((layer, x_part, out_part));
            }
            (next, x, out) = (end, x_after, out_after);
        }
        if !self.offsets.is_sorted() || self.offsets[0] != 0 || !x.is_empty() || !out.is_empty() {
            return Err(self.offsets_error());
        }
        parts.into_par_iter().with_max_len(1).try_for_each(|(layer, x, out)| f(layer, x, out))
    }

    fn offsets_error(self) -> Error {
        Error::Shape {
            op: "linear",
            expected: "offsets that ascend from 0 to the number of rows".into(),
            found: format!("{:?}", self.offsets),
        }
    }
}

impl Linear {
    /// The layer alone; `offsets` are 0 and the number of rows.
    pub(super) fn grouped<'a>(&'a self, offsets: &'a [usize; 2]) -> GroupedLinear<'a> {
        GroupedLinear { layers: std::slice::from_ref(self), offsets }
    }

    /// The layer, and its output features in `parts` layers of one size, which share its memory. A packed weight is unpacked if
    /// its parts would not begin with a panel; its products are then slower.
    ///
    /// # Errors
    /// Returns an error if the number of output features is not a multiple of `parts`, or the layer has a bias.
    pub(crate) fn split_outputs(self, parts: usize) -> Result<(Self, Vec<Self>)> {
        let (n, _) = self.dims()?;
        if parts == 0 || !n.is_multiple_of(parts) || self.bias.is_some() {
            return Err(Error::Shape {
                op: "linear",
                expected: format!("a layer without a bias whose outputs are {parts} equal parts"),
                found: format!("{n} outputs{}", if self.bias.is_some() { " and a bias" } else { "" }),
            });
        }
        let size = n / parts;
        let all = match &self.weight {
            Weight::Packed(packed) if packed.rows(size..size).is_none() => Self::new(self.weight()?, None)?,
            _ => self,
        };
        let layers = (0..parts).map(|i| all.rows(i * size..(i + 1) * size)).collect::<Result<_>>()?;
        Ok((all, layers))
    }
}
