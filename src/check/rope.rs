//! The cases of rope.

use super::Checks;
use crate::Result;
use crate::ops::backend::{Route, route};
use crate::ops::rope::{self, CacheRows, Rope};
use crate::ops::{AttentionShape, Indices, RopeTable};
use candle_core::{DType, Device, Tensor};

/// Rotations of rows, then into the cache.
pub(super) fn check(checks: &mut Checks) -> Result<()> {
    let angles = Rope::new(1e4);
    for (t, heads, others, d) in [(1, 2, 1, 2), (5, 3, 2, 10), (123, 2, 1, 64), (9, 5, 1, 128)] {
        checks.case(format!("{t} rows, {heads} of {} heads of {d}", heads + others));
        let x = checks.random((t, (heads + others) * d), 1.0)?;
        let positions = Indices::from((0..t).map(|i| (i * 37 % 200) as u32).collect::<Vec<_>>());
        let table = |dtype, device: &Device| RopeTable::new(&angles, d, 200, dtype, device);
        let exact_table = table(DType::F64, &Device::Cpu)?;
        let naive_table = table(DType::F32, &Device::Cpu)?;
        let device_table = table(DType::F32, checks.target.device)?;
        for (what, sign) in [("y", 1.0), ("dx", -1.0)] {
            let turn = |table: &RopeTable, x: &Tensor| match sign > 0.0 {
                true => table.forward(x.copy()?, heads, (&positions).into(), x.dtype()),
                false => table.backward(x.copy()?, heads, (&positions).into(), x.dtype()),
            };
            let ours = checks.run(|| turn(&device_table, &x.device))?;
            let naive = naive_table.reference(&x.cpu, heads, (&positions).into(), sign)?;
            checks.value(what, &ours, &turn(&exact_table, &x.exact)?, &naive)?;
        }
        for heads in [heads - others, 0] {
            let shape = AttentionShape { heads, kv_heads: others, head_dim: d, scale: 1.0 };
            rope_to_cache(checks, &shape, &positions, [&exact_table, &naive_table, &device_table])?;
        }
    }
    Ok(())
}

/// Rotation into the cache, which is a kernel of its own; the CPU rotates and copies. `tables` are those in f64, of the plain
/// computation, and of the device.
fn rope_to_cache(
    checks: &mut Checks,
    shape: &AttentionShape,
    positions: &Indices,
    tables: [&RopeTable; 3],
) -> Result<()> {
    let t = positions.len();
    let x = checks.random((t, shape.q_width() + shape.kv_width()), 1.0)?;
    if checks.run(|| Ok(route(&x.device)))? == Route::Cpu {
        return Ok(());
    }
    for tables in [tables.map(Some), [None; 3]] {
        let [exact, naive, device] = tables;
        let cache = checks.random((t + 5, shape.kv_width()), 1.0)?;
        let rows = Indices::from((0..t).map(|i| (i * 2 % t + 3) as u32).collect::<Vec<_>>());
        let of = (shape, positions, &rows);
        let (exact, exact_cache) = cached(exact, &x.exact, &cache.exact, of)?;
        let (naive, naive_cache) = cached(naive, &x.cpu, &cache.cpu, of)?;
        let ours = checks.run(|| {
            let to = CacheRows { cache: &cache.device, rows: (&rows).into() };
            rope::forward_to_cache(device, &x.device, shape, positions.into(), to)
        })?;
        if shape.heads > 0 {
            checks.value("queries", &ours, &exact, &naive)?;
        }
        checks.value("cache", &cache.device, &exact_cache, &naive_cache)?;
    }
    Ok(())
}

/// By plain candle ops: rotated queries of `x`, and `cache` with the rotated keys and the values of these rows.
fn cached(
    table: Option<&RopeTable>,
    x: &Tensor,
    cache: &Tensor,
    (shape, positions, rows): (&AttentionShape, &Indices, &Indices),
) -> Result<(Tensor, Tensor)> {
    let turned = shape.heads + shape.kv_heads;
    let x = table.map_or_else(|| Ok(x.clone()), |table| table.reference(x, turned, positions.into(), 1.0))?;
    let (q, kv) = (shape.q_width(), shape.kv_width());
    let cache = cache.copy()?;
    for (i, row) in rows.iter().enumerate() {
        cache.slice_set(&x.narrow(0, i, 1)?.narrow(1, q, kv)?.contiguous()?, 0, *row as usize)?;
    }
    Ok((x.narrow(1, 0, q)?, cache))
}
