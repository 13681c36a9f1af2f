//! Products with the weights between the rows of a chunk, which are zero above the diagonal: half of the work of a full product, and
//! nothing is packed, which counts for sequences of a few rows.

use super::super::plan::CHUNK;
use super::operand::Operand;
use crate::ops::cpu::{self, Fma, Real};
use std::ops::Range;

/// `out [q, columns] += weights [q, q] m [q, columns]`; the weights' rows begin [`CHUNK`] elements apart, the output's `stride`, and
/// both operands are in full rows except that the weights may be transposed.
///
/// # Panics
/// Panics if the matrices do not have those sizes.
pub(super) fn add_triangle<T: Real>(
    (q, columns): (usize, usize),
    weights: Operand<T>,
    m: Operand<T>,
    (out, stride): (&mut [T], usize),
) {
    cpu::simd(
        #[inline(always)]
        |fma| match weights.is_transposed() {
            true => add_tiles::<T, true>((q, columns), weights.values, m, (out, stride), fma),
            false => add_tiles::<T, false>((q, columns), weights.values, m, (out, stride), fma),
        },
    );
}

/// Tiles of 4 rows, and single rows at the end.
#[inline(always)]
fn add_tiles<T: Real, const TRANSPOSED: bool>(
    (q, columns): (usize, usize),
    weights: &[T],
    m: Operand<T>,
    (out, stride): (&mut [T], usize),
    fma: Fma,
) {
    let full = q - q % 4;
    for row in (0..full).step_by(4) {
        let out = &mut out[row * stride..];
        Tiles::<T, 4, TRANSPOSED> { weights, m, row, q, fma }.add(columns, out, stride);
    }
    for row in full..q {
        let out = &mut out[row * stride..];
        Tiles::<T, 1, TRANSPOSED> { weights, m, row, q, fma }.add(columns, out, stride);
    }
}

/// Rows of the output from `row` on.
struct Tiles<'a, T, const ROWS: usize, const TRANSPOSED: bool> {
    weights: &'a [T],
    m: Operand<'a, T>,
    row: usize,
    q: usize,
    fma: Fma,
}

impl<T: Real, const ROWS: usize, const TRANSPOSED: bool> Tiles<'_, T, ROWS, TRANSPOSED> {
    #[inline(always)]
    fn add(&self, columns: usize, out: &mut [T], stride: usize) {
        let mut column = 0;
        while column < columns {
            let out = &mut out[column..];
            column += match columns - column {
                32.. => self.add_tile::<32>(column, out, stride),
                8.. => self.add_tile::<8>(column, out, stride),
                _ => self.add_tile::<1>(column, out, stride),
            };
        }
    }

    /// The rows of `m` whose weights are not zero.
    #[inline(always)]
    fn summed(&self) -> Range<usize> {
        if TRANSPOSED { self.row..self.q } else { 0..self.row + ROWS }
    }

    /// Adds to `COLUMNS` columns, and returns their number. The sums stay in registers.
    #[inline(always)]
    fn add_tile<const COLUMNS: usize>(&self, column: usize, out: &mut [T], stride: usize) -> usize {
        let mut sums = [[T::zero(); COLUMNS]; ROWS];
        for k in self.summed() {
            let row: &[T; COLUMNS] = first(&self.m.values[k * self.m.stride + column..]);
            let weights: [T; ROWS] = if TRANSPOSED {
                *first(&self.weights[k * CHUNK + self.row..])
            } else {
                std::array::from_fn(|i| self.weights[(self.row + i) * CHUNK + k])
            };
            for (sums, weight) in sums.iter_mut().zip(weights) {
                sums.iter_mut().zip(row).for_each(|(sum, &x)| *sum = self.fma.mul_add(weight, x, *sum));
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            out[i * stride..][..COLUMNS].iter_mut().zip(sums).for_each(|(y, &sum)| *y += sum);
        }
        COLUMNS
    }
}

/// The first `N` elements.
#[inline(always)]
fn first<T, const N: usize>(values: &[T]) -> &[T; N] {
    match values.first_chunk() {
        Some(chunk) => chunk,
        None => unreachable!("a matrix of fewer elements than its sizes need"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn add_triangle_sums_the_lower_triangle() {
        let (stride, out_stride) = (110, 107);
        let value = |i: usize| ((i * 37 % 64) as f64) - 31.0;
        for q in [1, 3, 4, 5, 17, 64] {
            for columns in [1, 5, 8, 32, 45, 100] {
                let mut weights = vec![0.0; q * CHUNK];
                for (i, row) in weights.chunks_exact_mut(CHUNK).enumerate() {
                    (0..=i).for_each(|j| row[j] = value(i * 64 + j));
                }
                let m: Vec<f64> = (0..q * stride).map(value).collect();
                for transposed in [false, true] {
                    let mut out: Vec<f64> = (0..q * out_stride).map(value).collect();
                    let mut expected = out.clone();
                    for i in 0..q {
                        for j in 0..q {
                            let weight = weights[if transposed { j * CHUNK + i } else { i * CHUNK + j }];
                            (0..columns)
                                .for_each(|c| expected[i * out_stride + c] += weight * m[j * stride + c]);
                        }
                    }
                    let operand = Operand::new(&weights, CHUNK);
                    let operand = if transposed { operand.transposed() } else { operand };
                    add_triangle((q, columns), operand, Operand::new(&m, stride), (&mut out, out_stride));
                    assert!(out == expected, "{q} rows, {columns} columns, transposed: {transposed}");
                }
            }
        }
    }
}
