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
                let (gate, up) = x.split_at(f);
                // SAFETY: gate and up have the elements of every part, so that each is written.
                unsafe {
                    O::fill(
                        row,
                        &mut scratch,
                        #[inline(always)]
                        |part, row: &mut [MaybeUninit<T>]| {
                            for ((y, &g), &u) in row.iter_mut().zip(&gate[part.clone()]).zip(&up[part]) {
                                let (g, u): (T, T) = (g.load(), u.load());
                                y.write(g * sigmoid(g, fma) * u);
                            }
                        },
                    );
                }
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
            let mut scratch = [[T::zero(); PART]; 2];
            let (da, x) = (da[first * f..].chunks_exact(f), x[first * 2 * f..].chunks_exact(2 * f));
            for ((row, da), x) in rows.chunks_exact_mut(2 * f).zip(da).zip(x) {
                let ((gate, up), (dgate, dup)) = (x.split_at(f), row.split_at_mut(f));
                let outputs = dgate.chunks_mut(PART).zip(dup.chunks_mut(PART));
                let inputs = da.chunks(PART).zip(gate.chunks(PART)).zip(up.chunks(PART));
                for ((dgate, dup), ((da, gate), up)) in outputs.zip(inputs) {
                    let part = SwigluPart { da, gate, up, scratch: &mut scratch };
                    part.backward([dgate, dup], fma);
                }
            }
        },
    );
    // SAFETY: `da` and `gate_up` have T rows, so that every row was written.
    unsafe { out.into_tensor((t, 2 * f)) }
}

#[inline(always)]
fn sigmoid<T: Real>(x: T, fma: Fma) -> T {
    T::one() / (T::one() + (-x).fast_exp(fma))
}

/// Up to [`PART`] gates and ups, the gradients of their activations, and room for their own.
struct SwigluPart<'a, T, O> {
    da: &'a [T],
    gate: &'a [O],
    up: &'a [O],
    scratch: &'a mut [[T; PART]; 2],
}

impl<T: Real, O: StorageFloat<T>> SwigluPart<'_, T, O> {
    /// Writes the gradients of both, from one sigmoid.
    #[inline(always)]
    fn backward(self, [gate_out, up_out]: [&mut [MaybeUninit<O>]; 2], fma: Fma) {
        let [dgate, dup] = self.scratch;
        let (dgate, dup) = (&mut dgate[..self.da.len()], &mut dup[..self.da.len()]);
        let inputs = self.da.iter().zip(self.gate).zip(self.up);
        for ((x, y), ((&d, &g), &u)) in dgate.iter_mut().zip(dup.iter_mut()).zip(inputs) {
            let (g, u): (T, T) = (g.load(), u.load());
            let s = sigmoid(g, fma);
            *x = d * u * s * fma.mul_add(g, T::one() - s, T::one());
            *y = d * g * s;
        }
        O::store_slice(dgate, gate_out);
        O::store_slice(dup, up_out);
    }
}
