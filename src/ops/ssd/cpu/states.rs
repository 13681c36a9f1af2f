//! The states at the borders of chunks: where they are, and how a chunk goes on from one to the next.

use super::super::plan::{StateSlot, StateSource};
use super::operand::{Operand, ProductRows, multiply};
use super::pass::{HeadSlice, Pass};
use crate::ops::cpu::{self, Disjoint, Real};

/// Memory for the end states of chunks, [I, N] each. Tasks of different slices use different rows of a state.
pub(super) struct StateMemory<'a, T> {
    pub(super) ends: Disjoint<'a, T>,
    pub(super) scratch: Disjoint<'a, T>,
    /// The place of each chunk's end state.
    pub(super) slots: Vec<Option<StateSlot>>,
}

/// The state before a row.
#[derive(Clone, Copy)]
pub(super) enum StartState<'a, T> {
    Zero,
    /// [w, N], the rows of a slice.
    Rows(&'a [T]),
    /// In the memory of the end state, which replaces it.
    InPlace,
}

impl<T> StateMemory<'_, T> {
    /// Address of the first of `len` elements of a slice's rows in the end state of a chunk.
    fn address(&self, slot: StateSlot, first: usize, state_len: usize) -> *mut T {
        let (memory, index) = match slot {
            StateSlot::End(index) => (self.ends, index),
            StateSlot::Scratch(index) => (self.scratch, index),
        };
        // SAFETY: the address alone is computed here.
        unsafe { memory.element(index * state_len + first) }
    }

    /// Whether both chunks write their end states to one place.
    fn is_shared(&self, a: usize, b: usize) -> bool {
        self.slots[a].is_some() && self.slots[a] == self.slots[b]
    }
}

impl<T: Real> Pass<'_, T> {
    /// The rows of a slice in a start state; `None` for zeros.
    ///
    /// # Safety
    /// The state of a chunk is complete, and no task changes it as long as the slice lives.
    pub(super) unsafe fn start_rows<'s>(
        &'s self,
        source: StateSource,
        slice: &HeadSlice,
        memory: &'s StateMemory<T>,
    ) -> Option<&'s [T]> {
        let n = self.shape.state;
        let (first, len) = (slice.columns.start * n, slice.columns.len() * n);
        match source {
            StateSource::Zero => None,
            StateSource::Given(state) => Some(&self.given[state * self.state_len() + first..][..len]),
            StateSource::Chunk(chunk) => {
                let slot = memory.slots[chunk]?;
                let address = memory.address(slot, first, self.state_len());
                // SAFETY: the slot has the rows of every slice; the rest is the caller's promise.
                Some(unsafe { std::slice::from_raw_parts(address, len) })
            }
        }
    }

    /// The start state of a chunk, for the computation of its end state, and the rows of that.
    ///
    /// # Safety
    /// As for [`Pass::start_rows`].
    unsafe fn start_and_end<'s>(
        &'s self,
        (source, chunk): (StateSource, usize),
        slice: &HeadSlice,
        memory: &'s StateMemory<T>,
    ) -> Option<(StartState<'s, T>, *mut [T])> {
        let n = self.shape.state;
        let slot = memory.slots[chunk]?;
        let start = match source {
            StateSource::Chunk(before) if memory.is_shared(before, chunk) => StartState::InPlace,
            // SAFETY: the caller's promise.
            _ => match unsafe { self.start_rows(source, slice, memory) } {
                Some(rows) => StartState::Rows(rows),
                None => StartState::Zero,
            },
        };
        let address = memory.address(slot, slice.columns.start * n, self.state_len());
        Some((start, std::ptr::slice_from_raw_parts_mut(address, slice.columns.len() * n)))
    }

    /// Computes the end state of a chunk, if it has a place: `exp(l_q) S⁰ + sum_j exp(l_q - l_j) dt_j x_j B_jᵀ`. `scratch` gets
    /// `exp(l_q - l_j) dt_j x_j`.
    ///
    /// # Safety
    /// As for [`Pass::start_rows`]; this task is the only one that uses the end state's rows of the slice.
    pub(super) unsafe fn write_end(
        &self,
        (source, chunk): (StateSource, usize),
        slice: &HeadSlice,
        (x, scratch): (Operand<T>, &mut Vec<T>),
        memory: &StateMemory<T>,
    ) {
        // SAFETY: the caller's promise.
        let Some((start, end)) = (unsafe { self.start_and_end((source, chunk), slice, memory) }) else {
            return;
        };
        // SAFETY: the slot has the rows of every slice, which this task alone uses; elements that are not initialised are written
        // before they are read.
        let end = unsafe { &mut *end };
        let (rows, n, w) = (&self.plan.chunks[chunk].rows, self.shape.state, slice.columns.len());
        self.scale_state(slice, rows.start..rows.end, start, end);
        self.weighted_x(slice, rows.clone(), x, scratch);
        let (u, b) = (Operand::new(scratch, w), self.b(rows.start, slice.group));
        multiply(
            (w, n, rows.len()),
            u.transposed(),
            b,
            ProductRows { values: end, stride: n, accumulate: true },
        );
    }

    /// Writes `exp(l_q) S⁰` to the rows of an end state.
    fn scale_state(
        &self,
        slice: &HeadSlice,
        rows: std::ops::Range<usize>,
        start: StartState<T>,
        end: &mut [T],
    ) {
        let per_head = self.shape.head_dim * self.shape.state;
        cpu::simd(
            #[inline(always)]
            |fma| {
                for (i, end) in end.chunks_exact_mut(per_head).enumerate() {
                    let (_, l) = self.steps(&rows, slice.heads.start + i);
                    let decay = T::nearest(l[l.len() - 1]).fast_exp(fma);
                    match start {
                        StartState::Zero => end.fill(T::zero()),
                        StartState::InPlace => end.iter_mut().for_each(|s| *s *= decay),
                        StartState::Rows(rows) => {
                            let rows = &rows[i * per_head..][..per_head];
                            end.iter_mut().zip(rows).for_each(|(s, &x)| *s = decay * x);
                        }
                    }
                }
            },
        );
    }

    /// Writes `exp(l_q - l_j) dt_j x_j` [q, w].
    pub(super) fn weighted_x(
        &self,
        slice: &HeadSlice,
        rows: std::ops::Range<usize>,
        x: Operand<T>,
        out: &mut Vec<T>,
    ) {
        let (w, r) = (slice.columns.len(), self.shape.head_dim);
        out.resize(rows.len() * w, T::zero());
        cpu::simd(
            #[inline(always)]
            |fma| {
                for (h, head) in slice.heads.clone().enumerate() {
                    let (dt, l) = self.steps(&rows, head);
                    let last = l[l.len() - 1];
                    for (j, out) in out.chunks_exact_mut(w).enumerate() {
                        let weight = T::nearest(last - l[j]).fast_exp(fma) * dt[j];
                        let x = &x.row(j, w)[h * r..][..r];
                        out[h * r..][..r].iter_mut().zip(x).for_each(|(y, &x)| *y = weight * x);
                    }
                }
            },
        );
    }

    /// The recurrence of a chunk of one row with an end state: writes the state, and `y - D x` to `y`, in one pass over the state.
    /// Returns whether it was done: the end state has a place, and the chunk has one row.
    ///
    /// # Safety
    /// As for [`Pass::start_rows`]; this task is the only one that uses the end state's rows of the slice.
    pub(super) unsafe fn try_recurrence(
        &self,
        (source, chunk): (StateSource, usize),
        slice: &HeadSlice,
        (x, y): (Operand<T>, &mut [T]),
        memory: &StateMemory<T>,
    ) -> bool {
        let rows = &self.plan.chunks[chunk].rows;
        if rows.len() != 1 {
            return false;
        }
        // SAFETY: the caller's promise.
        let Some((start, end)) = (unsafe { self.start_and_end((source, chunk), slice, memory) }) else {
            return false;
        };
        // SAFETY: as in `write_end`.
        let end = unsafe { &mut *end };
        let (n, r, x) = (self.shape.state, self.shape.head_dim, x.row(0, slice.columns.len()));
        let (b, c) = (self.b(rows.start, slice.group).row(0, n), self.c(rows.start, slice.group).row(0, n));
        cpu::simd(
            #[inline(always)]
            |fma| {
                for (i, (s, y)) in end.chunks_exact_mut(n).zip(y).enumerate() {
                    let (dt, l) = self.steps(rows, slice.heads.start + i / r);
                    let (decay, added) = (T::nearest(l[0]).fast_exp(fma), dt[0] * x[i]);
                    match start {
                        StartState::Zero => s.iter_mut().zip(b).for_each(|(s, &b)| *s = added * b),
                        StartState::InPlace => {
                            s.iter_mut().zip(b).for_each(|(s, &b)| *s = fma.mul_add(decay, *s, added * b));
                        }
                        StartState::Rows(rows) => {
                            let before = &rows[i * n..][..n];
                            for ((s, &before), &b) in s.iter_mut().zip(before).zip(b) {
                                *s = fma.mul_add(decay, before, added * b);
                            }
                        }
                    }
                    *y = cpu::dot(s, c, fma);
                }
            },
        );
        true
    }

    /// Writes the wanted end states that are not the place of a chunk's end state.
    ///
    /// # Safety
    /// All end states of chunks are complete, and no task runs.
    pub(super) unsafe fn copy_ends(&self, memory: &StateMemory<T>) {
        let len = self.state_len();
        for (i, source) in self.plan.ends.iter().enumerate() {
            let to = memory.address(StateSlot::End(i), 0, len);
            // SAFETY: both are states of the memory, two different ones.
            unsafe {
                match *source {
                    StateSource::Zero => std::slice::from_raw_parts_mut(to, len).fill(T::zero()),
                    StateSource::Given(state) => {
                        std::ptr::copy_nonoverlapping(self.given[state * len..][..len].as_ptr(), to, len);
                    }
                    StateSource::Chunk(chunk) => match memory.slots[chunk] {
                        Some(slot) if slot != StateSlot::End(i) => {
                            std::ptr::copy_nonoverlapping(memory.address(slot, 0, len), to, len);
                        }
                        _ => {}
                    },
                }
            }
        }
    }
}
