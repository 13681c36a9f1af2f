//! What all tasks of a pass read: its inputs as slices, and for every chunk the steps, the sums of decays and the products of C and B.

use super::super::plan::{CHUNK, Chunk, ChunkPlan};
use super::super::{SsdInputs, SsdShape, SsdWeights};
use super::operand::{Operand, ProductRows, multiply};
use crate::Result;
use crate::ops::cpu::{self, Fma, Real, StoredSlice, StoredView, View};
use rayon::prelude::*;
use std::ops::Range;

/// Columns of x for which one task computes at a time, about: several heads share the loads of B and C, and a block of them
/// stays in the second-level cache.
const SLICE: usize = 256;

/// Heads of one group.
pub(super) struct HeadSlice {
    pub(super) index: usize,
    pub(super) group: usize,
    pub(super) heads: Range<usize>,
    /// Columns of x, or rows of a state.
    pub(super) columns: Range<usize>,
}

fn slices(shape: &SsdShape) -> Vec<HeadSlice> {
    let (in_group, at_most) = (shape.heads / shape.groups, (SLICE / shape.head_dim.max(1)).max(1));
    let mut slices = Vec::new();
    for group in 0..shape.groups {
        let end = (group + 1) * in_group;
        for first in (group * in_group..end).step_by(at_most) {
            let heads = first..(first + at_most).min(end);
            let columns = heads.start * shape.head_dim..heads.end * shape.head_dim;
            slices.push(HeadSlice { index: slices.len(), group, heads, columns });
        }
    }
    slices
}

/// Inputs of a pass, and what is computed from them first.
pub(super) struct Pass<'a, T> {
    pub(super) shape: &'a SsdShape,
    pub(super) plan: &'a ChunkPlan,
    pub(super) slices: Vec<HeadSlice>,
    pub(super) xbc: StoredSlice<'a, T>,
    /// r [T, M].
    pub(super) r: &'a [T],
    pub(super) a: &'a [T],
    pub(super) d: &'a [T],
    pub(super) dt_bias: &'a [T],
    dt_limit: (f64, f64),
    /// The steps before the softplus that are not clamped after it.
    unclamped: (T, T),
    /// The given states, [n, I, N].
    pub(super) given: &'a [T],
    /// Steps: those of a chunk with q rows from row s are [M, q], from element s M.
    dt: Vec<T>,
    /// Sums of `A dt` from a chunk's first row, as `dt`.
    l: Vec<f64>,
    /// B and C of all rows, [T, 2 G N], if those of `xbc` are bf16.
    bc: Vec<T>,
    /// `C_i · B_j` of the rows of a chunk: [G, q, CHUNK], from element s G CHUNK.
    cb: Vec<T>,
}

/// The elements of each chunk of a buffer that has `per_row` for every row.
pub(super) fn split<'a, U>(mut buffer: &'a mut [U], chunks: &[Chunk], per_row: usize) -> Vec<&'a mut [U]> {
    let part = |chunk: &Chunk| {
        let (part, rest) = std::mem::take(&mut buffer).split_at_mut(chunk.rows.len() * per_row);
        buffer = rest;
        part
    };
    chunks.iter().map(part).collect()
}

impl<'a, T: Real> Pass<'a, T> {
    /// Calls `f` with the inputs, which were checked.
    pub(super) fn with<R>(
        op: &'static str,
        inputs: SsdInputs,
        (shape, weights): (&SsdShape, &SsdWeights),
        f: impl FnOnce(&Pass<T>) -> Result<R>,
    ) -> Result<R> {
        let xbc = StoredView::<T>::new(op, inputs.xbc)?;
        let views = [inputs.dt, &weights.a, &weights.d, &weights.dt_bias].map(|t| View::<T>::new(op, t));
        let [r, a, d, dt_bias] = views;
        let (r, a, d, dt_bias) = (r?, a?, d?, dt_bias?);
        let given = inputs.states.map(|states| View::<T>::new(op, states)).transpose()?;
        let mut pass = Pass {
            shape,
            plan: inputs.plan.chunks(),
            slices: slices(shape),
            xbc: xbc.as_slice(),
            r: &r,
            a: &a,
            d: &d,
            dt_bias: &dt_bias,
            dt_limit: weights.dt_limit,
            unclamped: (softplus_inverse(weights.dt_limit.0), softplus_inverse(weights.dt_limit.1)),
            given: given.as_deref().unwrap_or_default(),
            dt: Vec::new(),
            l: Vec::new(),
            bc: Vec::new(),
            cb: Vec::new(),
        };
        pass.prepare();
        f(&pass)
    }

    /// Computes the steps and products of every chunk.
    fn prepare(&mut self) {
        let SsdShape { heads, state, groups, .. } = *self.shape;
        let (rows, chunks) = (self.rows(), &self.plan.chunks);
        let bc_width = if matches!(self.xbc, StoredSlice::Bf16(_)) { 2 * groups * state } else { 0 };
        let (mut dt, mut l) = (vec![T::zero(); rows * heads], vec![0.0; rows * heads]);
        let (mut bc, mut cb) = (vec![T::zero(); rows * bc_width], vec![T::zero(); rows * groups * CHUNK]);
        let steps = split(&mut dt, chunks, heads).into_par_iter().zip(split(&mut l, chunks, heads));
        let sides =
            split(&mut bc, chunks, bc_width).into_par_iter().zip(split(&mut cb, chunks, groups * CHUNK));
        chunks.par_iter().zip(steps).zip(sides).for_each(|((chunk, (dt, l)), (bc, cb))| {
            self.write_steps(&chunk.rows, dt, l);
            for (row, bc) in chunk.rows.clone().zip(bc.chunks_exact_mut(bc_width.max(1))) {
                let first = row * self.shape.width() + self.shape.inner();
                self.xbc.range(first..first + bc_width).load(bc);
            }
            self.multiply_sides(&chunk.rows, bc, cb);
        });
        (self.dt, self.l, self.bc, self.cb) = (dt, l, bc, cb);
    }

    /// Writes the steps of a chunk and the sums of its decays.
    fn write_steps(&self, rows: &Range<usize>, dt: &mut [T], l: &mut [f64]) {
        let (heads, q) = (self.shape.heads, rows.len());
        let limits = (T::nearest(self.dt_limit.0), T::nearest(self.dt_limit.1));
        let mut steps = vec![T::zero(); heads];
        cpu::simd(
            #[inline(always)]
            |fma| {
                for (i, row) in rows.clone().enumerate() {
                    let r = &self.r[row * heads..][..heads];
                    for ((step, &r), &bias) in steps.iter_mut().zip(r).zip(self.dt_bias) {
                        let x = (r + bias).softplus(fma);
                        // NaN stays NaN.
                        let x = if x < limits.0 { limits.0 } else { x };
                        *step = if x > limits.1 { limits.1 } else { x };
                    }
                    steps.iter().enumerate().for_each(|(head, &step)| dt[head * q + i] = step);
                }
            },
        );
        for ((dt, l), a) in dt.chunks_exact(q).zip(l.chunks_exact_mut(q)).zip(self.a) {
            let mut sum = 0.0;
            for (dt, l) in dt.iter().zip(l) {
                sum += a.as_f64() * dt.as_f64();
                *l = sum;
            }
        }
    }

    /// The derivative of a step with respect to r.
    #[inline(always)]
    pub(super) fn step_derivative(&self, row: usize, head: usize, fma: Fma) -> T {
        let x = self.r[row * self.shape.heads + head] + self.dt_bias[head];
        let (low, high) = self.unclamped;
        if x > low && x < high { cpu::sigmoid(x, fma) } else { T::zero() }
    }

    fn multiply_sides(&self, rows: &Range<usize>, bc: &[T], cb: &mut [T]) {
        let SsdShape { state, groups, .. } = *self.shape;
        let q = rows.len();
        let sides = match self.xbc {
            StoredSlice::Computed(xbc) => {
                Operand::new(xbc, self.shape.width()).from(rows.start, self.shape.inner())
            }
            StoredSlice::Bf16(_) => Operand::new(bc, 2 * groups * state),
        };
        for (group, cb) in cb.chunks_exact_mut(q * CHUNK).enumerate() {
            let (b, c) = (sides.from(0, group * state), sides.from(0, (groups + group) * state));
            multiply(
                (q, q, state),
                c,
                b.transposed(),
                ProductRows { values: cb, stride: CHUNK, accumulate: false },
            );
        }
    }

    /// Rows of the batch, T.
    pub(super) fn rows(&self) -> usize {
        self.r.len() / self.shape.heads.max(1)
    }

    /// Elements of a state, I N.
    pub(super) fn state_len(&self) -> usize {
        self.shape.inner() * self.shape.state
    }

    /// Steps and sums of decays of the rows of a chunk.
    pub(super) fn steps(&self, rows: &Range<usize>, head: usize) -> (&[T], &[f64]) {
        let first = rows.start * self.shape.heads + head * rows.len();
        (&self.dt[first..][..rows.len()], &self.l[first..][..rows.len()])
    }

    /// B of a group, from a row on.
    pub(super) fn b(&self, row: usize, group: usize) -> Operand<'_, T> {
        self.side(row, group * self.shape.state)
    }

    /// C of a group, from a row on.
    pub(super) fn c(&self, row: usize, group: usize) -> Operand<'_, T> {
        self.side(row, (self.shape.groups + group) * self.shape.state)
    }

    fn side(&self, row: usize, column: usize) -> Operand<'_, T> {
        match self.xbc {
            StoredSlice::Computed(xbc) => {
                Operand::new(xbc, self.shape.width()).from(row, self.shape.inner() + column)
            }
            StoredSlice::Bf16(_) => {
                Operand::new(&self.bc, 2 * self.shape.groups * self.shape.state).from(row, column)
            }
        }
    }

    /// `C_i · B_j` of a chunk's rows, [q, CHUNK].
    pub(super) fn cb(&self, rows: &Range<usize>, group: usize) -> &[T] {
        &self.cb[(rows.start * self.shape.groups + group * rows.len()) * CHUNK..][..rows.len() * CHUNK]
    }

    /// x of some rows and the columns of a slice; in `scratch` if it has to be widened.
    pub(super) fn x<'s>(
        &'s self,
        rows: &Range<usize>,
        slice: &HeadSlice,
        scratch: &'s mut Vec<T>,
    ) -> Operand<'s, T> {
        let (width, columns) = (self.shape.width(), slice.columns.len());
        if let StoredSlice::Computed(xbc) = self.xbc {
            return Operand::new(xbc, width).from(rows.start, slice.columns.start);
        }
        scratch.resize(rows.len() * columns, T::zero());
        for (row, x) in rows.clone().zip(scratch.chunks_exact_mut(columns)) {
            let first = row * width + slice.columns.start;
            self.xbc.range(first..first + columns).load(x);
        }
        Operand::new(scratch, columns)
    }
}

/// The x with `softplus(x) = y`; negative infinity if y is not positive.
fn softplus_inverse<T: Real>(y: f64) -> T {
    T::nearest(match y {
        y if y > 20.0 => y,
        y if y > 0.0 => y.exp_m1().ln(),
        _ => f64::NEG_INFINITY,
    })
}
