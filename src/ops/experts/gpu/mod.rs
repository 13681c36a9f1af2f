//! Launches of `kernels/experts.cu` and `kernels/experts_mma.cu`.

mod products;

use super::routing::SortedPairs;
use super::{ExpertLinear, Routing};
use crate::ops::cpu::check_same_dtype;
use crate::ops::gpu::{self, Kernel};
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use products::{ExpertProduct, product};

gpu::parameters!(ExpertRouteParameters { rows: u32, experts: u32, per_token: u32 });
gpu::parameters!(ExpertSortParameters { pairs: u32, experts: u32, parts: u32, tile_rows: u32 });
gpu::parameters!(ExpertRowsParameters { width: u32, per_token: u32, aligned: u32 });

const FILE: &str = "experts";

/// Most experts of a model.
const MOST_EXPERTS: usize = 128;

/// Pairs that a block sorts.
const PART_PAIRS: usize = 512;

/// Rows that a block routes, each by a warp.
const ROUTED_ROWS: usize = 4;

/// Threads for a row, 8 elements each at a time.
fn row_threads(columns: usize) -> usize {
    columns.div_ceil(8).next_multiple_of(32).min(256)
}

pub(super) fn routing(logits: &Tensor, per_token: usize) -> Result<Routing> {
    let (rows, experts) = logits.dims2()?;
    if experts > MOST_EXPERTS {
        return Err(Error::Shape {
            op: "routing",
            expected: format!("at most {MOST_EXPERTS} experts on a GPU"),
            found: experts.to_string(),
        });
    }
    let weights = gpu::empty((rows, per_token), DType::F32, logits)?;
    let chosen = gpu::empty((rows, per_token), DType::U32, logits)?;
    let kernel = Kernel::new(FILE, "experts_route", rows.div_ceil(ROUTED_ROWS), 32 * ROUTED_ROWS);
    let dtype = logits.dtype();
    // SAFETY: the module has checked shapes and dtypes; the routing's kernels wrote its indices, which lie inside the matrices.
    unsafe {
        gpu::launch(&kernel, dtype, &[logits, &weights, &chosen], &route_parameters(rows, experts, per_token))
    }?;
    let sorted = sort_pairs(&chosen, experts, dtype)?;
    Ok(Routing { weights, chosen, sorted, experts, dtype })
}

fn route_parameters(rows: usize, experts: usize, per_token: usize) -> ExpertRouteParameters {
    ExpertRouteParameters {
        rows: gpu::uint(rows),
        experts: gpu::uint(experts),
        per_token: gpu::uint(per_token),
    }
}

/// By kernels compiled for `dtype`, which they do not use.
fn sort_pairs(chosen: &Tensor, experts: usize, dtype: DType) -> Result<SortedPairs> {
    let pairs = chosen.elem_count();
    let parts = pairs.div_ceil(PART_PAIRS);
    let list = |shape: usize| gpu::empty(shape, DType::U32, chosen);
    let (counts, order) = (list(parts * experts)?, list(pairs)?);
    let place = gpu::empty(chosen.dims2()?, DType::U32, chosen)?;
    let (offsets, tiles) = (list(experts + 1)?, list(experts + 1)?);
    let parameters = ExpertSortParameters {
        pairs: gpu::uint(pairs),
        experts: gpu::uint(experts),
        parts: gpu::uint(parts),
        tile_rows: gpu::uint(products::tile_rows(pairs, experts)),
    };
    let kernel = |name| Kernel::new(FILE, name, parts, MOST_EXPERTS);
    // SAFETY: the module has checked shapes and dtypes; the routing's kernels wrote its indices, which lie inside the matrices.
    unsafe { gpu::launch(&kernel("experts_count"), dtype, &[chosen, &counts], &parameters) }?;
    let buffers = [chosen, &counts, &order, &place, &offsets, &tiles];
    // SAFETY: the module has checked shapes and dtypes; the routing's kernels wrote its indices, which lie inside the matrices.
    unsafe { gpu::launch(&kernel("experts_place"), dtype, &buffers, &parameters) }?;
    Ok(SortedPairs { order, place, offsets, tiles: Some(tiles) })
}

pub(super) fn routing_backward(dweights: &Tensor, routing: &Routing) -> Result<Tensor> {
    let (rows, experts) = (routing.rows(), routing.experts);
    check_same_dtype("routing backward", dweights, DType::F32)?;
    let dlogits = gpu::empty((rows, experts), routing.dtype, dweights)?;
    let kernel = Kernel::new(FILE, "experts_route_backward", rows.div_ceil(ROUTED_ROWS), 32 * ROUTED_ROWS);
    let buffers = [&routing.weights, &routing.chosen, &routing.sorted.place, dweights, &dlogits];
    let parameters = route_parameters(rows, experts, routing.per_token());
    // SAFETY: the module has checked shapes and dtypes; the routing's kernels wrote its indices, which lie inside the matrices.
    unsafe { gpu::launch(&kernel, routing.dtype, &buffers, &parameters) }?;
    Ok(dlogits)
}

fn rows_parameters(width: usize, routing: &Routing, tensors: &[&Tensor]) -> ExpertRowsParameters {
    ExpertRowsParameters {
        width: gpu::uint(width),
        per_token: gpu::uint(routing.per_token()),
        aligned: gpu::aligned(&[width], tensors),
    }
}

pub(super) fn gather(x: &Tensor, routing: &Routing) -> Result<Tensor> {
    let (pairs, c) = (routing.pairs(), x.dims2()?.1);
    let y = gpu::empty((pairs, c), x.dtype(), x)?;
    let kernel = Kernel::new(FILE, "experts_gather", pairs, row_threads(c));
    let parameters = rows_parameters(c, routing, &[x]);
    // SAFETY: the module has checked shapes and dtypes; the routing's kernels wrote its indices, which lie inside the matrices.
    unsafe { gpu::launch(&kernel, x.dtype(), &[x, &routing.sorted.order, &y], &parameters) }?;
    Ok(y)
}

pub(super) fn combine(y: &Tensor, routing: &Routing) -> Result<Tensor> {
    let (rows, c) = (routing.rows(), y.dims2()?.1);
    let x = gpu::empty((rows, c), y.dtype(), y)?;
    let threads = gpu::balanced_threads(c.div_ceil(8));
    let mut kernel = Kernel::new(FILE, "experts_combine", rows, threads);
    kernel.grid[1] = c.div_ceil(8 * threads);
    let parameters = rows_parameters(c, routing, &[y]);
    // SAFETY: the module has checked shapes and dtypes; the routing's kernels wrote its indices, which lie inside the matrices.
    unsafe { gpu::launch(&kernel, y.dtype(), &[y, &routing.sorted.place, &x], &parameters) }?;
    Ok(x)
}

pub(super) fn activation_forward(h: &Tensor, routing: &Routing) -> Result<Tensor> {
    let (pairs, width) = h.dims2()?;
    let f = width / 2;
    let a = gpu::empty((pairs, f), h.dtype(), h)?;
    let threads = gpu::balanced_threads(f.div_ceil(8));
    let mut kernel = Kernel::new(FILE, "experts_activation_forward", pairs, threads);
    kernel.grid[1] = f.div_ceil(8 * threads);
    let parameters = rows_parameters(f, routing, &[h]);
    // SAFETY: the module has checked shapes and dtypes; the routing's kernels wrote its indices, which lie inside the matrices.
    unsafe {
        gpu::launch(&kernel, h.dtype(), &[h, &routing.weights, &routing.sorted.order, &a], &parameters)
    }?;
    Ok(a)
}

pub(super) fn activation_backward(da: &Tensor, h: &Tensor, routing: &Routing) -> Result<(Tensor, Tensor)> {
    check_same_dtype("experts activation backward", da, h.dtype())?;
    let (pairs, width) = h.dims2()?;
    let f = width / 2;
    let dh = gpu::empty((pairs, width), h.dtype(), h)?;
    let dweights = gpu::empty(pairs, DType::F32, h)?;
    let kernel = Kernel::new(FILE, "experts_activation_backward", pairs, row_threads(f));
    let buffers = [da, h, &routing.weights, &routing.sorted.order, &dh, &dweights];
    // SAFETY: the module has checked shapes and dtypes; the routing's kernels wrote its indices, which lie inside the matrices.
    unsafe { gpu::launch(&kernel, h.dtype(), &buffers, &rows_parameters(f, routing, &[da, h])) }?;
    Ok((dh, dweights))
}

pub(super) fn forward(layer: &ExpertLinear, x: &Tensor, routing: &Routing, out: DType) -> Result<Tensor> {
    const OP: &str = "experts";
    check_same_dtype(OP, x, out)?;
    let columns = layer.dims()?.0;
    product(layer, x, routing, &ExpertProduct { op: OP, kernels: &products::FORWARD, columns, scale: 1.0 })
}

pub(super) fn backward(layer: &ExpertLinear, dy: &Tensor, routing: &Routing, scale: f64) -> Result<Tensor> {
    let (op, columns) = ("experts backward", layer.dims()?.1);
    product(layer, dy, routing, &ExpertProduct { op, kernels: &products::BACKWARD, columns, scale })
}
