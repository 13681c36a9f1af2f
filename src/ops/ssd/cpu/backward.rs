//! The backward pass: tasks of runs and slices, from the last level to the first, then the sums over slices and runs.

use super::super::plan::{Block, CHUNK, StateSource};
use super::super::{SsdGradients, SsdShape};
use super::chunk_gradient::ChunkGradient;
use super::operand::{Operand, ProductRows, multiply};
use super::pass::{HeadSlice, Pass, copy_columns};
use super::states::StateMemory;
use crate::Result;
use crate::ops::cpu::{self, Disjoint, Real, StoredSlice, UninitBuffer, View};
use candle_core::Tensor;
use std::ops::Range;

/// What the tasks of a backward pass read and write.
pub(super) struct BackwardPass<'a, T> {
    pub(super) pass: &'a Pass<'a, T>,
    /// [T, I].
    dy: &'a [T],
    /// [n, I, N].
    dends: Option<&'a [T]>,
    /// The start states of chunks.
    memory: &'a StateMemory<'a, T>,
    /// Whether the end state of each chunk has a gradient.
    pub(super) has_end_gradient: Vec<bool>,
    /// Whether the start state of each chunk is not zero.
    pub(super) has_start: Vec<bool>,
    /// The place of the gradient of each run's start state, if that is not zero.
    starts_at: Vec<Option<usize>>,
    pub(super) outputs: Outputs<'a, T>,
}

/// Memory for gradients; a task writes the rows of its run and the columns of its slice.
pub(super) struct Outputs<'a, T> {
    /// [T, X].
    pub(super) dxbc: Disjoint<'a, T>,
    /// [T, M].
    dr: Disjoint<'a, T>,
    /// Gradients of the runs' start states, [n, I, N].
    starts: Disjoint<'a, T>,
    /// Of each slice, the gradients of B and C through states, [slices, T, 2 N].
    sides: Disjoint<'a, T>,
    /// Of each slice, `sum_h K_ij`, [slices, T, CHUNK].
    k: Disjoint<'a, T>,
}

pub(super) fn run<T: Real>(
    pass: &Pass<T>,
    (dy, dends): (&Tensor, Option<&Tensor>),
    has_states: bool,
) -> Result<SsdGradients> {
    const OP: &str = "scan backward";
    let (dy, dends) = (View::<T>::new(OP, dy)?, dends.map(|d| View::<T>::new(OP, d)).transpose()?);
    let (plan, slices, rows) = (pass.plan, pass.slices.len(), pass.rows());
    let SsdShape { heads, state, .. } = *pass.shape;
    let mut states = UninitBuffer::<T>::new(plan.slots[1] * pass.state_len());
    let memory = StateMemory {
        ends: Disjoint::new(&mut []),
        scratch: Disjoint::new(states.as_slice()),
        slots: plan.chunks.iter().map(|chunk| chunk.backward_slot).collect(),
    };
    write_states(pass, &memory);
    let starts_at = numbered_starts(pass);
    let starts = starts_at.iter().flatten().count();
    let mut dxbc = UninitBuffer::<T>::new(rows * pass.shape.width());
    let mut dr = UninitBuffer::<T>::new(rows * heads);
    let mut starts = UninitBuffer::<T>::new(starts * pass.state_len());
    let mut sides = UninitBuffer::<T>::new(slices * rows * 2 * state);
    let mut k = UninitBuffer::<T>::new(slices * rows * CHUNK);
    let dstates = {
        let outputs = Outputs {
            dxbc: Disjoint::new(dxbc.as_slice()),
            dr: Disjoint::new(dr.as_slice()),
            starts: Disjoint::new(starts.as_slice()),
            sides: Disjoint::new(sides.as_slice()),
            k: Disjoint::new(k.as_slice()),
        };
        let backward = BackwardPass {
            pass,
            dy: &dy,
            dends: dends.as_deref(),
            memory: &memory,
            has_end_gradient: has_end_gradient(pass, dends.is_some()),
            has_start: has_start(pass),
            starts_at,
            outputs,
        };
        backward.run_levels();
        backward.add_slices();
        has_states.then(|| backward.given_gradients())
    };
    // SAFETY: the tasks wrote the columns of x and the steps of every row, and `add_slices` those of B and C.
    let (dxbc, dr) =
        unsafe { (dxbc.into_tensor((rows, pass.shape.width()))?, dr.into_tensor((rows, heads))?) };
    let states = match dstates {
        Some(values) => {
            let n = values.len() / pass.state_len().max(1);
            Some(cpu::tensor(values, (n, pass.shape.inner(), state))?)
        }
        None => None,
    };
    Ok(SsdGradients { xbc: dxbc, dt: dr, states })
}

/// Numbers the runs that do not start from zeros.
fn numbered_starts<T: Real>(pass: &Pass<T>) -> Vec<Option<usize>> {
    let mut next = 0..;
    let runs = pass.plan.runs.iter();
    runs.map(|run| if run.start == StateSource::Zero { None } else { next.next() }).collect()
}

fn has_end_gradient<T: Real>(pass: &Pass<T>, has_dends: bool) -> Vec<bool> {
    let chunks = pass.plan.chunks.iter().enumerate();
    let ends = |chunk| has_dends && pass.plan.ends.contains(&StateSource::Chunk(chunk));
    chunks.map(|(i, chunk)| chunk.is_start || ends(i)).collect()
}

fn has_start<T: Real>(pass: &Pass<T>) -> Vec<bool> {
    let blocks = pass.plan.blocks.iter();
    blocks.flat_map(|block| block.chunks.clone().map(|_| block.start != StateSource::Zero)).collect()
}

/// Computes the states from which chunks start again.
fn write_states<T: Real>(pass: &Pass<T>, memory: &StateMemory<T>) {
    for level in &pass.plan.levels {
        let has_state = |run: &&usize| {
            pass.plan.blocks[pass.plan.runs[**run].blocks.clone()]
                .iter()
                .any(|block| pass.plan.chunks[block.chunks.clone()].iter().any(|chunk| chunk.is_start))
        };
        let runs: Vec<usize> = level.iter().filter(has_state).copied().collect();
        cpu::par_tasks(runs.len() * pass.slices.len(), &|task| {
            let (run, slice) = (runs[task / pass.slices.len()], &pass.slices[task % pass.slices.len()]);
            let (mut x, mut u) = (Vec::new(), Vec::new());
            for block in &pass.plan.blocks[pass.plan.runs[run].blocks.clone()] {
                let x = pass.x(&block.rows, slice, &mut x);
                for chunk in block.chunks.clone() {
                    let x = x.from(pass.plan.chunks[chunk].rows.start - block.rows.start, 0);
                    // SAFETY: a task writes the rows of its slice in the states of its run's chunks, and reads complete ones.
                    unsafe { pass.write_end((block.start, chunk), slice, (x, &mut u), memory) };
                }
            }
        });
    }
}

/// The rows of a block in a slice, and memory for their gradients.
struct BlockGradient<'a, T> {
    dy: Operand<'a, T>,
    /// `b` [rows, w].
    b: Vec<T>,
    /// `exp(l_i) dy_i · S⁰ C_i`, a row for each head.
    off: Vec<T>,
    /// Gradient of the start state, [w, N]; `None` for zeros.
    dstart: Option<Vec<T>>,
}

impl<T: Real> BackwardPass<'_, T> {
    fn run_levels(&self) {
        let slices = &self.pass.slices;
        for level in self.pass.plan.levels.iter().rev() {
            cpu::par_tasks(level.len() * slices.len(), &|task| {
                self.run(level[task / slices.len()], &slices[task % slices.len()]);
            });
        }
    }

    /// The gradients of a run and a slice.
    fn run(&self, run: usize, slice: &HeadSlice) {
        let (mut next, mut scratch) = (None, [Vec::new(), Vec::new()]);
        for block in self.pass.plan.blocks[self.pass.plan.runs[run].blocks.clone()].iter().rev() {
            next = self.block(block, slice, next, &mut scratch);
        }
        if let (Some(index), Some(dstart)) = (self.starts_at[run], next) {
            let first = index * self.pass.state_len() + slice.columns.start * self.pass.shape.state;
            // SAFETY: a task writes the rows of its slice in the gradient of its run's start state.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    dstart.as_ptr(),
                    self.outputs.starts.element(first),
                    dstart.len(),
                )
            };
        }
    }

    /// The gradients of a block: `next` is that of its end state if the segment goes on; that of its start state is returned.
    fn block(
        &self,
        block: &Block,
        slice: &HeadSlice,
        mut next: Option<Vec<T>>,
        [x, dy]: &mut [Vec<T>; 2],
    ) -> Option<Vec<T>> {
        let (pass, n, w) = (self.pass, block.rows.len(), slice.columns.len());
        let x = pass.x(&block.rows, slice, x);
        let dy = copy_columns((StoredSlice::Computed(self.dy), pass.shape.inner()), &block.rows, slice, dy);
        let off = vec![T::zero(); slice.heads.len() * n];
        let mut gradient = BlockGradient { dy, b: vec![T::zero(); n * w], off, dstart: None };
        // SAFETY: the start states of chunks are complete, and no task writes them.
        let start = unsafe { pass.start_rows(block.start, slice, self.memory) };
        // SAFETY: a task uses the rows of its blocks in the memory of its slice.
        let sides = unsafe { self.sides(&block.rows, slice) };
        if let Some(start) = start {
            self.start_gradient(block, slice, (start, &mut *sides), &mut gradient);
        }
        for chunk in block.chunks.clone() {
            let rows = &pass.plan.chunks[chunk].rows;
            let first = rows.start - block.rows.start;
            // SAFETY: as above.
            let k = unsafe { self.k(rows, slice) };
            let off = gradient.off.chunks_exact(n).map(|off| &off[first..first + rows.len()]);
            let b = &mut gradient.b[first * w..(first + rows.len()) * w];
            let mut task =
                ChunkGradient::new(pass, (rows, slice), (x.from(first, 0), dy.from(first, 0)), b, off);
            let dend =
                if pass.plan.chunks[chunk].is_last { self.end_gradient(chunk, slice) } else { next.take() };
            if let Some(dend) = dend {
                task.add_end(&dend, start, &mut sides[first * 2 * pass.shape.state..]);
                if let Some(dstart) = &mut gradient.dstart {
                    task.add_decayed(&dend, dstart);
                }
            }
            task.add_diagonal(k);
            // SAFETY: a task writes the columns of its slice and the steps of its heads in the rows of its run.
            unsafe { task.write(self.outputs.dxbc, self.outputs.dr) };
        }
        gradient.dstart
    }

    /// Gradients through the start state of a block: that of C, `off`, and that of the start state.
    fn start_gradient(
        &self,
        block: &Block,
        slice: &HeadSlice,
        (start, sides): (&[T], &mut [T]),
        gradient: &mut BlockGradient<T>,
    ) {
        let (pass, rows) = (self.pass, block.rows.len());
        let (w, n, r) = (slice.columns.len(), pass.shape.state, pass.shape.head_dim);
        // exp(l_i) dy_i
        let mut decayed = vec![T::zero(); rows * w];
        for (i, decayed) in decayed.chunks_exact_mut(w).enumerate() {
            decayed.copy_from_slice(gradient.dy.row(i, w));
        }
        for chunk in &pass.plan.chunks[block.chunks.clone()] {
            let first = (chunk.rows.start - block.rows.start) * w;
            pass.scale_rows(&chunk.rows, slice, &mut decayed[first..first + chunk.rows.len() * w]);
        }
        let (decayed, c) = (Operand::new(&decayed, w), pass.c(block.rows.start, slice.group));
        let mut head_term = vec![T::zero(); rows * n];
        for (h, off) in gradient.off.chunks_exact_mut(rows).enumerate() {
            let start = Operand::new(&start[h * r * n..][..r * n], n);
            let out = ProductRows { values: &mut head_term, stride: n, accumulate: false };
            multiply((rows, n, r), decayed.from(0, h * r), start, out);
            cpu::simd(
                #[inline(always)]
                |fma| {
                    let parts = head_term.chunks_exact(n).zip(sides.chunks_exact_mut(2 * n)).zip(off);
                    for (i, ((term, sides), off)) in parts.enumerate() {
                        *off = cpu::dot(term, c.row(i, n), fma);
                        let dc = &mut sides[n..];
                        match h {
                            0 => dc.copy_from_slice(term),
                            _ => dc.iter_mut().zip(term).for_each(|(y, &x)| *y += x),
                        }
                    }
                },
            );
        }
        let mut dstart = vec![T::zero(); w * n];
        let out = ProductRows { values: &mut dstart, stride: n, accumulate: false };
        multiply((w, n, rows), decayed.transposed(), c, out);
        gradient.dstart = Some(dstart);
    }

    /// The gradient of the end state of a segment's last chunk, [w, N], if it has one: those of wanted ends and of the runs that
    /// start from it, in their order.
    fn end_gradient(&self, chunk: usize, slice: &HeadSlice) -> Option<Vec<T>> {
        if !self.has_end_gradient[chunk] {
            return None;
        }
        let rows = slice.columns.start * self.pass.shape.state..slice.columns.end * self.pass.shape.state;
        let mut sum = vec![T::zero(); rows.len()];
        self.add_state_gradients(StateSource::Chunk(chunk), rows, &mut sum);
        Some(sum)
    }

    /// Adds the gradients of a state from wanted ends and from the runs that start from it; of the elements of a range.
    fn add_state_gradients(&self, source: StateSource, elements: Range<usize>, sum: &mut [T]) {
        let (plan, len) = (self.pass.plan, self.pass.state_len());
        let mut add = |values: &[T]| {
            cpu::simd(
                #[inline(always)]
                |_| sum.iter_mut().zip(values).for_each(|(y, &x)| *y += x),
            );
        };
        for (i, _) in plan.ends.iter().enumerate().filter(|(_, end)| **end == source) {
            if let Some(dends) = self.dends {
                add(&dends[i * len..][elements.clone()]);
            }
        }
        for (run, index) in plan.runs.iter().zip(&self.starts_at).filter(|(run, _)| run.start == source) {
            let Some(index) = *index else { unreachable!("{:?} is not zero", run.start) };
            // SAFETY: the runs that start from a state are of higher levels, which are complete.
            add(unsafe {
                let first = self.outputs.starts.element(index * len + elements.start);
                std::slice::from_raw_parts(first, elements.len())
            });
        }
    }

    /// The gradients of the given states.
    fn given_gradients(&self) -> Vec<T> {
        let n = self.pass.shape.state;
        let mut sums = vec![T::zero(); self.pass.given.len()];
        cpu::par_chunks(&mut sums, self.pass.state_len(), &|i, sums| {
            cpu::par_chunks(sums, 256 * n, &|part, sum| {
                let first = part * 256 * n;
                self.add_state_gradients(StateSource::Given(i), first..first + sum.len(), sum);
            });
        });
        sums
    }

    /// The gradients of B and C of some rows through states, of one slice, [rows, 2 N].
    ///
    /// # Safety
    /// No other task uses them.
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn sides(&self, rows: &Range<usize>, slice: &HeadSlice) -> &mut [T] {
        let width = 2 * self.pass.shape.state;
        let first = (slice.index * self.pass.rows() + rows.start) * width;
        // SAFETY: the buffer has all rows of every slice; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.outputs.sides.element(first), rows.len() * width) }
    }

    /// `sum_h K_ij` of a chunk, of one slice, [q, CHUNK].
    ///
    /// # Safety
    /// No other task uses them.
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn k(&self, rows: &Range<usize>, slice: &HeadSlice) -> &mut [T] {
        let first = (slice.index * self.pass.rows() + rows.start) * CHUNK;
        // SAFETY: the buffer has all rows of every slice; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.outputs.k.element(first), rows.len() * CHUNK) }
    }
}
