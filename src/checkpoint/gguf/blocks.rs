//! Dequantises the blocks of GGUF's types, straight from the file's bytes.
//!
//! Layouts are those of ggml's `ggml-common.h`, values those of its `ggml-quants.c`
//! (<https://github.com/ggml-org/ggml/tree/master/src>). A block of 32 values has a scale, and some types a least value.
//! A block of 256 also has scales of its groups of 16 or 32 values, of a few bits each.

use candle_core::quantized::GgmlDType;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::ops::cpu::{self, StorageFloat};

/// Dequantises whole blocks of `dtype`.
///
/// # Panics
/// Panics if `out` has another number of values than `bytes`.
pub(super) fn dequantise(dtype: GgmlDType, bytes: &[u8], out: &mut [f32]) {
    let values = bytes.len() / dtype.type_size() * dtype.block_size();
    assert_eq!(out.len(), values, "values of {} bytes of {dtype:?}", bytes.len());
    cpu::simd(
        #[inline(always)]
        |_| match dtype {
            GgmlDType::F32 => of_blocks(bytes, out, f32_value),
            GgmlDType::F16 => f16_values(bytes, out),
            GgmlDType::BF16 => of_blocks(bytes, out, bf16_value),
            GgmlDType::Q4_0 => of_blocks(bytes, out, q4_0),
            GgmlDType::Q4_1 => of_blocks(bytes, out, q4_1),
            GgmlDType::Q5_0 => of_blocks(bytes, out, q5_0),
            GgmlDType::Q5_1 => of_blocks(bytes, out, q5_1),
            GgmlDType::Q8_0 => of_blocks(bytes, out, q8_0),
            GgmlDType::Q8_1 => of_blocks(bytes, out, q8_1),
            GgmlDType::Q2K => of_blocks(bytes, out, q2_k),
            GgmlDType::Q3K => of_blocks(bytes, out, q3_k),
            GgmlDType::Q4K => of_blocks(bytes, out, q4_k),
            GgmlDType::Q5K => of_blocks(bytes, out, q5_k),
            GgmlDType::Q6K => of_blocks(bytes, out, q6_k),
            GgmlDType::Q8K => of_blocks(bytes, out, q8_k),
        },
    );
}

#[inline(always)]
fn of_blocks<const BYTES: usize, const VALUES: usize>(
    bytes: &[u8],
    out: &mut [f32],
    block: impl Fn(&[u8; BYTES], &mut [f32; VALUES]),
) {
    bytes.as_chunks().0.iter().zip(out.as_chunks_mut().0).for_each(|(bytes, values)| block(bytes, values));
}

/// The `N` bytes from byte `at` on.
#[inline(always)]
fn bytes<const N: usize>(block: &[u8], at: usize) -> &[u8; N] {
    block[at..].first_chunk().expect("a part of the block")
}

/// The f16 value at byte `at`.
#[inline(always)]
fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes(*bytes(block, at)).to_f32()
}

#[inline(always)]
fn f32_value(block: &[u8; 4], y: &mut [f32; 1]) {
    y[0] = f32::from_le_bytes(*block);
}

#[inline(always)]
fn bf16_value(block: &[u8; 2], y: &mut [f32; 1]) {
    y[0] = bf16::from_le_bytes(*block).load();
}

/// f16 values, some at a time: `half` looks at each call for what the CPU has.
fn f16_values(bytes: &[u8], out: &mut [f32]) {
    const TOGETHER: usize = 64;
    for (bytes, out) in bytes.chunks(2 * TOGETHER).zip(out.chunks_mut(TOGETHER)) {
        let mut halves = [f16::ZERO; TOGETHER];
        halves
            .iter_mut()
            .zip(bytes.as_chunks().0)
            .for_each(|(half, bytes)| *half = f16::from_le_bytes(*bytes));
        halves[..out.len()].convert_to_f32_slice(out);
    }
}

/// Integers of four bits: those in the low halves of 16 bytes, then those in the high halves.
#[inline(always)]
fn nibbles(packed: &[u8; 16], y: &mut [f32; 32], value: impl Fn(usize, u8) -> f32) {
    let (low, high) = y.split_at_mut(16);
    low.iter_mut().zip(packed).enumerate().for_each(|(i, (y, q))| *y = value(i, q & 15));
    high.iter_mut().zip(packed).enumerate().for_each(|(i, (y, q))| *y = value(16 + i, q >> 4));
}

/// `q` with bit `i` of `high` as its fifth bit.
#[inline(always)]
fn fifth_bit(high: u32, i: usize, q: u8) -> f32 {
    f32::from(q | ((high >> i & 1) as u8) << 4)
}

#[inline(always)]
fn q4_0(block: &[u8; 18], y: &mut [f32; 32]) {
    let d = half(block, 0);
    nibbles(bytes(block, 2), y, |_, q| (f32::from(q) - 8.0) * d);
}

#[inline(always)]
fn q4_1(block: &[u8; 20], y: &mut [f32; 32]) {
    let (d, m) = (half(block, 0), half(block, 2));
    nibbles(bytes(block, 4), y, |_, q| f32::from(q) * d + m);
}

#[inline(always)]
fn q5_0(block: &[u8; 22], y: &mut [f32; 32]) {
    let (d, high) = (half(block, 0), u32::from_le_bytes(*bytes(block, 2)));
    nibbles(bytes(block, 6), y, |i, q| (fifth_bit(high, i, q) - 16.0) * d);
}

#[inline(always)]
fn q5_1(block: &[u8; 24], y: &mut [f32; 32]) {
    let (d, m, high) = (half(block, 0), half(block, 2), u32::from_le_bytes(*bytes(block, 4)));
    nibbles(bytes(block, 8), y, |i, q| fifth_bit(high, i, q) * d + m);
}

/// Integers of eight bits with one scale.
#[inline(always)]
fn scaled<const VALUES: usize>(integers: &[u8; VALUES], y: &mut [f32; VALUES], d: f32) {
    y.iter_mut().zip(integers).for_each(|(y, q)| *y = f32::from(q.cast_signed()) * d);
}

#[inline(always)]
fn q8_0(block: &[u8; 34], y: &mut [f32; 32]) {
    scaled(bytes(block, 2), y, half(block, 0));
}

/// Bytes 2 and 3 are the sum of the block, for products.
#[inline(always)]
fn q8_1(block: &[u8; 36], y: &mut [f32; 32]) {
    scaled(bytes(block, 4), y, half(block, 0));
}

/// The last 32 bytes are sums of groups, for products.
#[inline(always)]
fn q8_k(block: &[u8; 292], y: &mut [f32; 256]) {
    scaled(bytes(block, 4), y, f32::from_le_bytes(*bytes(block, 0)));
}

/// The groups of a block, with their numbers.
#[inline(always)]
fn groups<const VALUES: usize>(y: &mut [f32; 256]) -> impl Iterator<Item = (usize, &mut [f32; VALUES])> {
    y.as_chunks_mut().0.iter_mut().enumerate()
}

/// The bytes that hold two bits of each value of group `group` of 16, and by how much to shift them: the first 32 bytes are of the
/// first eight groups, two groups for each pair of bits.
#[inline(always)]
fn two_bits(packed: &[u8; 64], group: usize) -> (&[u8; 16], usize) {
    (bytes(packed, group / 8 * 32 + group % 2 * 16), group % 8 / 2 * 2)
}

#[inline(always)]
fn q2_k(block: &[u8; 84], y: &mut [f32; 256]) {
    let (scales, d, m) = (bytes::<16>(block, 0), half(block, 80), half(block, 82));
    for (group, y) in groups::<16>(y) {
        let (d, m) = (d * f32::from(scales[group] & 15), m * f32::from(scales[group] >> 4));
        let (packed, shift) = two_bits(bytes(block, 16), group);
        y.iter_mut().zip(packed).for_each(|(y, q)| *y = d * f32::from(q >> shift & 3) - m);
    }
}

#[inline(always)]
fn q3_k(block: &[u8; 110], y: &mut [f32; 256]) {
    let (scales, d) = (bytes::<12>(block, 96), half(block, 108));
    for (group, y) in groups::<16>(y) {
        let (low, high) =
            (scales[group % 8] >> (group / 8 * 4) & 15, scales[8 + group % 4] >> (group / 4 * 2) & 3);
        let d = d * (f32::from(low | high << 4) - 32.0);
        let (packed, shift) = two_bits(bytes(block, 32), group);
        let third = bytes::<16>(block, group % 2 * 16);
        for ((y, q), third) in y.iter_mut().zip(packed).zip(third) {
            *y = d * (f32::from(q >> shift & 3 | (third >> (group / 2) & 1) << 2) - 4.0);
        }
    }
}

/// Scale and least value of a group of 32, of six bits each, in units of the block's.
#[inline(always)]
fn scale_and_least(packed: &[u8; 12], group: usize) -> (f32, f32) {
    let (scale, least) = match group {
        0..4 => (packed[group] & 63, packed[group + 4] & 63),
        _ => (
            packed[group + 4] & 15 | (packed[group - 4] >> 6) << 4,
            packed[group + 4] >> 4 | (packed[group] >> 6) << 4,
        ),
    };
    (f32::from(scale), f32::from(least))
}

#[inline(always)]
fn q4_k(block: &[u8; 144], y: &mut [f32; 256]) {
    let (d, m, scales) = (half(block, 0), half(block, 2), bytes(block, 4));
    for (group, y) in groups::<32>(y) {
        let (scale, least) = scale_and_least(scales, group);
        let (d, m) = (d * scale, m * least);
        let packed = bytes::<32>(block, 16 + group / 2 * 32);
        y.iter_mut().zip(packed).for_each(|(y, q)| *y = d * f32::from(q >> (group % 2 * 4) & 15) - m);
    }
}

#[inline(always)]
fn q5_k(block: &[u8; 176], y: &mut [f32; 256]) {
    let (d, m, scales, fifth) = (half(block, 0), half(block, 2), bytes(block, 4), bytes::<32>(block, 16));
    for (group, y) in groups::<32>(y) {
        let (scale, least) = scale_and_least(scales, group);
        let (d, m) = (d * scale, m * least);
        let packed = bytes::<32>(block, 48 + group / 2 * 32);
        for ((y, q), fifth) in y.iter_mut().zip(packed).zip(fifth) {
            *y = d * f32::from(q >> (group % 2 * 4) & 15 | (fifth >> group & 1) << 4) - m;
        }
    }
}

#[inline(always)]
fn q6_k(block: &[u8; 210], y: &mut [f32; 256]) {
    let (scales, d) = (bytes::<16>(block, 192), half(block, 208));
    for (group, y) in groups::<16>(y) {
        let d = d * f32::from(scales[group].cast_signed());
        let low = bytes::<16>(block, group / 8 * 64 + group % 4 * 16);
        let (high, shift) = two_bits(bytes(block, 128), group);
        for ((y, low), high) in y.iter_mut().zip(low).zip(high) {
            *y = d * (f32::from(low >> (group % 8 / 4 * 4) & 15 | (high >> shift & 3) << 4) - 32.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use candle_core::quantized::{QStorage, QTensor};
    use rand::{Rng, SeedableRng};
    use std::borrow::Cow;

    const TYPES: [(GgmlDType, &[usize]); 15] = [
        (GgmlDType::F32, &[2]),
        (GgmlDType::F16, &[0]),
        (GgmlDType::BF16, &[0]),
        (GgmlDType::Q4_0, &[0]),
        (GgmlDType::Q4_1, &[0, 2]),
        (GgmlDType::Q5_0, &[0]),
        (GgmlDType::Q5_1, &[0, 2]),
        (GgmlDType::Q8_0, &[0]),
        (GgmlDType::Q8_1, &[0]),
        (GgmlDType::Q2K, &[80, 82]),
        (GgmlDType::Q3K, &[108]),
        (GgmlDType::Q4K, &[0, 2]),
        (GgmlDType::Q5K, &[0, 2]),
        (GgmlDType::Q6K, &[208]),
        (GgmlDType::Q8K, &[2]),
    ];

    /// Random bytes, but for the high ones of the floats, which stay away from infinity.
    fn random_blocks(count: usize, size: usize, floats: &[usize]) -> Vec<u8> {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(7);
        let mut bytes: Vec<u8> = (0..count * size).map(|_| rng.random()).collect();
        for (block, at) in (0..count).flat_map(|block| floats.iter().map(move |at| (block, at))) {
            bytes[block * size + at + 1] = rng.random_range(0x20..0x70) | rng.random::<u8>() & 0x80;
        }
        bytes
    }

    /// candle is the second implementation; tests/checkpoint has ggml's own.
    #[test]
    fn the_values_are_those_of_candle() {
        for (dtype, floats) in TYPES {
            // Not a multiple of what is converted together.
            let blocks = random_blocks(75, dtype.type_size(), floats);
            let mut found = vec![0.0; 75 * dtype.block_size()];
            dequantise(dtype, &blocks, &mut found);
            let candle = QStorage::from_data(Cow::Borrowed(&blocks), &Device::Cpu, dtype).unwrap();
            let candle = QTensor::new(candle, found.len()).unwrap().dequantize(&Device::Cpu).unwrap();
            let expected: Vec<f32> = candle.to_vec1().unwrap();
            assert!(expected.iter().all(|x| x.is_finite()) && expected.iter().any(|x| *x != expected[0]));
            let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&found), bits(&expected), "{dtype:?}");
        }
    }
}
