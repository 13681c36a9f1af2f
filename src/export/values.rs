//! The written form of values, and the two matrices that get new rows.

use super::base::{Base, EMBEDDING};
use super::place::Placed;
use super::unlikely::Unlikely;
use crate::checkpoint::stored::StoredDtype;
use crate::{Error, Result};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{D, DType, Device, Tensor};
use safetensors::Dtype;
use std::borrow::Cow;

/// The type of floating-point values on disk, with f32 for f64; `None` for other values.
pub(super) fn ggml(stored: StoredDtype) -> Option<GgmlDType> {
    match stored {
        StoredDtype::Gguf(dtype) => Some(dtype),
        StoredDtype::Safetensors(Dtype::F32 | Dtype::F64) => Some(GgmlDType::F32),
        StoredDtype::Safetensors(Dtype::F16) => Some(GgmlDType::F16),
        StoredDtype::Safetensors(Dtype::BF16) => Some(GgmlDType::BF16),
        StoredDtype::Safetensors(_) => None,
    }
}

/// The GGUF type of values on disk; f32 for a type that GGUF does not have.
pub(super) fn ggml_or_f32(stored: StoredDtype) -> GgmlDType {
    ggml(stored).unwrap_or(GgmlDType::F32)
}

/// Whether the values on disk already have the type `dtype`.
pub(super) fn is(stored: StoredDtype, dtype: GgmlDType) -> bool {
    stored != StoredDtype::Safetensors(Dtype::F64) && ggml(stored) == Some(dtype)
}

/// Whether values of this type are quantised in blocks.
pub(super) fn is_quantised(dtype: GgmlDType) -> bool {
    dtype.block_size() > 1
}

/// The values of an f32 tensor in `dtype`, little-endian; rows of a quantised type must be whole blocks.
///
/// # Errors
/// Returns an error if a value is too large for the type, or if rows are not whole blocks.
pub(super) fn encode(values: &Tensor, dtype: GgmlDType) -> Result<Vec<u8>> {
    let flat = values.flatten_all()?;
    let finite = |all: bool| {
        let problem = || {
            Error::Invalid(format!(
                "--type: expected values that fit {dtype:?}, found larger ones; hint: bf16"
            ))
        };
        if all { Ok(()) } else { Err(problem()) }
    };
    Ok(match dtype {
        GgmlDType::F32 => flat.to_vec1::<f32>()?.into_iter().flat_map(f32::to_le_bytes).collect(),
        GgmlDType::F16 => {
            let halves = flat.to_dtype(DType::F16)?.to_vec1::<half::f16>()?;
            finite(halves.iter().all(|value| value.is_finite()))?;
            halves.into_iter().flat_map(half::f16::to_le_bytes).collect()
        }
        GgmlDType::BF16 => {
            let halves = flat.to_dtype(DType::BF16)?.to_vec1::<half::bf16>()?;
            finite(halves.iter().all(|value| value.is_finite()))?;
            halves.into_iter().flat_map(half::bf16::to_le_bytes).collect()
        }
        // candle quantises all of a tensor's memory, also if the tensor is a part of it.
        quantised => QTensor::quantize(&values.force_contiguous()?, quantised)?.data()?.into_owned(),
    })
}

/// Largest fraction of its norm that a row loses if it is written as `dtype`.
pub(super) fn rounding(rows: &Tensor, dtype: GgmlDType) -> Result<f64> {
    let rounded = match dtype {
        GgmlDType::F32 => return Ok(0.0),
        GgmlDType::F16 => rows.to_dtype(DType::F16)?.to_dtype(DType::F32)?,
        GgmlDType::BF16 => rows.to_dtype(DType::BF16)?.to_dtype(DType::F32)?,
        quantised => QTensor::quantize(rows, quantised)?.dequantize(&Device::Cpu)?,
    };
    let norms = |rows: &Tensor| -> Result<Vec<f32>> { Ok(rows.sqr()?.sum(D::Minus1)?.sqrt()?.to_vec1()?) };
    let lost = norms(&(rows - rounded)?)?;
    let parts = lost.iter().zip(norms(rows)?).filter(|(_, norm)| *norm > 0.0);
    Ok(parts.map(|(lost, norm)| f64::from(*lost) / f64::from(norm)).fold(0.0, f64::max))
}

impl Base {
    /// A matrix of the vocabulary, f32 [V, C].
    pub fn config_matrix(&self, name: &str) -> Result<Tensor> {
        let shape = [self.config.vocab_size, self.config.hidden_size];
        self.weights.tensor(name, &shape, DType::F32, &Device::Cpu)
    }

    /// Type of a matrix's values.
    pub fn dtype_of(&self, name: &str) -> Result<GgmlDType> {
        let stored = self.weights.stored(name)?.dtype;
        ggml(stored).ok_or_else(|| {
            let problem = format!("tensor `{name}`: expected floating-point values, found {stored:?}");
            Error::Checkpoint { path: self.weights.path().to_path_buf(), problem }
        })
    }
}

/// Embedding and head with the rows of the new tokens.
pub(super) struct Matrices<'a> {
    pub base: &'a Base,
    pub placed: &'a Placed,
    /// The head's rows for the new tokens, f32 [N, C].
    unlikely: Tensor,
}

impl<'a> Matrices<'a> {
    pub fn new(base: &'a Base, placed: &'a Placed, unlikely: &Unlikely) -> Result<Self> {
        let row = Tensor::new(unlikely.row.as_slice(), &Device::Cpu)?;
        let unlikely = row.unsqueeze(0)?.broadcast_as(placed.rows.shape())?.contiguous()?;
        Ok(Self { base, placed, unlikely })
    }

    /// Rows of both; the base may have unused ones.
    pub fn vocab_size(&self) -> usize {
        self.base.config.vocab_size.max(self.placed.ids().end as usize)
    }

    pub fn shape(&self) -> [usize; 2] {
        [self.vocab_size(), self.base.config.hidden_size]
    }

    /// The embedding as `dtype`, in consecutive pieces.
    pub fn embedding(&self, dtype: GgmlDType) -> Result<[Cow<'_, [u8]>; 3]> {
        self.grown(EMBEDDING, &self.placed.rows, dtype)
    }

    /// The head.
    pub fn head(&self, dtype: GgmlDType) -> Result<[Cow<'_, [u8]>; 3]> {
        self.grown(self.base.head(), &self.unlikely, dtype)
    }

    /// The base's rows before the new ones, the new ones, and the base's rows after them.
    fn grown(&self, name: &str, new: &Tensor, dtype: GgmlDType) -> Result<[Cow<'_, [u8]>; 3]> {
        let stored = self.base.weights.stored(name)?;
        let old = match is(stored.dtype, dtype) {
            true => Cow::Borrowed(stored.bytes),
            false => Cow::Owned(encode(&self.base.config_matrix(name)?, dtype)?),
        };
        let rows = self.base.config.vocab_size;
        let (row, ids) = (old.len() / rows, self.placed.ids());
        let (start, end) = (ids.start as usize * row, (ids.end as usize).min(rows) * row);
        let [before, after] = match old {
            Cow::Borrowed(old) => [Cow::Borrowed(&old[..start]), Cow::Borrowed(&old[end..])],
            Cow::Owned(mut old) => {
                let after = old.split_off(end);
                old.truncate(start);
                [Cow::Owned(old), Cow::Owned(after)]
            }
        };
        Ok([before, Cow::Owned(encode(new, dtype)?), after])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_that_of_the_type() {
        let rows = Tensor::new(&[[1.0f32, 0.0], [1.0 + 1.0 / 256.0, 0.0]], &Device::Cpu).unwrap();
        assert_eq!(rounding(&rows, GgmlDType::F32).unwrap(), 0.0);
        // bf16 has 8 bits: 1 + 1/256 lies in the middle of two.
        let expected = (1.0 / 256.0) / (1.0 + 1.0 / 256.0);
        assert!((rounding(&rows, GgmlDType::BF16).unwrap() - expected).abs() < 1e-7);
        assert_eq!(rounding(&rows, GgmlDType::F16).unwrap(), 0.0);
    }

    #[test]
    fn a_value_that_does_not_fit_is_refused() {
        let rows = Tensor::new(&[[1e5f32]], &Device::Cpu).unwrap();
        assert!(encode(&rows, GgmlDType::F16).unwrap_err().to_string().contains("hint: bf16"));
        assert_eq!(encode(&rows, GgmlDType::F32).unwrap(), 1e5f32.to_le_bytes());
    }
}
