//! Slices of tensors, buffers that are written before they are read, and parallel loops over their rows.

use super::{Fma, Real, simd};
use crate::{Error, Result};
use candle_core::backend::BackendStorage;
use candle_core::shape::ShapeWithOneHole;
use candle_core::{CpuStorage, Device, Storage, StorageRef, Tensor, WithDType};
use rayon::prelude::*;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::{Deref, Range};

/// A contiguous CPU tensor as a slice, for as long as its storage is locked for reading.
pub(crate) struct View<'a, T> {
    storage: StorageRef<'a>,
    range: Range<usize>,
    dtype: PhantomData<T>,
}

impl<'a, T: WithDType> View<'a, T> {
    /// # Errors
    /// Returns an error if the tensor is not contiguous, not on the CPU, or of another dtype.
    pub(crate) fn new(op: &'static str, tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let (Storage::Cpu(cpu), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else {
            return Err(Error::shape(
                op,
                "a contiguous tensor on the CPU",
                format!("{:?} on {:?}", layout.stride(), tensor.device()),
            ));
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

/// Memory for the output of an op, which writes every element of it.
///
/// The memory is not set to zero first: a step would clear more than half a gigabyte for nothing. Builds with debug
/// assertions fill it with NaN instead, so that a test sees an element that was not written.
pub(crate) struct UninitBuffer<T> {
    memory: Vec<T>,
    n: usize,
}

impl<T: num_traits::Float> UninitBuffer<T> {
    /// Memory for `n` elements.
    pub(crate) fn new(n: usize) -> Self {
        let mut buffer = Self { memory: Vec::with_capacity(n), n };
        if cfg!(debug_assertions) {
            buffer.as_slice().fill(MaybeUninit::new(T::nan()));
        }
        buffer
    }

    /// All elements.
    pub(crate) fn as_slice(&mut self) -> &mut [MaybeUninit<T>] {
        &mut self.memory.spare_capacity_mut()[..self.n]
    }

    /// The elements as a vector.
    ///
    /// # Safety
    /// Every element was written.
    pub(crate) unsafe fn into_vec(mut self) -> Vec<T> {
        // SAFETY: the capacity is at least `n`, and the caller wrote that many elements.
        unsafe { self.memory.set_len(self.n) };
        self.memory
    }

    /// The elements as a tensor of this shape.
    ///
    /// # Safety
    /// Every element was written.
    ///
    /// # Errors
    /// Returns an error if the shape has another number of elements.
    pub(crate) unsafe fn into_tensor(self, shape: impl ShapeWithOneHole) -> Result<Tensor>
    where
        T: WithDType,
    {
        // SAFETY: the caller's promise.
        tensor(unsafe { self.into_vec() }, shape)
    }
}

/// The values of elements that were written.
///
/// # Safety
/// Every element was written.
#[inline(always)]
pub(crate) unsafe fn assume_init<T>(elements: &mut [MaybeUninit<T>]) -> &mut [T] {
    // SAFETY: `MaybeUninit<T>` has the layout of `T`, and the caller wrote every element.
    unsafe { &mut *(std::ptr::from_mut(elements) as *mut [T]) }
}

/// A tensor that owns `buffer`.
///
/// # Errors
/// Returns an error if the shape has another number of elements.
pub(crate) fn tensor<T: WithDType>(buffer: Vec<T>, shape: impl ShapeWithOneHole) -> Result<Tensor> {
    Ok(Tensor::from_vec(buffer, shape, &Device::Cpu)?)
}

/// Rows of `width` elements that one task processes: about 16 thousand elements, enough work to outweigh the cost of a
/// task, and few enough that a batch makes tasks for many cores.
pub(crate) fn rows_per_task(width: usize) -> usize {
    (16 * 1024 / width.max(1)).max(1)
}

/// Calls `f(first_row, rows, fma)` for parts of `out`, which has rows of `width` elements, in parallel.
pub(crate) fn par_rows<T: Send>(out: &mut [T], width: usize, f: impl Fn(usize, &mut [T], Fma) + Sync) {
    let rows = rows_per_task(width);
    par_chunks(out, rows * width, &|i, chunk| {
        simd(
            #[inline(always)]
            |fma| f(i * rows, chunk, fma),
        )
    });
}

/// Calls `f(i, chunk)` for chunks of `len` elements, in parallel. `f` is no type parameter, so that rayon's code is compiled
/// once for a type of elements, not again for every loop.
pub(crate) fn par_chunks<T: Send>(out: &mut [T], len: usize, f: &(dyn Fn(usize, &mut [T]) + Sync)) {
    out.par_chunks_mut(len.max(1)).enumerate().for_each(|(i, chunk)| f(i, chunk));
}

/// Calls `f(i)` for i below `n`, in parallel. `f` is no type parameter, as in `par_chunks`.
pub(crate) fn par_tasks(n: usize, f: &(dyn Fn(usize) + Sync)) {
    (0..n).into_par_iter().for_each(f);
}

/// A buffer that parallel tasks write, each at elements of its own.
pub(crate) struct Disjoint<'a, T> {
    first: *mut T,
    buffer: PhantomData<&'a mut [T]>,
}

impl<T> Clone for Disjoint<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Disjoint<'_, T> {}
// SAFETY: elements are reached through `element` alone, whose callers promise that no two threads use one element.
unsafe impl<T: Send> Send for Disjoint<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    /// The elements of `buffer`, which is borrowed as long as a copy of this value lives.
    pub(crate) fn new(buffer: &'a mut [MaybeUninit<T>]) -> Self {
        Self { first: buffer.as_mut_ptr().cast(), buffer: PhantomData }
    }

    /// Address of element `i`.
    ///
    /// # Safety
    /// No other task uses the elements that the caller reaches from there, and the caller reads none before it is written.
    pub(crate) unsafe fn element(self, i: usize) -> *mut T {
        self.first.wrapping_add(i)
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
    fn uninit_buffer_is_nan_in_debug_builds() {
        let mut buffer = UninitBuffer::<f32>::new(3);
        assert_eq!(buffer.as_slice().len(), 3);
        if cfg!(debug_assertions) {
            buffer.as_slice()[1].write(1.0);
            // SAFETY: a build with debug assertions writes every element.
            let values = unsafe { buffer.into_vec() };
            assert!(values[0].is_nan() && values[1] == 1.0 && values[2].is_nan());
        }
    }
}
