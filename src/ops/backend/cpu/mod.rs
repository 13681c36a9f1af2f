//! What the CPU kernels share: views of tensors as slices, outputs that are written before they are
//! read, row-parallel loops, vectors, rounding, and the one call into `gemm`.

use crate::{Error, Result};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Storage, StorageRef, Tensor, WithDType};
use half::bf16;
use rayon::prelude::*;
use std::marker::PhantomData;
use std::ops::{Deref, Range};

mod gemm;
mod pool;
mod round;
mod vectors;

pub(crate) use gemm::{Mat, gemm};
pub(crate) use pool::on_pool;
#[cfg(target_arch = "x86_64")]
pub(crate) use round::low;
pub(crate) use round::{Rows, round_pairs, round_slice};
pub(crate) use vectors::{Fma, dot, largest, simd, sum};

/// A float that the CPU kernels compute in: f32, and f64 for finite differences.
pub(crate) trait Real: WithDType + num_traits::Float + std::iter::Sum {
    /// e^x, in a form that vectorises; within 2 units in the last place.
    fn exp_(self, fma: Fma) -> Self;
    /// The elements of a storage of this dtype.
    fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]>;
    /// The nearest value to `x`.
    fn of(x: f64) -> Self {
        <Self as WithDType>::from_f64(x)
    }
    /// As f64.
    fn wide(self) -> f64 {
        <Self as WithDType>::to_f64(self)
    }
}

impl Real for f32 {
    #[inline(always)]
    fn exp_(self, fma: Fma) -> Self {
        vectors::exp_f32(self, fma)
    }
    fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]> {
        match storage {
            CpuStorage::F32(v) => Some(v),
            _ => None,
        }
    }
}

impl Real for f64 {
    fn exp_(self, _: Fma) -> Self {
        self.exp()
    }
    fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]> {
        match storage {
            CpuStorage::F64(v) => Some(v),
            _ => None,
        }
    }
}

/// A contiguous CPU tensor as a slice, for as long as its storage is locked for reading.
pub(crate) struct View<'a, T> {
    storage: StorageRef<'a>,
    range: Range<usize>,
    dtype: PhantomData<T>,
}

impl<'a, T: WithDType> View<'a, T> {
    pub(crate) fn new(op: &'static str, tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let (Storage::Cpu(cpu), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else {
            return Err(Error::Shape {
                op,
                expected: "a contiguous tensor on the CPU".into(),
                found: format!("{:?} on {:?}", layout.stride(), tensor.device()),
            });
        };
        cpu.as_slice::<T>()?;
        Ok(Self { storage, range: start..end, dtype: PhantomData })
    }
}

impl<T: WithDType> Deref for View<'_, T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        match &*self.storage {
            Storage::Cpu(cpu) => match cpu.as_slice::<T>() {
                Ok(slice) => &slice[self.range.clone()],
                Err(_) => unreachable!("the dtype was checked when the view was made"),
            },
            _ => unreachable!("the device was checked when the view was made"),
        }
    }
}

/// Runs `$body` with `$T` standing for the dtype that the CPU kernels compute in.
macro_rules! with_real {
    ($op:expr, $dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $T = f32;
                $body
            }
            candle_core::DType::F64 => {
                type $T = f64;
                $body
            }
            other => Err(crate::ops::cpu::not_real($op, other)),
        }
    };
}
pub(crate) use with_real;

/// As `with_real`, with `$O` standing for the dtype of the output: `$dtype` itself, or bf16 of f32.
macro_rules! with_stored {
    ($op:expr, $dtype:expr, $out:expr, $T:ident, $O:ident => $body:expr) => {
        match ($dtype, $out) {
            (candle_core::DType::F32, candle_core::DType::F32) => {
                type $T = f32;
                type $O = f32;
                $body
            }
            (candle_core::DType::F32, candle_core::DType::BF16) => {
                type $T = f32;
                type $O = half::bf16;
                $body
            }
            (candle_core::DType::F64, candle_core::DType::F64) => {
                type $T = f64;
                type $O = f64;
                $body
            }
            (dtype, out) => Err(crate::ops::cpu::not_stored($op, dtype, out)),
        }
    };
}
pub(crate) use with_stored;

/// An error where an op's output has another dtype than its input on a device that can't.
pub(crate) fn same_dtype(op: &'static str, x: &Tensor, out: DType) -> Result<()> {
    if x.dtype() == out { Ok(()) } else { Err(not_stored(op, x.dtype(), out)) }
}

pub(crate) fn not_stored(op: &'static str, dtype: DType, out: DType) -> Error {
    Error::Shape {
        op,
        expected: "an output in the dtype of the activations, or in bf16 where those are f32 on the CPU"
            .into(),
        found: format!("{out:?} of {dtype:?}"),
    }
}

pub(crate) fn not_real(op: &'static str, dtype: DType) -> Error {
    Error::Shape { op, expected: "f32 (or f64) activations on the CPU".into(), found: format!("{dtype:?}") }
}

/// A buffer of `n` elements, filled by `fill`, which must write each of them and read none before.
///
/// Fresh memory is not zeroed first (a step would clear over half a gigabyte for nothing). Builds with
/// debug assertions poison it with NaN instead, so that the tests see an element left unwritten.
pub(crate) fn overwrite<T: num_traits::Float>(n: usize, fill: impl FnOnce(&mut [T])) -> Vec<T> {
    let mut buffer: Vec<T> = Vec::with_capacity(n);
    if cfg!(debug_assertions) {
        buffer.resize(n, T::nan());
    } else {
        // SAFETY: the capacity is n, every bit pattern is a valid float, and `fill` writes all n
        // before anything reads them.
        #[allow(clippy::uninit_vec)]
        unsafe {
            buffer.set_len(n)
        };
    }
    fill(&mut buffer);
    buffer
}

/// A tensor that owns `buffer`.
pub(crate) fn tensor<T: WithDType>(
    buffer: Vec<T>,
    shape: impl candle_core::shape::ShapeWithOneHole,
) -> Result<Tensor> {
    Ok(Tensor::from_vec(buffer, shape, &candle_core::Device::Cpu)?)
}

/// A float as a kernel writes what it computed in `T`.
pub(crate) trait Stored<T>: WithDType + num_traits::Float {
    /// The nearest value to `x`, ties to even.
    fn stored(x: T) -> Self;

    /// The value that is stored.
    fn loaded(self) -> T;

    /// Stores all of `from` in `to`, which has its length.
    fn store_slice(from: &[T], to: &mut [Self]);

    /// Fills `to` with what `compute` writes in `T`, given the range of elements that it is to write; in `scratch`, if that
    /// is not how they are stored.
    fn fill(to: &mut [Self], scratch: &mut [T; PART], compute: impl FnMut(Range<usize>, &mut [T]));
}

impl<T: Real> Stored<T> for T {
    #[inline(always)]
    fn stored(x: T) -> T {
        x
    }

    #[inline(always)]
    fn loaded(self) -> T {
        self
    }

    #[inline(always)]
    fn store_slice(from: &[T], to: &mut [T]) {
        to.copy_from_slice(from);
    }

    #[inline(always)]
    fn fill(to: &mut [T], _: &mut [T; PART], mut compute: impl FnMut(Range<usize>, &mut [T])) {
        compute(0..to.len(), to);
    }
}

/// Elements that an op computes in a wider dtype at a time, before it stores them: they stay in the first-level cache.
pub(crate) const PART: usize = 512;

impl Stored<f32> for bf16 {
    #[inline(always)]
    fn stored(x: f32) -> Self {
        let bits = x.to_bits();
        let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
        // A NaN's payload may not carry over into its sign.
        Self::from_bits(if x.is_nan() { (bits >> 16) as u16 | 0x40 } else { rounded })
    }

    #[inline(always)]
    fn loaded(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn store_slice(from: &[f32], to: &mut [bf16]) {
        round_slice(from, to);
    }

    #[inline(always)]
    fn fill(to: &mut [bf16], scratch: &mut [f32; PART], mut compute: impl FnMut(Range<usize>, &mut [f32])) {
        for (i, to) in to.chunks_mut(PART).enumerate() {
            let wide = &mut scratch[..to.len()];
            compute(i * PART..i * PART + to.len(), wide);
            round_slice(wide, to);
        }
    }
}

/// `x`, in dtype `out`: its own, or bf16 of f32.
pub(crate) fn stored(op: &'static str, x: &Tensor, out: DType) -> Result<Tensor> {
    match (x.dtype(), out) {
        (DType::F32, DType::BF16) => round(op, x),
        _ => same_dtype(op, x, out).map(|()| x.clone()),
    }
}

/// `x` in f32, rounded to bf16.
pub(crate) fn round(op: &'static str, x: &Tensor) -> Result<Tensor> {
    let from = View::<f32>::new(op, x)?;
    let from: &[f32] = &from;
    let rounded = overwrite::<bf16>(from.len(), |out| {
        par_rows(
            out,
            1,
            #[inline(always)]
            |first, out, _| round_slice(&from[first..first + out.len()], out),
        );
    });
    tensor(rounded, x.dims())
}

/// Rows of `width` elements that one task takes: about 16 thousand elements, enough work to outweigh what a
/// task costs, few enough that a batch makes tasks for many cores.
pub(crate) fn rows_per_task(width: usize) -> usize {
    (16 * 1024 / width.max(1)).max(1)
}

/// Fills `out`, rows of `width` elements, in parallel: `f(first_row, rows, fma)`.
pub(crate) fn par_rows<T: Send>(out: &mut [T], width: usize, f: impl Fn(usize, &mut [T], Fma) + Sync) {
    let rows = rows_per_task(width);
    out.par_chunks_mut((rows * width).max(1)).enumerate().for_each(|(i, chunk)| {
        simd(
            #[inline(always)]
            |fma| f(i * rows, chunk, fma),
        )
    });
}

/// A pointer that tasks share; each writes a part that no other touches.
#[derive(Clone, Copy)]
pub(crate) struct Disjoint<T>(pub(crate) *mut T);
// SAFETY: whoever makes one promises that tasks write disjoint elements while the buffer lives.
unsafe impl<T: Send> Send for Disjoint<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Disjoint<T> {}

impl<T> Disjoint<T> {
    /// The element `i` and those behind it.
    ///
    /// # Safety
    /// `i` is inside the buffer.
    pub(crate) unsafe fn at(self, i: usize) -> *mut T {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(i) }
    }
}

/// Changes a contiguous CPU tensor's elements in place.
pub(crate) fn in_place<T: Real>(tensor: &Tensor, f: impl Fn(&mut [T]) + Sync) -> Result<()> {
    struct Op<F, T>(F, PhantomData<fn(T)>);
    impl<T: Real, F: Fn(&mut [T])> candle_core::InplaceOp1 for Op<F, T> {
        fn name(&self) -> &'static str {
            "in_place"
        }
        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &candle_core::Layout) -> candle_core::Result<()> {
            let Some((start, end)) = layout.contiguous_offsets() else {
                candle_core::bail!(
                    "in_place: expected a contiguous tensor, found strides {:?}",
                    layout.stride()
                )
            };
            let found = storage.dtype();
            match T::slice_mut(storage) {
                Some(slice) => (self.0)(&mut slice[start..end]),
                None => candle_core::bail!("in_place: expected {:?}, found {found:?}", T::DTYPE),
            }
            Ok(())
        }
    }
    Ok(tensor.inplace_op1(&Op(f, PhantomData::<fn(T)>))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_builds_poison_what_is_not_written() {
        let buffer = overwrite::<f32>(3, |out| out[1] = 1.0);
        assert!(!cfg!(debug_assertions) || (buffer[0].is_nan() && buffer[1] == 1.0));
    }
}
