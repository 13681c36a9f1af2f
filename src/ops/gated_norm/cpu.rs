//! The gated norm on the CPU, in f32 or f64; inputs and output may be bf16.

use super::{GatedNorm, GatedNormGradients, GatedNormed};
use crate::Result;
use crate::ops::cpu::{
    self, Fma, PART, Real, StorageFloat, StoredSlice, StoredView, UninitBuffer, View, with_real, with_storage,
};
use candle_core::{DType, Tensor};
use rayon::prelude::*;
use std::mem::MaybeUninit;

pub(super) fn forward(norm: &GatedNorm, inputs: (&Tensor, &Tensor), out: DType) -> Result<GatedNormed> {
    with_storage!("gated norm", norm.weight.dtype(), out, T, O => forward_rows::<T, O>(norm, inputs))
}

pub(super) fn backward(
    norm: &GatedNorm,
    dnormed: &Tensor,
    inputs: (&Tensor, &Tensor),
    rstd: &Tensor,
) -> Result<GatedNormGradients> {
    with_real!("gated norm backward", norm.weight.dtype(), T => backward_rows::<T>(norm, dnormed, inputs, rstd))
}

/// y and z, as they are stored.
#[derive(Clone, Copy)]
struct GateInputs<'a, T> {
    y: StoredSlice<'a, T>,
    z: StoredSlice<'a, T>,
}

/// Room for the values of up to [`PART`] columns.
struct GateScratch<T> {
    y: [T; PART],
    z: [T; PART],
    g: [T; PART],
}

impl<T: Real> GateScratch<T> {
    fn new() -> Self {
        Self { y: [T::zero(); PART], z: [T::zero(); PART], g: [T::zero(); PART] }
    }
}

fn forward_rows<T: Real, O: StorageFloat<T>>(
    norm: &GatedNorm,
    (y, z): (&Tensor, &Tensor),
) -> Result<GatedNormed> {
    const OP: &str = "gated norm";
    let (rows, width) = y.dims2()?;
    let (group, eps) = (width / norm.groups, T::nearest(norm.eps));
    let (y, z) = (StoredView::<T>::new(OP, y)?, StoredView::<T>::new(OP, z)?);
    let inputs = GateInputs { y: y.as_slice(), z: z.as_slice() };
    let w = View::<T>::new(OP, &norm.weight)?;
    let w: &[T] = &w;
    let (mut normed, mut rstd) =
        (UninitBuffer::<O>::new(rows * width), UninitBuffer::<T>::new(rows * norm.groups));
    let per_task = cpu::rows_per_task(width);
    let outputs = normed.as_slice().par_chunks_mut((per_task * width).max(1));
    let outputs = outputs.zip(rstd.as_slice().par_chunks_mut(per_task * norm.groups));
    outputs.enumerate().for_each(|(task, (normed, rstd))| {
        cpu::simd(
            #[inline(always)]
            |fma| {
                let (mut scratch, mut gated) = (GateScratch::new(), vec![T::zero(); group]);
                let first = task * per_task * width;
                for (i, (out, s)) in normed.chunks_exact_mut(group.max(1)).zip(rstd).enumerate() {
                    let columns = first + i * group..first + (i + 1) * group;
                    let inputs =
                        GateInputs { y: inputs.y.range(columns.clone()), z: inputs.z.range(columns) };
                    let square = inputs.gate(&mut gated, &mut scratch, fma);
                    let s = *s.write((square / T::nearest(group as f64) + eps).sqrt().recip());
                    let w = &w[i % norm.groups * group..][..group];
                    gated.iter_mut().zip(w).for_each(|(g, &w)| *g = w * *g * s);
                    O::store_slice(&gated, out);
                }
            },
        );
    });
    // SAFETY: every row was normed.
    unsafe {
        Ok(GatedNormed {
            normed: normed.into_tensor((rows, width))?,
            rstd: rstd.into_tensor((rows, norm.groups))?,
        })
    }
}

impl<T: Real> GateInputs<'_, T> {
    /// Writes `y * silu(z)` to `g`, and returns the sum of its squares.
    #[inline(always)]
    fn gate(self, g: &mut [T], scratch: &mut GateScratch<T>, fma: Fma) -> T {
        for (i, g) in g.chunks_mut(PART).enumerate() {
            let part = i * PART..i * PART + g.len();
            let (y, z) = (self.y.range(part.clone()), self.z.range(part));
            let (y, z) = (y.widen(&mut scratch.y), z.widen(&mut scratch.z));
            for ((g, &y), &z) in g.iter_mut().zip(y).zip(z) {
                *g = y * (z * cpu::sigmoid(z, fma));
            }
        }
        cpu::dot(g, g, fma)
    }
}

fn backward_rows<T: Real>(
    norm: &GatedNorm,
    dnormed: &Tensor,
    (y, z): (&Tensor, &Tensor),
    rstd: &Tensor,
) -> Result<GatedNormGradients> {
    const OP: &str = "gated norm backward";
    let (rows, width) = y.dims2()?;
    let group = width / norm.groups;
    let (y, z) = (StoredView::<T>::new(OP, y)?, StoredView::<T>::new(OP, z)?);
    let inputs = GateInputs { y: y.as_slice(), z: z.as_slice() };
    let (dn, w, rstd) =
        (View::<T>::new(OP, dnormed)?, View::<T>::new(OP, &norm.weight)?, View::<T>::new(OP, rstd)?);
    let (dn, w, rstd): (&[T], &[T], &[T]) = (&dn, &w, &rstd);
    let (mut dy, mut dz) = (UninitBuffer::<T>::new(rows * width), UninitBuffer::<T>::new(rows * width));
    let per_task = cpu::rows_per_task(width);
    let len = (per_task * width).max(1);
    let outputs = dy.as_slice().par_chunks_mut(len).zip(dz.as_slice().par_chunks_mut(len));
    outputs.enumerate().for_each(|(task, (dy, dz))| {
        cpu::simd(
            #[inline(always)]
            |fma| {
                let mut scratch = GateScratch::new();
                let first = task * per_task * width;
                let outputs = dy.chunks_exact_mut(group.max(1)).zip(dz.chunks_exact_mut(group.max(1)));
                for (i, (dy, dz)) in outputs.enumerate() {
                    let columns = first + i * group..first + (i + 1) * group;
                    let task = GroupGradient {
                        dn: &dn[columns.clone()],
                        w: &w[i % norm.groups * group..][..group],
                        rstd: rstd[task * per_task * norm.groups + i],
                        inputs: GateInputs { y: inputs.y.range(columns.clone()), z: inputs.z.range(columns) },
                    };
                    task.write(dy, dz, &mut scratch, fma);
                }
            },
        );
    });
    // SAFETY: every row was written.
    unsafe { Ok(GatedNormGradients { y: dy.into_tensor((rows, width))?, z: dz.into_tensor((rows, width))? }) }
}

/// One row of one group.
struct GroupGradient<'a, T> {
    dn: &'a [T],
    w: &'a [T],
    rstd: T,
    inputs: GateInputs<'a, T>,
}

impl<T: Real> GroupGradient<'_, T> {
    /// Writes every element of both gradients.
    #[inline(always)]
    fn write(
        self,
        dy: &mut [MaybeUninit<T>],
        dz: &mut [MaybeUninit<T>],
        scratch: &mut GateScratch<T>,
        fma: Fma,
    ) {
        let Self { dn, w, rstd, inputs } = self;
        let GateScratch { y: y_scratch, z: z_scratch, g: terms } = scratch;
        // First silu(z) goes to dy and silu'(z) y to dz; g is y silu(z).
        let mut sum = T::zero();
        for (i, (dy, dz)) in dy.chunks_mut(PART).zip(dz.chunks_mut(PART)).enumerate() {
            let part = i * PART..i * PART + dy.len();
            let y = inputs.y.range(part.clone()).widen(y_scratch);
            let z = inputs.z.range(part.clone()).widen(z_scratch);
            let terms = &mut terms[..dy.len()];
            let weights = w[part.clone()].iter().zip(&dn[part]);
            for ((((dy, dz), term), (&y, &z)), (&w, &dn)) in
                dy.iter_mut().zip(dz.iter_mut()).zip(terms.iter_mut()).zip(y.iter().zip(z)).zip(weights)
            {
                let s = cpu::sigmoid(z, fma);
                dy.write(z * s);
                dz.write(y * s * fma.mul_add(z, T::one() - s, T::one()));
                *term = w * dn * y * (z * s);
            }
            sum += cpu::sum(terms);
        }
        let k = rstd * rstd * rstd * sum / T::nearest(dn.len() as f64);
        for (i, (dy, dz)) in dy.chunks_mut(PART).zip(dz.chunks_mut(PART)).enumerate() {
            let part = i * PART..i * PART + dy.len();
            let y = inputs.y.range(part.clone()).widen(y_scratch);
            // SAFETY: the loop above wrote every element.
            let (dy, dz) = unsafe { (cpu::assume_init(dy), cpu::assume_init(dz)) };
            let weights = w[part.clone()].iter().zip(&dn[part]);
            for (((dy, dz), &y), (&w, &dn)) in dy.iter_mut().zip(dz.iter_mut()).zip(y).zip(weights) {
                let dg = fma.mul_add(-k, y * *dy, rstd * (w * dn));
                *dy = dg * *dy;
                *dz = dg * *dz;
            }
        }
    }
}
