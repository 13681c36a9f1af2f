//! Detects values that are not finite in the type in which weights are read. Every tensor is checked while it is read,
//! because a NaN in an answer or a loss does not show the tensor that caused it.

use std::path::Path;

use candle_core::{DType, WithDType};
use half::{bf16, f16};
use safetensors::Dtype;

use crate::{Error, Result};

/// A float type in which weights are read.
pub(crate) trait Float: WithDType + num_traits::Zero {
    /// The nearest value to `x`.
    fn nearest(x: f32) -> Self;
}

impl Float for f32 {
    fn nearest(x: f32) -> Self {
        x
    }
}

impl Float for f16 {
    fn nearest(x: f32) -> Self {
        Self::from_f32(x)
    }
}

impl Float for bf16 {
    fn nearest(x: f32) -> Self {
        Self::from_f32(x)
    }
}

/// The least magnitudes that are not finite in a type, as bits of the types on disk: the bits of positive floats have
/// the order of their values, with NaN above infinity.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limit {
    f64: u64,
    f32: u32,
    bf16: u16,
    f16: u16,
}

impl Limit {
    /// For values that are read as `dtype`.
    pub(super) fn for_dtype(dtype: DType) -> Self {
        // Halfway between the largest value of the type and the next power of two; from there on rounding overflows.
        let least: f64 = match dtype {
            DType::F16 => 65_520.0,
            DType::BF16 => f64::from(f32::from_bits(0x7f7f_8000)),
            DType::F32 => 3.402_823_567_797_336_6e38,
            _ => f64::INFINITY,
        };
        let narrowed = |finite: f64| if least.is_infinite() { f64::INFINITY } else { finite };
        Self {
            f64: least.to_bits(),
            f32: (narrowed(least) as f32).to_bits(),
            // The first bf16 value that is not below the limit; f16 has no value that overflows in another type.
            bf16: if dtype == DType::F16 {
                bf16::from_f32(65_536.0).to_bits()
            } else {
                bf16::INFINITY.to_bits()
            },
            f16: f16::INFINITY.to_bits(),
        }
    }
}

/// The first of `values` that is not below the limit: its index and value.
pub(super) fn first_beyond(values: &[f32], limit: Limit) -> Option<(usize, f64)> {
    let beyond = |value: &f32| value.to_bits() & (u32::MAX >> 1) >= limit.f32;
    first(values, beyond).map(|at| (at, f64::from(values[at])))
}

/// The same for values on disk, little-endian; `None` for a type that is not a float.
pub(super) fn first_beyond_on_disk(bytes: &[u8], dtype: Dtype, limit: Limit) -> Option<(usize, f64)> {
    match dtype {
        Dtype::F64 => {
            let values = bytes.as_chunks::<8>().0;
            let beyond = |x: &[u8; 8]| u64::from_le_bytes(*x) & (u64::MAX >> 1) >= limit.f64;
            first(values, beyond).map(|at| (at, f64::from_le_bytes(values[at])))
        }
        Dtype::F32 => {
            let values = bytes.as_chunks::<4>().0;
            let beyond = |x: &[u8; 4]| u32::from_le_bytes(*x) & (u32::MAX >> 1) >= limit.f32;
            first(values, beyond).map(|at| (at, f64::from(f32::from_le_bytes(values[at]))))
        }
        Dtype::BF16 => {
            let values = bytes.as_chunks::<2>().0;
            let beyond = |x: &[u8; 2]| u16::from_le_bytes(*x) & (u16::MAX >> 1) >= limit.bf16;
            first(values, beyond).map(|at| (at, bf16::from_le_bytes(values[at]).to_f64()))
        }
        Dtype::F16 => {
            let values = bytes.as_chunks::<2>().0;
            let beyond = |x: &[u8; 2]| u16::from_le_bytes(*x) & (u16::MAX >> 1) >= limit.f16;
            first(values, beyond).map(|at| (at, f16::from_le_bytes(values[at]).to_f64()))
        }
        _ => None,
    }
}

/// Values that are checked together, without a branch between them, so that the loop is vectorised.
const TOGETHER: usize = 1024;

#[inline(always)]
fn first<T>(values: &[T], beyond: impl Fn(&T) -> bool) -> Option<usize> {
    let any = |values: &[T]| values.iter().fold(false, |any, value| any | beyond(value));
    let start = values.chunks(TOGETHER).position(any)? * TOGETHER;
    values[start..].iter().position(beyond).map(|at| start + at)
}

/// The place of value `index` in a tensor, `[row, column]`.
pub(super) fn place(shape: &[usize], index: usize) -> Vec<usize> {
    let mut rest = index;
    let mut place: Vec<usize> = shape
        .iter()
        .rev()
        .map(|size| {
            let at = rest % size.max(&1);
            rest /= size.max(&1);
            at
        })
        .collect();
    place.reverse();
    place
}

/// An error about a value that is not finite in `dtype`.
pub(super) fn error(path: &Path, name: &str, place: &[usize], value: f64, dtype: DType) -> Error {
    let problem = if value.is_finite() {
        let dtype = format!("{dtype:?}").to_lowercase();
        format!(
            "tensor `{name}`: expected values that {dtype} holds, found {value:e} at {place:?}; hint: model.dtype = \
             \"bf16\" or \"f32\""
        )
    } else {
        format!(
            "tensor `{name}`: expected finite values, found {value} at {place:?}: the file is damaged, or the training \
             that wrote it diverged; hint: download it again, or take another checkpoint"
        )
    };
    Error::Checkpoint { path: path.to_path_buf(), problem }
}

/// Returns an error if a value on disk is not finite in `dtype`; `start` is the index of the first value in its tensor.
pub(super) fn check_on_disk(
    (path, name, shape): (&Path, &str, &[usize]),
    (bytes, stored): (&[u8], Dtype),
    start: usize,
    dtype: DType,
) -> Result<()> {
    match first_beyond_on_disk(bytes, stored, Limit::for_dtype(dtype)) {
        None => Ok(()),
        Some((index, value)) => Err(error(path, name, &place(shape, start + index), value, dtype)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a conversion makes of the value decides.
    #[test]
    fn a_limit_is_where_rounding_overflows() {
        let around = |least: f32| [least.next_down(), least, -least, f32::NAN, f32::NEG_INFINITY];
        let f16s = around(65_520.0).map(|x| f16::from_f32(x).is_finite());
        let bf16s = around(f32::from_bits(0x7f7f_8000)).map(|x| bf16::from_f32(x).is_finite());
        assert_eq!((f16s, bf16s), ([true, false, false, false, false], [true, false, false, false, false]));
        for (dtype, values) in [
            (DType::F16, around(65_520.0)),
            (DType::BF16, around(f32::from_bits(0x7f7f_8000))),
            (DType::F32, [f32::MAX, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -f32::NAN]),
        ] {
            let finite = values.map(|x| first_beyond(&[0.0, x], Limit::for_dtype(dtype)).is_none());
            assert_eq!(finite, [true, false, false, false, false], "{dtype:?}");
        }
    }

    #[test]
    fn every_type_on_disk_is_looked_at() {
        let limit = Limit::for_dtype(DType::F32);
        let mut values = vec![1.5f32; 3000];
        values[2100] = f32::INFINITY;
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        assert_eq!(first_beyond_on_disk(&bytes, Dtype::F32, limit), Some((2100, f64::INFINITY)));
        let bytes: Vec<u8> = values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect();
        assert_eq!(first_beyond_on_disk(&bytes, Dtype::F16, limit), Some((2100, f64::INFINITY)));
        let bytes: Vec<u8> = values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect();
        assert_eq!(first_beyond_on_disk(&bytes, Dtype::BF16, limit), Some((2100, f64::INFINITY)));
        let bytes: Vec<u8> = values.iter().flat_map(|x| f64::from(*x).to_le_bytes()).collect();
        assert_eq!(first_beyond_on_disk(&bytes, Dtype::F64, limit), Some((2100, f64::INFINITY)));
        assert_eq!(first_beyond_on_disk(&1e39f64.to_le_bytes(), Dtype::F64, limit), Some((0, 1e39)));
        // The largest value of bf16 under 2^16, and 2^16.
        let bytes: Vec<u8> =
            [65_280.0f32, 65_536.0].iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect();
        assert_eq!(
            first_beyond_on_disk(&bytes, Dtype::BF16, Limit::for_dtype(DType::F16)),
            Some((1, 65_536.0))
        );
        assert_eq!(first_beyond_on_disk(&bytes, Dtype::BF16, limit), None);
        assert_eq!(first_beyond_on_disk(&[255; 8], Dtype::I64, limit), None);
        assert_eq!(place(&[3, 5], 13), [2, 3]);
    }
}
