//! The activation on the CPU, in f32 or f64; matrices may be bf16.

use crate::Result;
use crate::ops::cpu::{
    self, Disjoint, PART, Real, StorageFloat, UninitBuffer, View, check_same_dtype, with_storage,
};
use crate::ops::experts::Routing;
use crate::ops::swiglu::SwigluRow;
use candle_core::Tensor;
use std::mem::MaybeUninit;

pub(in crate::ops::experts) fn forward(h: &Tensor, routing: &Routing) -> Result<Tensor> {
    let dtype = routing.weights.dtype();
    with_storage!("experts activation", dtype, h.dtype(), T, O => forward_rows::<T, O>(h, routing))
}

fn forward_rows<T: Real, O: StorageFloat<T>>(h: &Tensor, routing: &Routing) -> Result<Tensor> {
    const OP: &str = "experts activation";
    let (s, width) = h.dims2()?;
    let f = width / 2;
    let (x, weights) = (View::<O>::new(OP, h)?, View::<T>::new(OP, &routing.weights)?);
    let order = View::<u32>::new(OP, &routing.sorted.order)?;
    let (x, weights, order): (&[O], &[T], &[u32]) = (&x, &weights, &order);
    let mut out = UninitBuffer::<O>::new(s * f);
    cpu::par_rows(
        out.as_slice(),
        f,
        #[inline(always)]
        |first, rows, fma| {
            let mut scratch = [MaybeUninit::uninit(); PART];
            let inputs = x[first * width..].chunks_exact(width).zip(&order[first..]);
            for (row, (x, &pair)) in rows.chunks_exact_mut(f).zip(inputs) {
                let weight = weights[pair as usize];
                SwigluRow { gate_up: x, weight, fma }.forward(row, &mut scratch);
            }
        },
    );
    // SAFETY: `h` has S rows and there are S pairs, so that every row was written.
    unsafe { out.into_tensor((s, f)) }
}

pub(in crate::ops::experts) fn backward(
    da: &Tensor,
    h: &Tensor,
    routing: &Routing,
) -> Result<(Tensor, Tensor)> {
    const OP: &str = "experts activation backward";
    check_same_dtype(OP, da, routing.weights.dtype())?;
    with_storage!(OP, da.dtype(), h.dtype(), T, O => backward_rows::<T, O>(da, h, routing))
}

fn backward_rows<T: Real, O: StorageFloat<T>>(
    da: &Tensor,
    h: &Tensor,
    routing: &Routing,
) -> Result<(Tensor, Tensor)> {
    const OP: &str = "experts activation backward";
    let (s, width) = h.dims2()?;
    let f = width / 2;
    let (da, x) = (View::<T>::new(OP, da)?, View::<O>::new(OP, h)?);
    let (weights, order) =
        (View::<T>::new(OP, &routing.weights)?, View::<u32>::new(OP, &routing.sorted.order)?);
    let (da, x, weights, order): (&[T], &[O], &[T], &[u32]) = (&da, &x, &weights, &order);
    let (mut dh, mut dweights) = (UninitBuffer::<O>::new(s * width), UninitBuffer::<T>::new(s));
    let dweight_elements = Disjoint::new(dweights.as_slice());
    cpu::par_rows(
        dh.as_slice(),
        width,
        #[inline(always)]
        |first, rows, fma| {
            let mut scratch = [[T::zero(); PART]; 3];
            let inputs = da[first * f..].chunks_exact(f).zip(x[first * width..].chunks_exact(width));
            let pairs = (first..).zip(&order[first..]);
            for ((row, (da, x)), (place, &pair)) in rows.chunks_exact_mut(width).zip(inputs).zip(pairs) {
                let weight = weights[pair as usize];
                let row = SwigluRow { gate_up: x, weight, fma }.backward::<true>(da, row, &mut scratch);
                // SAFETY: `place` is a row of this task alone, and `order` has S elements as `dweights` has.
                unsafe { dweight_elements.element(place).write(row) };
            }
        },
    );
    // SAFETY: `da` and `h` have S rows and there are S pairs, so that every row and its weight's gradient were written.
    unsafe { Ok((dh.into_tensor((s, width))?, dweights.into_tensor(s)?)) }
}
