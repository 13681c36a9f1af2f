//! The forward pass of a run of blocks and a slice of heads.

use super::super::plan::{Block, BlockRun, CHUNK};
use super::decay::{HeadSteps, LANES};
use super::operand::{Operand, ProductRows, multiply};
use super::pass::{HeadSlice, Pass};
use super::states::StateMemory;
use super::triangle::add_triangle;
use crate::ops::cpu::{self, Disjoint, Real, StorageFloat};
use std::ops::Range;

impl<T: Real> Pass<'_, T> {
    /// Writes y of the run's rows in the slice's columns, and the end states of its chunks.
    ///
    /// # Safety
    /// No other task uses those elements; the states of lower levels are complete.
    pub(super) unsafe fn forward_run<O: StorageFloat<T>>(
        &self,
        run: &BlockRun,
        slice: &HeadSlice,
        memory: &StateMemory<T>,
        out: Disjoint<O>,
    ) {
        let (mut x, mut y, mut u) = (Vec::new(), Vec::new(), Vec::new());
        let mut weights = vec![T::zero(); CHUNK * CHUNK];
        let (w, inner) = (slice.columns.len(), self.shape.inner());
        for block in &self.plan.blocks[run.blocks.clone()] {
            let x = self.x(&block.rows, slice, &mut x);
            y.resize(block.rows.len() * w, T::zero());
            // SAFETY: the caller's promise; the start state is that of a lower level, or of an earlier chunk of this task.
            let done = block.chunks.len() == 1
                && unsafe {
                    self.try_recurrence((block.start, block.chunks.start), slice, (x, &mut y), memory)
                };
            if !done {
                // SAFETY: as above.
                unsafe { self.start_term(block, slice, memory, &mut y) };
                for chunk in block.chunks.clone() {
                    let rows = &self.plan.chunks[chunk].rows;
                    let first = rows.start - block.rows.start;
                    let x = x.from(first, 0);
                    self.chunk_term(rows, slice, (x, &mut weights), &mut y[first * w..]);
                    // SAFETY: as above.
                    unsafe { self.write_end((block.start, chunk), slice, (x, &mut u), memory) };
                }
            }
            self.add_skip(slice, x, &mut y);
            for (row, y) in block.rows.clone().zip(y.chunks_exact(w)) {
                // SAFETY: a task writes the columns of its slice in the rows of its run, and no other task does.
                unsafe {
                    let out = out.element(row * inner + slice.columns.start).cast();
                    O::store_slice(y, std::slice::from_raw_parts_mut(out, w));
                }
            }
        }
    }

    /// `y_i = exp(l_i) S⁰ C_i` for all rows of a block.
    ///
    /// # Safety
    /// As for [`Pass::start_rows`].
    unsafe fn start_term(&self, block: &Block, slice: &HeadSlice, memory: &StateMemory<T>, y: &mut [T]) {
        // SAFETY: the caller's promise.
        let Some(start) = (unsafe { self.start_rows(block.start, slice, memory) }) else {
            y.fill(T::zero());
            return;
        };
        let (n, w) = (self.shape.state, slice.columns.len());
        let (c, start) = (self.c(block.rows.start, slice.group), Operand::new(start, n));
        let out = ProductRows { values: y, stride: w, accumulate: false };
        multiply((block.rows.len(), w, n), c, start.transposed(), out);
        for chunk in &self.plan.chunks[block.chunks.clone()] {
            let first = chunk.rows.start - block.rows.start;
            self.scale_rows(&chunk.rows, slice, &mut y[first * w..][..chunk.rows.len() * w]);
        }
    }

    /// Multiplies the rows of a chunk by `exp(l_i)`.
    pub(super) fn scale_rows(&self, rows: &Range<usize>, slice: &HeadSlice, y: &mut [T]) {
        let (w, r) = (slice.columns.len(), self.shape.head_dim);
        cpu::simd(
            #[inline(always)]
            |fma| {
                for (h, head) in slice.heads.clone().enumerate() {
                    let (_, l) = self.steps(rows, head);
                    for (y, &l) in y.chunks_exact_mut(w).zip(l) {
                        let decay = T::nearest(l).fast_exp(fma);
                        y[h * r..][..r].iter_mut().for_each(|y| *y *= decay);
                    }
                }
            },
        );
    }

    /// `y_i += sum_j G_ij L_ij dt_j x_j` for the rows of a chunk.
    fn chunk_term(
        &self,
        rows: &Range<usize>,
        slice: &HeadSlice,
        (x, weights): (Operand<T>, &mut [T]),
        y: &mut [T],
    ) {
        let (q, w, r) = (rows.len(), slice.columns.len(), self.shape.head_dim);
        let cb = self.cb(rows, slice.group);
        for (h, head) in slice.heads.clone().enumerate() {
            let steps = HeadSteps::new(self, rows, head);
            cpu::simd(
                #[inline(always)]
                |fma| {
                    let (dt, _) = steps.dt.as_chunks::<LANES>();
                    for (i, (row, cb)) in
                        weights.chunks_exact_mut(CHUNK).zip(cb.chunks_exact(CHUNK)).enumerate()
                    {
                        let ((row, _), (cb, _)) = (row.as_chunks_mut::<LANES>(), cb.as_chunks::<LANES>());
                        for block in 0..q.div_ceil(LANES) {
                            if block > i / LANES {
                                row[block] = [T::zero(); LANES];
                                continue;
                            }
                            let decays = steps.decays(i, block, fma);
                            for t in 0..LANES {
                                row[block][t] = cb[block][t] * decays[t] * dt[block][t];
                            }
                        }
                    }
                },
            );
            let out = (&mut y[h * r..], w);
            add_triangle((q, r), Operand::new(weights, CHUNK), x.from(0, h * r), out);
        }
    }

    /// `y_i += D x_i`.
    fn add_skip(&self, slice: &HeadSlice, x: Operand<T>, y: &mut [T]) {
        let (w, r) = (slice.columns.len(), self.shape.head_dim);
        cpu::simd(
            #[inline(always)]
            |fma| {
                for (i, y) in y.chunks_exact_mut(w).enumerate() {
                    let heads = y.chunks_exact_mut(r).zip(x.row(i, w).chunks_exact(r));
                    for ((y, x), head) in heads.zip(slice.heads.clone()) {
                        cpu::add_scaled(y, self.d[head], x, fma);
                    }
                }
            },
        );
    }
}
