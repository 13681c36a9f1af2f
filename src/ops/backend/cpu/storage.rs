//! The dtypes that outputs are stored in.

use super::round::round_into;
use super::{Real, UninitBuffer, View, assume_init, check_same_dtype, par_rows};
use crate::Result;
use candle_core::{DType, Tensor, WithDType};
use half::bf16;
use std::mem::MaybeUninit;
use std::ops::Range;

/// A float in which values are stored that are computed in `T`.
pub(crate) trait StorageFloat<T>: WithDType + num_traits::Float {
    /// The nearest value to `x`, ties to even.
    fn store(x: T) -> Self;

    /// The stored value in `T`.
    fn load(self) -> T;

    /// Stores all of `from` in `to`, which has its length.
    fn store_slice(from: &[T], to: &mut [MaybeUninit<Self>]);

    /// Computes parts of `to` and stores them: `compute` is called with ranges of elements, and writes their values in `T`
    /// either to `to` itself or, if `to` has another dtype, to `scratch`.
    ///
    /// # Safety
    /// `compute` writes every element of the slice that it is called with.
    unsafe fn fill(
        to: &mut [MaybeUninit<Self>],
        scratch: &mut [MaybeUninit<T>; PART],
        compute: impl FnMut(Range<usize>, &mut [MaybeUninit<T>]),
    );
}

impl<T: Real> StorageFloat<T> for T {
    #[inline(always)]
    fn store(x: T) -> T {
        x
    }

    #[inline(always)]
    fn load(self) -> T {
        self
    }

    #[inline(always)]
    fn store_slice(from: &[T], to: &mut [MaybeUninit<T>]) {
        assert_eq!(from.len(), to.len(), "values to store, and room for them");
        to.iter_mut().zip(from).for_each(|(y, &x)| _ = y.write(x));
    }

    #[inline(always)]
    unsafe fn fill(
        to: &mut [MaybeUninit<T>],
        _: &mut [MaybeUninit<T>; PART],
        mut compute: impl FnMut(Range<usize>, &mut [MaybeUninit<T>]),
    ) {
        compute(0..to.len(), to);
    }
}

/// Elements that an op computes in a wider dtype at a time before it stores them: they stay in the first-level cache.
pub(crate) const PART: usize = 512;

impl StorageFloat<f32> for bf16 {
    #[inline(always)]
    fn store(x: f32) -> Self {
        let bits = x.to_bits();
        let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
        // A NaN's payload may not carry over into its sign.
        Self::from_bits(if x.is_nan() { (bits >> 16) as u16 | 0x40 } else { rounded })
    }

    #[inline(always)]
    fn load(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn store_slice(from: &[f32], to: &mut [MaybeUninit<bf16>]) {
        round_into(from, to);
    }

    #[inline(always)]
    unsafe fn fill(
        to: &mut [MaybeUninit<bf16>],
        scratch: &mut [MaybeUninit<f32>; PART],
        mut compute: impl FnMut(Range<usize>, &mut [MaybeUninit<f32>]),
    ) {
        for (i, to) in to.chunks_mut(PART).enumerate() {
            let computed = &mut scratch[..to.len()];
            compute(i * PART..i * PART + to.len(), computed);
            // SAFETY: `compute` wrote every element.
            round_into(unsafe { assume_init(computed) }, to);
        }
    }
}

/// A contiguous CPU tensor of values in `T` or in bf16.
pub(crate) enum StoredView<'a, T> {
    Computed(View<'a, T>),
    Bf16(View<'a, bf16>),
}

impl<'a, T: Real> StoredView<'a, T> {
    /// # Errors
    /// Returns an error if the tensor is not contiguous, not on the CPU, or of another dtype.
    pub(crate) fn new(op: &'static str, tensor: &'a Tensor) -> Result<Self> {
        Ok(match tensor.dtype() {
            DType::BF16 => Self::Bf16(View::new(op, tensor)?),
            _ => Self::Computed(View::new(op, tensor)?),
        })
    }

    pub(crate) fn as_slice(&self) -> StoredSlice<'_, T> {
        match self {
            Self::Computed(view) => StoredSlice::Computed(view),
            Self::Bf16(view) => StoredSlice::Bf16(view),
        }
    }
}

/// Values in `T` or in bf16.
#[derive(Clone, Copy)]
pub(crate) enum StoredSlice<'a, T> {
    Computed(&'a [T]),
    Bf16(&'a [bf16]),
}

impl<'a, T: Real> StoredSlice<'a, T> {
    /// The values of a range.
    #[inline(always)]
    pub(crate) fn range(self, range: Range<usize>) -> Self {
        match self {
            Self::Computed(values) => Self::Computed(&values[range]),
            Self::Bf16(values) => Self::Bf16(&values[range]),
        }
    }

    /// Writes the values to `to`, which has their number.
    #[inline(always)]
    pub(crate) fn load(self, to: &mut [T]) {
        match self {
            Self::Computed(values) => to.copy_from_slice(values),
            Self::Bf16(values) => {
                assert_eq!(values.len(), to.len(), "values to load, and room for them");
                to.iter_mut().zip(values).for_each(|(y, &x)| *y = T::widened(x));
            }
        }
    }

    /// The values in `T`: themselves, or those of bf16 in `scratch`.
    #[inline(always)]
    pub(crate) fn widen<'s>(self, scratch: &'s mut [T]) -> &'s [T]
    where
        'a: 's,
    {
        match self {
            Self::Computed(values) => values,
            Self::Bf16(values) => {
                let scratch = &mut scratch[..values.len()];
                self.load(scratch);
                scratch
            }
        }
    }
}

/// `x` in dtype `out`, which is its own, or bf16 of f32.
///
/// # Errors
/// Returns an error for another `out`, or if `x` is not contiguous on the CPU.
pub(crate) fn to_storage(op: &'static str, x: &Tensor, out: DType) -> Result<Tensor> {
    match (x.dtype(), out) {
        (DType::F32, DType::BF16) => round(op, x),
        _ => check_same_dtype(op, x, out).map(|()| x.clone()),
    }
}

/// `x`, which is f32, rounded to bf16.
///
/// # Errors
/// Returns an error if `x` is not contiguous on the CPU.
pub(crate) fn round(op: &'static str, x: &Tensor) -> Result<Tensor> {
    let from = View::<f32>::new(op, x)?;
    let from: &[f32] = &from;
    let mut rounded = UninitBuffer::<bf16>::new(from.len());
    par_rows(
        rounded.as_slice(),
        1,
        #[inline(always)]
        |first, out, _| round_into(&from[first..first + out.len()], out),
    );
    // SAFETY: every part was rounded.
    unsafe { rounded.into_tensor(x.dims()) }
}
