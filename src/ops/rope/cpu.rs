//! The rotation on the CPU, in f32 or f64; matrices may be bf16.

use super::RopeTable;
use crate::Result;
use crate::ops::cpu::{self, Real, StorageFloat, UninitBuffer, View, with_storage};
use candle_core::{DType, Tensor};
use half::bf16;
use std::mem::MaybeUninit;

pub(super) fn rotate(
    table: &RopeTable,
    x: &Tensor,
    heads: usize,
    position_ids: &[u32],
    (sign, out): (f64, DType),
) -> Result<Tensor> {
    if (x.dtype(), out) == (DType::BF16, DType::BF16) {
        return rotate_rows::<f32, bf16, bf16>(table, x, heads, position_ids, sign as f32);
    }
    with_storage!("rope", x.dtype(), out, T, O => {
        rotate_rows::<T, T, O>(table, x, heads, position_ids, T::nearest(sign))
    })
}

/// The rotation in `T` of a matrix in `I` to one in `O`.
fn rotate_rows<T: Real, I: StorageFloat<T>, O: StorageFloat<T>>(
    table: &RopeTable,
    x: &Tensor,
    heads: usize,
    position_ids: &[u32],
    sign: T,
) -> Result<Tensor> {
    let ((t, width), d, half) = (x.dims2()?, table.head_dim, table.head_dim / 2);
    let (cos, sin) = (View::<T>::new("rope", &table.cos)?, View::<T>::new("rope", &table.sin)?);
    assert!(d.is_multiple_of(2), "a rotation of pairs, and heads of {d}");
    let x = View::<I>::new("rope", x)?;
    let (x, cos, sin): (&[I], &[T], &[T]) = (&x, &cos, &sin);
    let mut out = UninitBuffer::<O>::new(t * width);
    cpu::par_rows(
        out.as_slice(),
        width,
        #[inline(always)]
        |first, rows, _| {
            let x = x[first * width..].chunks_exact(width);
            for ((row, x), &p) in rows.chunks_exact_mut(width).zip(x).zip(&position_ids[first..]) {
                let angles = p as usize * half..(p as usize + 1) * half;
                let (cos, sin) = (&cos[angles.clone()], &sin[angles]);
                let ((row, copied), (x, others)) = (row.split_at_mut(heads * d), x.split_at(heads * d));
                for (head, x) in row.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
                    let ((low, high), (a, b)) = (head.split_at_mut(half), x.split_at(half));
                    rotate_half(low, (a, b), (cos, sin), -sign);
                    rotate_half(high, (b, a), (cos, sin), sign);
                }
                copied.iter_mut().zip(others).for_each(|(y, &x)| _ = y.write(O::store(x.load())));
            }
        },
    );
    // SAFETY: `x` and the positions have T rows; in each, both halves of the heads and the other columns were written.
    unsafe { out.into_tensor((t, width)) }
}

/// `x cos + sign y sin`: one coordinate of rotated pairs (x, y). Each of the two coordinates has a loop of its own, because
/// a loop with more addresses to tell apart does not vectorise.
#[inline(always)]
fn rotate_half<T: Real, I: StorageFloat<T>, O: StorageFloat<T>>(
    to: &mut [MaybeUninit<O>],
    (x, y): (&[I], &[I]),
    (cos, sin): (&[T], &[T]),
    sign: T,
) {
    for (z, ((&x, &y), (&c, &s))) in to.iter_mut().zip(x.iter().zip(y).zip(cos.iter().zip(sin))) {
        z.write(O::store(x.load() * c + sign * s * y.load()));
    }
}
