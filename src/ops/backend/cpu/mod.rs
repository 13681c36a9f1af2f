//! What the CPU code of the ops shares: the dtypes that it computes and stores in, slices of tensors, output buffers,
//! loops over rows, vectors, rounding, and the one call of `gemm`.

use crate::{Error, Result};
use candle_core::{CpuStorage, DType, Tensor, WithDType};
use std::mem::MaybeUninit;

mod buffer;
mod gemm;
mod matrix;
mod pool;
mod round;
mod storage;
mod vectors;

pub(crate) use buffer::{
    Disjoint, UninitBuffer, View, assume_init, in_place, par_chunks, par_rows, par_tasks, rows_per_task,
    tensor,
};
pub(crate) use gemm::{Gemm, gemm};
pub(crate) use matrix::{Mat, MatMut};
pub(crate) use pool::on_pool;
#[cfg(target_arch = "x86_64")]
pub(crate) use round::low_mask;
pub(crate) use round::{F32Rows, round_pairs, round_slice};
pub(crate) use storage::{PART, StorageFloat, StoredSlice, StoredView, round, to_storage};
pub(crate) use vectors::{Fma, add_scaled, dot, largest, sigmoid, simd, sum};

/// A float that the CPU code computes in: f32, and f64 for finite differences.
pub(crate) trait Real: WithDType + num_traits::Float + std::iter::Sum {
    /// e^x, in a form that vectorises; within 2 units in the last place.
    fn fast_exp(self, fma: Fma) -> Self;
    /// ln(1 + e^x), x itself above 20 as in PyTorch, in a form that vectorises; within a few units in the last place.
    fn softplus(self, fma: Fma) -> Self;
    /// The elements of a storage of this dtype; `None` for another dtype.
    fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]>;
    /// The value of a bf16, exactly.
    fn widened(x: half::bf16) -> Self;
    /// The elements, if this is f32.
    fn as_f32(_: &[Self]) -> Option<&[f32]> {
        None
    }
    /// The elements of an output, if this is f32.
    fn as_f32_output(_: &mut [MaybeUninit<Self>]) -> Option<&mut [MaybeUninit<f32>]> {
        None
    }
    /// The nearest value to `x`.
    fn nearest(x: f64) -> Self {
        <Self as WithDType>::from_f64(x)
    }
    /// The value as f64.
    fn as_f64(self) -> f64 {
        <Self as WithDType>::to_f64(self)
    }
}

impl Real for f32 {
    #[inline(always)]
    fn fast_exp(self, fma: Fma) -> Self {
        vectors::exp_f32(self, fma)
    }
    #[inline(always)]
    fn softplus(self, fma: Fma) -> Self {
        vectors::softplus_f32(self, fma)
    }
    fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]> {
        match storage {
            CpuStorage::F32(v) => Some(v),
            _ => None,
        }
    }
    #[inline(always)]
    fn widened(x: half::bf16) -> Self {
        x.load()
    }
    fn as_f32(elements: &[Self]) -> Option<&[f32]> {
        Some(elements)
    }
    fn as_f32_output(elements: &mut [MaybeUninit<Self>]) -> Option<&mut [MaybeUninit<f32>]> {
        Some(elements)
    }
    #[inline(always)]
    fn nearest(x: f64) -> Self {
        x as f32
    }
    #[inline(always)]
    fn as_f64(self) -> f64 {
        Self::into(self)
    }
}

impl Real for f64 {
    fn fast_exp(self, _: Fma) -> Self {
        self.exp()
    }
    fn softplus(self, _: Fma) -> Self {
        if self > 20.0 { self } else { self.exp().ln_1p() }
    }
    fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]> {
        match storage {
            CpuStorage::F64(v) => Some(v),
            _ => None,
        }
    }
    fn widened(x: half::bf16) -> Self {
        Self::from(x.to_f32())
    }
}

/// Runs `$body` with `$T` standing for the dtype that the CPU code computes in; another dtype is an error.
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
            other => Err(crate::ops::cpu::unsupported_dtype($op, other)),
        }
    };
}
pub(crate) use with_real;

/// As `with_real`, with `$O` standing for the dtype of the output: `$dtype` itself, or bf16 if `$dtype` is f32.
macro_rules! with_storage {
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
            (dtype, out) => Err(crate::ops::cpu::unsupported_output($op, dtype, out)),
        }
    };
}
pub(crate) use with_storage;

/// Returns an error if `x` has another dtype than `out`.
pub(crate) fn check_same_dtype(op: &'static str, x: &Tensor, out: DType) -> Result<()> {
    if x.dtype() == out { Ok(()) } else { Err(unsupported_output(op, x.dtype(), out)) }
}

/// The error of an op that has no output in dtype `out` for inputs in `dtype`.
pub(crate) fn unsupported_output(op: &'static str, dtype: DType, out: DType) -> Error {
    Error::shape(
        op,
        "an output in the dtype of the activations, or in bf16 where those are f32 on the CPU",
        format!("{out:?} of {dtype:?}"),
    )
}

/// The error of an op that the CPU does not compute in `dtype`.
pub(crate) fn unsupported_dtype(op: &'static str, dtype: DType) -> Error {
    Error::shape(op, "f32 (or f64) activations on the CPU", format!("{dtype:?}"))
}
