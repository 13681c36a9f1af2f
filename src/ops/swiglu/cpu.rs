//! The activation on the CPU, in f32 or f64; matrices may be bf16.

use super::check;
use crate::Result;
use crate::ops::cpu::{self, Fma, PART, Real, StorageFloat, UninitBuffer, View, with_storage};
use candle_core::{DType, Tensor};
use std::mem::MaybeUninit;

pub(super) fn forward(gate_up: &Tensor) -> Result<Tensor> {
    let dtype = gate_up.dtype();
    let computed = if dtype == DType::BF16 { DType::F32 } else { dtype };
    with_storage!("swiglu", computed, dtype, T, O => forward_rows::<T, O>(gate_up))
}

fn forward_rows<T: Real, O: StorageFloat<T>>(gate_up: &Tensor) -> Result<Tensor> {
    let (t, f) = check(gate_up)?;
    let x = View::<O>::new("swiglu", gate_up)?;
    let x: &[O] = &x;
    let mut out = UninitBuffer::<O>::new(t * f);
    cpu::par_rows(
        out.as_slice(),
        f,
        #[inline(always)]
        |first, rows, fma| {
            let mut scratch = [MaybeUninit::uninit(); PART];
            for (row, x) in rows.chunks_exact_mut(f).zip(x[first * 2 * f..].chunks_exact(2 * f)) {
                SwigluRow { gate_up: x, weight: T::one(), fma }.forward(row, &mut scratch);
            }
        },
    );
    // SAFETY: `gate_up` has T rows, so that every row was written.
    unsafe { out.into_tensor((t, f)) }
}

pub(super) fn backward(da: &Tensor, gate_up: &Tensor) -> Result<Tensor> {
    with_storage!("swiglu backward", da.dtype(), gate_up.dtype(), T, O => backward_rows::<T, O>(da, gate_up))
}

fn backward_rows<T: Real, O: StorageFloat<T>>(da: &Tensor, gate_up: &Tensor) -> Result<Tensor> {
    const OP: &str = "swiglu backward";
    let (t, f) = check(gate_up)?;
    let (da, x) = (View::<T>::new(OP, da)?, View::<O>::new(OP, gate_up)?);
    let (da, x): (&[T], &[O]) = (&da, &x);
    let mut out = UninitBuffer::<O>::new(t * 2 * f);
    cpu::par_rows(
        out.as_slice(),
        2 * f,
        #[inline(always)]
        |first, rows, fma| {
            let mut scratch = [[T::zero(); PART]; 3];
            let (da, x) = (da[first * f..].chunks_exact(f), x[first * 2 * f..].chunks_exact(2 * f));
            for ((row, da), x) in rows.chunks_exact_mut(2 * f).zip(da).zip(x) {
                SwigluRow { gate_up: x, weight: T::one(), fma }.backward::<false>(da, row, &mut scratch);
            }
        },
    );
    // SAFETY: `da` and `gate_up` have T rows, so that every row was written.
    unsafe { out.into_tensor((t, 2 * f)) }
}

/// One row: gate and up side by side, and a factor of its activation.
pub(in crate::ops) struct SwigluRow<'a, T, O> {
    pub(in crate::ops) gate_up: &'a [O],
    pub(in crate::ops) weight: T,
    pub(in crate::ops) fma: Fma,
}

impl<T: Real, O: StorageFloat<T>> SwigluRow<'_, T, O> {
    /// Writes the F elements of the activation, times the weight.
    #[inline(always)]
    pub(in crate::ops) fn forward(self, out: &mut [MaybeUninit<O>], scratch: &mut [MaybeUninit<T>; PART]) {
        let Self { gate_up, weight, fma } = self;
        assert_eq!(gate_up.len(), 2 * out.len(), "gate and up, and room for the activation");
        let (gate, up) = gate_up.split_at(out.len());
        // SAFETY: gate and up have the elements of every part, so that each is written.
        unsafe {
            O::fill(
                out,
                scratch,
                #[inline(always)]
                |part, row: &mut [MaybeUninit<T>]| {
                    for ((y, &g), &u) in row.iter_mut().zip(&gate[part.clone()]).zip(&up[part]) {
                        let (g, u): (T, T) = (g.load(), u.load());
                        y.write(weight * (g * cpu::sigmoid(g, fma) * u));
                    }
                },
            );
        }
    }

    /// Writes the gradients of gate and up, 2F elements, from `da`, that of the weighted activation. Returns the gradient of the
    /// weight if `WEIGHTED`, and zero otherwise.
    #[inline(always)]
    pub(in crate::ops) fn backward<const WEIGHTED: bool>(
        self,
        da: &[T],
        out: &mut [MaybeUninit<O>],
        scratch: &mut [[T; PART]; 3],
    ) -> T {
        let Self { gate_up, weight, fma } = self;
        assert!(gate_up.len() == 2 * da.len() && out.len() == 2 * da.len(), "gate and up, and room");
        let ((gate, up), (dgate, dup)) = (gate_up.split_at(da.len()), out.split_at_mut(da.len()));
        let outputs = dgate.chunks_mut(PART).zip(dup.chunks_mut(PART));
        let inputs = da.chunks(PART).zip(gate.chunks(PART)).zip(up.chunks(PART));
        let mut dweight = T::zero();
        for ((dgate_out, dup_out), ((da, gate), up)) in outputs.zip(inputs) {
            let [dgate, dup, a] = &mut *scratch;
            let (dgate, dup, a) = (&mut dgate[..da.len()], &mut dup[..da.len()], &mut a[..da.len()]);
            let inputs = da.iter().zip(gate).zip(up);
            for (((x, y), a), ((&d, &g), &u)) in
                dgate.iter_mut().zip(dup.iter_mut()).zip(a.iter_mut()).zip(inputs)
            {
                let (d, g, u): (T, T, T) = (weight * d, g.load(), u.load());
                let s = cpu::sigmoid(g, fma);
                *x = d * u * s * fma.mul_add(g, T::one() - s, T::one());
                *y = d * g * s;
                if WEIGHTED {
                    *a = g * s * u;
                }
            }
            if WEIGHTED {
                dweight += cpu::dot(da, a, fma);
            }
            O::store_slice(dgate, dgate_out);
            O::store_slice(dup, dup_out);
        }
        dweight
    }
}
