//! The gradients of B and C: sums over the slices of heads.

use super::super::plan::CHUNK;
use super::backward::BackwardPass;
use super::operand::{Operand, ProductRows, multiply};
use crate::ops::cpu::{self, Real};

impl<T: Real> BackwardPass<'_, T> {
    /// Adds up the slices' gradients of B and C, and writes them.
    pub(super) fn add_slices(&self) {
        let (pass, n) = (self.pass, self.pass.shape.state);
        cpu::par_tasks(pass.plan.chunks.len(), &|chunk| {
            let rows = &pass.plan.chunks[chunk].rows;
            for group in 0..pass.shape.groups {
                let gradients = self.group_sides(chunk, group);
                let columns = [group * n, (pass.shape.groups + group) * n];
                for (row, sides) in rows.clone().zip(gradients.chunks_exact(2 * n)) {
                    for (column, side) in columns.into_iter().zip(sides.chunks_exact(n)) {
                        let first = row * pass.shape.width() + pass.shape.inner() + column;
                        // SAFETY: a task writes B and C of the rows of its chunk.
                        unsafe {
                            std::ptr::copy_nonoverlapping(side.as_ptr(), self.outputs.dxbc.element(first), n);
                        }
                    }
                }
            }
        });
    }

    /// The gradients of B and C of a chunk's rows and a group, [q, 2 N].
    fn group_sides(&self, chunk: usize, group: usize) -> Vec<T> {
        let (pass, n) = (self.pass, self.pass.shape.state);
        let rows = &pass.plan.chunks[chunk].rows;
        let (mut sum, mut k) = (vec![T::zero(); rows.len() * 2 * n], vec![T::zero(); rows.len() * CHUNK]);
        // Gradients of B come through the end state, those of C through the start state.
        let through_states = [self.has_end_gradient[chunk], self.has_start[chunk]];
        for slice in pass.slices.iter().filter(|slice| slice.group == group) {
            // SAFETY: no task writes any more.
            let (sides, k_of_slice) = unsafe { (self.sides(rows, slice), self.k(rows, slice)) };
            cpu::simd(
                #[inline(always)]
                |_| {
                    k.iter_mut().zip(k_of_slice.iter()).for_each(|(y, &x)| *y += x);
                    for (sum, sides) in sum.chunks_exact_mut(2 * n).zip(sides.chunks_exact(2 * n)) {
                        let parts = sum.chunks_exact_mut(n).zip(sides.chunks_exact(n)).zip(through_states);
                        for ((sum, side), _) in parts.filter(|(_, is_written)| *is_written) {
                            sum.iter_mut().zip(side).for_each(|(y, &x)| *y += x);
                        }
                    }
                },
            );
        }
        let (k, size) = (Operand::new(&k, CHUNK), (rows.len(), n, rows.len()));
        let db = ProductRows { values: &mut sum, stride: 2 * n, accumulate: true };
        multiply(size, k.transposed(), pass.c(rows.start, group), db);
        let dc = ProductRows { values: &mut sum[n..], stride: 2 * n, accumulate: true };
        multiply(size, k, pass.b(rows.start, group), dc);
        sum
    }
}
