//! The decays `L_ij` between the rows of a chunk, in blocks of 16 columns that compile to full vectors.

use super::super::plan::CHUNK;
use super::pass::Pass;
use crate::ops::cpu::{Fma, Real};
use std::ops::Range;

/// Columns of a block.
pub(super) const LANES: usize = 16;

/// The steps of a chunk and head, and the sums of their decays, with full blocks: steps beyond the chunk are zero.
pub(super) struct HeadSteps<T> {
    pub(super) dt: [T; CHUNK],
    l: [f64; CHUNK],
}

impl<T: Real> HeadSteps<T> {
    pub(super) fn new(pass: &Pass<T>, rows: &Range<usize>, head: usize) -> Self {
        let (dt, l) = pass.steps(rows, head);
        let mut padded = Self { dt: [T::zero(); CHUNK], l: [l[l.len() - 1]; CHUNK] };
        padded.dt[..dt.len()].copy_from_slice(dt);
        padded.l[..l.len()].copy_from_slice(l);
        padded
    }

    /// `exp(l_i - l_j)` for the columns of a block that are up to `i`, 0 for the others.
    #[inline(always)]
    pub(super) fn decays(&self, i: usize, block: usize, fma: Fma) -> [T; LANES] {
        let (blocks, _) = self.l.as_chunks::<LANES>();
        let mut decays = [T::zero(); LANES];
        for (t, (decay, &l)) in decays.iter_mut().zip(&blocks[block]).enumerate() {
            // The difference is never positive for j <= i; elsewhere it must not overflow.
            let exponential = T::nearest((self.l[i] - l).min(0.0)).fast_exp(fma);
            *decay = if block * LANES + t <= i { exponential } else { T::zero() };
        }
        decays
    }
}
