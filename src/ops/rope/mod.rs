//! Rotary position embedding on the leading heads of each row (Su et al., 2021, arXiv:2104.09864), in the
//! half-split layout of transformers (`modeling_granite.py`, `apply_rotary_pos_emb`):
//!
//! ```text
//! y[i]       = x[i] cos - x[i + D/2] sin        i < D/2, angle = position * theta^(-2i/D)
//! y[i + D/2] = x[i + D/2] cos + x[i] sin
//! ```
//!
//! The backward pass is the same rotation by the negative angle. How a checkpoint scales the angles, and by what it
//! multiplies cos and sin, is in the table ([`crate::ops::rope::scaling`]); a row's position is the row of the table that it
//! takes:
//!
//! ```text
//! row     0 ........ n-1   n ...............
//!         ┌─────────────┐┌──────────────────    n = Rope::long_above: positions of sequences of at most n positions,
//! angles  0 ........ n-1   0 ...............    then those of longer sequences, which turn by other frequencies;
//!                                               a model without such has the first part alone, without an end
//! ```

pub mod scaling;

pub use scaling::{Llama3Scaling, LongRopeScaling, Rope, RopeScaling, YarnScaling};

use super::cpu::{self, Real, Stored, View, with_stored};
use super::gpu::{self, Kernel, Route};
use super::profile;
use super::{AttentionShape, IndexView};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use half::bf16;

gpu::parameters!(RopeParameters {
    rows: u32,
    width: u32,
    heads: u32,
    head_dim: u32,
    sign: f32,
    aligned: u32,
});

gpu::parameters!(RopeCacheParameters {
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    rotates: u32,
    aligned: u32,
});

/// Rows of a cache of keys and values.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CacheRows<'a> {
    /// [capacity, 2K D].
    pub(crate) cache: &'a Tensor,
    /// One for each row of a batch, none twice.
    pub(crate) rows: IndexView<'a>,
}

/// Cosines and sines [rows, D/2] of every position that a pass may meet, drawn above.
#[derive(Debug, Clone)]
pub struct RopeTable {
    cos: Tensor,
    sin: Tensor,
    head_dim: usize,
}

impl RopeTable {
    /// The table of `positions` rows for heads of size `head_dim`; angles are made in f64. Kernels read
    /// it in f32 whatever the activations are.
    ///
    /// # Errors
    /// The device's.
    pub fn new(
        rope: &Rope,
        head_dim: usize,
        positions: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let half = head_dim / 2;
        let end = rope.long_above().unwrap_or(positions).min(positions);
        let (short, long) = (rope.frequencies(head_dim, false), rope.frequencies(head_dim, true));
        let rows = (0..end).map(|p| (p, &short)).chain((0..positions - end).map(|p| (p, &long)));
        let angles: Vec<f64> = rows.flat_map(|(p, all)| all.iter().map(move |f| p as f64 * f)).collect();
        let factor = rope.attention_factor();
        let table = |f: fn(f64) -> f64| -> Result<Tensor> {
            let values: Vec<f64> = angles.iter().map(|angle| f(*angle) * factor).collect();
            gpu::to_device(
                &Tensor::from_vec(values, (positions, half), &Device::Cpu)?.to_dtype(dtype)?,
                device,
            )
        };
        Ok(Self { cos: table(f64::cos)?, sin: table(f64::sin)?, head_dim })
    }

    /// Size of the heads.
    pub(crate) fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Cosines and sines.
    pub(crate) fn tables(&self) -> (&Tensor, &Tensor) {
        (&self.cos, &self.sin)
    }

    /// Rows that the table has.
    pub fn positions(&self) -> usize {
        self.cos.dims()[0]
    }

    /// Rotates the first `heads` heads of each row of `x` [T, at least heads * D] by its position, in dtype `out`: that of
    /// `x`, or on the CPU bf16 of f32. The CPU computes in f32 where `x` is bf16; a GPU's kernel changes `x` in place.
    ///
    /// # Errors
    /// A position beyond the table, or fewer columns than heads; another `out`.
    pub fn forward(&self, x: Tensor, heads: usize, position_ids: IndexView, out: DType) -> Result<Tensor> {
        self.rotate(x, heads, position_ids, 1.0, out)
    }

    /// Gradient of [`RopeTable::forward`]'s input from that of its output; dtypes as there.
    ///
    /// # Errors
    /// As [`RopeTable::forward`].
    pub fn backward(&self, dy: Tensor, heads: usize, position_ids: IndexView, out: DType) -> Result<Tensor> {
        self.rotate(dy, heads, position_ids, -1.0, out)
    }

    fn rotate(&self, x: Tensor, heads: usize, positions: IndexView, sign: f64, out: DType) -> Result<Tensor> {
        let _timed = profile::scope("rope", x.device());
        let (t, width) = x.dims2()?;
        let position_ids = positions.host();
        let last = position_ids.iter().max().map_or(0, |p| *p as usize + 1);
        if t != position_ids.len() || width < heads * self.head_dim || last > self.positions() {
            return Err(Error::Shape {
                op: "rope",
                expected: format!(
                    "{} rows of at least {} columns, positions under {}",
                    position_ids.len(),
                    heads * self.head_dim,
                    self.positions()
                ),
                found: format!("[{t}, {width}], positions under {last}"),
            });
        }
        if gpu::route(&x) != Route::Cpu {
            cpu::same_dtype("rope", &x, out)?;
        }
        match gpu::route(&x) {
            Route::Cpu if (x.dtype(), out) == (DType::BF16, DType::BF16) => {
                self.rotate_cpu::<f32, bf16, bf16>(&x, heads, position_ids, sign as f32)
            }
            Route::Cpu => with_stored!("rope", x.dtype(), out, T, O => {
                self.rotate_cpu::<T, T, O>(&x, heads, position_ids, T::of(sign))
            }),
            Route::Kernel => self.rotate_kernel(&x, heads, positions, sign).map(|()| x),
            Route::Reference => self.reference(&x, heads, positions, sign),
        }
    }

    fn rotate_kernel(&self, x: &Tensor, heads: usize, positions: IndexView, sign: f64) -> Result<()> {
        let (rows, width) = x.dims2()?;
        let half = self.head_dim / 2;
        let parameters = RopeParameters {
            rows: gpu::uint(rows),
            width: gpu::uint(width),
            heads: gpu::uint(heads),
            head_dim: gpu::uint(self.head_dim),
            sign: sign as f32,
            aligned: gpu::aligned(&[width, half], &[x]),
        };
        let kernel = Kernel::new("rope", "rope", rows, row_threads(heads, half));
        let positions = positions.on(x.device())?;
        gpu::launch(&kernel, x.dtype(), &[x, &self.cos, &self.sin, &positions], &parameters)
    }

    fn rotate_cpu<T: Real, I: Stored<T>, O: Stored<T>>(
        &self,
        x: &Tensor,
        heads: usize,
        position_ids: &[u32],
        sign: T,
    ) -> Result<Tensor> {
        let ((t, width), d, half) = (x.dims2()?, self.head_dim, self.head_dim / 2);
        let (cos, sin) = (View::<T>::new("rope", &self.cos)?, View::<T>::new("rope", &self.sin)?);
        let x = View::<I>::new("rope", x)?;
        let (x, cos, sin): (&[I], &[T], &[T]) = (&x, &cos, &sin);
        let out = cpu::overwrite::<O>(t * width, |out| {
            cpu::par_rows(
                out,
                width,
                #[inline(always)]
                |first, rows, _| {
                    let x = x[first * width..].chunks_exact(width);
                    for ((row, x), &p) in rows.chunks_exact_mut(width).zip(x).zip(&position_ids[first..]) {
                        let at = p as usize * half..(p as usize + 1) * half;
                        let (cos, sin) = (&cos[at.clone()], &sin[at]);
                        let ((row, rest), (x, past)) = (row.split_at_mut(heads * d), x.split_at(heads * d));
                        for (head, x) in row.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
                            let ((low, high), (a, b)) = (head.split_at_mut(half), x.split_at(half));
                            turn(low, (a, b), (cos, sin), -sign);
                            turn(high, (b, a), (cos, sin), sign);
                        }
                        rest.iter_mut().zip(past).for_each(|(y, &x)| *y = O::stored(x.loaded()));
                    }
                },
            );
        });
        cpu::tensor(out, (t, width))
    }

    /// The formula in plain candle ops; `sign` is 1, or -1 for the backward rotation.
    pub fn reference(&self, x: &Tensor, heads: usize, position_ids: IndexView, sign: f64) -> Result<Tensor> {
        let (t, width) = x.dims2()?;
        let (d, half) = (self.head_dim, self.head_dim / 2);
        let positions = position_ids.on(x.device())?;
        let pick = |table: &Tensor| table.index_select(&positions, 0)?.to_dtype(x.dtype())?.unsqueeze(1);
        let (cos, sin) = (pick(&self.cos)?, (pick(&self.sin)? * sign)?);
        let turned = x.narrow(1, 0, heads * d)?.reshape((t, heads, d))?;
        let (a, b) = (turned.narrow(2, 0, half)?, turned.narrow(2, half, half)?);
        let low = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let high = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        let turned = Tensor::cat(&[low, high], 2)?.reshape((t, heads * d))?;
        Ok(Tensor::cat(&[&turned, &x.narrow(1, heads * d, width - heads * d)?], 1)?)
    }
}

/// On a GPU, in one launch: of `qkv` [T, (H + 2K) D] the queries, rotated, as a matrix [T, H D] of their own; its keys,
/// rotated, and values are written to `to`. Without a `table` nothing is rotated. A `shape` without query heads is that of
/// keys and values alone.
///
/// # Errors
/// Shapes, positions or rows that do not fit; the device's.
pub(crate) fn forward_to_cache(
    table: Option<&RopeTable>,
    qkv: &Tensor,
    shape: &AttentionShape,
    positions: IndexView,
    to: CacheRows,
) -> Result<Tensor> {
    const OP: &str = "rope to cache";
    let _timed = profile::scope("rope", qkv.device());
    let ((t, width), (capacity, cache_width)) = (qkv.dims2()?, to.cache.dims2()?);
    let beyond = |rows: IndexView, limit: usize| rows.host().iter().any(|row| *row as usize >= limit);
    let expected = (shape.q_width() + shape.kv_width(), shape.kv_width());
    let rows = (positions.host().len(), to.rows.host().len());
    if (width, cache_width) != expected
        || rows != (t, t)
        || beyond(to.rows, capacity)
        || table.is_some_and(|table| beyond(positions, table.positions()) || table.head_dim != shape.head_dim)
    {
        let expected =
            format!("{rows:?} rows of {expected:?} columns, in a cache of {capacity} rows and in the table");
        return Err(Error::Shape { op: OP, expected, found: format!("{:?} and {:?}", qkv.dims(), to) });
    }
    super::cpu::same_dtype(OP, qkv, to.cache.dtype())?;
    let queries = gpu::empty((t, shape.q_width()), qkv.dtype(), qkv)?;
    let half = shape.head_dim / 2;
    let parameters = RopeCacheParameters {
        heads: gpu::uint(shape.heads),
        kv_heads: gpu::uint(shape.kv_heads),
        head_dim: gpu::uint(shape.head_dim),
        rotates: u32::from(table.is_some()),
        aligned: gpu::aligned(&[half], &[qkv, to.cache]),
    };
    let all = shape.heads + 2 * shape.kv_heads;
    let kernel = Kernel::new("rope", "rope_cache", t, row_threads(all, half));
    let (positions, rows) = (positions.on(qkv.device())?, to.rows.on(qkv.device())?);
    // A table that is not read may be any buffer, and so may queries that are not there.
    let (cos, sin) = table.map_or((&rows, &rows), |table| (&table.cos, &table.sin));
    let written = if shape.heads == 0 { to.cache } else { &queries };
    let buffers = [qkv, cos, sin, &positions, &rows, written, to.cache];
    gpu::launch(&kernel, qkv.dtype(), &buffers, &parameters)?;
    Ok(queries)
}

/// Threads that turn `heads` heads of a row, up to 8 pairs each at a time.
fn row_threads(heads: usize, half: usize) -> usize {
    gpu::balanced_threads(heads * half.div_ceil(8))
}

/// `x cos + sign y sin`: one coordinate of pairs (x, y) that are turned. Each output has a loop of its own, as with more
/// addresses to tell apart it does not vectorise.
#[inline(always)]
fn turn<T: Real, I: Stored<T>, O: Stored<T>>(
    to: &mut [O],
    (x, y): (&[I], &[I]),
    (cos, sin): (&[T], &[T]),
    sign: T,
) {
    for (z, ((&x, &y), (&c, &s))) in to.iter_mut().zip(x.iter().zip(y).zip(cos.iter().zip(sin))) {
        *z = O::stored(x.loaded() * c + sign * s * y.loaded());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{Indices, autograd, testing::*};

    #[test]
    fn forward_and_backward_agree_with_the_reference() -> Result<()> {
        let llama3 = Llama3Scaling {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 16,
        };
        for (t, heads, d, extra) in [(1, 1, 2, 0), (5, 3, 10, 7), (123, 4, 64, 64)] {
            for (dtype, scaling) in
                [(DType::F32, RopeScaling::Default), (DType::F64, RopeScaling::Llama3(llama3))]
            {
                let table = RopeTable::new(&Rope { theta: 1e4, scaling }, d, 200, dtype, &Device::Cpu)?;
                let x = randn(1, (t, heads * d + extra), dtype)?;
                let positions = Indices::from((0..t as u32).map(|i| (i * 37) % 200).collect::<Vec<_>>());
                let positions = IndexView::from(&positions);
                let expected = table.reference(&x, heads, positions, 1.0)?;
                let dy = randn(2, x.dims2()?, dtype)?;
                let dx = autograd(&[&x], &dy, |v| table.reference(v[0].as_tensor(), heads, positions, 1.0))?
                    .remove(0);
                let y = table.forward(x.copy()?, heads, positions, dtype)?;
                assert_close("rope", &y, &expected, Tolerance::of(dtype));
                let ours = table.backward(dy.copy()?, heads, positions, dtype)?;
                assert_close("rope backward", &ours, &dx, Tolerance::of(dtype));
            }
        }
        Ok(())
    }

    #[test]
    fn an_output_in_bf16_is_the_other_rounded() -> Result<()> {
        let table = RopeTable::new(&Rope::new(1e4), 10, 60, DType::F32, &Device::Cpu)?;
        let positions = Indices::from((0..50).collect::<Vec<u32>>());
        let positions = IndexView::from(&positions);
        for turn in [RopeTable::forward, RopeTable::backward] {
            let x = randn(1, (50, 3 * 10 + 7), DType::F32)?;
            let x = x.to_dtype(DType::BF16)?;
            let wide = x.to_dtype(DType::F32)?;
            let values = |t: Tensor| t.to_dtype(DType::BF16)?.flatten_all()?.to_vec1::<bf16>();
            let expected = values(turn(&table, wide.copy()?, 3, positions, DType::F32)?)?;
            assert_eq!(values(turn(&table, wide, 3, positions, DType::BF16)?)?, expected);
            assert_eq!(values(turn(&table, x, 3, positions, DType::BF16)?)?, expected);
        }
        assert!(table.forward(randn(1, (50, 30), DType::F32)?, 3, positions, DType::F64).is_err());
        Ok(())
    }

    #[test]
    fn a_position_beyond_the_table_is_an_error() -> Result<()> {
        let rope = Rope::new(1e4);
        let table = RopeTable::new(&rope, 4, 8, DType::F32, &Device::Cpu)?;
        let error = table
            .forward(randn(1, (1, 4), DType::F32)?, 1, (&Indices::from(vec![8])).into(), DType::F32)
            .unwrap_err();
        assert!(error.to_string().contains("positions under 8, found [1, 4], positions under 9"), "{error}");
        Ok(())
    }
}
