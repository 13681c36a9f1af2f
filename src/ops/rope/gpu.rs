//! Launches of `kernels/rope.cu`.

use super::{CacheRows, RopeTable};
use crate::ops::cpu::check_same_dtype;
use crate::ops::gpu::{self, Kernel};
use crate::ops::{AttentionShape, IndexView, profile};
use crate::{Error, Result};
use candle_core::{DType, Tensor};

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

/// Threads that rotate `heads` heads of a row, up to 8 pairs each at a time.
fn row_threads(heads: usize, half: usize) -> usize {
    gpu::balanced_threads(heads * half.div_ceil(8))
}

/// Rotates `x` in place.
pub(super) fn rotate(
    table: &RopeTable,
    x: Tensor,
    heads: usize,
    positions: IndexView,
    (sign, out): (f64, DType),
) -> Result<Tensor> {
    check_same_dtype("rope", &x, out)?;
    gpu::check_dtype("rope", &[&table.cos, &table.sin], DType::F32)?;
    let (rows, width) = x.dims2()?;
    let half = table.head_dim / 2;
    let parameters = RopeParameters {
        rows: gpu::uint(rows),
        width: gpu::uint(width),
        heads: gpu::uint(heads),
        head_dim: gpu::uint(table.head_dim),
        sign: sign as f32,
        aligned: gpu::aligned(&[width, half], &[&x]),
    };
    let kernel = Kernel::new("rope", "rope", rows, row_threads(heads, half));
    let positions = positions.to_device(x.device())?;
    // SAFETY: the module has checked the width and that the positions are in the table, which is f32.
    unsafe { gpu::launch(&kernel, x.dtype(), &[&x, &table.cos, &table.sin, &positions], &parameters) }?;
    Ok(x)
}

/// Rotates the queries and keys of `qkv` [T, (H + 2K) D] in one launch on a GPU: returns the queries as a matrix [T, H D], and
/// writes keys and values to `to`. Without a `table` nothing is rotated. A `shape` without query heads means that `qkv` has
/// keys and values only.
///
/// # Errors
/// Returns an error if shapes, positions or rows do not match, or a device operation fails.
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
    let is_beyond = |rows: IndexView, limit: usize| rows.host().iter().any(|row| *row as usize >= limit);
    let expected = (shape.q_width() + shape.kv_width(), shape.kv_width());
    let rows = (positions.host().len(), to.rows.host().len());
    if (width, cache_width) != expected
        || rows != (t, t)
        || is_beyond(to.rows, capacity)
        || table
            .is_some_and(|table| is_beyond(positions, table.positions()) || table.head_dim != shape.head_dim)
    {
        let expected =
            format!("{rows:?} rows of {expected:?} columns, in a cache of {capacity} rows and in the table");
        return Err(Error::shape(OP, expected, format!("{:?} and {:?}", qkv.dims(), to)));
    }
    check_same_dtype(OP, qkv, to.cache.dtype())?;
    if let Some(RopeTable { cos, sin, .. }) = table {
        gpu::check_dtype(OP, &[cos, sin], DType::F32)?;
    }
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
    let (positions, rows) = (positions.to_device(qkv.device())?, to.rows.to_device(qkv.device())?);
    // Any buffer can stand for a table that is not read, and for queries that do not exist.
    let (cos, sin) = table.map_or((&rows, &rows), |table| (&table.cos, &table.sin));
    let written = if shape.heads == 0 { to.cache } else { &queries };
    let buffers = [qkv, cos, sin, &positions, &rows, written, to.cache];
    // SAFETY: widths, rows, positions and dtypes were checked above.
    unsafe { gpu::launch(&kernel, qkv.dtype(), &buffers, &parameters) }?;
    Ok(queries)
}
