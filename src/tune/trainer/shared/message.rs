//! What ranks send each other in a step: some numbers, and the values of a matrix.
//!
//! ```text
//! f64 [N]   f32 or f64 [n]     little-endian; no values from a rank without examples
//! ```

use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};

/// `N` numbers and the bytes of a matrix.
#[derive(Debug, PartialEq)]
pub(super) struct StepMessage<const N: usize> {
    pub(super) numbers: [f64; N],
    pub(super) values: Vec<u8>,
}

impl<const N: usize> StepMessage<N> {
    pub(super) fn numbers(numbers: [f64; N]) -> Self {
        Self { numbers, values: Vec::new() }
    }

    pub(super) fn encode(self) -> Vec<u8> {
        let mut bytes: Vec<u8> = self.numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        bytes.extend(self.values);
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self> {
        let Some((numbers, values)) = bytes.split_at_checked(8 * N) else {
            return Err(other(format!("at least {} bytes", 8 * N), bytes.len()));
        };
        let mut all = [0.0; N];
        for (number, bytes) in all.iter_mut().zip(numbers.chunks_exact(8)) {
            *number = bytes.try_into().map(f64::from_le_bytes).unwrap_or(f64::NAN);
        }
        Ok(Self { numbers: all, values: values.to_vec() })
    }
}

/// The dtype in which a matrix is sent: f64 if it is f64, otherwise f32.
pub(super) fn value_dtype(values: &Tensor) -> DType {
    if values.dtype() == DType::F64 { DType::F64 } else { DType::F32 }
}

/// The values of a tensor as bytes of `dtype`, which is f32 or f64; waits for the device.
pub(super) fn bytes(values: &Tensor, dtype: DType) -> Result<Vec<u8>> {
    let values = values.to_device(&Device::Cpu)?.to_dtype(dtype)?.flatten_all()?;
    Ok(match dtype {
        DType::F64 => values.to_vec1::<f64>()?.into_iter().flat_map(f64::to_le_bytes).collect(),
        _ => values.to_vec1::<f32>()?.into_iter().flat_map(f32::to_le_bytes).collect(),
    })
}

/// Bytes of [`bytes`] as a tensor of the shape and dtype of `like`, on the CPU.
pub(super) fn tensor(bytes: &[u8], like: &Tensor) -> Result<Tensor> {
    let dtype = value_dtype(like);
    let expected = like.elem_count() * dtype.size_in_bytes();
    if bytes.len() != expected {
        return Err(other(format!("{expected} bytes of values"), bytes.len()));
    }
    Ok(Tensor::from_raw_buffer(bytes, dtype, like.dims(), &Device::Cpu)?.to_dtype(like.dtype())?)
}

/// The sum of matrices of `dtype`, which is f32 or f64, added in f64 in their order. Those without values are left out.
pub(super) fn sum<'a>(parts: impl Iterator<Item = &'a [u8]>, dtype: DType) -> Result<Vec<f64>> {
    let mut sums: Option<Vec<f64>> = None;
    for part in parts.filter(|part| !part.is_empty()) {
        let values: Vec<f64> = match dtype {
            DType::F64 => part.as_chunks().0.iter().copied().map(f64::from_le_bytes).collect(),
            _ => part.as_chunks().0.iter().map(|bytes| f64::from(f32::from_le_bytes(*bytes))).collect(),
        };
        match &mut sums {
            None => sums = Some(values),
            Some(sums) if sums.len() == values.len() => {
                sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
            }
            Some(sums) => return Err(other(format!("{} values", sums.len()), values.len())),
        }
    }
    sums.ok_or_else(|| other("the gradient of at least one rank".into(), 0))
}

fn other(expected: String, found: usize) -> Error {
    Error::Ranks {
        problem: format!("a message between ranks: expected {expected}, found {found}"),
        is_bad_input: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_comes_back() {
        let message = StepMessage { numbers: [1.5, f64::NAN], values: vec![1, 2, 3] };
        let read = StepMessage::<2>::decode(&message.encode()).unwrap();
        assert!(read.numbers[0] == 1.5 && read.numbers[1].is_nan() && read.values == [1, 2, 3]);
        assert!(StepMessage::<2>::decode(&[0; 15]).is_err());
    }

    #[test]
    fn sum_is_in_order_and_leaves_out_what_is_empty() {
        for dtype in [DType::F32, DType::F64] {
            let tensor =
                |values: [f64; 3]| Tensor::new(&values, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            let parts = [tensor([1.0, 2.0, 3.0]), tensor([0.5, -2.0, f64::NAN])];
            let [a, b] = parts.each_ref().map(|part| bytes(part, dtype).unwrap());
            let found = sum([&a[..], &[], &b].into_iter(), dtype).unwrap();
            assert!(found[..2] == [1.5, 0.0] && found[2].is_nan(), "{found:?}");
            assert!(sum([&a[..], &b[4..]].into_iter(), dtype).is_err(), "fewer values");
            let back = super::tensor(&a, &parts[0]).unwrap();
            assert_eq!(bytes(&back, dtype).unwrap(), a);
            assert!(super::tensor(&a[1..], &parts[0]).is_err());
        }
        assert!(sum([].into_iter(), DType::F32).is_err());
    }
}
