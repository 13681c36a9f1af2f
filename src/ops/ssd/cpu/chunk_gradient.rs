//! The gradients of a chunk's rows and a slice of heads.

use super::super::plan::CHUNK;
use super::decay::{HeadSteps, LANES};
use super::operand::{Operand, ProductRows, multiply};
use super::pass::{HeadSlice, Pass};
use super::triangle::add_triangle;
use crate::ops::cpu::{self, Disjoint, Real};
use std::ops::Range;

pub(super) struct ChunkGradient<'a, T> {
    pass: &'a Pass<'a, T>,
    rows: &'a Range<usize>,
    slice: &'a HeadSlice,
    x: Operand<'a, T>,
    dy: Operand<'a, T>,
    /// `b` [q, w], of which the terms are added up.
    b: &'a mut [T],
    /// `dl` of each head.
    dl: Vec<[f64; CHUNK]>,
}

impl<'a, T: Real> ChunkGradient<'a, T> {
    /// `b` must be zeros; `off` has `exp(l_i) dy_i · S⁰ C_i` of each head.
    pub(super) fn new<'o>(
        pass: &'a Pass<'a, T>,
        (rows, slice): (&'a Range<usize>, &'a HeadSlice),
        (x, dy): (Operand<'a, T>, Operand<'a, T>),
        b: &'a mut [T],
        off: impl Iterator<Item = &'o [T]>,
    ) -> Self
    where
        T: 'o,
    {
        let dl = off.map(|off| {
            let mut dl = [0.0; CHUNK];
            dl.iter_mut().zip(off).for_each(|(dl, off)| *dl = off.as_f64());
            dl
        });
        let dl = dl.collect();
        Self { pass, rows, slice, x, dy, b, dl }
    }

    /// Adds the terms of the gradient `dend` [w, N] of the chunk's end state, and writes that of B, `dt_j exp(l_q - l_j) dS¹ᵀ x_j`,
    /// to the first N columns of `sides` [q, 2 N]. `start` is the start state, [w, N]; `None` for zeros.
    pub(super) fn add_end(&mut self, dend: &[T], start: Option<&[T]>, sides: &mut [T]) {
        let (q, w, r) = (self.rows.len(), self.slice.columns.len(), self.pass.shape.head_dim);
        let n = self.pass.shape.state;
        let mut u = Vec::new();
        self.pass.weighted_x(self.slice, self.rows.clone(), self.x, &mut u);
        let mut v = vec![T::zero(); q * w];
        let dend_matrix = Operand::new(dend, n);
        let b = self.pass.b(self.rows.start, self.slice.group);
        let out = ProductRows { values: &mut v, stride: w, accumulate: false };
        multiply((q, w, n), b, dend_matrix.transposed(), out);
        let out = ProductRows { values: sides, stride: 2 * n, accumulate: false };
        multiply((q, n, w), Operand::new(&u, w), dend_matrix, out);
        let Self { pass, rows, slice, b, dl, .. } = self;
        cpu::simd(
            #[inline(always)]
            |fma| {
                for (h, (head, dl)) in slice.heads.clone().zip(dl).enumerate() {
                    let (_, l) = pass.steps(rows, head);
                    let last = l[q - 1];
                    let columns = h * r..(h + 1) * r;
                    let mut sum = 0.0;
                    for (j, ((v, u), b)) in
                        v.chunks_exact(w).zip(u.chunks_exact(w)).zip(b.chunks_exact_mut(w)).enumerate()
                    {
                        let (v, u, b) = (&v[columns.clone()], &u[columns.clone()], &mut b[columns.clone()]);
                        let into = cpu::dot(u, v, fma).as_f64();
                        dl[j] -= into;
                        sum += into;
                        cpu::add_scaled(b, T::nearest(last - l[j]).fast_exp(fma), v, fma);
                    }
                    if let Some(start) = start {
                        let elements = h * r * n..(h + 1) * r * n;
                        let carry = cpu::dot(&dend[elements.clone()], &start[elements], fma);
                        sum += (T::nearest(last).fast_exp(fma) * carry).as_f64();
                    }
                    dl[q - 1] += sum;
                }
            },
        );
    }

    /// Adds `exp(l_q) dS¹` to the gradient of the start state.
    pub(super) fn add_decayed(&self, dend: &[T], dstart: &mut [T]) {
        let per_head = self.pass.shape.head_dim * self.pass.shape.state;
        cpu::simd(
            #[inline(always)]
            |fma| {
                let heads = dstart.chunks_exact_mut(per_head).zip(dend.chunks_exact(per_head));
                for ((dstart, dend), head) in heads.zip(self.slice.heads.clone()) {
                    let (_, l) = self.pass.steps(self.rows, head);
                    cpu::add_scaled(dstart, T::nearest(l[l.len() - 1]).fast_exp(fma), dend, fma);
                }
            },
        );
    }

    /// Adds the terms between the rows of the chunk, and writes `sum_h K_ij` to `k` [q, CHUNK].
    pub(super) fn add_diagonal(&mut self, k: &mut [T]) {
        let (q, w, r) = (self.rows.len(), self.slice.columns.len(), self.pass.shape.head_dim);
        k.fill(T::zero());
        let (mut p, mut weights) = (vec![T::zero(); q * CHUNK], vec![T::zero(); q * CHUNK]);
        for (h, head) in self.slice.heads.clone().enumerate() {
            let steps = HeadSteps::new(self.pass, self.rows, head);
            let (x, dy) = (self.x.from(0, h * r), self.dy.from(0, h * r));
            let out = ProductRows { values: &mut p, stride: CHUNK, accumulate: false };
            multiply((q, q, r), dy, x.transposed(), out);
            let cb = self.pass.cb(self.rows, self.slice.group);
            add_pairs(&steps, (cb, &p), (&mut weights, &mut *k), &mut self.dl[h]);
            let weights = Operand::new(&weights, CHUNK).transposed();
            add_triangle((q, r), weights, dy, (&mut self.b[h * r..], w));
        }
    }

    /// Writes the gradients of x and of r.
    ///
    /// # Safety
    /// No other task uses the columns of the slice and the steps of its heads in the rows of the chunk.
    pub(super) unsafe fn write(&self, dxbc: Disjoint<T>, dr: Disjoint<T>) {
        let (w, r, shape) = (self.slice.columns.len(), self.pass.shape.head_dim, self.pass.shape);
        let mut dx = vec![T::zero(); r];
        cpu::simd(
            #[inline(always)]
            |fma| {
                for (h, head) in self.slice.heads.clone().enumerate() {
                    let (dt, _) = self.pass.steps(self.rows, head);
                    let (a, d, mut da) = (self.pass.a[head].as_f64(), self.pass.d[head], 0.0);
                    for (j, row) in self.rows.clone().enumerate().rev() {
                        let columns = h * r..(h + 1) * r;
                        let (x, dy) =
                            (&self.x.row(j, w)[columns.clone()], &self.dy.row(j, w)[columns.clone()]);
                        let b = &self.b[j * w..][columns];
                        da += self.dl[h][j];
                        let ddt = cpu::dot(x, b, fma).as_f64() + a * da;
                        for ((dx, &dy), &b) in dx.iter_mut().zip(dy).zip(b) {
                            *dx = fma.mul_add(d, dy, dt[j] * b);
                        }
                        let first = row * shape.width() + self.slice.columns.start + h * r;
                        let derivative = self.pass.step_derivative(row, head, fma);
                        // SAFETY: the caller's promise.
                        unsafe {
                            std::ptr::copy_nonoverlapping(dx.as_ptr(), dxbc.element(first), r);
                            dr.element(row * shape.heads + head).write(T::nearest(ddt) * derivative);
                        }
                    }
                }
            },
        );
    }
}

/// The terms of one head between the rows of a chunk, from `G` and `P` [q, CHUNK]: writes `G_ij L_ij`, adds `K_ij` to `k`, and adds
/// to `dl_i` the sum of `E_ij` over j < i and subtracts that of `E_ji` over j > i.
fn add_pairs<T: Real>(
    steps: &HeadSteps<T>,
    (cb, p): (&[T], &[T]),
    (weights, k): (&mut [T], &mut [T]),
    dl: &mut [f64; CHUNK],
) {
    cpu::simd(
        #[inline(always)]
        |fma| {
            let (dt, _) = steps.dt.as_chunks::<LANES>();
            let mut column_sums = [[0.0; LANES]; CHUNK / LANES];
            let inputs = cb.chunks_exact(CHUNK).zip(p.chunks_exact(CHUNK));
            let outputs = weights.chunks_exact_mut(CHUNK).zip(k.chunks_exact_mut(CHUNK));
            for (i, ((cb, p), (weights, k))) in inputs.zip(outputs).enumerate() {
                let ((cb, _), (p, _)) = (cb.as_chunks::<LANES>(), p.as_chunks::<LANES>());
                let ((weights, _), (k, _)) = (weights.as_chunks_mut::<LANES>(), k.as_chunks_mut::<LANES>());
                let mut row_sums = [0.0; LANES];
                for block in 0..=i / LANES {
                    let decays = steps.decays(i, block, fma);
                    for t in 0..LANES {
                        let k_ij = decays[t] * dt[block][t] * p[block][t];
                        weights[block][t] = cb[block][t] * decays[t];
                        k[block][t] += k_ij;
                        let e = if block * LANES + t < i { (cb[block][t] * k_ij).as_f64() } else { 0.0 };
                        row_sums[t] += e;
                        column_sums[block][t] += e;
                    }
                }
                weights[i / LANES + 1..].fill([T::zero(); LANES]);
                dl[i] += row_sums.iter().sum::<f64>();
            }
            dl.iter_mut().zip(column_sums.as_flattened()).for_each(|(dl, &sum)| *dl -= sum);
        },
    );
}
